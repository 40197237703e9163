package kube

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func testCIDR(name string, ranges ...string) *cidr {
	return trimCIDR(&networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: ranges},
	})
}

// A range that others have addresses in is not refused to anybody, and named.
func TestReserve(t *testing.T) {
	t.Parallel()
	own := map[netip.Addr]bool{netip.MustParseAddr("10.0.0.1"): true, netip.MustParseAddr("2001:db8::1"): true}
	pods := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}
	endpoints := map[types.NamespacedName]netip.Addr{{Namespace: "shop", Name: "web"}: netip.MustParseAddr("192.0.2.7")}
	for _, c := range []struct {
		name    string
		cidrs   []*cidr
		want    string
		problem string // in the first one
	}{
		{"none", nil, "[]", ""},
		{"dual stack", []*cidr{testCIDR("kubernetes", "10.96.0.0/16", "2001:db8:96::/108")}, "[10.96.0.0/16 2001:db8:96::/108]", ""},
		{"two that say the same", []*cidr{testCIDR("a", "10.97.0.0/24"), testCIDR("b", "10.97.0.0/24", "10.96.0.0/24")}, "[10.96.0.0/24 10.97.0.0/24]", ""},
		{"the node's own", []*cidr{testCIDR("a", "10.0.0.0/24", "10.96.0.0/16")}, "[10.96.0.0/16]", "10.0.0.0/24 has the address 10.0.0.1 of this node"},
		{"all of IPv6", []*cidr{testCIDR("a", "::/0")}, "[]", "2001:db8::1"},
		{"of pods", []*cidr{testCIDR("a", "10.240.0.0/12")}, "[]", "addresses of pods (10.244.1.0/24)"},
		{"an endpoint", []*cidr{testCIDR("a", "192.0.2.0/29")}, "[]", "the endpoint 192.0.2.7 of the Service shop/web"},
		{"no range", []*cidr{testCIDR("a", "10.96.0.0")}, "[]", `"10.96.0.0" is no range`},
	} {
		got, problems := reserve(c.cidrs, own, pods, endpoints)
		if fmt.Sprint(got) != c.want {
			t.Errorf("%s: %v, want %s", c.name, got, c.want)
		}
		if (len(problems) > 0) != (c.problem != "") || c.problem != "" && !strings.Contains(problems[0].Message, c.problem) {
			t.Errorf("%s: problems %v, want %q", c.name, problems, c.problem)
		}
	}
}

// An endpoint with an address that only Services should have is found.
func TestStray(t *testing.T) {
	t.Parallel()
	at := testSurroundings()
	at.ranges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	s := trimService(testService(nil))
	for text, want := range map[string]string{"10.244.0.2@n1/z1": "invalid IP", "10.96.7.7@n1/z1": "10.96.7.7"} {
		if got := translate(s, []*slice{testSlice("a", text)}, at).stray; got.String() != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}
