// Package health finds out which backends are well. It probes what it is told
// to probe, decides by rise and fall, and reports changes; what follows from a
// change is for others to say. It knows nothing of the kernel's maps.
package health

import (
	"container/heap"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/health/probe"
	"github.com/pentad/pentad/service"
)

// Key names a backend: addresses are unique within a service only.
type Key struct {
	Service string
	Address netip.AddrPort
}

// Change is a backend that went up or down.
type Change struct {
	Key
	Up  bool
	Err error // of the probe that decided; nil when up
}

// Target is a backend to probe.
type Target struct {
	Key
	Health service.Health
	Mark   int  // SO_MARK of the probe's socket, 0 for none
	Down   bool // what is known of it
	Known  bool // whether Down is worth anything
}

// Probed is the address that is probed.
func (t Target) Probed() netip.AddrPort {
	if t.Health.Port == 0 {
		return t.Address
	}
	return netip.AddrPortFrom(t.Address.Addr(), t.Health.Port)
}

// firstWithin is how far the first probes of new targets are spread.
const firstWithin = 500 * time.Millisecond

// tick is how long due probes are gathered: waking up for each of thousands
// costs more than probing.
const tick = 10 * time.Millisecond

// Monitor probes targets and reports changes.
type Monitor struct {
	log    *slog.Logger
	report func([]Change)

	mu      sync.Mutex
	targets map[Key]*target
	due     queue
	lanes   lanes
	wake    chan struct{}
	probes  map[probeKey]*shared

	results uint64
	late    time.Duration // how late the last probe started
	latest  string        // the service of that probe
}

// shared is a probe and how many targets use it.
type shared struct {
	probe probe.Func
	users int
}

type probeKey struct {
	health service.Health
	mark   int
}

// target is one backend while it is probed.
type target struct {
	Target
	machine machine
	probe   probe.Func
	at      time.Time // of the next probe
	was     time.Time // when the probe that waits was due
	waiting bool      // in its lane
	own     error     // why the last probe could not be made; nil: it could
	spread  bool      // the second probe has its time
	gone    bool
	record  Record
}

// Record is what the probes of a backend met with.
type Record struct {
	Probe     service.Probe
	Up        bool
	At        time.Time     // when the last one ended; zero: none has
	Took      time.Duration // of the last one
	Err       error         // of the last one; nil: a success
	InARow    int           // how many ended so, the last one included
	Next      time.Time     // when the next one begins
	Succeeded uint64        // since the agent runs
	Failed    uint64
}

// New returns a monitor without targets. report is called from one goroutine at
// a time and must not call the monitor.
func New(log *slog.Logger, report func([]Change)) *Monitor {
	return &Monitor{
		log: log, report: report, targets: make(map[Key]*target), lanes: newLanes(slotsFor(maxFiles())),
		wake: make(chan struct{}, 1), probes: make(map[probeKey]*shared),
	}
}

// maxFiles is how many files this process may have open.
func maxFiles() uint64 {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 2 * maxInFlight
	}
	return limit.Cur
}

// Update probes, from now on, the targets of add and no longer those of remove.
// A target that is already known with the same settings goes on undisturbed.
func (m *Monitor) Update(add []Target, remove []Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range remove {
		if t := m.targets[k]; t != nil {
			m.retire(t)
			delete(m.targets, k)
		}
	}
	now := time.Now()
	for _, a := range add {
		m.add(a, now)
	}
	m.awake()
}

// awake lets Run look at what is to be done.
func (m *Monitor) awake() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *Monitor) add(a Target, now time.Time) {
	old := m.targets[a.Key]
	if old != nil && old.Health == a.Health && old.Mark == a.Mark {
		return
	}
	f, err := m.probeFor(a)
	if err != nil {
		m.log.Error("backend is not probed", "service", a.Service, "backend", a.Address, "error", err)
		return
	}
	t := &target{Target: a, probe: f, machine: machine{up: !a.Down, known: a.Known}}
	if old != nil {
		t.machine, t.record = old.machine, old.record
		m.retire(old)
	}
	t.at = now.Add(rand.N(min(a.Health.Interval, firstWithin)))
	m.targets[a.Key] = t
	heap.Push(&m.due, t)
}

// probeFor shares one probe among all targets with the same settings.
func (m *Monitor) probeFor(a Target) (probe.Func, error) {
	k := probeKey{a.Health, a.Mark}
	if f := m.probes[k]; f != nil {
		f.users++
		return f.probe, nil
	}
	f, err := probe.New(a.Health, a.Mark)
	if err != nil {
		return nil, err
	}
	m.probes[k] = &shared{f, 1}
	return f, nil
}

// retire ends the probing of a target.
func (m *Monitor) retire(t *target) {
	t.gone = true
	k := probeKey{t.Health, t.Mark}
	f := m.probes[k]
	if f.users--; f.users == 0 {
		delete(m.probes, k)
	}
}

// Stats says how the probing goes.
type Stats struct {
	Targets int
	Probes  uint64        // finished since the start
	Late    time.Duration // how late the last probe started, or one that still waits
	Latest  string        // the service of that probe

	// Unmade is how many targets could not be probed last time, by a fault of this
	// host; their states are what they were. Fault is what one of them met with.
	Unmade int
	Fault  error
}

