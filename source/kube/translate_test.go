package kube

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

func ptr[T any](v T) *T { return &v }

// here is node n1 in zone z1.
func testSurroundings() *surroundings {
	return &surroundings{
		node: unique.Make("n1"), zone: unique.Make("z1"),
		nodePorts: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1")},
		own:       map[netip.Addr]bool{netip.MustParseAddr("10.0.0.1"): true, netip.MustParseAddr("192.0.2.1"): true},
		allowed:   []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")},
	}
}

func testService(change func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.0.10", ClusterIPs: []string{"10.96.0.10"},
			Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, NodePort: 0}},
		},
	}
	if change != nil {
		change(s)
	}
	return s
}

// testEndpoint is ADDRESS@NODE/ZONE followed by letters: u unready, s serving though
// unready, t terminating; and hints z:ZONE and n:NODE.
func testEndpoint(text string) discoveryv1.Endpoint {
	words := strings.Fields(text)
	address, where, _ := strings.Cut(words[0], "@")
	node, zone, _ := strings.Cut(where, "/")
	e := discoveryv1.Endpoint{Addresses: []string{address}, NodeName: &node, Zone: &zone}
	ready, serving, terminating := true, true, false
	for _, w := range words[1:] {
		key, value, hint := strings.Cut(w, ":")
		if hint && e.Hints == nil {
			e.Hints = &discoveryv1.EndpointHints{}
		}
		switch {
		case hint && key == "z":
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: value})
		case hint:
			e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: value})
		default:
			ready = ready && !strings.ContainsAny(w, "ut")
			serving = !strings.Contains(w, "u") || strings.Contains(w, "s")
			terminating = strings.Contains(w, "t")
		}
	}
	e.Conditions = discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating}
	return e
}

func testSlice(name string, endpoints ...string) *slice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports: []discoveryv1.EndpointPort{
			{Name: ptr("http"), Protocol: ptr(corev1.ProtocolTCP), Port: ptr(int32(8080))},
			{Name: ptr("dns"), Protocol: ptr(corev1.ProtocolUDP), Port: ptr(int32(5353))},
		},
	}
	for _, e := range endpoints {
		s.Endpoints = append(s.Endpoints, testEndpoint(e))
	}
	return trimSlice(s)
}

// places names the clients of a listener by letters.
func places(f service.From) string {
	text := ""
	for i, letter := range "shgw" {
		if f&(1<<i) != 0 {
			text += string(letter)
		}
	}
	return text
}

// show writes services as a test expects them: name, listeners with their clients,
// H held and G guarded, and the backends that are chosen; those that are not in
// parentheses.
func show(all []*service.Service) string {
	var lines []string
	for _, s := range all {
		words := []string{s.Name}
		for _, l := range s.Listeners {
			w := l.String() + "=" + places(l.From)
			if l.Held {
				w += "H"
			}
			if l.Guarded {
				w += "G"
			}
			words = append(words, w)
		}
		words = append(words, "->")
		for _, b := range s.Backends {
			w := b.Address.String()
			if b.Local {
				w += "*"
			}
			if b.Weight == 0 {
				w = "(" + w + ")"
			}
			words = append(words, w)
		}
		if s.Elsewhere.V4 {
			words = append(words, "elsewhere")
		}
		if s.Elsewhere.V6 {
			words = append(words, "elsewhere6")
		}
		lines = append(lines, strings.Join(words, " "))
	}
	return strings.Join(lines, "\n")
}

func servicesOf(wanted []want) []*service.Service {
	var all []*service.Service
	for _, w := range wanted {
		all = append(all, w.Service)
	}
	return all
}

