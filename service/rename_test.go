package service

import (
	"fmt"
	"net/netip"
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
