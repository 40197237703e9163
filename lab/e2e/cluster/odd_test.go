package cluster

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/pentad/pentad/lab"
)

var bothNodes = []corev1.LoadBalancerIngress{{IP: a4}, {IP: b4}}

func ofType(kind corev1.ServiceType) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.Type = kind }
}

// Services that want one listener in two ways harm nobody else: not on any node, and
// not after a new start.
func TestOddServices(t *testing.T) {
	t.Parallel()
	s := newScene(t, ownWorld(t))
	good := s.service("good", ofType(corev1.ServiceTypeNodePort))
	s.endpoints(good, pods("b1")...)
	local := corev1.ServiceInternalTrafficPolicyLocal
	bad := s.service("bad", func(svc *corev1.Service) { svc.Spec.InternalTrafficPolicy = &local })
	s.update(bad, func(svc *corev1.Service) { svc.Spec.ExternalIPs = []string{svc.Spec.ClusterIP} })
	s.endpoints(bad, pods("a1", "b1")...)
	world := s.service("world", func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	})
	s.update(world, func(svc *corev1.Service) { svc.Spec.ExternalIPs = []string{svc.Spec.ClusterIP} })
	s.endpoints(world, pods("a1", "b1")...)
	klip := s.service("klip", func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		svc.Spec.LoadBalancerSourceRanges = []string{"10.0.0.0/24"}
		svc.Spec.Ports = svc.Spec.Ports[:1]
		svc.Spec.Ports[0].Port, svc.Spec.Ports[0].NodePort = 30777, 30777
	})
	s.ingress(klip, bothNodes...)
	s.endpoints(klip, pods("a1", "b1")...)
	cross := s.service("cross", func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		svc.Spec.Ports[0].NodePort = 30778
		svc.Spec.Ports[1].Protocol, svc.Spec.Ports[1].Port, svc.Spec.Ports[1].NodePort = corev1.ProtocolTCP, 30778, 30779
		svc.Spec.Ports[1].TargetPort = intstr.FromInt32(8081)
	})
	s.ingress(cross, bothNodes...)
	s.endpoints(cross, pods("a1", "b1")...)
	served := func(who string) {
		t.Helper()
		for _, node := range []string{a4, b4} {
			s.expect(s.outside, hostPort(node, good.Spec.Ports[0].NodePort), seen{who, ""})
		}
		for _, n := range []*node{s.a, s.b} {
			s.within(patience, func() error {
				if code, body, err := get(n, "/healthz", 10256); err != nil || code != http.StatusOK {
					return fmt.Errorf("node %s: %d %s %v", n.name, code, body, err)
				}
				return nil
			})
			if strings.Contains(n.agent.Log.String(), "level=ERROR") {
				t.Errorf("node %s:\n%s", n.name, n.agent.Log)
			}
		}
	}
	served("b1")
	// What nobody but they themselves wants is theirs.
	s.expectBy("tcp", s.pods["a2"], hostPort(bad.Spec.ClusterIP, 80), seen{"a1", ""})
	s.expectBy("tcp", s.outside, hostPort(a4, 30777), seen{"a1 b1", ""})
	s.expectBy("tcp", s.outside, hostPort(a4, 30778), seen{"a1 b1", ""})
	s.endpoints(good, pods("a1")...)
	served("a1")
	for _, n := range []*node{s.a, s.b} {
		n.agent.Kill()
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
	}
	s.endpoints(good, pods("b2")...)
	served("b2")
}

