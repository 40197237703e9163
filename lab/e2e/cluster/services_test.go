package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/pentad/pentad/lab"
)

// scene is a test with a namespace of its own in a world.
type scene struct {
	*world
	t         *testing.T
	namespace string
}

func newScene(t *testing.T, w *world) *scene {
	t.Helper()
	ns, err := w.cluster.Client.CoreV1().Namespaces().Create(t.Context(),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{world: w, t: t, namespace: ns.Name}
	t.Cleanup(func() {
		// The controllers that empty a namespace do not run in every world.
		ctx := context.Background()
		list, err := w.cluster.Client.CoreV1().Services(ns.Name).List(ctx, metav1.ListOptions{})
		if err != nil {
			return // a test may have taken the API server away
		}
		for _, svc := range list.Items {
			_ = w.cluster.Client.CoreV1().Services(ns.Name).Delete(ctx, svc.Name, metav1.DeleteOptions{})
		}
		_ = w.cluster.Client.DiscoveryV1().EndpointSlices(ns.Name).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
	})
	return s
}

// service makes a Service with the ports http, TCP and UDP 80 to 8080, without a
// selector: its endpoints are what the test says.
func (s *scene) service(name string, change func(*corev1.Service)) *corev1.Service {
	s.t.Helper()
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}}
	svc.Spec.Ports = []corev1.ServicePort{
		{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(8080)},
		{Name: "udp", Protocol: corev1.ProtocolUDP, Port: 80, TargetPort: intstr.FromInt32(8080)},
	}
	dual := corev1.IPFamilyPolicyPreferDualStack
	svc.Spec.IPFamilyPolicy = &dual
	if change != nil {
		change(svc)
	}
	svc, err := s.cluster.Client.CoreV1().Services(s.namespace).Create(s.t.Context(), svc, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return svc
}

// update changes a Service.
func (s *scene) update(svc *corev1.Service, change func(*corev1.Service)) *corev1.Service {
	s.t.Helper()
	c := s.cluster.Client.CoreV1().Services(s.namespace)
	svc, err := c.Get(s.t.Context(), svc.Name, metav1.GetOptions{})
	if err == nil {
		change(svc)
		svc, err = c.Update(s.t.Context(), svc, metav1.UpdateOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return svc
}

// ingress gives a Service of type LoadBalancer its addresses.
func (s *scene) ingress(svc *corev1.Service, ingress ...corev1.LoadBalancerIngress) {
	s.t.Helper()
	svc.Status.LoadBalancer.Ingress = ingress
	if _, err := s.cluster.Client.CoreV1().Services(s.namespace).UpdateStatus(s.t.Context(), svc, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// member is an endpoint of a Service: a pod and its conditions.
type member struct {
	pod                  string
	unready, terminating bool
	serving              bool // though not ready
	zones, nodes         []string
}

func pods(names ...string) []member {
	var all []member
	for _, n := range names {
		all = append(all, member{pod: n})
	}
	return all
}

// endpoints makes or replaces the EndpointSlices of a Service, one of each family.
func (s *scene) endpoints(svc *corev1.Service, members ...member) {
	s.t.Helper()
	for _, v4 := range []bool{true, false} {
		s.slice(svc, v4, members)
	}
}

func (s *scene) slice(svc *corev1.Service, v4 bool, members []member) {
	s.t.Helper()
	sl := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Name: svc.Name + "-6", Labels: map[string]string{discoveryv1.LabelServiceName: svc.Name},
	}, AddressType: discoveryv1.AddressTypeIPv6}
	if v4 {
		sl.Name, sl.AddressType = svc.Name+"-4", discoveryv1.AddressTypeIPv4
	}
	for _, p := range svc.Spec.Ports {
		port := p.TargetPort.IntVal
		sl.Ports = append(sl.Ports, discoveryv1.EndpointPort{Name: &p.Name, Protocol: &p.Protocol, Port: &port})
	}
	for _, m := range members {
		sl.Endpoints = append(sl.Endpoints, m.endpoint(v4))
	}
	c := s.cluster.Client.DiscoveryV1().EndpointSlices(s.namespace)
	have, err := c.Get(s.t.Context(), sl.Name, metav1.GetOptions{})
	if err != nil {
		_, err = c.Create(s.t.Context(), sl, metav1.CreateOptions{})
	} else {
		sl.ResourceVersion = have.ResourceVersion
		_, err = c.Update(s.t.Context(), sl, metav1.UpdateOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (m member) endpoint(v4 bool) discoveryv1.Endpoint {
	node, index := m.pod[:1], 1
	if node == "b" {
		index = 2
	}
	a4, a6 := podAddresses(index, int(m.pod[1]-'0')+1)
	e := discoveryv1.Endpoint{Addresses: []string{a6}, NodeName: &node, Zone: &node}
	if v4 {
		e.Addresses[0] = a4
	}
	ready, serving := !m.unready && !m.terminating, m.serving || !m.unready
	e.Conditions = discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &m.terminating}
	if len(m.zones)+len(m.nodes) > 0 {
		e.Hints = &discoveryv1.EndpointHints{}
		for _, z := range m.zones {
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: z})
		}
		for _, n := range m.nodes {
			e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: n})
		}
	}
	return e
}

