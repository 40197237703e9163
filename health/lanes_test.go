package health

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pentad/pentad/health/probe"
	"github.com/pentad/pentad/service"
)

func waiter(service string, n int) *target {
	return &target{Target: Target{Key: Key{service, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), uint16(n))}}}
}

// One greedy service gets half of the slots, two a third each; who has little to
// ask gets what he asks for.
func TestLanesShare(t *testing.T) {
	for greedy := 1; greedy <= 4; greedy++ {
		l := newLanes(120)
		for i := range greedy {
			for n := range 1000 {
				l.wait(waiter(fmt.Sprint("greedy", i), n))
			}
		}
		count := make(map[string]int)
		for x := l.next(); x != nil; x = l.next() {
			count[x.Service]++
		}
		for i := range greedy {
			if have, want := count[fmt.Sprint("greedy", i)], 120/(greedy+1); have < want-1 || have > want+1 {
				t.Errorf("%d greedy ones: one has %d slots, want %d", greedy, have, want)
			}
		}
		l.wait(waiter("modest", 1))
		if x := l.next(); x == nil || x.Service != "modest" {
			t.Errorf("%d greedy ones: there is no slot for a modest one: %v", greedy, x)
		}
	}
}

// All slots come back and no lane is left, also when targets go while they wait.
func TestLanesEnd(t *testing.T) {
	l := newLanes(8)
	var all []*target
	for n := range 100 {
		x := waiter(fmt.Sprint("s", n%7), n)
		all = append(all, x)
		l.wait(x)
		l.wait(x)
	}
	for i, x := range all {
		x.gone = i%3 == 0
	}
	began := 0
	for {
		var now []*target
		for x := l.next(); x != nil; x = l.next() {
			now = append(now, x)
		}
		if len(now) == 0 {
			break
		}
		began += len(now)
		for _, x := range now {
			l.done(x)
		}
	}
	if began != 66 || l.free != 8 || l.waiting != 0 || len(l.lanes) != 0 || len(l.turns) != 0 {
		t.Errorf("%d began; %+v", began, l)
	}
}

// monitor returns a running monitor whose probes are f.
func monitor(t *testing.T, c *collected, slots int, f probe.Func, health service.Health) *Monitor {
	t.Helper()
	m := New(slog.New(slog.DiscardHandler), c.report)
	m.lanes = newLanes(slots)
	m.probes[probeKey{health, 0}] = &shared{probe: f}
	ctx, stop := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() { m.Run(ctx) })
	t.Cleanup(func() { stop(); run.Wait(); goleak.VerifyNone(t) })
	return m
}

// The backends of one service are silent, and there are more of them than slots: a
// dead backend of another one is seen as if they were not there.
func TestSilentNeighbours(t *testing.T) {
	c := &collected{now: make(map[Key]bool)}
	h := service.Health{Probe: service.ProbeTCP, Interval: 30 * time.Second, Timeout: 30 * time.Second, Rise: 1, Fall: 1}
	var underway atomic.Int64
	m := monitor(t, c, 8, func(ctx context.Context, addr netip.AddrPort) error {
		if addr.Port() == 1 {
			return syscall.ECONNREFUSED
		}
		underway.Add(1)
		<-ctx.Done()
		return ctx.Err()
	}, h)
	var silent []Target
	for n := 2; n < 100; n++ {
		silent = append(silent, Target{Key: waiter("silent", n).Key, Health: h})
	}
	m.Update(silent, nil)
	for deadline := time.Now().Add(10 * time.Second); underway.Load() < 4; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d probes are under way", underway.Load())
		}
	}
	dead := Target{Key: waiter("dead", 1).Key, Health: h}
	m.Update([]Target{dead}, nil)
	c.await(t, dead.Key, false)
	if s := m.Stats(); s.Latest != "silent" {
		t.Errorf("stats are %+v", s)
	}
}

// A fault of the prober leaves what is known of a backend, and is told.
func TestUnmade(t *testing.T) {
	c := &collected{now: make(map[Key]bool)}
	h := service.Health{Probe: service.ProbeTCP, Interval: 5 * time.Millisecond, Timeout: 5 * time.Millisecond, Rise: 1, Fall: 1}
	var fault atomic.Pointer[error]
	var probes atomic.Int64
	set := func(err error) { fault.Store(&err) }
	set(nil)
	m := monitor(t, c, 8, func(context.Context, netip.AddrPort) error { probes.Add(1); return *fault.Load() }, h)
	k := waiter("s", 1).Key
	m.Update([]Target{{Key: k, Health: h, Down: true, Known: true}}, nil)
	c.await(t, k, true)
	set(fmt.Errorf("%w: no file is left", probe.ErrOwn))
	for from := probes.Load(); probes.Load() < from+20; time.Sleep(time.Millisecond) {
	}
	c.mu.Lock()
	up := c.now[k]
	c.mu.Unlock()
	if s := m.Stats(); !up || s.Unmade != 1 || s.Fault == nil {
		t.Errorf("up is %v, stats are %+v", up, s)
	}
	set(syscall.ECONNREFUSED)
	c.await(t, k, false)
	if s := m.Stats(); s.Unmade != 0 {
		t.Errorf("stats are %+v", s)
	}
}
