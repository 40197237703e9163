package nat

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/service"
)

// host returns a host that is gone after the test.
func machine(t *testing.T) *lab.Host {
	t.Helper()
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
	if err := h.Forward(); err != nil {
		t.Fatal(err)
	}
	return h
}

// warnings returns what a plane has to say on a machine.
func warnings(t *testing.T, h *lab.Host, p *Plane) (all []string) {
	t.Helper()
	if err := h.Do(func() error {
		all = p.Warnings()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// randomService wants listeners of a few that all want, in every combination, and
// has endpoints of a few that all have.
func randomService(r *rand.Rand, name string) *service.Service {
	maybe := func() bool { return r.IntN(2) == 0 }
	s := &service.Service{Name: name, Elsewhere: service.Families{V4: maybe(), V6: maybe()}}
	if r.IntN(3) == 0 {
		s.Affinity = time.Duration(10+r.IntN(2)) * time.Second
	}
	if r.IntN(4) == 0 {
		s.Balance = service.SourceHash
	}
	for range 1 + r.IntN(4) {
		l := service.Listener{
			Address:  netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(r.IntN(4))}), uint16(80+r.IntN(2))),
			Protocol: []service.Protocol{service.TCP, service.UDP}[r.IntN(2)],
			From:     service.From(r.IntN(int(service.Anywhere) + 1)), Guarded: maybe(), Held: maybe(),
		}
		if maybe() {
			l.Address = netip.AddrPortFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(r.IntN(3))}), 80)
		}
		s.Listeners = append(s.Listeners, l)
	}
	slices.SortFunc(s.Listeners, service.Listener.Compare)
	for _, p := range []string{"192.0.2.0/24", "192.0.2.128/25", "198.51.100.0/24", "2001:db8::/32", "2001:db8:1::/48"} {
		if maybe() {
			s.Sources = append(s.Sources, netip.MustParsePrefix(p))
		}
	}
	for i := range 4 {
		for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(i)}), netip.AddrFrom16([16]byte{0xfd, 15: byte(i)})} {
			if maybe() {
				s.Backends = append(s.Backends, service.Backend{Address: netip.AddrPortFrom(a, 8080), Weight: uint32(r.IntN(3)), Local: maybe()})
			}
		}
	}
	return s
}

// table is what the kernel has, in an order.
func table(t *testing.T, h *lab.Host) []element {
	t.Helper()
	var all []element
	err := h.Do(func() error {
		k, err := dial()
		if err != nil {
			return err
		}
		defer k.close()
		all, err = k.elements()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(all, func(a, b element) int {
		return strings.Compare(fmt.Sprintf("%+v", a), fmt.Sprintf("%+v", b))
	})
	return all
}

// Whatever services want, and in whatever order they came to it, the kernel has the
// same as after a start with what they want now; and nothing is refused on the way.
func TestHistories(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	h := machine(t)
	var log bytes.Buffer
	p := New(slog.New(slog.NewTextHandler(&log, nil)))
	ranges := Ranges{
		Pods: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/30")}, Reserved: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/30")},
		Untracked: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
	}
	snap := &service.Snapshot{}
	services := make(map[string]*service.Service)
	for step := range 150 {
		for range 1 + r.IntN(3) {
			name := fmt.Sprintf("s-%d", r.IntN(7))
			if r.IntN(5) == 0 {
				delete(services, name)
			} else {
				services[name] = randomService(r, name)
			}
		}
		var list []*service.Service
		for _, s := range services {
			list = append(list, s)
		}
		snap = snap.Next(list)
		if err := h.Do(func() error { return p.Apply(t.Context(), Want{snap, ranges}) }); err != nil {
			t.Fatalf("seed %d, step %d: %v", seed, step, err)
		}
		if step%10 != 9 {
			continue
		}
		fresh := machine(t)
		if err := fresh.Do(func() error { return New(nil).Apply(t.Context(), Want{snap, ranges}) }); err != nil {
			t.Fatalf("seed %d, step %d: %v", seed, step, err)
		}
		have, want := table(t, h), table(t, fresh)
		if !slices.Equal(have, want) {
			t.Fatalf("seed %d, step %d: %d elements after a history, %d after a start:\n%+v\n%+v", seed, step, len(have), len(want), have, want)
		}
	}
	if said := warnings(t, h, p); log.Len() > 0 || len(said) > 0 {
		t.Errorf("seed %d: %s %v", seed, log.String(), said)
	}
}