// seen is what a client must see: which servers answer, and as whom they see it.
type seen struct {
	servers string // names, by space; "refused" or "timeout" when nobody answers
	client  string // the address; "a" and "b" for those of the nodes; empty: any
}

// networks are both protocols, which must behave the same.
var networks = []string{"tcp", "udp"}

// expect asks until every server that should answer has, and nobody else does.
func (s *scene) expect(from *place, address string, want seen) {
	s.t.Helper()
	for _, network := range networks {
		s.expectBy(network, from, address, want)
	}
}

func (s *scene) expectBy(network string, from *place, address string, want seen) {
	s.t.Helper()
	err := lab.Eventually(patience, func() error { return s.looksLike(network, from, address, want) })
	if err != nil {
		s.t.Errorf("%s by %s to %s: %v", from.name, network, address, err)
	}
}

// asks is how often a client asks: a server that is one of three and is not among
// the answers has been left out by chance once in a million times.
const asks = 34

func (s *scene) looksLike(network string, from *place, address string, want seen) error {
	servers := strings.Fields(want.servers)
	found := make(map[string]bool)
	for i := 0; i < asks && (i == 0 || len(found) < len(servers) || i < 6); i++ {
		server, client, err := from.ask(network, address)
		if err != nil {
			server = failure(err)
		}
		if !slices.Contains(servers, server) {
			return fmt.Errorf("%s answered (%v), want %s", server, err, want.servers)
		}
		if err == nil && want.client != "" && client != want.client {
			return fmt.Errorf("%s saw the client as %s, want %s", server, client, want.client)
		}
		found[server] = true
		if err != nil {
			break
		}
	}
	if len(found) < len(servers) {
		return fmt.Errorf("only %v answered, want %s", found, want.servers)
	}
	return nil
}

func failure(err error) string {
	switch {
	case strings.Contains(err.Error(), "refused"):
		return "refused"
	case strings.Contains(err.Error(), "timeout"), strings.Contains(err.Error(), "no route"), strings.Contains(err.Error(), "unreachable"):
		return "timeout"
	}
	return err.Error()
}

func hostPort(address string, port int32) string {
	if strings.Contains(address, ":") {
		return fmt.Sprintf("[%s]:%d", address, port)
	}
	return fmt.Sprintf("%s:%d", address, port)
}

// The addresses of places, as servers see them.
const (
	a4, a6             = "10.0.0.11", "2001:db8::11"
	b4, b6             = "10.0.0.12", "2001:db8::12"
	a1v4, a1v6         = "10.244.1.2", "2001:db8:244:1::2"
	outside4, outside6 = "10.0.0.100", "2001:db8::100"
)

