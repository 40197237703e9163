package ipam

import (
	"net/netip"
	"testing"
)

func TestBlocks(t *testing.T) {
	prefix := netip.MustParsePrefix
	both := BlockPool{V4: prefix("10.244.0.0/16"), V6: prefix("2001:db8:244::/48"), HostBits: 6}
	wide := BlockPool{V6: prefix("2001:db8::/32"), HostBits: 60}
	for _, x := range []struct {
		name string
		pool BlockPool
		i, n int
		want Block
	}{
		{"the first", both, 0, 1024, Block{prefix("10.244.0.0/26"), prefix("2001:db8:244::/122")}},
		{"one in the middle", both, 5, 1024, Block{prefix("10.244.1.64/26"), prefix("2001:db8:244::140/122")}},
		{"the last", both, 1023, 1024, Block{prefix("10.244.255.192/26"), prefix("2001:db8:244::ffc0/122")}},
		{"one of IPv4", BlockPool{V4: prefix("10.0.0.0/8"), HostBits: 8}, 65535, 65536, Block{V4: prefix("10.255.255.0/24")}},
		{"in the upper half of the address", wide, 0x123456, 1 << 24, Block{V6: prefix("2001:db8:1:2345:6000::/68")}},
		{"a pool of one block", BlockPool{V4: prefix("10.1.2.0/26"), HostBits: 6}, 0, 1, Block{V4: prefix("10.1.2.0/26")}},
		{"the smaller family counts", BlockPool{V4: prefix("10.1.0.0/16"), V6: prefix("2001:db8::/120"), HostBits: 6}, 3, 4, Block{prefix("10.1.0.192/26"), prefix("2001:db8::c0/122")}},
	} {
		t.Run(x.name, func(t *testing.T) {
			if n := x.pool.Blocks(); n != x.n {
				t.Errorf("it has %d blocks, want %d", n, x.n)
			}
			b := x.pool.Block(x.i)
			if b != x.want {
				t.Errorf("block %d is %v, want %v", x.i, b, x.want)
			}
			if back, ok := x.pool.Find(b.Name()); !ok || back != b {
				t.Errorf("%s is found as %v (%v)", b.Name(), back, ok)
			}
		})
	}
	for _, name := range []string{"10.244.0.0/25", "10.245.0.0/26", "2001:db8:244::/122", "10.244.0.1/26"} {
		if b, ok := both.Find(prefix(name)); ok {
			t.Errorf("%s is no block, and found as %v", name, b)
		}
	}
	if _, ok := both.Find(netip.Prefix{}); ok {
		t.Error("nothing is a block")
	}
}

// Every block is found by its name, and no two overlap, wherever the carry goes.
func TestBlocksAreApart(t *testing.T) {
	for _, p := range []BlockPool{
		{V4: netip.MustParsePrefix("10.0.0.0/20"), V6: netip.MustParsePrefix("2001:db8::ffff:ffff:ffff:0/108"), HostBits: 4},
		{V6: netip.MustParsePrefix("2001:db8:0:fff0::/60"), HostBits: 58},
	} {
		last := Block{}
		for i := range p.Blocks() {
			b := p.Block(i)
			if back, ok := p.Find(b.Name()); !ok || back != b {
				t.Fatalf("block %d, %v, is found as %v (%v)", i, b, back, ok)
			}
			if back, ok := p.FindV6(b.V6.Addr().Next()); p.V4.IsValid() && (!ok || back != b) {
				t.Fatalf("block %d, %v, is found by its IPv6 address as %v (%v)", i, b, back, ok)
			}
			for _, x := range b.Prefixes() {
				if x != x.Masked() {
					t.Fatalf("block %d: %v begins in its middle", i, x)
				}
			}
			if i > 0 && last.Overlaps(b) {
				t.Fatalf("%v and %v overlap", last, b)
			}
			last = b
		}
	}
}