// However old a Service is, what was given to another stays that one's.
func TestStealing(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	old := s.service("old", nil)
	s.endpoints(old, pods("b2")...)
	time.Sleep(1100 * time.Millisecond) // creationTimestamp has seconds
	victim := s.service("victim", ofType(corev1.ServiceTypeLoadBalancer))
	s.ingress(victim, corev1.LoadBalancerIngress{IP: "198.51.100.44"})
	s.endpoints(victim, pods("a1", "b1")...)
	s.update(old, func(svc *corev1.Service) {
		svc.Spec.ExternalIPs = []string{victim.Spec.ClusterIP, "198.51.100.44", "198.51.100.45"}
	})
	s.expect(s.outside, "198.51.100.45:80", seen{"b2", ""}) // the change has arrived
	for _, from := range []*place{s.pods["a2"], s.a.place, s.b.place, s.outside} {
		s.expect(from, hostPort(victim.Spec.ClusterIP, 80), seen{"a1 b1", ""})
		s.expect(from, "198.51.100.44:80", seen{"a1 b1", ""})
	}
	if out, _ := s.a.pentad("status"); !strings.Contains(out, "it is a ClusterIP of the Service "+s.namespace+"/victim") {
		t.Errorf("status does not say why:\n%s", out)
	}
}

// What one port leads to, for clients in different places, is taken from none of them
// by a change of policy.
func TestPolicyChanges(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	policy := func(p corev1.ServiceExternalTrafficPolicy) func(*corev1.Service) {
		return func(svc *corev1.Service) { svc.Spec.ExternalTrafficPolicy = p }
	}
	make := func(name, ip string, change func(*corev1.Service)) *corev1.Service {
		svc := s.service(name, func(svc *corev1.Service) {
			svc.Spec.Type = corev1.ServiceTypeLoadBalancer
			svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			change(svc)
		})
		s.ingress(svc, corev1.LoadBalancerIngress{IP: ip})
		s.endpoints(svc, pods("a1", "b1")...)
		s.expect(s.outside, ip+":80", seen{"a1", outside4})
		return svc
	}
	ranges := make("ranges", "198.51.100.61", func(svc *corev1.Service) { svc.Spec.LoadBalancerSourceRanges = []string{"10.0.0.0/24"} })
	s.update(ranges, policy(corev1.ServiceExternalTrafficPolicyCluster))
	s.expect(s.outside, "198.51.100.61:80", seen{"a1 b1", ""})
	s.update(ranges, func(svc *corev1.Service) { svc.Spec.LoadBalancerSourceRanges = []string{"10.0.0.0/25", "192.0.2.0/24"} })
	s.update(ranges, policy(corev1.ServiceExternalTrafficPolicyLocal))
	s.expect(s.outside, "198.51.100.61:80", seen{"a1", outside4})
	s.update(ranges, func(svc *corev1.Service) { svc.Spec.LoadBalancerSourceRanges = []string{"192.0.2.0/24"} })
	s.expectBy("tcp", s.outside, "198.51.100.61:80", seen{"timeout", ""})

	sticky := make("sticky", "198.51.100.62", func(svc *corev1.Service) { svc.Spec.SessionAffinity = corev1.ServiceAffinityClientIP })
	// Each rolling update passes through this.
	s.endpoints(sticky, member{pod: "a1", terminating: true, serving: true}, member{pod: "b1"})
	s.expect(s.outside, "198.51.100.62:80", seen{"a1", outside4})
	s.endpoints(sticky, member{pod: "a1", zones: []string{"b"}}, member{pod: "b1", zones: []string{"b"}})
	s.expect(s.outside, "198.51.100.62:80", seen{"a1", outside4})
	s.endpoints(sticky, pods("a1", "b1")...)
	s.update(sticky, policy(corev1.ServiceExternalTrafficPolicyCluster))
	for range 12 {
		if _, _, err := s.outside.ask("tcp", "198.51.100.62:80"); err != nil {
			t.Errorf("after Local -> Cluster with affinity: %v", err)
		}
	}
	s.update(sticky, policy(corev1.ServiceExternalTrafficPolicyLocal))
	s.update(sticky, func(svc *corev1.Service) { svc.Spec.SessionAffinity = corev1.ServiceAffinityNone })
	s.expect(s.outside, "198.51.100.62:80", seen{"a1", outside4})
	if log := s.a.agent.Log.String(); strings.Contains(log, "kernel refuses") {
		t.Errorf("transactions were refused:\n%s", log)
	}
}