func TestClusterIP(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", nil)
	ip4, ip6 := hostPort(svc.Spec.ClusterIPs[0], 80), hostPort(svc.Spec.ClusterIPs[1], 80)
	// Without endpoints it is refused, from everywhere.
	s.expect(s.pods["a1"], ip4, seen{"refused", ""})
	s.expect(s.a.place, ip6, seen{"refused", ""})
	s.expect(s.outside, ip4, seen{"refused", ""})

	s.endpoints(svc, pods("a2", "b1")...)
	s.expect(s.pods["a1"], ip4, seen{"a2 b1", a1v4})
	s.expect(s.pods["a1"], ip6, seen{"a2 b1", a1v6})
	s.expect(s.b.place, ip4, seen{"a2 b1", ""})
	// From outside: the reply of a pod of this node passes here, that of another
	// would not. A node is seen as itself.
	s.endpoints(svc, pods("a2")...)
	s.expect(s.b.place, ip4, seen{"a2", b4})
	s.expect(s.b.place, ip6, seen{"a2", b6})
	s.expect(s.outside, ip4, seen{"a2", outside4})
	s.expect(s.outside, ip6, seen{"a2", outside6})
	s.endpoints(svc, pods("b1")...)
	s.expect(s.outside, ip4, seen{"b1", a4})
	s.expect(s.outside, ip6, seen{"b1", a6})
	// A pod reaches itself.
	s.endpoints(svc, pods("a1")...)
	s.expect(s.pods["a1"], ip4, seen{"a1", a1v4})
	s.expect(s.pods["a1"], ip6, seen{"a1", a1v6})
}

func TestNodePort(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeNodePort })
	port := svc.Spec.Ports[0].NodePort
	if svc.Spec.Ports[1].NodePort != port {
		svc = s.update(svc, func(svc *corev1.Service) { svc.Spec.Ports[1].NodePort = port })
	}
	s.endpoints(svc, pods("a1", "b1")...)
	for _, n := range []*node{s.a, s.b} {
		s.expect(s.outside, hostPort(n.v4.String(), port), seen{"a1 b1", ""})
		s.expect(s.outside, hostPort(n.v6.String(), port), seen{"a1 b1", ""})
		s.expect(s.pods["a2"], hostPort(n.v4.String(), port), seen{"a1 b1", ""})
		s.expect(s.a.place, hostPort(n.v6.String(), port), seen{"a1 b1", ""})
	}
	// Whose reply passes the node that was asked is seen as himself.
	s.endpoints(svc, pods("a1")...)
	s.expect(s.outside, hostPort(a4, port), seen{"a1", outside4})
	s.expect(s.outside, hostPort(b4, port), seen{"a1", b4})
	s.expect(s.outside, hostPort(b6, port), seen{"a1", b6})
	s.expect(s.pods["a2"], hostPort(a4, port), seen{"a1", "10.244.1.3"})
	s.expect(s.pods["a2"], hostPort(b4, port), seen{"a1", b4})
	s.expect(s.b.place, hostPort(b4, port), seen{"a1", b4})
	s.endpoints(svc, pods("a1", "b1")...)
	// The loopback of the node, not that of a pod.
	s.expect(s.a.place, hostPort("127.0.0.1", port), seen{"a1 b1", ""})
	s.expect(s.a.place, hostPort("::1", port), seen{"a1 b1", ""})
	s.expect(s.pods["a1"], hostPort("127.0.0.1", port), seen{"refused", ""})
	// Nobody on the node binds what would never come to him; a pod may.
	for at, bindable := range map[string]bool{"0.0.0.0": false, "::": false, "127.0.0.1": false, a4: false, a6: false, "127.0.0.2": true} {
		if err := s.binds(s.a.place, hostPort(at, port)); (err == nil) != bindable {
			t.Errorf("binding %s on the node: %v, want it possible: %v", at, err, bindable)
		}
	}
	if err := s.binds(s.pods["a1"], hostPort("0.0.0.0", port)); err != nil {
		t.Errorf("binding a NodePort in a pod: %v", err)
	}
	s.update(svc, func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeClusterIP })
	err := lab.Eventually(patience, func() error { return s.binds(s.a.place, hostPort("0.0.0.0", port)) })
	if err != nil {
		t.Errorf("the port is no NodePort any more: %v", err)
	}
}

// binds has a client bind an address.
func (s *scene) binds(p *place, address string) error {
	_, _, err := p.ask("bind", address)
	return err
}

