package attach

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
)

func block(v4, v6 string) (b Block) {
	if v4 != "" {
		b.V4 = netip.MustParsePrefix(v4)
	}
	if v6 != "" {
		b.V6 = netip.MustParsePrefix(v6)
	}
	return b
}

// Each place of a block is given once, with names of its own that fit, and from the name
// of a device its address is known.
func TestSlots(t *testing.T) {
	for _, c := range []struct {
		v4, v6 string
		want   int
	}{
		{"10.244.1.0/26", "2001:db8:244:1::/122", 63},
		{"10.244.1.0/24", "2001:db8:244:1::/122", 63}, // the smaller one decides
		{"10.244.1.4/31", "", 1},
		{"", "2001:db8:244:1::/64", 1<<16 - 1},
		{"10.0.0.0/16", "", 1<<16 - 1},
	} {
		n := Network{Blocks: []Block{block(c.v4, c.v6)}}
		devices, macs := make(map[string]bool), make(map[string]bool)
		for s := range n.slots(netip.Addr{}) {
			name := s.device()
			if devices[name] || macs[s.mac().String()] || len(name) > 15 {
				t.Fatalf("%v: %s, %s is there twice, or too long", c, name, s.mac())
			}
			devices[name], macs[s.mac().String()] = true, true
			if s.v4.IsValid() {
				if !n.Blocks[0].V4.Contains(s.v4) || s.v4 == n.Blocks[0].V4.Addr() {
					t.Fatalf("%v: %s", c, s.v4)
				}
			}
			if s.v6.IsValid() && (!n.Blocks[0].V6.Contains(s.v6) || s.v6 == n.Blocks[0].V6.Addr()) {
				t.Fatalf("%v: %s", c, s.v6)
			}
		}
		if len(devices) != c.want {
			t.Errorf("%v: %d places, want %d", c, len(devices), c.want)
		}
	}
}

func TestWantedAddress(t *testing.T) {
	n := Network{Blocks: []Block{block("10.0.0.0/30", "2001:db8::/126"), block("10.0.1.0/30", "")}}
	for text, want := range map[string]string{"10.0.1.2": "10.0.1.2", "2001:db8::3": "10.0.0.3", "10.0.2.1": "", "10.0.0.0": ""} {
		got := ""
		for s := range n.slots(netip.MustParseAddr(text)) {
			got += s.v4.String()
		}
		if got != want {
			t.Errorf("for %s there is %q, want %q", text, got, want)
		}
	}
}

func TestAliases(t *testing.T) {
	a := Attachment{Owner: Owner{"pods", "7d3f", "eth0", "ns/web"}, V4: netip.MustParseAddr("10.0.0.1"), V6: netip.MustParseAddr("2001:db8::1")}
	got, ok := parseAlias(a.alias())
	if got.PodMAC = nil; !ok || got.Owner != a.Owner || got.V4 != a.V4 || got.V6 != a.V6 {
		t.Errorf("%q is %+v", a.alias(), got)
	}
	for _, alias := range []string{"", "pentad", "somebody else's device here, of which much is to be said", "pentad a b - - c d", "pentad a b 10.0.0.300 - c d"} {
		if got, ok := parseAlias(alias); ok {
			t.Errorf("%q is %+v", alias, got)
		}
	}
	// Names that Kubernetes allows, and those that nobody should have.
	for _, pod := range []string{strings.Repeat("n", 63) + "/" + strings.Repeat("x", 253), "", "a b\tc\n", strings.Repeat(" ", 40)} {
		a.Container, a.Pod = strings.Repeat("c", 64), pod
		got, ok := parseAlias(a.alias())
		if len(a.alias()) > maxAlias || !ok || got.Container != a.Container || got.V6 != a.V6 {
			t.Errorf("%q is %+v", a.alias(), got)
		}
	}
}

func TestNetworkFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "pods.json")
	if _, err := Read(path); err != ErrNoNetwork {
		t.Errorf("without a file: %v", err)
	}
	n := Network{MTU: 1450, Blocks: []Block{block("10.0.0.0/30", "2001:db8::/126"), block("10.0.1.0/30", "")}}
	if err := n.Write(path); err != nil {
		t.Fatal(err)
	}
	got, err := Read(path)
	if err != nil || got.MTU != 1450 || len(got.Blocks) != 2 || got.Blocks[0] != n.Blocks[0] || got.Blocks[1] != n.Blocks[1] {
		t.Errorf("it comes back as %+v, %v", got, err)
	}
}
