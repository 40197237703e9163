package flow

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/pentad/pentad/ipam"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
)

func question(dest string) Question {
	return Question{Destination: netip.MustParseAddrPort(dest), Protocol: service.TCP}
}

// view is what a table does: a service for all, one for pods, one whose backends are
// elsewhere, one for few.
func view() *nat.View {
	l := func(at string, from service.From) service.Listener {
		return service.Listener{Address: netip.MustParseAddrPort(at), Protocol: service.TCP, From: from}
	}
	all := service.FromPods | service.FromWorld
	near := nat.Share{Address: netip.MustParseAddrPort("10.244.1.2:8080"), Slots: 1, Local: true}
	far := nat.Share{Address: netip.MustParseAddrPort("10.244.2.2:8080"), Slots: 1}
	guarded := l("198.51.100.3:80", all)
	guarded.Guarded = true
	return &nat.View{
		Mappings: []nat.Mapping{
			{Service: "shop/web:http", Listener: l("10.96.0.1:80", all), Backends: []nat.Share{near, far}},
			{Service: "shop/local:http", Listener: l("198.51.100.1:80", service.FromPods), Backends: []nat.Share{far}},
			{Service: "shop/local:http/external", Listener: l("198.51.100.1:80", service.FromWorld), Dropped: true},
			{Service: "shop/pods:http", Listener: l("198.51.100.2:80", service.FromPods), Backends: []nat.Share{far}, Hashed: true},
			{Service: "shop/few:http", Listener: guarded, Backends: []nat.Share{near},
				Sources: []ipam.Range{{First: netip.MustParseAddr("192.0.2.0"), Last: netip.MustParseAddr("192.0.2.255")}}},
			{Service: "shop/none:http", Listener: l("10.96.0.2:80", all)},
		},
		Pods:     []ipam.Range{{First: netip.MustParseAddr("10.244.1.0"), Last: netip.MustParseAddr("10.244.1.255")}},
		Reserved: []ipam.Range{{First: netip.MustParseAddr("10.96.0.0"), Last: netip.MustParseAddr("10.96.255.255")}},
	}
}

func TestExplainPackets(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, dest string
		works      bool
		want       string
	}{
		{"192.0.2.7", "10.96.0.1:80", true, "of which 10.244.1.2:8080 would see 192.0.2.7, and 10.244.2.2:8080 an address of this host instead"},
		{"10.244.1.9", "10.96.0.1:80", true, "goes to one of 10.244.1.2:8080, 10.244.2.2:8080, which sees 10.244.1.9"},
		{"10.244.1.2", "10.96.0.1:80", true, "of which 10.244.2.2:8080 would see 10.244.1.2, and 10.244.1.2:8080 an address of this host"},
		{"192.0.2.7", "198.51.100.1:80", false, "dropped, because this host has no backend of the service shop/local:http/external and others have"},
		{"10.244.1.9", "198.51.100.1:80", true, "goes to 10.244.2.2:8080, which sees 10.244.1.9"},
		{"192.0.2.7", "198.51.100.2:80", false, "the service shop/pods:http is there for those of pods of this host only"},
		{"192.0.2.7", "198.51.100.3:80", true, "goes to 10.244.1.2:8080, which sees 192.0.2.7"},
		{"203.0.113.7", "198.51.100.3:80", false, "in none of the source ranges of the service shop/few:http: 192.0.2.0/24"},
		{"192.0.2.7", "10.96.0.2:80", false, "refused at 10.96.0.2:80, because no backend of the service shop/none:http is usable"},
		{"192.0.2.7", "10.96.9.9:80", false, "no Service has this address of the range 10.96.0.0/16"},
		{"192.0.2.7", "203.0.113.9:80", false, "go on as they are: it is no address of a service"},
		{"2001:db8::7", "10.96.0.1:80", false, "one is IPv4 and the other IPv6"},
	} {
		e := ExplainPackets(view(), netip.MustParseAddr(c.from), question(c.dest))
		if e.Works != c.works || !strings.Contains(e.Conclusion, c.want) {
			t.Errorf("from %s to %s: %v %s, want %q", c.from, c.dest, e.Works, e.Conclusion, c.want)
		}
	}
}

// What makes no sense in the cluster is told where it concerns the question.
func TestAddWarnings(t *testing.T) {
	t.Parallel()
	warnings := []string{
		"Service shop/web: externalIPs: 10.0.0.11 is an address of this node and not served",
		"Service shop/other: 10.0.0.12:30080/udp is not served for it: it belongs to the older Service shop/first",
		"Service shop/webs: annotation pentad.io/breaker: wrong",
	}
	for _, c := range []struct {
		dest     string
		services []string
		want     string // the numbers of warnings
	}{
		{"10.0.0.11:22", nil, "0"},
		{"10.0.0.12:30080", nil, "1"},
		{"10.0.0.12:30081", nil, ""},
		{"10.96.0.1:80", []string{"shop/web:http/internal", "shop/web:http"}, "0"},
		{"10.96.0.1:80", []string{"shop/webs:http"}, "2"},
		{"10.96.0.1:80", nil, ""},
	} {
		e := &Explanation{Conclusion: "It goes there."}
		e.AddWarnings(question(c.dest), c.services, warnings)
		found := ""
		for _, s := range e.Steps {
			for i, w := range warnings {
				if s.Found == w {
					found += string(rune('0' + i))
				}
			}
		}
		if found != c.want || (c.want != "") != strings.Contains(e.Conclusion, "in the cluster, Service") {
			t.Errorf("%s %v: %s, want %s; %s", c.dest, c.services, found, c.want, e.Conclusion)
		}
	}
}