func TestExternalTrafficPolicy(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	})
	s.ingress(svc, corev1.LoadBalancerIngress{IP: "198.51.100.1"}, corev1.LoadBalancerIngress{IP: "203.0.113.1"},
		corev1.LoadBalancerIngress{IP: "2001:db8:51::1"})
	s.endpoints(svc, pods("a1", "a2")...)
	port := svc.Spec.Ports[0].NodePort
	// The client's address is kept, and only pods of the node answer.
	s.expect(s.outside, "198.51.100.1:80", seen{"a1 a2", outside4})
	s.expect(s.outside, "[2001:db8:51::1]:80", seen{"a1 a2", outside6})
	s.expectBy("tcp", s.outside, hostPort(a4, port), seen{"a1 a2", outside4})
	// Node b has none: it drops, so that the load balancer looks elsewhere.
	s.expectBy("tcp", s.outside, "203.0.113.1:80", seen{"timeout", ""})
	// Pods and processes of a node reach all.
	s.endpoints(svc, pods("a1", "b1")...)
	s.expect(s.outside, "198.51.100.1:80", seen{"a1", outside4})
	s.expect(s.outside, "203.0.113.1:80", seen{"b1", outside4})
	s.expect(s.pods["a2"], "203.0.113.1:80", seen{"a1 b1", "10.244.1.3"})
	s.expect(s.b.place, "198.51.100.1:80", seen{"a1 b1", ""})
	// The commands tell the one from the other.
	name := s.namespace + "/web:http"
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"service", "list"}, []string{name + " ", "sockets, pods", name + "/external  198.51.100.1:80", "world"}},
		{[]string{"service", "show", name + "/external"}, []string{"198.51.100.1:80", "10.244.1.2:8080"}},
		{[]string{"explain", "198.51.100.1"}, []string{"of other hosts are led to 10.244.1.2:8080 (" + name + "/external)", "of pods are led to 10.244.1.2:8080, 10.244.2.2:8080"}},
		{[]string{"status"}, []string{"served by the table inet pentad"}},
	} {
		out, _ := s.a.pentad(c.args...)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("pentad %s does not show %q:\n%s", strings.Join(c.args, " "), want, out)
			}
		}
	}
}

func TestInternalTrafficPolicy(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) {
		local := corev1.ServiceInternalTrafficPolicyLocal
		svc.Spec.InternalTrafficPolicy = &local
		svc.Spec.Type = corev1.ServiceTypeNodePort
	})
	s.endpoints(svc, pods("a1", "a2", "b1")...)
	ip := hostPort(svc.Spec.ClusterIP, 80)
	s.expect(s.pods["a1"], ip, seen{"a1 a2", a1v4})
	s.expect(s.pods["b2"], ip, seen{"b1", "10.244.2.3"})
	// It says nothing of NodePorts.
	s.expectBy("tcp", s.outside, hostPort(b4, svc.Spec.Ports[0].NodePort), seen{"a1 a2 b1", ""})
	s.endpoints(svc, pods("a1")...)
	s.expect(s.pods["b2"], ip, seen{"refused", ""})
}

func TestTerminatingEndpoints(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", nil)
	ip := hostPort(svc.Spec.ClusterIP, 80)
	s.endpoints(svc, member{pod: "a1"}, member{pod: "b1", terminating: true, serving: true})
	s.expect(s.pods["a2"], ip, seen{"a1", ""})
	s.expect(s.outside, ip, seen{"a1", ""})
	// Only when nothing else is left.
	s.endpoints(svc, member{pod: "a1", unready: true}, member{pod: "b1", terminating: true, serving: true})
	s.expect(s.pods["a2"], ip, seen{"b1", ""})
	s.expect(s.outside, ip, seen{"b1", ""})
	s.endpoints(svc, member{pod: "a1", unready: true}, member{pod: "b1", terminating: true, unready: true})
	s.expect(s.pods["a2"], ip, seen{"refused", ""})
	s.expect(s.outside, ip, seen{"refused", ""})
}

