package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/nodehealth"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source/kube"
)

// fakePlane keeps what it is given, unless it fails.
type fakePlane struct {
	err  error
	last *service.Snapshot
}

func (p *fakePlane) Apply(_ context.Context, s *service.Snapshot) error {
	if p.err == nil {
		p.last = s
	}
	return p.err
}

func (*fakePlane) Intact() bool        { return true }
func (*fakePlane) Distrust()           {}
func (*fakePlane) Run(context.Context) {}

// Who is told that a drain failed does not see it happen later.
func TestDrainThatFails(t *testing.T) {
	backend := netip.MustParseAddrPort("192.0.2.11:80")
	plane := &fakePlane{}
	a := &Agent{
		log: slog.New(slog.DiscardHandler), plane: plane, state: make(map[health.Key]state), snapshot: &service.Snapshot{},
		drainOver: time.NewTimer(time.Hour),
		config:    &config.Config{Services: []*service.Service{{Name: "web", Backends: []service.Backend{{Address: backend, Weight: 1}}}}},
	}
	if err := a.apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	ask := func(r api.DrainRequest) error {
		r.Service, r.Address, r.Drained = "web", backend, true
		d := drain{r, make(chan error, 1)}
		_ = a.drain(t.Context(), d) // what the loop sees
		return <-d.done
	}
	plane.err = errors.New("the kernel has no memory")
	if err := ask(api.DrainRequest{}); !errors.Is(err, plane.err) {
		t.Errorf("the answer is %v", err)
	}
	plane.err = nil
	if err := a.apply(t.Context()); err != nil || plane.last.Services[0].Backends[0].Drained {
		t.Errorf("the drain that failed is in force (%v)", err)
	}
	if err := ask(api.DrainRequest{Timeout: -time.Hour}); !errors.Is(err, api.ErrRefused) {
		t.Errorf("a negative time: %v", err)
	}
	// What did not fit has nothing to do with it.
	plane.err = &socket.FullError{Services: []string{"other"}}
	if err := ask(api.DrainRequest{}); err != nil {
		t.Errorf("where something else did not fit: %v", err)
	}
}

type fakeNAT struct{ fakePlane }

func (*fakeNAT) Refused() []string { return nil }

// What is known of a backend goes with it: who gets its address is another one.
func TestStateGoesWithItsBackend(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	plane := &fakePlane{}
	a := &Agent{
		log: log, plane: plane, state: make(map[health.Key]state), snapshot: &service.Snapshot{}, drainOver: time.NewTimer(time.Hour),
		config: &config.Config{},
	}
	a.cluster = &cluster{
		known: true, nat: &fakeNAT{}, config: &config.Kubernetes{}, problems: make(map[kube.Problem]bool),
		health: nodehealth.New(a.nodeState, log),
	}
	pod, other := netip.MustParseAddrPort("192.0.2.11:80"), netip.MustParseAddrPort("192.0.2.12:80")
	update := func(backends ...netip.AddrPort) *service.Service {
		t.Helper()
		s := &service.Service{Name: "shop/web:http"}
		for _, b := range backends {
			s.Backends = append(s.Backends, service.Backend{Address: b, Weight: 1})
		}
		if err := a.takeCluster(t.Context(), kube.Update{Services: []*service.Service{s}}); err != nil {
			t.Fatal(err)
		}
		return plane.last.Services[0]
	}
	update(pod, other)
	for _, b := range []netip.AddrPort{pod, other} {
		d := drain{api.DrainRequest{Service: "shop/web:http", Address: b, Drained: true}, make(chan error, 1)}
		if err := a.drain(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	update(other)
	if s := update(pod, other); s.Backends[0].Drained || !s.Backends[1].Drained {
		t.Errorf("after one has gone and come: %+v", s.Backends)
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
