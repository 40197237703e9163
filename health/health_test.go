package health

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pentad/pentad/health/probe"
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

// A server that answers with garbage, endlessly or not at all costs a bounded
// read and time, and counts as a failure.
func TestBadServers(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := service.Health{Probe: service.ProbeHTTP, Path: "/", Expect: "200"}
	ask, err := probe.New(h, 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, answer := range map[string]func(net.Conn){
		"garbage":         func(c net.Conn) { io.WriteString(c, "\x00\xff\x00\n\n") },
		"endless headers": func(c net.Conn) { endless(c, "HTTP/1.1 200 OK\r\n", "X-A: "+strings.Repeat("a", 1000)+"\r\n") },
		"no answer":       func(c net.Conn) { io.Copy(io.Discard, c) },
		"hangs up":        func(net.Conn) {},
	} {
		l, addr := listen(t)
		var served sync.WaitGroup
		served.Go(func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			answer(c)
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if err := ask(ctx, addr); err == nil {
			t.Errorf("%s: counted as a success", name)
		}
		cancel()
		l.Close()
		served.Wait()
	}
	// An endless body of a good answer is cut, and is a success.
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := fmt.Fprintln(w, strings.Repeat("a", 1000)); err != nil {
				return
			}
		}
	}))
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := ask(ctx, netip.MustParseAddrPort(s.Listener.Addr().String())); err != nil {
		t.Errorf("endless body: %v", err)
	}
}

func endless(c net.Conn, head, line string) {
	if _, err := io.WriteString(c, head); err != nil {
		return
	}
	for {
		if _, err := io.WriteString(c, line); err != nil {
			return
		}
	}
}
