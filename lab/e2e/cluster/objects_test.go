package cluster

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/pentad/pentad/lab"
)

// What a Service says of itself takes effect while it lives, and back.
func TestServiceChanges(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", nil)
	s.endpoints(svc, pods("a1")...)
	ip := svc.Spec.ClusterIP
	s.expect(s.pods["a2"], hostPort(ip, 80), seen{"a1", ""})

	// Another proxy serves it, by a label; its slices get the label from their
	// controller, which is this test.
	svc = s.update(svc, func(svc *corev1.Service) {
		svc.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "other"}
	})
	s.expectBy("tcp", s.pods["a2"], hostPort(ip, 80), seen{"timeout", ""})
	s.expectBy("tcp", s.outside, hostPort(ip, 80), seen{"timeout", ""})
	svc = s.update(svc, func(svc *corev1.Service) { svc.Labels = nil })
	s.expect(s.pods["a2"], hostPort(ip, 80), seen{"a1", ""})

	// A port is changed, and one is added.
	svc = s.update(svc, func(svc *corev1.Service) {
		svc.Spec.Ports[0].Port, svc.Spec.Ports[1].Port = 81, 81
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: "more", Port: 82, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(8081)})
	})
	s.endpoints(svc, pods("a1")...)
	s.expect(s.outside, hostPort(ip, 81), seen{"a1", ""})
	s.expectBy("tcp", s.pods["a2"], hostPort(ip, 82), seen{"a1", ""})
	s.expectBy("tcp", s.pods["a2"], hostPort(ip, 80), seen{"refused", ""})
	s.expectBy("tcp", s.outside, hostPort(ip, 80), seen{"refused", ""})

	// Its type is changed, there and back.
	svc = s.update(svc, func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeNodePort })
	port := svc.Spec.Ports[0].NodePort
	s.expectBy("tcp", s.outside, hostPort(b4, port), seen{"a1", ""})
	s.update(svc, func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeClusterIP })
	s.expectBy("tcp", s.outside, hostPort(b4, port), seen{"refused", ""})

	// It goes.
	if err := s.cluster.Client.CoreV1().Services(s.namespace).Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.expectBy("tcp", s.pods["a2"], hostPort(ip, 81), seen{"timeout", ""})
}

// Annotations say what Kubernetes has no field for; SCTP and what cannot be read
// are named by status, and break nothing beside them.
func TestAnnotations(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) {
		svc.Annotations = map[string]string{"pentad.io/balance": "source-hash", "pentad.io/keepalive": "{idle: 7s}", "pentad.io/breaker": "3"}
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: "sctp", Protocol: corev1.ProtocolSCTP, Port: 80, TargetPort: intstr.FromInt32(8080)})
	})
	s.endpoints(svc, pods("a1", "b1")...)
	for _, from := range []*place{s.pods["a2"], s.outside} {
		s.expect(from, hostPort(svc.Spec.ClusterIP, 80), seen{s.sticksTo("tcp", from, hostPort(svc.Spec.ClusterIP, 80)), ""})
	}
	// What packets find may be there before what sockets find is.
	s.within(patience, func() error {
		out, err := s.a.pentad("service", "show", s.namespace+"/web:http")
		if err == nil && (!strings.Contains(out, "source-hash") || !strings.Contains(out, "7s")) {
			err = fmt.Errorf("service show: %s", out)
		}
		return err
	})
	s.within(patience, func() error {
		out, err := s.a.pentad("status")
		for _, want := range []string{"/web: port 80/SCTP is not served", "/web: annotation pentad.io/breaker: "} {
			if err != nil || !strings.Contains(out, s.namespace+want) {
				return fmt.Errorf("%v: %s", err, out)
			}
		}
		out, err = s.a.pentad("status", "-o", "json")
		if err != nil || !strings.Contains(out, `"unserved": 1`) {
			err = fmt.Errorf("the port of SCTP is not counted: %v: %s", err, out)
		}
		return err
	})
}