func TestTranslate(t *testing.T) {
	two := []string{"10.1.0.1@n1/z1", "10.2.0.1@n2/z2"}
	nodePort := func(s *corev1.Service) {
		s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, 30080
	}
	balancer := func(ingress ...corev1.LoadBalancerIngress) func(*corev1.Service) {
		return func(s *corev1.Service) {
			s.Spec.Type, s.Status.LoadBalancer.Ingress = corev1.ServiceTypeLoadBalancer, ingress
		}
	}
	local := func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal }
	with := func(changes ...func(*corev1.Service)) func(*corev1.Service) {
		return func(s *corev1.Service) {
			for _, c := range changes {
				c(s)
			}
		}
	}
	for name, c := range map[string]struct {
		change    func(*corev1.Service)
		endpoints []string
		want      string
		problem   string
	}{
		"cluster IP":    {nil, two, "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080* 10.2.0.1:8080", ""},
		"no endpoints":  {nil, nil, "shop/web:http 10.96.0.10:80=shgw ->", ""},
		"headless":      {func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "None", []string{"None"} }, two, "", ""},
		"external name": {func(s *corev1.Service) { s.Spec.Type, s.Spec.ClusterIP = corev1.ServiceTypeExternalName, "" }, two, "", ""},
		"dual stack": {func(s *corev1.Service) { s.Spec.ClusterIPs = []string{"10.96.0.10", "2001:db8:96::a"} },
			[]string{"10.1.0.1@n1/z1", "2001:db8:1::1@n1/z1"}, "shop/web:http 10.96.0.10:80=shgw [2001:db8:96::a]:80=shgw -> 10.1.0.1:8080* [2001:db8:1::1]:8080*", ""},
		"two ports": {func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53})
		}, two[:1], "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080*\nshop/web:dns 10.96.0.10:53/udp=shgw -> 10.1.0.1:5353*", ""},
		"a port without endpoints": {func(s *corev1.Service) { s.Spec.Ports[0].Name = "other" }, two, "shop/web:other 10.96.0.10:80=shgw ->", ""},
		"SCTP":                     {func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolSCTP }, two, "", "port 80/SCTP is not served"},
		"node port":                {nodePort, two[1:], "shop/web:http 0.0.0.0:30080=hH 10.0.0.1:30080=shgwH 10.96.0.10:80=shgw 127.0.0.1:30080=hH -> 10.2.0.1:8080", ""},
		"node port, local": {with(nodePort, local), two,
			"shop/web:http 0.0.0.0:30080=hH 10.0.0.1:30080=shgH 10.96.0.10:80=shgw 127.0.0.1:30080=hH -> 10.1.0.1:8080* 10.2.0.1:8080\n" +
				"shop/web:http/external 10.0.0.1:30080=wH -> 10.1.0.1:8080* elsewhere", ""},
		"local without an endpoint here": {with(balancer(corev1.LoadBalancerIngress{IP: "203.0.113.1"}), local), two[1:],
			"shop/web:http 10.96.0.10:80=shgw 203.0.113.1:80=shg -> 10.2.0.1:8080\nshop/web:http/external 203.0.113.1:80=w -> elsewhere", ""},
		"local without any": {with(balancer(corev1.LoadBalancerIngress{IP: "203.0.113.1"}), local), nil,
			"shop/web:http 10.96.0.10:80=shgw 203.0.113.1:80=shg ->\nshop/web:http/external 203.0.113.1:80=w ->", ""},
		"load balancer that is a proxy": {balancer(corev1.LoadBalancerIngress{IP: "203.0.113.1", IPMode: ptr(corev1.LoadBalancerIPModeProxy)},
			corev1.LoadBalancerIngress{IP: "203.0.113.2", IPMode: ptr(corev1.LoadBalancerIPModeVIP)}, corev1.LoadBalancerIngress{Hostname: "lb.example"}),
			nil, "shop/web:http 10.96.0.10:80=shgw 203.0.113.2:80=shgw ->", ""},
		"source ranges": {with(balancer(corev1.LoadBalancerIngress{IP: "203.0.113.1"}), func(s *corev1.Service) {
			s.Spec.LoadBalancerSourceRanges = []string{" 192.0.2.0/24 "}
		}), nil, "shop/web:http 10.96.0.10:80=shgw 203.0.113.1:80=gwG ->", ""},
		"source ranges with the node": {with(balancer(corev1.LoadBalancerIngress{IP: "203.0.113.1"}), func(s *corev1.Service) {
			s.Spec.LoadBalancerSourceRanges = []string{"10.0.0.0/24"}
		}), nil, "shop/web:http 10.96.0.10:80=shgw 203.0.113.1:80=hgwG ->", ""},
		"internal policy": {func(s *corev1.Service) {
			s.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicyLocal)
			s.Spec.ExternalIPs = []string{"198.51.100.1"}
		}, two, "shop/web:http 198.51.100.1:80=shgw -> 10.1.0.1:8080* 10.2.0.1:8080\nshop/web:http/internal 10.96.0.10:80=shgw -> 10.1.0.1:8080*", ""},
		"external IPs": {func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"203.0.113.9", "198.51.100.1"} }, nil,
			"shop/web:http 10.96.0.10:80=shgw 198.51.100.1:80=shgw 203.0.113.9:80=w ->", ""},
		"external IP of the node":     {func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"192.0.2.1"} }, nil, "shop/web:http 10.96.0.10:80=shgw ->", "192.0.2.1 is an address of this node"},
		"external IP on the loopback": {func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"127.0.0.1"} }, nil, "shop/web:http 10.96.0.10:80=shgw ->", "127.0.0.1 is not served: a loopback"},
		"external IP with leading zeros": {func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"203.000.113.009"} }, nil,
			"shop/web:http 10.96.0.10:80=shgw 203.0.113.9:80=w ->", ""},
		"endpoints nobody can reach": {nil, []string{"127.0.0.5@n1/z1", "169.254.1.1@n1/z1", "10.1.0.1@n1/z1"}, "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080*", "127.0.0.5"},

		"an address of another family": {balancer(corev1.LoadBalancerIngress{IP: "203.0.113.1"}, corev1.LoadBalancerIngress{IP: "2001:db8:113::1"}), nil,
			"shop/web:http 10.96.0.10:80=shgw 203.0.113.1:80=shgw ->", ""},
		"an external IP of another family": {func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"2001:db8:113::1"} }, nil,
			"shop/web:http 10.96.0.10:80=shgw ->", ""},
		"passed by on its own node": {func(s *corev1.Service) { s.Annotations = map[string]string{"pentad.io/local": "bypass"} }, nil,
			"shop/web:http 10.96.0.10:80=gw ->", ""},
		"passed by, mistyped": {func(s *corev1.Service) { s.Annotations = map[string]string{"pentad.io/local": "pass"} }, nil,
			"shop/web:http 10.96.0.10:80=shgw ->", "annotation pentad.io/local: want bypass"},

		"not ready":                   {nil, []string{"10.1.0.1@n1/z1 u", "10.1.0.2@n1/z1"}, "shop/web:http 10.96.0.10:80=shgw -> (10.1.0.1:8080*) 10.1.0.2:8080*", ""},
		"terminating beside ready":    {nil, []string{"10.1.0.1@n1/z1 t", "10.1.0.2@n1/z1"}, "shop/web:http 10.96.0.10:80=shgw -> (10.1.0.1:8080*) 10.1.0.2:8080*", ""},
		"terminating alone":           {nil, []string{"10.1.0.1@n1/z1 t", "10.1.0.2@n1/z1 u"}, "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080* (10.1.0.2:8080*)", ""},
		"terminating and not serving": {nil, []string{"10.1.0.1@n1/z1 ut"}, "shop/web:http 10.96.0.10:80=shgw -> (10.1.0.1:8080*)", ""},
		"local, terminating here": {with(nodePort, local), []string{"10.1.0.1@n1/z1 t", "10.2.0.1@n2/z2"},
			"shop/web:http 0.0.0.0:30080=hH 10.0.0.1:30080=shgH 10.96.0.10:80=shgw 127.0.0.1:30080=hH -> (10.1.0.1:8080*) 10.2.0.1:8080\n" +
				"shop/web:http/external 10.0.0.1:30080=wH -> 10.1.0.1:8080* elsewhere", ""},

		"zone":                    {nil, []string{"10.1.0.1@n1/z1 z:z1", "10.2.0.1@n2/z2 z:z2"}, "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080* (10.2.0.1:8080)", ""},
		"zone, incomplete":        {nil, []string{"10.1.0.1@n1/z1 z:z1", "10.2.0.1@n2/z2"}, "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080* 10.2.0.1:8080", ""},
		"zone, nobody for us":     {nil, []string{"10.1.0.1@n1/z1 z:z3", "10.2.0.1@n2/z2 z:z2"}, "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080* 10.2.0.1:8080", ""},
		"zone, unready without":   {nil, []string{"10.1.0.1@n1/z1 z:z1", "10.2.0.1@n2/z2 u"}, "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080* (10.2.0.1:8080)", ""},
		"node before zone":        {nil, []string{"10.1.0.1@n1/z1 z:z1 n:n2", "10.2.0.1@n2/z2 z:z2 n:n1"}, "shop/web:http 10.96.0.10:80=shgw -> (10.1.0.1:8080*) 10.2.0.1:8080", ""},
		"zone when node has none": {nil, []string{"10.1.0.1@n1/z1 z:z1 n:n2", "10.2.0.1@n2/z2 z:z2 n:n2"}, "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080* (10.2.0.1:8080)", ""},
		"local ignores hints": {with(nodePort, local), []string{"10.1.0.1@n1/z1 z:z2", "10.2.0.1@n2/z2 z:z1"},
			"shop/web:http 0.0.0.0:30080=hH 10.0.0.1:30080=shgH 10.96.0.10:80=shgw 127.0.0.1:30080=hH -> (10.1.0.1:8080*) 10.2.0.1:8080\n" +
				"shop/web:http/external 10.0.0.1:30080=wH -> 10.1.0.1:8080* elsewhere", ""},
	} {
		s := trimService(testService(c.change))
		var all []*slice
		for _, e := range c.endpoints {
			all = append(all, testSlice("web-"+e, e))
		}
		got := translate(s, all, testSurroundings())
		if have := show(servicesOf(got.services)); have != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", name, have, c.want)
		}
		if want := strings.Count(c.problem, "SCTP"); got.unserved != want {
			t.Errorf("%s: %d ports are not served, want %d", name, got.unserved, want)
		}
		if problems := strings.Join(got.problems, "; "); (problems == "") != (c.problem == "") || !strings.Contains(problems, c.problem) {
			t.Errorf("%s: problems are %q, want %q", name, problems, c.problem)
		}
	}
}

