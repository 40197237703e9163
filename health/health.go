// Package health finds out which backends are well. It probes what it is told
// to probe, decides by rise and fall, and reports changes; what follows from a
// change is for others to say. It knows nothing of the kernel's maps.
package health

import (
	"container/heap"
	"context"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

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

// maxInFlight bounds the probes under way at once. It is far above what a
// healthy fleet needs, and below the usual limit on files.
const maxInFlight = 4096

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
	wake    chan struct{}
	probes  map[probeKey]probe.Func

	results atomic.Uint64
	late    atomic.Int64 // how late the last probe started, ns
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
	spread  bool      // the second probe has its time
	gone    bool
}

// New returns a monitor without targets. report is called from one goroutine at
// a time and must not call the monitor.
func New(log *slog.Logger, report func([]Change)) *Monitor {
	return &Monitor{
		log: log, report: report, targets: make(map[Key]*target),
		wake: make(chan struct{}, 1), probes: make(map[probeKey]probe.Func),
	}
}

// Update probes, from now on, the targets of add and no longer those of remove.
// A target that is already known with the same settings goes on undisturbed.
func (m *Monitor) Update(add []Target, remove []Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range remove {
		if t := m.targets[k]; t != nil {
			t.gone = true
			delete(m.targets, k)
		}
	}
	now := time.Now()
	for _, a := range add {
		m.add(a, now)
	}
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
		t.machine = old.machine
		old.gone = true
	}
	t.at = now.Add(rand.N(min(a.Health.Interval, firstWithin)))
	m.targets[a.Key] = t
	heap.Push(&m.due, t)
}

// probeFor shares one probe among all targets with the same settings.
func (m *Monitor) probeFor(a Target) (probe.Func, error) {
	k := probeKey{a.Health, a.Mark}
	if f := m.probes[k]; f != nil {
		return f, nil
	}
	f, err := probe.New(a.Health, a.Mark)
	if err != nil {
		return nil, err
	}
	m.probes[k] = f
	return f, nil
}

// Stats says how the probing goes.
type Stats struct {
	Targets int
	Probes  uint64        // finished since the start
	Late    time.Duration // how late the last probe started
}

// Stats returns how the probing goes.
func (m *Monitor) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Stats{Targets: len(m.targets), Probes: m.results.Load(), Late: time.Duration(m.late.Load())}
}

// outcome is the end of one probe.
type outcome struct {
	target *target
	err    error
}

// Run probes until the context ends, and returns when the last probe has ended.
func (m *Monitor) Run(ctx context.Context) {
	outcomes := make(chan outcome, 256)
	slots := make(chan struct{}, maxInFlight)
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
			slots <- struct{}{}
			probes.Go(func() {
				outcomes <- outcome{t, t.run(ctx)}
				<-slots
			})
		}
		timer.Reset(m.untilNext(time.Now()))
	}
	probes.Wait()
	close(outcomes)
	<-collected
}

func (t *target) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, t.Health.Timeout)
	defer cancel()
	return t.probe(ctx, t.Address)
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

// ready takes the targets whose time has come.
func (m *Monitor) ready(now time.Time) []*target {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ready []*target
	for len(m.due) > 0 && !m.due[0].at.After(now) {
		t := m.due[0]
		if t.gone {
			heap.Pop(&m.due)
			continue
		}
		m.late.Store(int64(now.Sub(t.at)))
		ready = append(ready, t)
		t.at = t.next(now)
		heap.Fix(&m.due, 0)
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
	m.results.Add(1)
	t := o.target
	m.mu.Lock()
	defer m.mu.Unlock()
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