// A node that may not read ServiceCIDRs serves everything all the same, says so, and
// reads them when it may.
func TestForbiddenServiceCIDRs(t *testing.T) {
	t.Parallel()
	s := newScene(t, ownWorld(t))
	roles := s.cluster.Client.RbacV1().ClusterRoles()
	role, err := roles.Get(t.Context(), "pentad", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	whole := slices.Clone(role.Rules)
	role.Rules = slices.DeleteFunc(role.Rules, func(r rbacv1.PolicyRule) bool { return slices.Contains(r.Resources, "servicecidrs") })
	if role, err = roles.Update(t.Context(), role, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.a.agent.Kill()
	if err := s.a.start(); err != nil {
		t.Fatal(err)
	}
	svc := s.service("web", nil)
	s.endpoints(svc, pods("a1")...)
	s.expect(s.pods["a2"], hostPort(svc.Spec.ClusterIP, 80), seen{"a1", ""})
	s.expect(s.outside, hostPort(svc.Spec.ClusterIP, 80), seen{"a1", ""})
	const says = "ServiceCIDRs: they may not be read"
	s.within(patience, func() error {
		if out, _ := s.a.pentad("status"); !strings.Contains(out, says) {
			return fmt.Errorf("status does not say %q:\n%s", says, out)
		}
		return nil
	})
	role.Rules = whole
	if _, err = roles.Update(t.Context(), role, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.within(2*time.Minute, func() error {
		if out, _ := s.a.pentad("status"); strings.Contains(out, says) {
			return fmt.Errorf("status still says %q:\n%s", says, out)
		}
		return nil
	})
	s.expectBy("tcp", s.outside, hostPort(svc.Spec.ClusterIP, 81), seen{"refused", ""})
}

// A load balancer asks each node at the healthCheckNodePort.
func TestHealthCheckNodePort(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	})
	asks := func(n *node, code, endpoints int) {
		t.Helper()
		s.within(patience, func() error {
			have, body, err := get(n, "/", int(svc.Spec.HealthCheckNodePort))
			if err != nil {
				return err
			}
			var answer struct {
				Service             struct{ Namespace, Name string }
				LocalEndpoints      int
				ServiceProxyHealthy bool
			}
			if err := json.Unmarshal(body, &answer); err != nil {
				return err
			}
			if have != code || answer.LocalEndpoints != endpoints || answer.Service.Name != "web" || !answer.ServiceProxyHealthy {
				return fmt.Errorf("node %s: %d %s", n.name, have, body)
			}
			return nil
		})
	}
	asks(s.a, http.StatusServiceUnavailable, 0)
	s.endpoints(svc, pods("a1", "a2")...)
	asks(s.a, http.StatusOK, 2)
	asks(s.b, http.StatusServiceUnavailable, 0)
	// Those that terminate do not count, though they still answer.
	s.endpoints(svc, member{pod: "a1", terminating: true, serving: true}, member{pod: "b1"})
	asks(s.a, http.StatusServiceUnavailable, 0)
	asks(s.b, http.StatusOK, 1)
	// A family without endpoints here says so to those who ask by it.
	s.slice(svc, false, pods("b1"))
	s.slice(svc, true, pods("a1"))
	s.within(patience, func() error {
		heard, err := s.outside.many(many{"ask", []string{"http " + hostPort(a4, svc.Spec.HealthCheckNodePort), "http " + hostPort(a6, svc.Spec.HealthCheckNodePort)}, 1, quickly})
		if err != nil || heard[0]["200 with 1"] == 0 || heard[1]["503 with 0"] == 0 {
			return fmt.Errorf("%v, %v", heard, err)
		}
		return nil
	})
	s.update(svc, func(svc *corev1.Service) { svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster })
	s.within(patience, func() error {
		if _, _, err := get(s.a, "/", int(svc.Spec.HealthCheckNodePort)); err == nil {
			return fmt.Errorf("port %d is still open", svc.Spec.HealthCheckNodePort)
		}
		return nil
	})
}

// A slice of 1,000 endpoints is replaced at once, under load, by one of as many;
// every connection reaches one of those that are.
func TestLargeSlice(t *testing.T) {
	t.Parallel()
	s := newScene(t, theWorld(t))
	svc := s.service("web", func(svc *corev1.Service) { svc.Spec.Ports = svc.Spec.Ports[:1] })
	ip := hostPort(svc.Spec.ClusterIP, 80)
	port, name, protocol := int32(8080), "http", corev1.ProtocolTCP
	c := s.cluster.Client.DiscoveryV1().EndpointSlices(s.namespace)
	// All addresses of two ranges are those of pods: a server answers at each.
	slice := func(third int) *discoveryv1.EndpointSlice {
		sl := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: "web", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Protocol: &protocol, Port: &port}},
		}
		for i := range 1000 {
			node := "b"
			sl.Endpoints = append(sl.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{fmt.Sprintf("10.246.%d.%d", third+i/250, i%250+1)}, NodeName: &node,
			})
		}
		return sl
	}
	w := s.world
	if err := w.pods["b1"].RouteLocal("10.246.0.0/16"); err != nil {
		t.Fatal(err)
	}
	if err := w.a.Route("10.246.0.0/16", b4); err != nil {
		t.Fatal(err)
	}
	if err := w.b.Route("10.246.0.0/16", "10.244.2.2"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Create(t.Context(), slice(0), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.expectBy("tcp", s.pods["a2"], ip, seen{"b1", ""})
	s.expectBy("tcp", s.outside, ip, seen{"b1", ""})
	l := s.load(ip, s.pods["a2"], s.outside)
	for round := range 4 {
		if _, err := c.Update(t.Context(), slice(4*(round%2+1)), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
	}
	l.end(t)
	s.within(patience, func() error {
		out, err := s.a.pentad("service", "show", s.namespace+"/web:http", "-o", "json")
		if n := strings.Count(out, `"address": "10.246.`); err != nil || n != 1000 {
			return fmt.Errorf("%d backends: %v", n, err)
		}
		return nil
	})
}

// A Node that is deleted takes its addresses with it; Services go on.
func TestNodeDeleted(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	s := newScene(t, w)
	svc := s.service("web", func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeNodePort })
	s.endpoints(svc, pods("a1", "b1")...)
	ip, port := hostPort(svc.Spec.ClusterIP, 80), svc.Spec.Ports[0].NodePort
	s.expectBy("tcp", s.outside, hostPort(a4, port), seen{"a1 b1", ""})
	if err := w.cluster.Client.CoreV1().Nodes().Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.expectBy("tcp", s.outside, hostPort(a4, port), seen{"refused", ""})
	s.expect(s.pods["a2"], ip, seen{"a1 b1", ""})
	s.expectBy("tcp", s.outside, hostPort(b4, port), seen{"a1 b1", ""})
	if out, err := s.a.pentad("status"); err != nil || !strings.Contains(out, "Node a: there is no such Node") {
		t.Errorf("status: %v\n%s", err, out)
	}
	// The watch is so old that the API server refuses to go on with it.
	w.cluster.KillAPIServer()
	if err := w.cluster.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.cluster.StartAPIServer(); err != nil {
		t.Fatal(err)
	}
	if err := w.cluster.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.endpoints(svc, pods("a2")...)
	s.within(time.Minute, func() error { return s.looksLike("tcp", s.b.place, ip, seen{"a2", ""}) })
	if err := lab.Eventually(time.Minute, func() error { return s.looksLike("tcp", s.a.place, ip, seen{"a2", ""}) }); err != nil {
		t.Error(err)
	}
}
