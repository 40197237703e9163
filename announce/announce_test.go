package announce

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/pentad/pentad/service"
)

func snapshot(services ...*service.Service) *service.Snapshot {
	return (&service.Snapshot{}).Next(services)
}

// of makes a service with listeners, and one backend a family.
func of(name string, f service.Forward, usable bool, listeners ...string) *service.Service {
	s := &service.Service{Name: name, Forward: f, Source: service.SourceFile}
	for _, l := range listeners {
		s.Listeners = append(s.Listeners, service.Listener{Address: netip.MustParseAddrPort(l), Protocol: service.TCP})
	}
	for _, b := range []string{"10.0.0.1:80", "[2001:db8::1]:80"} {
		s.Backends = append(s.Backends, service.Backend{Address: netip.MustParseAddrPort(b), Weight: 100, Down: !usable})
	}
	return s
}

func TestVIPs(t *testing.T) {
	inCluster := func(public bool, s *service.Service) *service.Service {
		s.Source = service.SourceKubernetes
		for i := range s.Listeners {
			s.Listeners[i].Public = public
		}
		return s
	}
	// With externalTrafficPolicy: Local sockets and pods of the node go to other nodes, too.
	within := func(s *service.Service) *service.Service {
		s.Listeners[0].From = service.FromPods | service.FromHost
		return s
	}
	everything := []*service.Service{
		of("direct", service.ForwardDirect, true, "192.0.2.1:80", "[2001:db8:1::1]:80"),
		of("nat", service.ForwardNAT, true, "192.0.2.2:80", "192.0.2.2:443"),
		of("none", service.ForwardNone, true, "192.0.2.3:80"),
		of("dead", service.ForwardNAT, false, "192.0.2.4:80"),
		of("half", service.ForwardNAT, false, "192.0.2.2:81"),
		of("unheard", service.ForwardNAT, true, "192.0.2.2:82"),
		of("own", service.ForwardNAT, true, "127.0.0.7:80", "[fe80::7]:80"),
		inCluster(true, of("balancer", service.ForwardNAT, true, "192.0.2.5:80")),
		within(inCluster(true, of("balancer-inside", service.ForwardNAT, true, "192.0.2.6:80"))),
		inCluster(false, of("cluster-ip", service.ForwardNAT, true, "10.96.0.1:80")),
	}
	all := snapshot(everything...)
	both := Standing{service.ForwardNAT: all, service.ForwardDirect: all}
	for _, c := range []struct {
		name    string
		directs bool
		in      Standing
		want    string // address=services/working, and ! with what is missing
	}{
		{"everything stands", true, both, "192.0.2.1=direct/direct 192.0.2.2=half,nat,unheard/nat 192.0.2.4=dead/!no backend of the service dead is usable 192.0.2.5=balancer/balancer 2001:db8:1::1=direct/direct"},
		{"no director", false, both, "192.0.2.2=half,nat,unheard/nat 192.0.2.4=dead/!no backend of the service dead is usable 192.0.2.5=balancer/balancer"},
		{"nothing is in the kernel", false, nil, "192.0.2.2=half,nat,unheard/!no backend of the service half is usable, and it is not in the kernel yet (forward: nat) 192.0.2.4=dead/!no backend of the service dead is usable 192.0.2.5=balancer/!it is not in the kernel yet (forward: nat)"},
		{"the kernel has another service", false, Standing{service.ForwardNAT: snapshot(everything[7])},
			"192.0.2.2=half,nat,unheard/!no backend of the service half is usable, and the service nat is not in the kernel yet (forward: nat), and the service unheard is not in the kernel yet (forward: nat) 192.0.2.4=dead/!no backend of the service dead is usable 192.0.2.5=balancer/balancer"},
		{"the kernel thinks that nobody is usable", false, Standing{service.ForwardNAT: snapshot(of("nat", service.ForwardNAT, false, "192.0.2.2:80", "192.0.2.2:443"), everything[7])},
			"192.0.2.2=half,nat,unheard/!no backend of the service half is usable, and the kernel does not know yet which backends of the service nat are usable, and the service unheard is not in the kernel yet (forward: nat) 192.0.2.4=dead/!no backend of the service dead is usable 192.0.2.5=balancer/balancer"},
	} {
		var got []string
		for _, v := range VIPs(all, c.directs, c.in, map[string]bool{"unheard": true}) {
			text := v.Address.String() + "=" + strings.Join(v.Services, ",") + "/" + strings.Join(v.Working, ",")
			if v.Missing != "" {
				text += "!" + v.Missing
			}
			got = append(got, text)
		}
		if g := strings.Join(got, " "); g != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, g, c.want)
		}
	}
}

func TestToldAndPrefixes(t *testing.T) {
	vip := func(a string, working ...string) VIP {
		return VIP{Address: netip.MustParseAddr(a), Services: []string{"web", "mail"}, Working: working}
	}
	all := []VIP{vip("192.0.2.1", "web"), vip("192.0.2.2", "mail"), vip("192.0.2.3"), vip("198.51.100.1", "web", "mail"), vip("2001:db8::1", "web")}
	aggregates := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("192.0.2.2/31"), netip.MustParsePrefix("203.0.113.0/24")}
	prefixes := func(of ...string) (p []netip.Prefix) {
		for _, x := range of {
			p = append(p, netip.MustParsePrefix(x))
		}
		return p
	}
	for _, c := range []struct {
		services   []string
		aggregates []netip.Prefix
		want       []netip.Prefix
	}{
		{nil, nil, prefixes("192.0.2.1/32", "192.0.2.2/32", "198.51.100.1/32", "2001:db8::1/128")},
		{[]string{"mail"}, nil, prefixes("192.0.2.2/32", "198.51.100.1/32")},
		{nil, aggregates, prefixes("192.0.2.0/24", "198.51.100.1/32", "2001:db8::1/128")},
		{[]string{"web"}, aggregates[1:], prefixes("192.0.2.1/32", "198.51.100.1/32", "2001:db8::1/128")},
		{[]string{"nobody"}, aggregates, nil},
	} {
		if got := Prefixes(Told(all, c.services), c.aggregates); !reflect.DeepEqual(got, c.want) && len(got)+len(c.want) > 0 {
			t.Errorf("of %v with %v: %v, want %v", c.services, c.aggregates, got, c.want)
		}
	}
}
