package socket

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// sweeper walks over the sockets of every network namespace: a socket knows its
// place in the maps, not the other way round. It closes connections to backends
// that are marked for it, and counts back those of sockets that are no more.
type sweeper struct {
	udp, tcp *link.Iter
	expire   *ebpf.Program
	walk     *ebpf.Variable // number of the walk
	clock    *clock
	number   uint32
}

// sweepPrograms are those that are run from here.
var sweepPrograms = []string{kernelProgResetUdp, kernelProgResetTcp, kernelProgExpire}

func newSweeper(programs map[string]*ebpf.Program, walk *ebpf.Variable, c *clock) (*sweeper, error) {
	udp, err := link.AttachIter(link.IterOptions{Program: programs[kernelProgResetUdp]})
	if err != nil {
		return nil, fmt.Errorf("iterator over UDP sockets: %w", err)
	}
	tcp, err := link.AttachIter(link.IterOptions{Program: programs[kernelProgResetTcp]})
	if err != nil {
		udp.Close()
		return nil, fmt.Errorf("iterator over TCP sockets: %w", err)
	}
	expire, err := programs[kernelProgExpire].Clone()
	if err != nil {
		udp.Close()
		tcp.Close()
		return nil, err
	}
	return &sweeper{udp: udp, tcp: tcp, expire: expire, walk: walk, clock: c}, nil
}

func (s *sweeper) close() {
	if s == nil {
		return
	}
	s.udp.Close()
	s.tcp.Close()
	s.expire.Close()
}

// young is how old an entry must be for its socket to be missed: between
// connect() and the kernel's tables it is in neither.
const young = 2 * time.Second

// sweep walks over all sockets, or those of UDP alone.
func (s *sweeper) sweep(ctx context.Context, onlyUDP bool) error {
	now, err := s.clock.now()
	if err != nil {
		return err
	}
	s.number++
	if err := s.walk.Set(s.number); err != nil {
		return err
	}
	iterators := []*link.Iter{s.udp, s.tcp}
	if onlyUDP {
		iterators = iterators[:1]
	}
	if err := visitAll(ctx, iterators); err != nil {
		// Who was not visited must not be taken for gone.
		return err
	}
	e := kernelExpiry{Before: uint32(now - s.clock.jiffies(young))}
	if !onlyUDP {
		e.Tcp = 1
	}
	_, err = s.expire.Run(&ebpf.RunOptions{Context: &e, ContextOut: &e})
	return err
}

// visitAll lets iterators walk over the sockets of every network namespace.
func visitAll(ctx context.Context, iterators []*link.Iter) error {
	return InNamespaces(ctx, func() error { return visit(iterators) })
}

// InNamespaces calls f once in every network namespace that a process lives in or
// that is kept by a mount, on a thread that belongs to it. It goes on past those
// that it cannot enter and returns why.
func InNamespaces(ctx context.Context, f func() error) error {
	paths, err := namespaces()
	errs := []error{err}
	for _, path := range paths {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := inNamespace(path, f); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("network namespace %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

// visit lets iterators walk over the sockets of the calling thread's network
// namespace.
func visit(iterators []*link.Iter) error {
	for _, it := range iterators {
		r, err := it.Open()
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r)
		r.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

const ownNamespace = "/proc/thread-self/ns/net"

// namespaces returns a path to every network namespace that a process lives in
// or that is kept by a mount.
func namespaces() ([]string, error) {
	found := make(map[uint64]string)
	hidden := 0
	note := func(path string) {
		var st unix.Stat_t
		switch err := unix.Stat(path, &st); {
		case errors.Is(err, unix.EACCES):
			hidden++
			return
		case err != nil:
			return // processes end while they are looked at
		}
		if _, known := found[st.Ino]; !known {
			found[st.Ino] = path
		}
	}
	note(ownNamespace)
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, p := range processes {
		note(p + "/ns/net")
	}
	mounts, err := namespaceMounts()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		note(m)
	}
	paths := make([]string, 0, len(found))
	for _, path := range found {
		paths = append(paths, path)
	}
	if hidden > 0 {
		return paths, fmt.Errorf("the network namespaces of %d processes are hidden; the agent needs CAP_SYS_PTRACE to find them and CAP_SYS_ADMIN to enter them", hidden)
	}
	return paths, nil
}

// namespaceMounts returns where network namespaces are kept by a mount, as
// `ip netns` and container runtimes do.
func namespaceMounts() ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var mounts []string
	// "36 35 0:4 net:[4026532000] MOUNTPOINT OPTIONS - nsfs nsfs rw", see proc_pid_mountinfo(5).
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[3], "net:[") {
			mounts = append(mounts, fields[4])
		}
	}
	return mounts, lines.Err()
}

// inNamespace calls f with the calling thread in a network namespace.
func inNamespace(path string, f func() error) error {
	if path == ownNamespace {
		return f()
	}
	runtime.LockOSThread()
	home, err := os.Open(ownNamespace)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	away, err := os.Open(path)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer away.Close()
	if err := unix.Setns(int(away.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	err = f()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread stays locked and ends with its goroutine.
		return errors.Join(err, back)
	}
	runtime.UnlockOSThread()
	return err
}
