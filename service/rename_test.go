package service

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

func at(name string, ports ...uint16) *Service {
	s := &Service{Name: name}
	for _, p := range ports {
		s.Listeners = append(s.Listeners, Listener{Address: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), p), Protocol: TCP})
	}
	return s
}

func TestRenamed(t *testing.T) {
	for _, c := range []struct {
		name     string
		from, to []*Service
		want     map[string]string
	}{
		{"nothing", []*Service{at("a", 1)}, []*Service{at("a", 1)}, nil},
		{"one", []*Service{at("a", 1)}, []*Service{at("b", 1)}, map[string]string{"b": "a"}},
		{"one that listens elsewhere, too", []*Service{at("a", 1, 2)}, []*Service{at("b", 2, 3)}, map[string]string{"b": "a"}},
		{"two that change their names", []*Service{at("a", 1), at("b", 2)}, []*Service{at("a", 2), at("b", 1)}, map[string]string{"a": "b", "b": "a"}},
		{"a listener that moves", []*Service{at("a", 1, 2), at("b", 3)}, []*Service{at("a", 1), at("b", 2, 3)}, nil},
		{"one that is divided", []*Service{at("a", 1, 2)}, []*Service{at("b", 1), at("c", 2)}, map[string]string{"b": "a"}},
		{"two that become one", []*Service{at("a", 1), at("b", 2)}, []*Service{at("c", 1, 2)}, map[string]string{"c": "a"}},
		{"another one", []*Service{at("a", 1)}, []*Service{at("b", 2)}, nil},
		{"in a ring", []*Service{at("a", 1), at("b", 2), at("c", 3)}, []*Service{at("a", 2), at("b", 3), at("c", 1)},
			map[string]string{"a": "b", "b": "c", "c": "a"}},
		{"the old name goes on with something else", []*Service{at("a", 1)}, []*Service{at("a", 2), at("b", 1)}, map[string]string{"b": "a"}},
	} {
		if have := Renamed(c.from, c.to); fmt.Sprint(have) != fmt.Sprint(c.want) {
			t.Errorf("%s: %v, want %v", c.name, have, c.want)
		}
	}
}

// What did not move is left out of the search, and that changes nothing: the search
// among all finds the same.
func TestRenamedAmongMany(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 3000 {
		from, to := randomListeners(r), randomListeners(r)
		for i := range to { // much stays
			if k := slices.IndexFunc(from, func(s *Service) bool { return s.Name == to[i].Name }); k >= 0 && r.IntN(2) == 0 {
				to[i] = from[k]
			}
		}
		owners := make(map[Listener]string)
		for _, s := range to {
			for _, l := range s.Listeners {
				owners[l] += s.Name
			}
		}
		if slices.ContainsFunc(slices.Collect(maps.Values(owners)), func(names string) bool { return len(names) > 1 }) {
			continue // two want the same, which no snapshot has
		}
		have := Renamed(from, to)
		if want := renamedOf(from, to); !maps.Equal(have, want) {
			t.Fatalf("found %v, among all %v", have, want)
		}
	}
}

func randomListeners(r *rand.Rand) []*Service {
	ports := r.Perm(8)
	var all []*Service
	for i := range 1 + r.IntN(4) {
		s := &Service{Name: string(rune('a' + i + r.IntN(2)))}
		if i > 0 && all[i-1].Name >= s.Name {
			break
		}
		for range 1 + r.IntN(2) {
			s.Listeners = append(s.Listeners, Listener{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, 1}), uint16(ports[0]))})
			ports = ports[1:]
		}
		slices.SortFunc(s.Listeners, Listener.Compare)
		all = append(all, s)
	}
	return all
}