// One family's endpoints say nothing of the other's, and an address of a family that
// a Service does not have is somebody else's.
func TestFamilies(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", nil)
	if len(svc.Spec.ClusterIPs) != 2 {
		t.Fatalf("the cluster has the families %v", svc.Spec.IPFamilies)
	}
	v4, v6 := hostPort(svc.Spec.ClusterIPs[0], 80), hostPort(svc.Spec.ClusterIPs[1], 80)
	s.slice(svc, true, []member{{pod: "a1", terminating: true, serving: true}})
	s.slice(svc, false, pods("b1"))
	for _, from := range []*place{s.pods["a2"], s.outside} {
		s.expect(from, v6, seen{"b1", ""})
		s.expect(from, v4, seen{"a1", ""})
	}
	s.slice(svc, true, []member{{pod: "a1", zones: []string{"a"}}, {pod: "b1", zones: []string{"b"}}})
	s.slice(svc, false, []member{{pod: "b1", zones: []string{"b"}}, {pod: "b2", zones: []string{"b"}}})
	s.expect(s.pods["a2"], v4, seen{"a1", ""})
	s.expect(s.pods["a2"], v6, seen{"b1 b2", ""})

	single := corev1.IPFamilyPolicySingleStack
	one := s.service("one", func(svc *corev1.Service) {
		svc.Spec.Type, svc.Spec.IPFamilyPolicy = corev1.ServiceTypeLoadBalancer, &single
		svc.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol}
	})
	s.ingress(one, corev1.LoadBalancerIngress{IP: "198.51.100.97"}, corev1.LoadBalancerIngress{IP: outside6})
	s.endpoints(one, pods("a1")...)
	s.expect(s.pods["a2"], "198.51.100.97:80", seen{"a1", ""})
	// Nobody listens there, and that is what is heard: from there, by way of the node.
	if out, _ := s.a.pentad("explain", hostPort(outside6, 80)); strings.Contains(out, "one:http") {
		t.Errorf("it is captured:\n%s", out)
	}
}