// Each family goes by its own endpoints: what a Service of both becomes is what one
// of each would.
func TestFamiliesAreIndependent(t *testing.T) {
	flags := []string{"", " u", " us", " t", " ut", " z:z1", " z:z2", " n:n1", " z:z1 t"}
	r := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		change := func(families string) func(*corev1.Service) {
			return func(s *corev1.Service) {
				s.Spec.ClusterIPs = nil
				if strings.Contains(families, "4") {
					s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "10.96.0.10")
				}
				if strings.Contains(families, "6") {
					s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "2001:db8:96::a")
				}
				s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
				s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeLoadBalancer, 30080
				s.Spec.ExternalIPs = []string{"198.51.100.7", "2001:db8:51::7"}
				s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "203.0.113.1"}, {IP: "2001:db8:113::1"}}
				s.Spec.HealthCheckNodePort = 31000
			}
		}
		local, internal := r.IntN(2) == 0, r.IntN(2) == 0
		make4, make6 := r.IntN(4), r.IntN(4)
		var four, six []*slice
		for i := range make4 {
			n := 1 + r.IntN(2)
			four = append(four, testSlice(fmt.Sprint("four", i), fmt.Sprintf("10.%d.0.%d@n%d/z%d%s", n, i, n, n, flags[r.IntN(len(flags))])))
		}
		for i := range make6 {
			n := 1 + r.IntN(2)
			six = append(six, testSlice(fmt.Sprint("six", i), fmt.Sprintf("2001:db8:%d::%d@n%d/z%d%s", n, i+1, n, n, flags[r.IntN(len(flags))])))
		}
		become := func(families string, all ...*slice) []string {
			s := testService(change(families))
			if local {
				s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			}
			if internal {
				s.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicyLocal)
			}
			got := translate(trimService(s), all, testSurroundings())
			var lines []string
			for _, w := range got.services {
				for _, l := range w.Listeners {
					line := fmt.Sprint(w.Name, " ", l, " ", places(l.From), " ->")
					for _, b := range w.Backends {
						if b.Address.Addr().Is4() == l.Address.Addr().Is4() {
							line += fmt.Sprint(" ", b.Address, "*", b.Weight)
						}
					}
					if w.Elsewhere.Has(l.Address.Addr()) {
						line += " elsewhere"
					}
					lines = append(lines, line)
				}
			}
			slices.Sort(lines)
			return lines
		}
		all := append(slices.Clone(four), six...)
		both := become("46", all...)
		for _, apart := range [][]string{
			append(become("4", all...), become("6", all...)...),
			append(become("4", four...), become("6", six...)...),
		} {
			slices.Sort(apart)
			if !slices.Equal(both, apart) {
				t.Fatalf("of both\n%s\nof each\n%s", strings.Join(both, "\n"), strings.Join(apart, "\n"))
			}
		}
	}
}