// Stats returns how the probing goes.
func (m *Monitor) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Stats{Targets: len(m.targets), Probes: m.results, Late: m.late, Latest: m.latest}
	if service, since := m.lanes.oldest(); service != "" {
		if waits := time.Since(since); waits > s.Late {
			s.Late, s.Latest = waits, service
		}
	}
	for _, t := range m.targets {
		if t.own != nil {
			s.Unmade++
			s.Fault = t.own
		}
	}
	return s
}

// Records returns what the probes of all backends, or of the service of that name, met
// with.
func (m *Monitor) Records(service string) map[Key]Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make(map[Key]Record)
	for k, t := range m.targets {
		if service != "" && k.Service != service {
			continue
		}
		r := t.record
		r.Probe, r.Up, r.Next = t.Health.Probe, t.machine.up, t.at
		all[k] = r
	}
	return all
}

// Heard returns the services of which the state of a backend is known, by a probe or from
// an earlier agent; until then backends count as up.
func (m *Monitor) Heard() map[string]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make(map[string]bool)
	for k, t := range m.targets {
		if t.machine.known {
			all[k.Service] = true
		}
	}
	return all
}

// note takes the outcome of one probe.
func (r *Record) note(o outcome) {
	if r.At.IsZero() || (r.Err == nil) != (o.err == nil) {
		r.InARow = 0
	}
	r.At, r.Took, r.Err = o.ended, o.took, o.err
	r.InARow++
	if o.err == nil {
		r.Succeeded++
	} else {
		r.Failed++
	}
}

// outcome is the end of one probe.
type outcome struct {
	target *target
	err    error
	ended  time.Time
	took   time.Duration
}

// Run probes until the context ends, and returns when the last probe has ended.
func (m *Monitor) Run(ctx context.Context) {
	outcomes := make(chan outcome, 256)
	var probes sync.WaitGroup
	collected := make(chan struct{})
	go func() {
		m.collect(outcomes)
		close(collected)
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-m.wake:
		case <-timer.C:
		}
		for _, t := range m.ready(time.Now()) {
			probes.Go(func() {
				began := time.Now()
				err := t.run(ctx)
				ended := time.Now()
				m.finish(t)
				outcomes <- outcome{t, err, ended, ended.Sub(began)}
			})
		}
		timer.Reset(m.untilNext(time.Now()))
	}
	probes.Wait()
	close(outcomes)
	<-collected
}

// finish gives the slot of a probe to the next.
func (m *Monitor) finish(t *target) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lanes.done(t)
	if m.lanes.waiting > 0 {
		m.awake()
	}
}

func (t *target) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, t.Health.Timeout)
	defer cancel()
	return t.probe(ctx, t.Probed())
}

// next returns when to probe again: an interval after this time was due, give or
// take a twentieth. The second probe comes anywhere in the first interval, so that
// targets that started together part. A target that is a whole interval late does
// not catch up.
func (t *target) next(now time.Time) time.Time {
	wait := t.Health.Interval - t.Health.Interval/20 + rand.N(t.Health.Interval/10)
	if !t.spread {
		t.spread = true
		wait = rand.N(t.Health.Interval)
	}
	if next := t.at.Add(wait); next.After(now) {
		return next
	}
	return now.Add(wait)
}

// ready takes the targets whose time has come and for whom there is a slot.
func (m *Monitor) ready(now time.Time) []*target {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.due) > 0 && !m.due[0].at.After(now) {
		t := m.due[0]
		if t.gone {
			heap.Pop(&m.due)
			continue
		}
		if !t.waiting {
			t.was = t.at
		}
		m.lanes.wait(t)
		t.at = t.next(now)
		heap.Fix(&m.due, 0)
	}
	var ready []*target
	for t := m.lanes.next(); t != nil; t = m.lanes.next() {
		m.late, m.latest = now.Sub(t.was), t.Service
		ready = append(ready, t)
	}
	return ready
}

func (m *Monitor) untilNext(now time.Time) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.due) == 0 {
		return time.Hour
	}
	return max(tick, m.due[0].at.Sub(now))
}

// collect feeds results to the machines and reports changes, those that are
// there together as one.
func (m *Monitor) collect(outcomes <-chan outcome) {
	for o := range outcomes {
		var changes []Change
		for more := true; more; {
			if c, ok := m.observe(o); ok {
				changes = append(changes, c)
			}
			select {
			case o, more = <-outcomes:
			default:
				more = false
			}
		}
		if len(changes) > 0 {
			m.report(changes)
		}
	}
}

func (m *Monitor) observe(o outcome) (Change, bool) {
	t := o.target
	m.mu.Lock()
	defer m.mu.Unlock()
	m.results++
	if t.own = nil; errors.Is(o.err, probe.ErrOwn) {
		t.own = o.err
		return Change{}, false
	}
	t.record.note(o)
	if t.gone || !t.machine.observe(o.err == nil, t.Health.Rise, t.Health.Fall) {
		return Change{}, false
	}
	return Change{Key: t.Key, Up: t.machine.up, Err: o.err}, true
}

// queue is a heap of targets by time.
type queue []*target

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q queue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }

// Push and Pop implement heap.Interface.
func (q *queue) Push(x any) { *q = append(*q, x.(*target)) }

// Pop removes the last element.
func (q *queue) Pop() any {
	old := *q
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return t
}