func TestTopology(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", nil)
	ip := hostPort(svc.Spec.ClusterIP, 80)
	s.endpoints(svc, member{pod: "a1", zones: []string{"a"}}, member{pod: "b1", zones: []string{"b"}})
	s.expect(s.pods["a2"], ip, seen{"a1", ""})
	s.expect(s.pods["b2"], ip, seen{"b1", ""})
	// Hints count when all have them.
	s.endpoints(svc, member{pod: "a1", zones: []string{"a"}}, member{pod: "b1"})
	s.expect(s.pods["a2"], ip, seen{"a1 b1", ""})
	// A hint for the node comes before one for the zone (PreferSameNode).
	s.endpoints(svc, member{pod: "a1", zones: []string{"a"}, nodes: []string{"b"}}, member{pod: "b1", zones: []string{"a"}, nodes: []string{"a"}})
	s.expect(s.pods["a2"], ip, seen{"b1", ""})
	// Nobody is meant for this zone: all are.
	s.endpoints(svc, member{pod: "a1", zones: []string{"c"}}, member{pod: "b1", zones: []string{"c"}})
	s.expect(s.pods["a2"], ip, seen{"a1 b1", ""})
}

func TestExternalIPs(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) {
		svc.Spec.ExternalIPs = []string{"198.51.100.7", a4}
		// What this Service would take from the node.
		svc.Spec.Ports[0].Port, svc.Spec.Ports[1].Port = 10256, 10256
	})
	s.endpoints(svc, pods("a1", "b1")...)
	s.expect(s.outside, "198.51.100.7:10256", seen{"a1 b1", ""})
	// From inside it is no address of a Service: nobody draws the connections of
	// others to himself.
	s.expectBy("tcp", s.pods["a2"], "198.51.100.7:10256", seen{"timeout", ""})
	// Those that the operators of the nodes allow are served like any address.
	allowed := s.service("allowed", func(svc *corev1.Service) { svc.Spec.ExternalIPs = []string{"203.0.113.70"} })
	s.endpoints(allowed, pods("a1", "b1")...)
	s.expect(s.pods["a2"], "203.0.113.70:80", seen{"a1 b1", "10.244.1.3"})
	s.expect(s.b.place, "203.0.113.70:80", seen{"a1 b1", ""})
	s.expect(s.outside, "203.0.113.70:80", seen{"a1 b1", ""})
	s.endpoints(allowed, pods("b1")...)
	s.expect(s.outside, "203.0.113.70:80", seen{"b1", outside4})
	s.expect(s.pods["a2"], "203.0.113.70:80", seen{"b1", "10.244.1.3"})
	s.expect(s.a.place, "203.0.113.70:80", seen{"b1", a4})
	// And the node keeps what is its own.
	if out, err := s.a.pentad("status"); err != nil || !strings.Contains(out, a4+" is an address of this node and not served") {
		t.Errorf("status: %v\n%s", err, out)
	}
	if out, _ := s.a.pentad("explain", a4+":10256"); !strings.Contains(out, "in the cluster, Service "+s.namespace+"/web: externalIPs: "+a4+" is an address") {
		t.Errorf("explain does not say why it is not served:\n%s", out)
	}
}

// What no Service has is nobody's: an address in a ServiceCIDR, a port of a
// ClusterIP. A range that others have addresses in is left alone.
//
// In a world of its own: a ServiceCIDR is where the Services of others get addresses, too.
func TestServiceCIDRs(t *testing.T) {
	t.Parallel()
	s := newScene(t, ownWorld(t))
	svc := s.service("web", nil)
	s.endpoints(svc, pods("a1")...)
	everywhere := []*place{s.pods["a2"], s.pods["b2"], s.outside}
	for i, ip := range svc.Spec.ClusterIPs {
		free := []string{"10.96.250.250", "2001:db8:96::fafa"}[i]
		for _, from := range everywhere {
			s.expect(from, hostPort(ip, 80), seen{"a1", ""})
			s.expect(from, hostPort(ip, 81), seen{"refused", ""})
			s.expectBy("tcp", from, hostPort(free, 80), seen{"timeout", ""})
		}
	}
	s.expectBy("tcp", s.a.place, hostPort(svc.Spec.ClusterIP, 81), seen{"refused", ""})
	cidrs := s.cluster.Client.NetworkingV1().ServiceCIDRs()
	for name, ranges := range map[string][]string{"more": {"198.51.100.192/28"}, "wrong": {"10.244.0.0/16"}} {
		c := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: ranges}}
		if _, err := cidrs.Create(t.Context(), c, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cidrs.Delete(context.Background(), name, metav1.DeleteOptions{}) })
	}
	explains := func(want string, args ...string) {
		t.Helper()
		s.within(patience, func() error {
			out, _ := s.a.pentad(append([]string{"explain"}, args...)...)
			if !strings.Contains(out, want) {
				return fmt.Errorf("explain %v does not say %q:\n%s", args, want, out)
			}
			return nil
		})
	}
	explains("no Service has this address of the range 198.51.100.192/28", "198.51.100.200:80")
	explains("no Service has this address of the range 198.51.100.192/28", "--from", outside4, "198.51.100.200:80")
	explains("has no such port; it has "+hostPort(svc.Spec.ClusterIP, 80), hostPort(svc.Spec.ClusterIP, 81))
	explains("goes to 10.244.1.2:8080, which sees "+outside4, "--from", outside4, hostPort(svc.Spec.ClusterIP, 80))
	explains("goes to 10.244.1.2:8080, which sees an address of this host instead", "--from", a1v4, hostPort(svc.Spec.ClusterIP, 80))
	s.within(patience, func() error {
		if out, _ := s.a.pentad("status"); !strings.Contains(out, "ServiceCIDR wrong: 10.244.0.0/16 has addresses of pods") {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	})
	s.expect(s.pods["a2"], "10.244.2.2:8080", seen{"b1", "10.244.1.3"})
	s.expect(s.outside, hostPort(svc.Spec.ClusterIP, 80), seen{"a1", outside4})
}

