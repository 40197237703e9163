package socket_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Nothing waits for a walk over the sockets: no change and no look at the plane; other
// programs end it.
func TestNothingWaitsForChores(t *testing.T) {
	lab.Need(t)
	h, err := lab.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	p := socket.New(socket.Options{Pins: h.Pins, Version: "test"})
	defer p.Close()
	snap := &service.Snapshot{}
	change := func(weight uint32) {
		t.Helper()
		snap = snap.Next([]*service.Service{{
			Name:      "dns",
			Listeners: []service.Listener{{Address: netip.MustParseAddrPort("192.0.2.53:53"), Protocol: service.UDP}},
			Backends:  []service.Backend{{Address: netip.MustParseAddrPort("192.0.2.1:53"), Weight: weight}},
		}})
		if err := p.Apply(t.Context(), socket.Want{Cgroup: h.Scope(), Services: snap}); err != nil {
			t.Fatal(err)
		}
	}
	change(1)
	walker := p.Walk()
	done := make(chan struct{})
	go func() {
		defer close(done)
		change(2)
		if !p.Intact() {
			t.Error("it is not intact")
		}
		if _, err := p.Usage(); err != nil {
			t.Error(err)
		}
		if walker.Ended() {
			t.Error("the walk was ended, for a change that needs no other programs")
		}
		p.Distrust()
		change(3)
		if walker.Of(p) || !walker.Ended() {
			t.Error("the walk goes on with programs that were replaced")
		}
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("a change waits for the walk")
	}
	if err := walker.Again(t.Context()); !errors.Is(err, socket.ErrEnded) {
		t.Errorf("who comes late: %v", err)
	}
}
