package pod

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/pentad/pentad/config"
)

func hostOf(name string, addresses []string, blocks ...string) config.PodHost {
	h := config.PodHost{Name: name}
	for _, a := range addresses {
		h.Addresses = append(h.Addresses, netip.MustParseAddr(a))
	}
	for _, b := range blocks {
		h.Blocks = append(h.Blocks, netip.MustParsePrefix(b))
	}
	return h
}

func TestReach(t *testing.T) {
	c := config.Pods{Hosts: []config.PodHost{
		hostOf("a", []string{"198.51.100.11", "2001:db8::11"}, "10.1.0.0/24", "2001:db8:1::/120"),
		hostOf("b", []string{"198.51.100.12"}, "10.2.0.0/24", "10.3.0.0/24", "2001:db8:2::/120"),
	}}
	hops := func(o config.Overlay, self string) map[string]string {
		c.Overlay = o
		got := make(map[string]string)
		for p, h := range reachOf(c, self).hops {
			got[p.String()] = h.via.String()
		}
		return got
	}
	for _, x := range []struct {
		overlay config.Overlay
		self    string
		want    map[string]string
	}{
		{config.OverlayNone, "a", map[string]string{}},
		// Of a family in which a host has no address nothing leads to it.
		{config.OverlayDirect, "a", map[string]string{"10.2.0.0/24": "198.51.100.12", "10.3.0.0/24": "198.51.100.12"}},
		{config.OverlayDirect, "b", map[string]string{"10.1.0.0/24": "198.51.100.11", "2001:db8:1::/120": "2001:db8::11"}},
		{config.OverlayVXLAN, "a", map[string]string{"10.2.0.0/24": "10.2.0.0", "10.3.0.0/24": "10.2.0.0", "2001:db8:2::/120": "2001:db8:2::"}},
	} {
		if got := hops(x.overlay, x.self); !maps.Equal(got, x.want) {
			t.Errorf("overlay %d, on %s: %v, want %v", x.overlay, x.self, got, x.want)
		}
	}
	// Both ends of a tunnel say the same of one.
	c.Overlay = config.OverlayVXLAN
	a, b := reachOf(c, "a"), reachOf(c, "b")
	if a.neighbours[0].mac != b.own.mac || !slices.Equal(a.neighbours[0].inner, b.own.inner) || b.neighbours[0].outer != a.own.outer {
		t.Errorf("a says %+v of b, which is %+v", a.neighbours[0], b.own)
	}
}

func TestSelf(t *testing.T) {
	hosts := []config.PodHost{hostOf("a", []string{"198.51.100.11"}), hostOf("b", []string{"198.51.100.12", "2001:db8::12"})}
	if h, err := selfIn(hosts, map[netip.Addr]bool{netip.MustParseAddr("2001:db8::12"): true}); err != nil || h.Name != "b" {
		t.Errorf("this host is %s, %v", h.Name, err)
	}
	if _, err := selfIn(hosts, nil); err != errNotListed {
		t.Errorf("a host that is not listed: %v", err)
	}
}