// An endpoint that moves from one slice to another is there once, and ready if
// either says so.
func TestMovingEndpoint(t *testing.T) {
	s := trimService(testService(nil))
	got := translate(s, []*slice{testSlice("a", "10.1.0.1@n1/z1 u"), testSlice("b", "10.1.0.1@n1/z1")}, testSurroundings())
	if have := show(servicesOf(got.services)); have != "shop/web:http 10.96.0.10:80=shgw -> 10.1.0.1:8080*" {
		t.Error(have)
	}
}

func TestTranslateRest(t *testing.T) {
	s := trimService(testService(func(s *corev1.Service) {
		s.Spec.Type, s.Spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, 31000
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		s.Spec.LoadBalancerSourceRanges = []string{"nowhere"}
		s.Annotations = map[string]string{"pentad.io/balance": "random", "pentad.io/onDown": "sometimes", "other/balance": "x"}
	}))
	got := translate(s, []*slice{testSlice("a", "10.1.0.1@n1/z1", "10.1.0.2@n1/z1", "10.2.0.1@n2/z2"), testSlice("b", "10.1.0.1@n1/z1", "10.1.0.3@n1/z1 t")}, testSurroundings())
	if got.check == nil || *got.check != (source.Check{Port: 31000, Namespace: "shop", Name: "web", Endpoints4: 2}) {
		t.Errorf("check is %+v", got.check)
	}
	first := got.services[0].Service
	if first.Affinity != 3*time.Hour || first.Balance != service.Random || first.OnDown != service.Reset {
		t.Errorf("service is %+v", first)
	}
	problems := strings.Join(got.problems, "\n")
	for _, want := range []string{`"nowhere" is no address range and lets nobody in`, "annotation pentad.io/onDown: want reset or keep"} {
		if strings.Count(problems, want) != 1 {
			t.Errorf("problems are %s, want once %s", problems, want)
		}
	}
}