// What services that share no listener have is what each has alone.
func TestServicesAreIndependent(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 2))
	for range 1000 {
		a, b := randomService(r, "a"), randomService(r, "b")
		both := make(holders)
		both.add(b)
		both.add(a)
		for at, of := range both {
			if len(of) > 1 {
				continue
			}
			alone := elementsAt(at, of, make(slotTable), make(map[string]chain))
			for _, s := range []*service.Service{a, b} {
				single := make(holders)
				single.add(s)
				if s == of[0] && !slices.Equal(alone, elementsAt(at, single[at], make(slotTable), make(map[string]chain))) {
					t.Fatalf("seed %d: %s of %+v is another one beside others", seed, at, s)
				}
			}
		}
	}
}

// However long names are, every service arrives.
func TestLongNames(t *testing.T) {
	for _, n := range []int{40, 143, service.MaxName} {
		h := machine(t)
		var all []*service.Service
		for i := range 400 {
			name := fmt.Sprintf("s%04d-", i)
			all = append(all, &service.Service{
				Name: name + strings.Repeat("n", n-len(name)),
				Listeners: []service.Listener{{
					Address: netip.AddrPortFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: byte(i >> 8), 15: byte(i)}), 80), Protocol: service.TCP,
				}},
				Backends: []service.Backend{{Address: netip.MustParseAddrPort("[2001:db8:1::1]:80"), Weight: 1}},
			})
		}
		if err := h.Do(func() error { return New(nil).Apply(t.Context(), Want{Services: (&service.Snapshot{}).Next(all)}) }); err != nil {
			t.Fatal(err)
		}
		if err := h.Do(func() error {
			v, err := Read()
			if err == nil && len(v.Mappings) != len(all) {
				err = fmt.Errorf("%d of %d services with names of %d bytes have arrived", len(v.Mappings), len(all), n)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
}

// What the kernel refuses is named, and keeps nothing else from being served: not
// when it comes, not from a start, and not when the table is made anew.
func TestRefusal(t *testing.T) {
	h := machine(t)
	good := func(i, backend int) *service.Service {
		return &service.Service{
			Name: fmt.Sprintf("good-%d", i),
			Listeners: []service.Listener{{
				Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), 80), Protocol: service.TCP,
			}},
			Backends: []service.Backend{{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, byte(backend)}), 80), Weight: 1}},
		}
	}
	var services []*service.Service
	for i := range 20 {
		services = append(services, good(i, 1))
	}
	// Longer than the kernel lets a comment be, and than any source lets a name be.
	bad := good(200, 1)
	bad.Name = strings.Repeat("bad", 150)
	snap := (&service.Snapshot{}).Next(services)
	p := New(nil)
	apply := func(p *Plane, services []*service.Service) {
		t.Helper()
		snap = snap.Next(services)
		if err := h.Do(func() error { return p.Apply(context.Background(), Want{Services: snap}) }); err != nil {
			t.Fatal(err)
		}
	}
	served := func(p *Plane, backend int, refused bool) {
		t.Helper()
		if err := h.Do(func() error {
			v, err := Read()
			if err != nil {
				return err
			}
			if len(v.Mappings) != 20 {
				t.Errorf("%d of 20 services are served", len(v.Mappings))
			}
			for _, e := range table(t, h) {
				if e.in.name == setSlots && splitTarget(e.data, service.V4).Addr().As4()[3] != byte(backend) {
					t.Errorf("one is led to %s", splitTarget(e.data, service.V4))
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		said := strings.Join(warnings(t, h, p), "\n")
		if strings.Contains(said, bad.Name) != refused || strings.Contains(said, "good") {
			t.Errorf("refused: %q", said)
		}
	}
	apply(p, services)
	served(p, 1, false)
	apply(p, append(slices.Clone(services), bad))
	served(p, 1, true)
	// Others change while it is there.
	for i := range services {
		services[i] = good(i, 2)
	}
	apply(p, append(slices.Clone(services), bad))
	served(p, 2, true)
	p = New(nil)
	apply(p, append(slices.Clone(services), bad))
	served(p, 2, true)
	if err := h.Do(Remove); err != nil {
		t.Fatal(err)
	}
	p = New(nil)
	apply(p, append(slices.Clone(services), bad))
	served(p, 2, true)
	apply(p, services)
	served(p, 2, false)
}
