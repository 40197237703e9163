package service

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// Each backend is written as group, weight and what is the matter with it: e ejected,
// f full, x down, d drained. What the choice makes of it is its state, with an asterisk
// where the next connection may go there.
func TestChoose(t *testing.T) {
	for _, c := range []struct {
		name, backends, want string
		panics               bool
	}{
		{"all well", "0 0 1", "serving* serving* standby", false},
		{"a group is out", "0x 0d 1", "down drained serving*", false},
		{"half is ejected", "0e 0 1", "ejected serving* standby", false},
		{"more than half is ejected and another can serve", "0e 0e 0 1", "ejected ejected standby serving*", false},
		{"more than half is ejected and none else", "0e 0e 0", "ejected* ejected* serving*", true},
		{"more than half everywhere", "0e 1e", "ejected* ejected", true},
		{"one is full", "0f 0", "full serving*", false},
		{"all are full", "0f 0f", "full full", false},
		{"all are full and another group", "0f 1", "full serving*", false},
		{"full and ejected", "0f 0e", "full ejected", false},
		{"full and ejected, in panic", "0f 0e 0e", "full ejected* ejected*", true},
		{"weight 0", "0w 0", "weight 0 serving*", false},
		{"weight 0 alone", "0w", "weight 0", false},
		{"weight 0 and drained", "0wd", "drained", false},
		{"none", "", "", false},
	} {
		s := &Service{Breaker: Breaker{MaxConnections: 3, Failures: 1, MaxEjected: 50}}
		loads := make(map[netip.AddrPort]Load)
		for i, word := range strings.Fields(c.backends) {
			b := Backend{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), 80), Weight: 1, Group: uint32(word[0] - '0')}
			var l Load
			for _, mark := range word[1:] {
				switch mark {
				case 'e':
					l.Ejected = true
				case 'f':
					l.InFlight = 3
				case 'x':
					b.Down = true
				case 'd':
					b.Drained = true
				case 'w':
					b.Weight = 0
				}
			}
			loads[b.Address] = l
			s.Backends = append(s.Backends, b)
		}
		// The other family has nothing to do with it.
		s.Backends = append(s.Backends, Backend{Address: netip.MustParseAddrPort("[2001:db8::1]:80"), Weight: 1})
		choice := s.Choose(V4, func(b Backend) Load { return loads[b.Address] })
		var have []string
		for _, x := range choice.Candidates {
			mark := ""
			if x.Takes {
				mark = "*"
			}
			have = append(have, fmt.Sprint(x.State, mark))
		}
		if strings.Join(have, " ") != c.want || choice.Panic != c.panics {
			t.Errorf("%s: %v, panic %t; want %s", c.name, have, choice.Panic, c.want)
		}
	}
}
