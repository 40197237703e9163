package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
)

// How often the kernel is read whole, and how long a driver waits before it repeats
// what failed.
const (
	verifyEvery = 10 * time.Minute
	retryFirst  = 100 * time.Millisecond
	retryMost   = 10 * time.Second
	retryFull   = 30 * time.Second // something did not fit; memory may have been freed
)

// role is a part whose types are nobody else's business.
type role interface {
	// id names the role: to people, and in the directory of pins.
	id() string
	// drive returns who keeps the role to what the agent knows.
	drive(*Agent) driver
	// leave takes all of the role out of the kernel, whoever put it there.
	leave(Options) error
}

// driver keeps one role to what is known: in a goroutine of its own, so that one that
// fails or is slow delays no other.
type driver interface {
	run(context.Context)
	set(*known)
	state() roleState
	measure(meter)
	// opened returns the plane; nil: it is not open.
	opened() any
}

// part is a capability of the agent, as the table of roles names it.
type part[P plane[W], W want[W]] struct {
	name    string
	wanted  func(*config.Config) bool
	want    func(*known) (W, bool) // false: not known yet; what there is stays
	open    func(a *Agent, lost func()) P
	remove  func(Options) error // takes it out of the kernel; nil: it ends with the agent
	look    time.Duration       // how often the plane is asked whether it is intact; 0: never
	left    func(Options) bool  // whether what an earlier agent left will do until the want is known
	measure func(P, meter)
	minor   bool // services do not depend on it: what fails is a warning
	loud    bool // what fails is a problem all the same
}

func (p part[P, W]) id() string { return p.name }

func (p part[P, W]) drive(a *Agent) driver {
	return &drive[P, W]{part: p, agent: a, wake: make(chan struct{}, 1), lost: make(chan struct{}, 1)}
}

func (p part[P, W]) leave(opts Options) error {
	if p.remove == nil {
		return nil
	}
	// What could not be removed keeps its mark: it is tried again.
	if err := p.remove(opts); err != nil {
		return err
	}
	return p.unmark(opts)
}

// A role that has something in the kernel has a directory of its name among the pins:
// what is not this agent's is not removed because its file says nothing of it.
func (p part[P, W]) mark(opts Options) string { return filepath.Join(opts.Pins, p.name) }