func TestTrimNode(t *testing.T) {
	n := trimNode(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.1.0.0/24", "2001:db8:1::/64"}, Taints: []corev1.Taint{{Key: toBeDeleted}}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeHostName, Address: "n1"}, {Type: corev1.NodeExternalIP, Address: "203.0.113.1"},
			{Type: corev1.NodeInternalIP, Address: "10.0.0.1"}, {Type: corev1.NodeInternalIP, Address: "10.0.0.2"}, {Type: corev1.NodeExternalIP, Address: "2001:db8::1"},
		}},
	})
	if fmt.Sprint(n.primary) != "[10.0.0.1 2001:db8::1]" || len(n.addresses) != 4 || n.zone != "z1" || !n.leaving || len(n.pods) != 2 {
		t.Errorf("node is %+v", n)
	}
}

func TestNodePortAddresses(t *testing.T) {
	own := map[netip.Addr]bool{}
	for _, a := range []string{"10.0.0.1", "192.0.2.1", "2001:db8::1", "10.9.0.1"} {
		own[netip.MustParseAddr(a)] = true
	}
	n := &node{primary: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
	for prefixes, want := range map[string]string{
		"": "[192.0.2.1]", "10.0.0.0/8": "[10.0.0.1 10.9.0.1]", "0.0.0.0/0 ::/0": "[10.0.0.1 10.9.0.1 192.0.2.1 2001:db8::1]", "198.51.100.0/24": "[]",
	} {
		var chosen []netip.Prefix
		for _, p := range strings.Fields(prefixes) {
			chosen = append(chosen, netip.MustParsePrefix(p))
		}
		if have := fmt.Sprint(nodePortAddresses(chosen, own, n)); have != want {
			t.Errorf("%q: %s, want %s", prefixes, have, want)
		}
	}
	if have := nodePortAddresses(nil, own, nil); len(have) > 0 {
		t.Errorf("without a Node: %v", have)
	}
}

// claimant makes a Service that wants listeners: ADDRESS:PORT, =CLIENTS if not all
// (s sockets, w world), and how it asks: c ClusterIP, n NodePort, i ingress, e
// externalIP.
func claimant(name string, age int, listeners ...string) (*clusterService, []want) {
	s := &clusterService{created: time.Unix(int64(-age), 0)}
	s.Namespace, s.Name = "shop", name
	w := want{Service: &service.Service{Name: "shop/" + name}}
	for _, text := range listeners {
		f := strings.Fields(text)
		address, clients, _ := strings.Cut(f[0], "=")
		from := map[string]service.From{"": service.Anywhere, "w": service.FromWorld, "s": service.FromSockets, "h": service.FromHost}[clients]
		w.Listeners = append(w.Listeners, service.Listener{Address: netip.MustParseAddrPort(address), Protocol: service.TCP, From: from})
		w.as = append(w.as, asked(strings.Index("cnie", f[1])))
	}
	return s, []want{w}
}

func TestClaims(t *testing.T) {
	type wish struct {
		name      string
		age       int
		listeners []string
		has       string // show's; "" for nothing
		says      string
	}
	for name, wishes := range map[string][]wish{
		"NodePorts by age": {
			{"young", 1, []string{"10.0.0.1:30080 n", "10.96.0.2:80 c"}, "shop/young 10.96.0.2:80=shgw ->", "a NodePort of the older Service shop/old"},
			{"old", 3, []string{"10.0.0.1:30080 n"}, "shop/old 10.0.0.1:30080=shgw ->", ""},
		},
		"other clients": {
			{"world", 2, []string{"198.51.100.1:80=w e"}, "shop/world 198.51.100.1:80=w ->", ""},
			{"inside", 1, []string{"198.51.100.1:80=s e"}, "shop/inside 198.51.100.1:80=s ->", ""},
		},
		"clients in common": {
			{"old", 2, []string{"198.51.100.1:80=w e"}, "shop/old 198.51.100.1:80=w ->", ""},
			{"young", 1, []string{"198.51.100.1:80 e"}, "shop/young 198.51.100.1:80=shg ->", "an externalIP of the older Service shop/old"},
		},
		"a ClusterIP is nobody else's": {
			{"old", 9, []string{"10.96.0.1:80=w e"}, "", "a ClusterIP of the Service shop/victim"},
			{"victim", 1, []string{"10.96.0.1:80 c"}, "shop/victim 10.96.0.1:80=shgw ->", ""},
		},
		"nor an ingress": {
			{"old", 9, []string{"203.0.113.1:80=w e"}, "", "an address of the load balancer of the Service shop/victim"},
			{"victim", 1, []string{"203.0.113.1:80 i"}, "shop/victim 203.0.113.1:80=shgw ->", ""},
		},
		"nor a NodePort": {
			{"old", 9, []string{"10.0.0.1:30080 i"}, "", "a NodePort of the Service shop/victim"},
			{"older", 10, []string{"10.0.0.1:30080 e"}, "", "a NodePort of the Service shop/victim"},
			{"victim", 1, []string{"10.0.0.1:30080 n"}, "shop/victim 10.0.0.1:30080=shgw ->", ""},
		},
		"sockets find one": {
			{"host", 2, []string{"198.51.100.1:80=h e"}, "shop/host 198.51.100.1:80=h ->", ""},
			{"pods", 1, []string{"198.51.100.1:80=s e"}, "", "an externalIP of the older Service shop/host"},
		},
		"a ClusterIP that is passed by": {
			{"old", 9, []string{"10.96.0.1:80 e"}, "", "a ClusterIP of the Service shop/victim"},
			{"victim", 1, []string{"10.96.0.1:80=w c"}, "shop/victim 10.96.0.1:80=w ->", ""},
		},
		"one that asks twice": {
			{"twice", 1, []string{"10.96.0.1:80 c", "10.96.0.1:80=w e"}, "shop/twice 10.96.0.1:80=shgw ->", ""},
		},
		"one that asks twice for others": {
			{"twice", 1, []string{"10.0.0.1:80=s n", "10.0.0.1:80 i"}, "shop/twice 10.0.0.1:80=s 10.0.0.1:80=gw ->", ""},
		},
	} {
		// In whatever order they are heard of.
		for range 3 {
			c := make(claims)
			owners := make(map[string]*clusterService)
			wanted := make(map[string][]want)
			for _, i := range rand.Perm(len(wishes)) {
				w := wishes[i]
				s, all := claimant(w.name, w.age, w.listeners...)
				owners[w.name], wanted[w.name] = s, all
				c.add(s, all)
			}
			for _, w := range wishes {
				granted, problems := c.grant(owners[w.name].key(), wanted[w.name])
				if have := show(granted); have != w.has {
					t.Errorf("%s: %s has %q, want %q", name, w.name, have, w.has)
				}
				if have := strings.Join(problems, "; "); (have == "") != (w.says == "") || !strings.Contains(have, w.says) {
					t.Errorf("%s: of %s is said %q, want %q", name, w.name, have, w.says)
				}
			}
			// Alone each has all that it wants, and the others are told.
			for _, w := range wishes[1:] {
				if others := c.remove(owners[w.name].key(), wanted[w.name]); len(others) == 0 {
					t.Errorf("%s: nobody is told that %s is gone", name, w.name)
				}
			}
			first := wishes[0].name
			if granted, problems := c.grant(owners[first].key(), wanted[first]); len(wishes) > 1 && (granted[0] != wanted[first][0].Service || len(problems) > 0) {
				t.Errorf("%s: alone %s has %s, %v", name, first, show(granted), problems)
			}
		}
	}
}

// The list stays sorted and complete through any history of changes.
func TestMerge(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		var list []*service.Service
		live := make(map[string]*service.Service)
		for range 20 {
			gone, come := make(map[*service.Service]bool), []*service.Service(nil)
			for range r.IntN(6) {
				name := fmt.Sprintf("s%02d", r.IntN(30))
				old := live[name]
				if old != nil && slices.Contains(come, old) {
					continue
				}
				if old != nil {
					gone[old] = true
					delete(live, name)
				}
				if r.IntN(3) > 0 {
					live[name] = &service.Service{Name: name}
					come = append(come, live[name])
				}
			}
			list = merge(list, gone, come)
			if len(list) != len(live) || !slices.IsSortedFunc(list, func(a, b *service.Service) int { return strings.Compare(a.Name, b.Name) }) {
				t.Fatalf("%d of %d: %v", len(list), len(live), list)
			}
			for _, s := range list {
				if live[s.Name] != s {
					t.Fatalf("%s is an old one", s.Name)
				}
			}
		}
	}
}