func TestSourceRanges(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		svc.Spec.LoadBalancerSourceRanges = []string{"192.0.2.0/24"}
	})
	s.ingress(svc, corev1.LoadBalancerIngress{IP: "198.51.100.9"})
	s.endpoints(svc, pods("a1")...)
	s.expect(s.pods["a2"], hostPort(svc.Spec.ClusterIP, 80), seen{"a1", ""})
	s.expectBy("tcp", s.outside, "198.51.100.9:80", seen{"timeout", ""})
	s.update(svc, func(svc *corev1.Service) {
		svc.Spec.LoadBalancerSourceRanges = []string{"192.0.2.0/24", "10.0.0.64/26"}
	})
	s.expect(s.outside, "198.51.100.9:80", seen{"a1", outside4})
	for from, want := range map[string]string{
		"10.0.0.7":   "is in none of the source ranges of the service " + s.namespace + "/web:http: 10.0.0.64/26, 192.0.2.0/24",
		outside4:     "goes to 10.244.1.2:8080, which sees " + outside4,
		"10.244.1.9": "in none of the source ranges",
	} {
		if out, _ := s.a.pentad("explain", "--from", from, "198.51.100.9:80"); !strings.Contains(out, want) {
			t.Errorf("explain --from %s does not say %q:\n%s", from, want, out)
		}
	}
	// A pod outside of the ranges is kept out as well, one inside is not.
	s.expectBy("tcp", s.pods["a2"], "198.51.100.9:80", seen{"timeout", ""})
	s.update(svc, func(svc *corev1.Service) { svc.Spec.LoadBalancerSourceRanges = []string{"10.244.1.3/32"} })
	s.expect(s.pods["a2"], "198.51.100.9:80", seen{"a1", "10.244.1.3"})
}

func TestAffinity(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) { svc.Spec.SessionAffinity = corev1.ServiceAffinityClientIP })
	s.endpoints(svc, pods("a1", "b1", "b2")...)
	for _, from := range []*place{s.pods["a2"], s.outside, s.b.place} {
		for _, ip := range svc.Spec.ClusterIPs {
			at := hostPort(ip, 80)
			for _, network := range networks {
				// Each port has its own.
				s.expectBy(network, from, at, seen{s.sticksTo(network, from, at), ""})
			}
		}
	}
}

// sticksTo returns the one server that answers.
func (s *scene) sticksTo(network string, from *place, address string) string {
	s.t.Helper()
	first := ""
	err := lab.Eventually(patience, func() error {
		first = ""
		for range 20 {
			server, _, err := from.ask(network, address)
			if err != nil {
				return err
			}
			if first != "" && server != first {
				return fmt.Errorf("%s answers after %s", server, first)
			}
			first = server
		}
		return nil
	})
	if err != nil {
		s.t.Errorf("%s to %s: %v", from.name, address, err)
	}
	return first
}
