package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

// fakePlane keeps what it is given, unless it fails.
type fakePlane struct {
	mu      sync.Mutex
	err     error
	last    socket.Want
	applied int
	broken  bool
	opened  bool
	removed int
	keeps   int           // how often it cannot be removed
	held    chan struct{} // not nil: Apply waits until it is closed
}

func (p *fakePlane) Apply(ctx context.Context, w socket.Want) error {
	p.mu.Lock()
	held := p.held
	p.mu.Unlock()
	if held != nil {
		select {
		case <-held:
		case <-ctx.Done():
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied++
	if p.err == nil || isPartial(p.err) {
		p.last, p.broken = w, false
	}
	return p.err
}

func (p *fakePlane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.broken
}

func (*fakePlane) Distrust() {}

func (p *fakePlane) Run(ctx context.Context) { <-ctx.Done() }

func (p *fakePlane) Close() {
	p.do(func() { p.opened = false })
}

func (p *fakePlane) do(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// fake is a role with a fake plane.
func fake(name string, p *fakePlane, wanted func(*config.Config) bool) role {
	return part[*fakePlane, socket.Want]{
		name: name, wanted: wanted, want: wantSocket, look: time.Millisecond,
		open: func(*Agent, func()) *fakePlane {
			p.do(func() { p.opened = true })
			return p
		},
		remove: func(Options) error {
			var err error
			p.do(func() {
				if p.removed++; p.keeps > 0 {
					p.keeps--
					p.removed--
					err = errors.New("busy")
				}
			})
			return err
		},
	}
}

// start runs an agent with other roles and no sources until the test ends.
func start(t *testing.T, first *config.Config, roles ...role) *Agent {
	t.Helper()
	a := newAgent(Options{Pins: t.TempDir(), Log: slog.New(slog.DiscardHandler)}, roles)
	a.monitor = health.New(a.log, func([]health.Change) {})
	a.probes.monitor = a.monitor
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(func() {
		stop()
		a.tasks.Wait()
	})
	a.takeFile(ctx, source.Update{From: service.SourceFile, Services: first.Services, Config: first})
	for _, d := range a.drivers {
		a.tasks.Go(func() { d.run(ctx) })
	}
	a.tasks.Go(func() {
		if err := a.loop(ctx, nil); err != nil {
			t.Error(err)
		}
	})
	return a
}

func eventually(t *testing.T, what string, check func() bool) {
	t.Helper()
	if err := lab.Eventually(10*time.Second, func() error {
		if !check() {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func webAt(backends ...netip.AddrPort) *service.Service {
	s := &service.Service{Name: "web", Listeners: []service.Listener{{Address: netip.MustParseAddrPort("192.0.2.1:80"), Protocol: service.TCP}}}
	for _, b := range backends {
		s.Backends = append(s.Backends, service.Backend{Address: b, Weight: 1})
	}
	return s
}

// Who is told that a drain failed does not see it happen later.
func TestDrainThatFails(t *testing.T) {
	backend := netip.MustParseAddrPort("192.0.2.11:80")
	plane := &fakePlane{}
	a := start(t, &config.Config{Services: []*service.Service{webAt(backend)}}, fake("socket", plane, always))
	drained := func() (is bool) {
		plane.do(func() { is = plane.last.Services.Services[0].Backends[0].Drained })
		return is
	}
	ask := func(r api.DrainRequest) error {
		r.Service, r.Address, r.Drained = "web", backend, true
		r.Force = true
		_, err := a.Drain(t.Context(), r)
		return err
	}
	eventually(t, "the first services", func() (is bool) {
		plane.do(func() { is = plane.applied > 0 })
		return is
	})
	failure := errors.New("the kernel has no memory")
	plane.do(func() { plane.err = failure })
	if err := ask(api.DrainRequest{}); !errors.Is(err, failure) {
		t.Errorf("the answer is %v", err)
	}
	before := 0
	plane.do(func() { plane.err, before = nil, plane.applied })
	eventually(t, "trying again", func() (is bool) {
		plane.do(func() { is = plane.applied > before })
		return is
	})
	if drained() {
		t.Error("the drain that failed is in force")
	}
	if err := ask(api.DrainRequest{Timeout: -time.Hour}); !errors.Is(err, api.ErrRefused) {
		t.Errorf("a negative time: %v", err)
	}
	// What did not fit has nothing to do with it.
	plane.do(func() { plane.err = &socket.FullError{Services: []string{"other"}} })
	if err := ask(api.DrainRequest{}); err != nil || !drained() {
		t.Errorf("where something else did not fit: %v, drained %t", err, drained())
	}
}

// What is known of a backend goes with it: who gets its address is another one.
func TestStateGoesWithItsBackend(t *testing.T) {
	for _, from := range []service.Source{service.SourceFile, service.SourceKubernetes} {
		plane := &fakePlane{}
		a := start(t, &config.Config{}, fake("socket", plane, always))
		pod, other := netip.MustParseAddrPort("192.0.2.11:80"), netip.MustParseAddrPort("192.0.2.12:80")
		update := func(backends ...netip.AddrPort) (s *service.Service) {
			t.Helper()
			web := webAt(backends...)
			web.Source = from
			a.updates <- source.Update{From: from, Services: []*service.Service{web}, Config: &config.Config{}}
			eventually(t, "the backends", func() bool {
				plane.do(func() {
					s = nil
					if plane.applied > 0 && len(plane.last.Services.Services) > 0 {
						s = plane.last.Services.Services[0]
					}
				})
				return s != nil && len(s.Backends) == len(backends)
			})
			return s
		}
		update(pod, other)
		for _, b := range []netip.AddrPort{pod, other} {
			if _, err := a.Drain(t.Context(), api.DrainRequest{Service: "web", Address: b, Drained: true, Force: true}); err != nil {
				t.Fatal(err)
			}
		}
		update(other)
		// What the file names is one machine; in a cluster another pod has the address.
		stays := from == service.SourceFile
		if s := update(pod, other); s.Backends[0].Drained != stays || !s.Backends[1].Drained {
			t.Errorf("source %s: after one has gone and come: %+v", from, s.Backends)
		}
	}
}

// What did not fit is counted whatever else is wrong, and hides nothing that failed.
func TestErrorsOfSeveralPlanes(t *testing.T) {
	full, failed := &socket.FullError{Services: []string{"a", "b"}}, errors.New("netlink")
	for _, c := range []struct {
		err     error
		partial bool
		without int
	}{
		{nil, false, 0},
		{full, true, 2},
		{errors.Join(full, nil), true, 2},
		{fmt.Errorf("plane: %w", full), true, 2},
		{errors.Join(full, failed), false, 2},
		{errors.Join(failed, full), false, 2},
		{failed, false, 0},
	} {
		if isPartial(c.err) != c.partial || withoutRoom(c.err) != c.without {
			t.Errorf("%v: partial %t, %d services without room", c.err, isPartial(c.err), withoutRoom(c.err))
		}
	}
}

// A plane that fails or hangs delays no other, and is not called for what it has.
func TestPlanesAreApart(t *testing.T) {
	hung, failing, fine := &fakePlane{held: make(chan struct{})}, &fakePlane{err: errors.New("no")}, &fakePlane{}
	a := start(t, &config.Config{}, fake("hung", hung, always), fake("failing", failing, always), fake("fine", fine, always))
	for i := range 20 {
		n := i + 1
		var all []*service.Service
		for j := range n {
			all = append(all, &service.Service{Name: fmt.Sprint("s", j)})
		}
		a.updates <- source.Update{From: service.SourceFile, Services: all, Config: &config.Config{}}
		eventually(t, "the plane that works", func() (is bool) {
			fine.do(func() { is = fine.applied > 0 && len(fine.last.Services.Services) == n })
			return is
		})
	}
	if problems := a.Status().Problems; len(problems) != 1 || !strings.Contains(problems[0], "no") {
		t.Errorf("problems are %q", problems)
	}
	before := 0
	fine.do(func() { before = fine.applied })
	// The cluster has nothing to add.
	number := func(role string) uint64 {
		for _, r := range a.roles() {
			if r.name == role {
				return r.number
			}
		}
		return 0
	}
	then := number("fine")
	a.updates <- source.Update{From: service.SourceKubernetes}
	eventually(t, "being told", func() bool { return number("fine") > then })
	fine.do(func() {
		if fine.applied != before {
			t.Errorf("called %d times for what it has", fine.applied-before)
		}
		fine.broken = true
	})
	eventually(t, "putting back what somebody changed", func() (is bool) {
		fine.do(func() { is = fine.applied > before })
		return is
	})
	failing.do(func() { failing.err = nil })
	close(hung.held)
	eventually(t, "everything", func() bool { return len(a.Status().Problems) == 0 })
	hung.do(func() {
		if len(hung.last.Services.Services) != 20 {
			t.Errorf("the one that hung has %d services", len(hung.last.Services.Services))
		}
	})
}

// What the file has no use for any more leaves the kernel, and what an earlier agent
// with the same pins left there; what somebody else has there stays.
func TestOffMeansGone(t *testing.T) {
	scoped := func(c *config.Config) bool { return c.Scope.Cgroup != "" }
	plane, others := &fakePlane{}, &fakePlane{}
	a := start(t, &config.Config{}, fake("one", plane, scoped), fake("others", others, scoped))
	tell := func(cgroup string) {
		c := &config.Config{}
		c.Scope.Cgroup = cgroup
		a.updates <- source.Update{From: service.SourceFile, Config: c}
	}
	mark := filepath.Join(a.opts.Pins, "one")
	for round := range 3 {
		tell("/some")
		eventually(t, "being there", func() (is bool) {
			plane.do(func() { is = plane.opened && plane.last.Cgroup == "/some" })
			_, err := os.Stat(mark)
			return is && err == nil
		})
		// It is tried until it can be done.
		plane.do(func() { plane.keeps = round })
		tell("")
		eventually(t, "being gone", func() (is bool) {
			plane.do(func() { is = !plane.opened && plane.removed == round+1 })
			_, err := os.Stat(mark)
			return is && errors.Is(err, os.ErrNotExist)
		})
	}

	// Another agent finds the mark of an earlier one, or finds none.
	left, foreign := &fakePlane{}, &fakePlane{}
	b := newAgent(Options{Pins: t.TempDir(), Log: slog.New(slog.DiscardHandler)}, []role{fake("left", left, scoped), fake("foreign", foreign, scoped)})
	if err := os.Mkdir(filepath.Join(b.opts.Pins, "left"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, d := range b.drivers {
		d.set(&known{config: &config.Config{}, services: &service.Snapshot{}})
		ctx, stop := context.WithCancel(t.Context())
		go func() {
			<-b.outcomes
			stop()
		}()
		d.run(ctx)
	}
	if left.removed != 1 || foreign.removed != 0 {
		t.Errorf("removed %d times what was left, %d times what is another's", left.removed, foreign.removed)
	}
}
