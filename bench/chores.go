package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// manyNamespaces is how many network namespaces the chores walk through.
const manyNamespaces = 2000

// choreChanges is how many changes are measured, in turns, with chores and without.
const choreChanges = 200

// chores measures whether a change waits for those who walk through every network
// namespace: the chores of the plane, one walk after the other.
func chores(ctx context.Context, b *board) error {
	const services, backends = 10_000, 10
	h, err := lab.NewHost()
	if err != nil {
		return err
	}
	defer h.Close()
	remove, err := makeNamespaces(h.Dir, manyNamespaces)
	defer remove()
	if err != nil {
		return err
	}
	lock, err := host.Lock(h.Pins)
	if err != nil {
		return err
	}
	defer lock.Close()
	p := socket.New(socket.Options{Pins: h.Pins, Version: "bench"})
	defer p.Close()
	all := largeServices(services, backends)
	// With a listener of UDP and a backend that is gone there is something to walk for.
	all[0].Listeners[0].Protocol = service.UDP
	snap := (&service.Snapshot{}).Next(all)
	change := func(n int) (time.Duration, error) {
		i := 1 + n%(services-1)
		s := *all[i]
		s.Backends = slices.Clone(s.Backends)
		s.Backends[0].Weight = uint32(1 + n%1000)
		next := slices.Clone(all)
		next[i] = &s
		snap = snap.Next(next)
		began := time.Now()
		err := p.Apply(ctx, socket.Want{Cgroup: h.Scope(), Services: snap})
		return time.Since(began), err
	}
	if _, err := change(0); err != nil {
		return err
	}
	alone, err := changes(change, 0, func() bool { return true })
	if err != nil {
		return err
	}
	walking, stop := context.WithCancel(ctx)
	var walks atomic.Int32
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		walkOn(walking, p, &walks)
	}()
	beside, err := changes(change, choreChanges, func() bool { return walks.Load() > 0 })
	stop()
	<-ended
	if err != nil {
		return err
	}
	b.add(row{What: fmt.Sprintf("one change of 10,000 services while every one of %d network namespaces is walked through, to one without", manyNamespaces),
		Value: float64(beside) / float64(alone), Limit: 1.2, Below: true,
		Detail: fmt.Sprintf("median %s and %s; %d walks meanwhile", beside.Round(time.Microsecond), alone.Round(time.Microsecond), walks.Load())})
	return nil
}

// changes returns the median time of changes: as many as are measured, and more until
// there are enough.
func changes(change func(int) (time.Duration, error), from int, enough func() bool) (time.Duration, error) {
	var all []time.Duration
	for n := 0; n < choreChanges || !enough(); n++ {
		d, err := change(from + n + 1)
		if err != nil {
			return 0, err
		}
		all = append(all, d)
		time.Sleep(5 * time.Millisecond)
	}
	slices.Sort(all)
	return all[len(all)/2], nil
}

// walkOn has the plane do its chores again and again until the context ends, and counts
// how often it did.
func walkOn(ctx context.Context, p *socket.Plane, walks *atomic.Int32) {
	for ctx.Err() == nil {
		if err := p.CountBack(ctx); err == nil {
			walks.Add(1)
		}
	}
}

// makeNamespaces makes network namespaces that are kept by a mount; remove removes them.
func makeNamespaces(dir string, count int) (remove func(), err error) {
	var paths []string
	remove = func() {
		for _, path := range paths {
			// What is left goes with the directory.
			_ = unix.Unmount(path, unix.MNT_DETACH)
		}
	}
	done := make(chan error, 1)
	go func() {
		// The thread ends with this goroutine: nothing else may run in its namespace.
		runtime.LockOSThread()
		for i := range count {
			path := filepath.Join(dir, fmt.Sprintf("netns-%d", i))
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				done <- err
				return
			}
			if err := errors.Join(unix.Unshare(unix.CLONE_NEWNET), unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")); err != nil {
				done <- err
				return
			}
			paths = append(paths, path)
		}
		done <- nil
	}()
	return remove, <-done
}