func (p part[P, W]) unmark(opts Options) error {
	if err := os.Remove(p.mark(opts)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// drive is the driver of one part.
type drive[P plane[W], W want[W]] struct {
	part  part[P, W]
	agent *Agent
	wake  chan struct{} // something else is known
	lost  chan struct{} // what was made may be gone

	mu     sync.Mutex
	target target[W]
	is     roleState
	plane  P
	isOpen bool

	// Owned by run.
	chores func() // ends them
	last   *W     // what was tried last
	said   string // the error that was logged last
}

// target is what a part is to become.
type target[W any] struct {
	number   uint64
	mode     mode
	services *service.Snapshot // that were known then
	want     W
}

// set makes what is known the aim.
func (d *drive[P, W]) set(k *known) {
	t := target[W]{number: k.number, services: k.services}
	if d.part.wanted(k.config) {
		var known bool
		t.mode = waiting
		if t.want, known = d.part.want(k); known {
			t.mode = on
		}
	}
	d.mu.Lock()
	d.target = t
	d.mu.Unlock()
	poke(d.wake)
}

func (d *drive[P, W]) state() roleState {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.is
	s.name, s.minor, s.loud = d.part.name, d.part.minor, d.part.loud
	if left := d.part.left; left != nil {
		s.left = func() bool { return left(d.agent.opts) }
	}
	if d.isOpen {
		s.warner, _ = any(d.plane).(warner)
	}
	return s
}

func (d *drive[P, W]) opened() any {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.isOpen {
		return nil
	}
	return d.plane
}

func (d *drive[P, W]) measure(m meter) {
	d.mu.Lock()
	plane, ok := d.plane, d.isOpen && d.part.measure != nil
	d.mu.Unlock()
	if ok {
		d.part.measure(plane, m)
	}
}

// run drives until the context ends. What is in the kernel stays.
func (d *drive[P, W]) run(ctx context.Context) {
	defer d.close()
	look := time.NewTicker(max(d.part.look, time.Millisecond))
	defer look.Stop()
	if d.part.look == 0 {
		look.Stop()
	}
	verify := time.NewTicker(verifyEvery)
	defer verify.Stop()
	retry := time.NewTimer(time.Hour)
	retry.Stop()
	defer retry.Stop()
	for backoff := retryFirst; ; {
		force, verified := true, false
		select {
		case <-ctx.Done():
			return
		case <-d.wake:
			force = false
		case <-d.lost:
			if !d.isBroken() {
				continue
			}
		case <-look.C:
			if !d.isBroken() {
				continue
			}
		case <-verify.C:
			if !d.isOpen {
				continue
			}
			d.plane.Distrust()
			verified = true
		case <-retry.C:
		}
		tried, err := d.step(ctx, force)
		if ctx.Err() != nil {
			return
		}
		d.say(err)
		switch {
		case err == nil:
			backoff = retryFirst
			retry.Stop()
		case isPartial(err):
			retry.Reset(retryFull)
		default:
			retry.Reset(backoff)
			backoff = min(2*backoff, retryMost)
		}
		send(ctx, d.agent.outcomes, outcome{d.part.name, tried.number, tried.mode, tried.services, err, err != nil && d.is.broken, verified})
	}
}

// say logs an error once for as long as it stays the same, and that it is over.
func (d *drive[P, W]) say(err error) {
	if err == nil {
		if d.said != "" {
			d.said = ""
			d.agent.log.Info("everything is what it should be again", "role", d.part.name)
		}
		return
	}
	if err.Error() != d.said {
		d.said = err.Error()
		d.agent.log.Error("not everything is what it should be; it is tried again until it is", "role", d.part.name, "error", err)
	}
}

// isBroken reports whether somebody has changed what was made. What failed is tried
// again anyway.
func (d *drive[P, W]) isBroken() bool {
	if !d.isOpen || d.last == nil || d.is.mode != on || d.is.err != nil && !isPartial(d.is.err) || d.plane.Intact() {
		return false
	}
	d.agent.log.Warn("somebody has changed what is in the kernel; it is put back", "role", d.part.name)
	d.mu.Lock()
	d.is.broken = true
	d.mu.Unlock()
	return true
}

// step does what the aim asks for. Without force a plane is called only if its want is
// another one.
func (d *drive[P, W]) step(ctx context.Context, force bool) (t target[W], err error) {
	d.mu.Lock()
	t = d.target
	d.mu.Unlock()
	switch t.mode {
	case off:
		err = d.leave()
	case on:
		if !force && d.last != nil && (*d.last).Equal(t.want) && (d.is.err == nil || isPartial(d.is.err)) {
			err = d.is.err
			break
		}
		err = d.apply(ctx, t.want)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.is.mode, d.is.number, d.is.err = t.mode, t.number, err
	if t.mode == on && (err == nil || isPartial(err)) {
		d.is.broken, d.is.applied = false, time.Now()
	}
	if t.mode != on {
		d.is.broken = false
	}
	return t, err
}

// apply has the plane look like a want, and opens it before if need be.
func (d *drive[P, W]) apply(ctx context.Context, w W) error {
	if !d.isOpen {
		d.open(ctx)
	}
	if d.part.remove != nil {
		if err := os.MkdirAll(d.part.mark(d.agent.opts), 0o700); err != nil {
			return err
		}
	}
	d.last = &w
	return d.plane.Apply(ctx, w)
}

func (d *drive[P, W]) open(ctx context.Context) {
	p := d.part.open(d.agent, func() { poke(d.lost) })
	d.mu.Lock()
	d.plane, d.isOpen = p, true
	d.mu.Unlock()
	ctx, stop := context.WithCancel(ctx)
	var chores sync.WaitGroup
	chores.Go(func() { p.Run(ctx) })
	d.chores = func() {
		stop()
		chores.Wait()
	}
}

// close ends the chores and lets go of the plane.
func (d *drive[P, W]) close() {
	if !d.isOpen {
		return
	}
	d.chores()
	d.mu.Lock()
	d.isOpen = false
	d.mu.Unlock()
	d.plane.Close()
	d.last = nil
}

// leave takes out of the kernel what the role has there, whether this agent put it
// there or an earlier one with the same pins.
func (d *drive[P, W]) leave() error {
	if w, ok := any(d.plane).(withdrawer); ok && d.isOpen {
		w.Withdraw()
	}
	d.close()
	if d.part.remove == nil {
		return nil
	}
	if _, err := os.Stat(d.part.mark(d.agent.opts)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := d.part.leave(d.agent.opts)
	if err == nil {
		d.agent.log.Info("taken out of the kernel: the file has no use for it any more", "role", d.part.name)
	}
	return err
}
