package health

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pentad/pentad/service"
)

func TestMachine(t *testing.T) {
	// Results: + success, - failure; states after each: U up, D down.
	for _, c := range []struct {
		name          string
		known, up     bool
		rise, fall    int
		results, want string
	}{
		{"a new one that answers", false, true, 2, 3, "++", "UU"},
		{"a new one that does not", false, true, 2, 3, "-+-++", "DDDDU"},
		{"falls after three in a row", true, true, 2, 3, "--+---", "UUUUUD"},
		{"rises after two in a row", true, false, 2, 3, "+-++", "DDDU"},
		{"one is enough", true, true, 1, 1, "-+-", "DUD"},
	} {
		m := machine{up: c.up, known: c.known}
		for i, r := range c.results {
			before := m.up
			changed := m.observe(r == '+', c.rise, c.fall)
			if changed != (m.up != before) {
				t.Errorf("%s: result %d: changed is %v", c.name, i, changed)
			}
			if m.up != (c.want[i] == 'U') {
				t.Errorf("%s: after %s it is up: %v", c.name, c.results[:i+1], m.up)
			}
		}
	}
}

// collected keeps what a monitor reported.
type collected struct {
	mu  sync.Mutex
	now map[Key]bool
}

func (c *collected) report(changes []Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, x := range changes {
		c.now[x.Key] = x.Up
	}
}

func (c *collected) await(t *testing.T, k Key, up bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		c.mu.Lock()
		have, ok := c.now[k]
		c.mu.Unlock()
		if ok && have == up {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v: up is %v (reported: %v), want %v", k, have, ok, up)
		}
	}
}

func listen(t *testing.T) (net.Listener, netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l, netip.MustParseAddrPort(l.Addr().String())
}

func TestMonitor(t *testing.T) {
	defer goleak.VerifyNone(t)
	l, addr := listen(t)
	defer l.Close()
	c := &collected{now: make(map[Key]bool)}
	m := New(slog.New(slog.DiscardHandler), c.report)
	ctx, stop := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() { m.Run(ctx) })
	defer run.Wait()
	defer stop()

	h := service.Health{Probe: service.ProbeTCP, Interval: 20 * time.Millisecond, Timeout: 20 * time.Millisecond, Rise: 2, Fall: 2}
	k := Key{"s", addr}
	// An earlier agent left it down: it must rise.
	m.Update([]Target{{Key: k, Health: h, Down: true, Known: true}}, nil)
	c.await(t, k, true)
	l.Close()
	c.await(t, k, false)
	l2, err := net.Listen("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer l2.Close()
	c.await(t, k, true)

	m.Update(nil, []Key{k})
	if s := m.Stats(); s.Targets != 0 || s.Probes == 0 {
		t.Errorf("stats are %+v", s)
	}
}
