package agent

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/pentad/pentad/claim"
	"github.com/pentad/pentad/config"
)

func TestHostsOfBlocks(t *testing.T) {
	prefix, address := netip.MustParsePrefix, netip.MustParseAddr
	me := claim.Owner{Name: "me"}
	block := func(owner, v4, v6 string, addresses ...string) claim.Block {
		b := claim.Block{Owner: claim.Owner{Name: owner}}
		if v4 != "" {
			b.V4 = prefix(v4)
		}
		if v6 != "" {
			b.V6 = prefix(v6)
		}
		for _, a := range addresses {
			b.Addresses = append(b.Addresses, address(a))
		}
		return b
	}
	blocks := []claim.Block{
		block("me", "10.244.0.0/26", "2001:db8:244::/122", "198.51.100.1"),
		block("b", "10.244.0.64/26", "2001:db8:244::40/122", "2001:db8::2", "198.51.100.2"),
		block("b", "10.244.0.128/26", "", "2001:db8::2", "198.51.100.2"),
		block("nowhere", "10.244.0.192/26", ""),
		block("six", "10.244.1.0/26", "", "2001:db8::6"),
		block("", "10.244.1.64/26", "", "198.51.100.3"),
		// Of a time in which blocks were larger; nobody else has any of it.
		block("old", "10.244.8.0/24", "", "198.51.100.4"),
		// Who draws packets of others to himself.
		block("thief", "0.0.0.0/0", "", "198.51.100.66"),
		block("thief", "198.51.100.0/24", "", "198.51.100.66"),
		block("thief", "10.244.0.0/17", "", "198.51.100.66"),
		block("thief", "10.244.0.96/28", "", "198.51.100.66"),
		block("thief", "10.244.2.0/26", "2001:db8:244::40/122", "198.51.100.66"),
	}
	c := config.Pods{Ranges: []netip.Prefix{prefix("10.244.0.0/16"), prefix("2001:db8:244::/48")}, BlockSize: 26, Overlay: config.OverlayVXLAN}
	hosts := hostsOf(blocks, me, c)
	var names []string
	for _, h := range hosts {
		names = append(names, h.Name)
		if h.Name == "b" && (h.Addresses[0] != address("198.51.100.2") || !slices.Equal(h.Blocks, []netip.Prefix{prefix("10.244.0.64/26"), prefix("2001:db8:244::40/122"), prefix("10.244.0.128/26")})) {
			t.Errorf("host b is %+v", h)
		}
	}
	if !slices.Equal(names, []string{"b", "me", "old"}) {
		t.Errorf("packets are led to %v", names)
	}
	if blocks[1].Addresses[0] != address("2001:db8::2") {
		t.Error("what was known was changed")
	}
	if all := hostsOf(blocks[1:], me, c); slices.ContainsFunc(all, func(h config.PodHost) bool { return h.Name == "me" }) {
		t.Errorf("a host without a block has %v", all)
	}
	c.Overlay = config.OverlayDirect
	if all := hostsOf(blocks, me, c); len(all) != 5 {
		t.Errorf("without tunnels there are %v", all)
	}
}