// A connection goes on for as long as its endpoint is one of its Service, whatever
// else becomes of the Service.
func TestConnectionsStay(t *testing.T) {
	t.Parallel()
	s := newScene(t, ownWorld(t))
	svc := s.service("web", nil)
	s.endpoints(svc, pods("b1")...)
	at := hostPort(svc.Spec.ClusterIP, 80)
	from := []*place{s.pods["a2"], s.a.place, s.outside}
	for _, p := range from {
		s.expectBy("tcp", p, at, seen{"b1", ""})
		if who, _, err := p.ask("hold", at); err != nil || who != "b1" {
			t.Fatalf("%s holds %s, %v", p.name, who, err)
		}
	}
	alive := func(after string) {
		t.Helper()
		// Longer than an endpoint may be missing.
		for until := time.Now().Add(1500 * time.Millisecond); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
			for _, p := range from {
				if _, _, err := p.ask("alive", at); err != nil {
					t.Fatalf("%s after %s: %v", p.name, after, err)
				}
			}
		}
	}
	local, cluster := corev1.ServiceInternalTrafficPolicyLocal, corev1.ServiceInternalTrafficPolicyCluster
	s.update(svc, func(svc *corev1.Service) { svc.Spec.InternalTrafficPolicy = &local })
	alive("internalTrafficPolicy Local")
	s.update(svc, func(svc *corev1.Service) { svc.Spec.InternalTrafficPolicy = &cluster })
	alive("internalTrafficPolicy Cluster")
	svc = s.update(svc, func(svc *corev1.Service) { svc.Spec.Ports[0].Name = "web" })
	alive("a port renamed, and its slice not yet")
	s.endpoints(svc, pods("b1")...)
	alive("its slice renamed, too")
	svc = s.update(svc, func(svc *corev1.Service) {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: "more", Protocol: corev1.ProtocolTCP, Port: 81, TargetPort: intstr.FromInt32(8080)})
	})
	s.endpoints(svc, pods("b1")...)
	alive("another port")
	svc = s.update(svc, func(svc *corev1.Service) { svc.Spec.Ports[0].Port = 82 })
	alive("the port's number")
	svc = s.update(svc, func(svc *corev1.Service) { svc.Spec.Ports[0].Port = 80 })
	svc = s.update(svc, func(svc *corev1.Service) { svc.Spec.Ports[0].TargetPort = intstr.FromInt32(8081) })
	s.endpoints(svc, pods("b1")...)
	alive("the target port")
	// From one slice to another, which is two writes.
	c := s.cluster.Client.DiscoveryV1().EndpointSlices(s.namespace)
	have, err := c.Get(t.Context(), svc.Name+"-4", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(t.Context(), have.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	moved := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: svc.Name + "-moved", Labels: have.Labels},
		AddressType: have.AddressType, Ports: have.Ports, Endpoints: have.Endpoints,
	}
	time.Sleep(200 * time.Millisecond)
	if _, err := c.Create(t.Context(), moved, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	alive("a move to another slice")
	// The Service made anew, with the same address.
	services := s.cluster.Client.CoreV1().Services(s.namespace)
	if err := services.Delete(t.Context(), svc.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	alive("the Service is deleted")
	// Its slices go with it, and come after the new one.
	if err := c.Delete(t.Context(), moved.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // the nodes have heard of it
	s.service("web", func(again *corev1.Service) {
		again.Spec.ClusterIP, again.Spec.ClusterIPs, again.Spec.Ports = svc.Spec.ClusterIP, svc.Spec.ClusterIPs, svc.Spec.Ports
	})
	alive("the Service is made anew")
	moved.ResourceVersion, moved.UID = "", ""
	if _, err := c.Create(t.Context(), moved, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	alive("its slice is made anew")
	// Gone for good: the sockets of this node hear of it, as they always did.
	if err := c.Delete(t.Context(), moved.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, p := range from[:2] {
		s.within(patience, func() error {
			if _, _, err := p.ask("alive", at); err == nil {
				return fmt.Errorf("%s has its connection still", p.name)
			}
			return nil
		})
	}
	// A port gets another name while no agent is there.
	for _, p := range from {
		p.ask("drop", at)
	}
	if _, err := c.Create(t.Context(), moved, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, p := range from {
		s.expectBy("tcp", p, at, seen{"b1", ""})
		if who, _, err := p.ask("hold", at); err != nil || who != "b1" {
			t.Fatalf("%s holds %s, %v", p.name, who, err)
		}
	}
	s.a.agent.Kill()
	s.update(svc, func(svc *corev1.Service) { svc.Spec.Ports[0].Name = "renamed" })
	if err := s.a.start(); err != nil {
		t.Fatal(err)
	}
	s.healthy(s.a, "/healthz", http.StatusOK)
	alive("another agent")
}

// Who sends datagrams from one port, and was there first, is answered as soon as
// there is somebody to answer.
func TestSenderWasFirst(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	port := 41000
	// first sends where nobody answers, from a port of its own.
	first := func(address string) (again func()) {
		t.Helper()
		port++
		what := fmt.Sprintf("%d %s", port, address)
		if who, _, err := s.outside.ask("from", what); err == nil {
			t.Fatalf("%s answers at %s already", who, address)
		}
		return func() {
			t.Helper()
			s.within(patience, func() error {
				_, _, err := s.outside.ask("from", what)
				return err
			})
		}
	}
	svc := s.service("web", nil)
	again := first(hostPort(svc.Spec.ClusterIP, 80))
	s.endpoints(svc, pods("b1")...)
	again()
	// Its slice exists before it does.
	ip := svc.Spec.ClusterIP
	if err := s.cluster.Client.CoreV1().Services(s.namespace).Delete(t.Context(), svc.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.within(patience, func() error {
		if who, _, err := s.outside.ask("udp", hostPort(ip, 80)); err == nil {
			return fmt.Errorf("%s answers still", who)
		}
		return nil
	})
	again = first(hostPort(ip, 80))
	svc = s.service("web", func(svc *corev1.Service) { svc.Spec.ClusterIP, svc.Spec.ClusterIPs = ip, nil })
	again()
	// Addresses and ports that a Service with endpoints gets.
	again = first("198.51.100.71:80")
	s.update(svc, func(svc *corev1.Service) { svc.Spec.ExternalIPs = []string{"198.51.100.71"} })
	again()
	again = first(hostPort(a4, 30881))
	s.update(svc, func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		svc.Spec.Ports[1].NodePort = 30881
	})
	again()
	again = first("198.51.100.72:80")
	now, err := s.cluster.Client.CoreV1().Services(s.namespace).Get(t.Context(), svc.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.ingress(now, corev1.LoadBalancerIngress{IP: "198.51.100.72"})
	again()
	again = first(hostPort(ip, 81))
	s.update(svc, func(svc *corev1.Service) { svc.Spec.Ports[1].Port = 81 })
	again()
}

// Sockets of the node that are older than a Service find it, as those of pods do. It runs
// by itself: what it waits for is an answer of the kernel, not of an API server that is
// busy with the hundreds of Services of others.
func TestSocketsAreOlder(t *testing.T) {
	s := newScene(t, theWorld(t))
	spare := s.service("spare", nil)
	ip := spare.Spec.ClusterIP
	if err := s.cluster.Client.CoreV1().Services(s.namespace).Delete(t.Context(), spare.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	at := hostPort(ip, 80)
	for _, from := range []*place{s.a.place, s.pods["a2"]} {
		s.within(patience, func() error {
			if _, _, err := from.ask("tcp", at); err == nil || failure(err) != "timeout" {
				return fmt.Errorf("the address is not free: %v", err)
			}
			return nil
		})
		if who, _, err := from.ask("again", at); err == nil {
			t.Fatalf("%s answers", who)
		}
	}
	under := make(chan error)
	go func() {
		_, _, err := s.a.place.ask("wait", at)
		under <- err
	}()
	time.Sleep(200 * time.Millisecond)
	svc := s.service("web", func(svc *corev1.Service) { svc.Spec.ClusterIP, svc.Spec.ClusterIPs = ip, nil })
	s.endpoints(svc, pods("b1")...)
	if err := <-under; err != nil {
		t.Errorf("a connect that was under way: %v", err)
	}
	for _, from := range []*place{s.a.place, s.pods["a2"]} {
		s.within(patience, func() error {
			_, _, err := from.ask("again", at)
			return err
		})
	}
}

// A port that somebody has when its Service comes is opened when he is gone.
func TestHealthCheckNodePortIsTaken(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	const port = 31977
	var taken net.Listener
	if err := s.a.Do(func() (err error) {
		taken, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	svc := s.service("web", func(svc *corev1.Service) {
		svc.Spec.Type, svc.Spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, port
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	})
	s.endpoints(svc, pods("a1")...)
	warns := func(want bool) {
		t.Helper()
		s.within(patience, func() error {
			out, err := s.a.pentad("status")
			if strings.Contains(out, fmt.Sprintf("healthCheckNodePort %d", port)) != want {
				err = fmt.Errorf("status: %w\n%s", err, out)
			} else {
				err = nil
			}
			return err
		})
	}
	warns(true)
	taken.Close()
	warns(false)
	s.within(patience, func() error {
		code, body, err := get(s.a, "/", port)
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
}

// A client that has said all that it has to say may wait long for its answer; what a
// node changes for that is put back.
func TestConntrackSettings(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	s := newScene(t, w)
	svc := s.service("web", nil)
	s.endpoints(svc, pods("a1")...)
	s.expect(s.outside, hostPort(svc.Spec.ClusterIP, 80), seen{"a1", ""})
	settings := func(closeWait, established string) {
		t.Helper()
		for name, want := range map[string]string{
			"nf_conntrack_tcp_timeout_close_wait": closeWait, "nf_conntrack_tcp_timeout_established": established,
		} {
			s.within(patience, func() error {
				var have []byte
				err := s.a.Do(func() (err error) {
					have, err = os.ReadFile("/proc/sys/net/netfilter/" + name)
					return err
				})
				if err == nil && strings.TrimSpace(string(have)) != want {
					err = fmt.Errorf("%s is %s, want %s", name, have, want)
				}
				return err
			})
		}
	}
	settings("3600", "86400")
	// Another agent does not take for the kernel's what this one has set.
	s.a.agent.Kill()
	if err := s.a.start(); err != nil {
		t.Fatal(err)
	}
	s.healthy(s.a, "/healthz", http.StatusOK)
	settings("3600", "86400")
	if out, err := s.a.pentad("down"); err != nil {
		t.Fatalf("down: %v\n%s", err, out)
	}
	settings("60", "432000")
}

// A Service that changes harms itself alone: it keeps what it has until it can have
// what it asks for, and who shares an address with it keeps that.
func TestControllerKeeps(t *testing.T) {
	t.Parallel()
	c := newControl(t)
	c.start()
	c.pool("main", map[string]any{"addresses": []any{"192.0.2.1-192.0.2.3"}})
	share := func(port int32) func(*corev1.Service) {
		return func(svc *corev1.Service) {
			svc.Annotations = map[string]string{"pentad.io/share": "k"}
			svc.Spec.Ports = svc.Spec.Ports[:1]
			svc.Spec.Ports[0].Port = port
		}
	}
	old := c.balancer("old", share(80))
	c.has("old", "192.0.2.1", "Allocated")
	time.Sleep(1100 * time.Millisecond) // creationTimestamp has seconds
	c.balancer("young", share(81))
	c.has("young", "192.0.2.1", "Allocated")
	// The older one takes the younger's port, and has to go.
	c.update(old, func(svc *corev1.Service) { svc.Spec.Ports[0].Port = 81 })
	c.has("old", "192.0.2.2", "Allocated")
	c.has("young", "192.0.2.1", "Allocated")

	asks := func(address string) func(*corev1.Service) {
		return func(svc *corev1.Service) { svc.Annotations = map[string]string{"pentad.io/addresses": address} }
	}
	for address, reason := range map[string]string{"192.0.2.300": "Invalid", "198.51.100.1": "NotInPool", "192.0.2.1": "InUse"} {
		c.update(old, asks(address))
		c.has("old", "192.0.2.2", reason)
	}
	c.update(old, asks("192.0.2.3"))
	c.has("old", "192.0.2.3", "Allocated")
	c.update(old, func(svc *corev1.Service) { svc.Annotations = map[string]string{"pentad.io/pool": "nowhere"} })
	c.has("old", "192.0.2.3", "UnknownPool")
	c.update(old, func(svc *corev1.Service) { svc.Annotations = nil })
	c.has("old", "192.0.2.3", "Allocated")

	// Somebody empties its status: it gets its own address again.
	first := c.balancer("first", nil)
	c.has("first", "192.0.2.2", "Allocated")
	now := c.update(old, func(svc *corev1.Service) {})
	c.update(first, func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeClusterIP })
	c.has("first", "", "")
	c.ingress(now)
	c.has("old", "192.0.2.3", "Allocated")

	// One that is being deleted has its address until it is gone.
	c.update(old, func(svc *corev1.Service) { svc.Finalizers = []string{"example.com/cleanup"} })
	c.pool("main", map[string]any{"addresses": []any{"192.0.2.1/32", "192.0.2.3/32"}})
	if err := c.cluster.Client.CoreV1().Services(c.namespace).Delete(t.Context(), "old", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.balancer("second", nil)
	c.has("second", "", "Exhausted")
	c.update(old, func(svc *corev1.Service) { svc.Finalizers = nil })
	c.has("second", "192.0.2.3", "Allocated")

	// What others write into a status is of no pool, and nobody's.
	alien := c.balancer("alien", func(svc *corev1.Service) { svc.Spec.LoadBalancerClass = ptr("example.com/other") })
	c.ingress(alien, corev1.LoadBalancerIngress{IP: "198.18.0.1"})
	c.has("alien", "198.18.0.1", "")
	c.update(alien, func(svc *corev1.Service) {
		svc.Spec.Type, svc.Spec.LoadBalancerClass = corev1.ServiceTypeClusterIP, nil
	})
	c.update(alien, func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeLoadBalancer })
	c.has("alien", "", "Exhausted")
}

func ptr[T any](v T) *T { return &v }

// hostile returns a Service that asks for what another has: its ClusterIP, the
// address that its load balancer has, its NodePort; or for its own things twice.
func hostile(i int, victim, balancer string, nodePort int32) (svc *corev1.Service, ingress []corev1.LoadBalancerIngress) {
	svc = &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("hostile-%04d", i)}}
	svc.Spec.ClusterIP = fmt.Sprintf("10.96.%d.%d", 60+i/250, 1+i%250)
	port := corev1.ServicePort{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(8080)}
	local, loadBalancer := corev1.ServiceInternalTrafficPolicyLocal, false
	switch i % 6 {
	case 0:
		svc.Spec.ExternalIPs = []string{victim, balancer}
	case 1:
		svc.Spec.ExternalIPs, svc.Spec.InternalTrafficPolicy = []string{victim, svc.Spec.ClusterIP}, &local
	case 2:
		loadBalancer, port.Port, ingress = true, nodePort, bothNodes
	case 3:
		loadBalancer, ingress = true, []corev1.LoadBalancerIngress{{IP: victim}, {IP: svc.Spec.ClusterIP}, {IP: balancer}}
		svc.Spec.LoadBalancerSourceRanges = []string{"192.0.2.0/24"}
	case 4:
		loadBalancer, ingress = true, []corev1.LoadBalancerIngress{{IP: victim}}
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		svc.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		svc.Spec.HealthCheckNodePort = int32(31200 + i)
	case 5:
		port.Port = nodePort
		svc.Spec.ExternalIPs = []string{a4, b4, victim, victim}
		svc.Annotations = map[string]string{"pentad.io/breaker": "{failures: many}", "pentad.io/health": "{probe: exec, command: [reboot]}"}
	}
	if loadBalancer {
		svc.Spec.Type, svc.Spec.AllocateLoadBalancerNodePorts = corev1.ServiceTypeLoadBalancer, ptr(false)
	}
	svc.Spec.Ports = []corev1.ServicePort{port}
	return svc, ingress
}

// Services by the hundred, each with an older one beside it that wants what it has:
// every one is served on every node, as if it were alone. PENTAD_HOSTILE is how many.
func TestHostileNeighbours(t *testing.T) {
	t.Parallel()
	s := newScene(t, ownWorld(t))
	count := 200
	if text := os.Getenv("PENTAD_HOSTILE"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		count = n
	}
	services := s.cluster.Client.CoreV1().Services(s.namespace)
	create := func(svc *corev1.Service, ingress []corev1.LoadBalancerIngress) *corev1.Service {
		t.Helper()
		svc, err := services.Create(t.Context(), svc, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(ingress) > 0 {
			s.ingress(svc, ingress...)
		}
		return svc
	}
	victim := func(i int) (ip, balancer string, nodePort int32) {
		return fmt.Sprintf("10.96.%d.%d", 30+i/250, 1+i%250), fmt.Sprintf("198.51.%d.%d", 101+i/250, 1+i%250), int32(30000 + i)
	}
	for i := range count {
		ip, balancer, nodePort := victim(i)
		svc := create(hostile(i, ip, balancer, nodePort))
		s.slice(svc, true, pods("b2"))
	}
	for i := range count {
		ip, balancer, nodePort := victim(i)
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("victim-%04d", i)}}
		svc.Spec.Type, svc.Spec.ClusterIP = corev1.ServiceTypeLoadBalancer, ip
		svc.Spec.Ports = []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, NodePort: nodePort, TargetPort: intstr.FromInt32(8080)}}
		svc = create(svc, []corev1.LoadBalancerIngress{{IP: balancer}})
		s.slice(svc, true, pods("a1"))
	}
	last, _, lastPort := victim(count - 1)
	s.expectBy("tcp", s.outside, hostPort(last, 80), seen{"a1", ""})
	s.expectBy("tcp", s.outside, hostPort(b4, lastPort), seen{"a1", ""})
	for i := range count {
		ip, balancer, nodePort := victim(i)
		for _, x := range []struct {
			from    *place
			address string
		}{
			{s.pods["a2"], hostPort(ip, 80)}, {s.b.place, hostPort(ip, 80)}, {s.pods["b1"], hostPort(balancer, 80)},
			{s.outside, hostPort(ip, 80)}, {s.outside, hostPort(a4, nodePort)}, {s.outside, hostPort(b4, nodePort)},
		} {
			// The last ones may be there before others are.
			if err := lab.Eventually(patience, func() error {
				who, _, err := x.from.ask("tcp", x.address)
				if err == nil && who != "a1" {
					err = fmt.Errorf("%s answers", who)
				}
				return err
			}); err != nil {
				t.Errorf("victim %d, beside a hostile one of kind %d: %s to %s: %v", i, i%6, x.from.name, x.address, err)
			}
		}
		if t.Failed() && i%20 == 0 {
			t.FailNow()
		}
	}
	for _, n := range []*node{s.a, s.b} {
		s.healthy(n, "/healthz", http.StatusOK)
		if strings.Contains(n.agent.Log.String(), "level=ERROR") {
			t.Errorf("node %s:\n%s", n.name, n.agent.Log)
		}
	}
}

// Who sends datagrams from one port stays with an endpoint that serves, also while it
// ends, and leaves one that answers nobody any more.
func TestDatagramsLeave(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", nil)
	s.endpoints(svc, pods("a1", "b1")...)
	at := "udp " + hostPort(svc.Spec.ClusterIP, 80)
	other := map[string]string{"a1": "b1", "b1": "a1"}
	for _, from := range []*place{s.pods["a2"], s.a.place, s.outside} {
		answers := func() (string, error) {
			heard, err := from.many(many{"steady", []string{at}, 1, quickly})
			if err != nil {
				t.Fatal(err)
			}
			who := heard[0].only()
			if !isServer(who) {
				return "", fmt.Errorf("%s heard %v", from.name, heard[0])
			}
			return who, nil
		}
		s.endpoints(svc, pods("a1", "b1")...)
		s.expectBy("udp", from, hostPort(svc.Spec.ClusterIP, 80), seen{"a1 b1", ""})
		who, err := answers()
		if err != nil {
			t.Fatal(err)
		}
		becomes := func(m member, want, why string) {
			t.Helper()
			s.endpoints(svc, m, member{pod: other[m.pod]})
			s.expectBy("udp", from, hostPort(svc.Spec.ClusterIP, 80), seen{other[m.pod], ""})
			s.within(patience, func() error {
				have, err := answers()
				if err == nil && have != want {
					err = fmt.Errorf("%s is answered by %s, want %s: %s", from.name, have, want, why)
				}
				return err
			})
		}
		becomes(member{pod: who, terminating: true, serving: true}, who, "it serves while it ends")
		becomes(member{pod: who, unready: true}, other[who], "it serves nobody")
		becomes(member{pod: who, terminating: true, serving: true}, other[who], "nobody goes back")
	}
}
