package nat

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// A plane that finds what it would make itself makes no transaction at all.
func TestAdoptWritesNothing(t *testing.T) {
	h := machine(t)
	s := &service.Service{
		Name: "web", Affinity: time.Minute, Sources: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")},
		Listeners: []service.Listener{
			{Address: netip.MustParseAddrPort("10.96.0.1:80"), Protocol: service.TCP, Guarded: true},
			{Address: netip.MustParseAddrPort("[2001:db8::1]:80"), Protocol: service.UDP},
		},
		Backends: []service.Backend{
			{Address: netip.MustParseAddrPort("10.1.0.1:80"), Weight: 1, Local: true}, {Address: netip.MustParseAddrPort("10.1.0.2:80"), Weight: 3},
			{Address: netip.MustParseAddrPort("[2001:db8:1::1]:80"), Weight: 1},
		},
	}
	plain := *s
	plain.Name, plain.Affinity, plain.Listeners = "plain", 0, []service.Listener{{Address: netip.MustParseAddrPort("10.96.0.2:80"), Protocol: service.TCP}}
	none := &service.Service{Name: "none", Listeners: []service.Listener{{Address: netip.MustParseAddrPort("10.96.0.3:80"), Protocol: service.TCP}}}
	want := Want{Services: (&service.Snapshot{}).Next([]*service.Service{s, &plain, none}), Ranges: Ranges{Pods: []netip.Prefix{
		netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("2001:db8:1::/64"),
	}}}
	if err := h.Do(func() error {
		if err := New(nil).Apply(t.Context(), want); err != nil {
			return err
		}
		before, err := nft.Generation()
		if err != nil {
			return err
		}
		if err := New(nil).Apply(t.Context(), want); err != nil {
			return err
		}
		after, err := nft.Generation()
		if err == nil && after != before {
			t.Errorf("generation %d became %d", before, after)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
