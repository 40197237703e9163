package cluster

import (
	"fmt"
	"math/rand/v2"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// generator makes random objects: everything that a Service and its slices may say,
// the usual more often than the odd. What it makes may be refused by the API server.
type generator struct{ *rand.Rand }

// chance is true in so many of a hundred cases.
func (g generator) chance(percent int) bool { return g.IntN(100) < percent }

func oneOf[T any](g generator, all ...T) T { return all[g.IntN(len(all))] }

// service makes the i-th Service of a case. Its ports are its own, so that it may
// share addresses with others and with nodes.
func (g generator) service(i int) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("s%d", i)}}
	// kube-proxy chooses at random; by latency, the slower are left out for a while.
	if g.chance(75) {
		svc.Annotations = map[string]string{"pentad.io/balance": "random"}
	}
	families := oneOf(g, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicySingleStack)
	svc.Spec.IPFamilyPolicy = &families
	if g.chance(40) {
		svc.Spec.IPFamilies = []corev1.IPFamily{oneOf(g, corev1.IPv4Protocol, corev1.IPv6Protocol)}
	}
	g.ports(svc, i)
	svc.Spec.Type = oneOf(g, corev1.ServiceTypeClusterIP, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort,
		corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeLoadBalancer)
	if g.chance(5) {
		svc.Spec.Type, svc.Spec.ClusterIP = corev1.ServiceTypeClusterIP, corev1.ClusterIPNone
	}
	for range g.IntN(4) {
		g.change(svc, i)
	}
	return svc
}

// ports gives a Service one to three ports.
func (g generator) ports(svc *corev1.Service, i int) {
	first := int32(80 + 10*i)
	all := []corev1.ServicePort{
		{Name: "http", Protocol: corev1.ProtocolTCP, Port: first, TargetPort: intstr.FromInt32(8080)},
		{Name: "dns", Protocol: corev1.ProtocolUDP, Port: first, TargetPort: intstr.FromInt32(8080)},
		{Name: "more", Protocol: corev1.ProtocolTCP, Port: first + 1, TargetPort: intstr.FromInt32(8081)},
		{Name: "log", Protocol: corev1.ProtocolUDP, Port: first + 2, TargetPort: intstr.FromInt32(8081)},
	}
	g.Shuffle(len(all), func(i, k int) { all[i], all[k] = all[k], all[i] })
	all = all[:1+g.IntN(3)]
	if len(all) == 1 && g.chance(50) {
		all[0].Name = ""
	}
	// Ports that stay keep what was allocated for them.
	for k := range all {
		for _, had := range svc.Spec.Ports {
			if had.Protocol == all[k].Protocol && had.Port == all[k].Port {
				all[k].NodePort = had.NodePort
			}
		}
	}
	svc.Spec.Ports = all
}

// change changes one thing that a Service says. Nodes' addresses as externalIPs are left
// out: pentad serves them only where it is told to, because others are reached there.
func (g generator) change(svc *corev1.Service, i int) {
	spec := &svc.Spec
	switch g.IntN(11) {
	case 0:
		spec.Type = oneOf(g, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer)
	case 1:
		g.ports(svc, i)
	case 2:
		internal := oneOf(g, corev1.ServiceInternalTrafficPolicyLocal, corev1.ServiceInternalTrafficPolicyCluster)
		spec.InternalTrafficPolicy = &internal
	case 3, 4:
		spec.ExternalTrafficPolicy = oneOf(g, corev1.ServiceExternalTrafficPolicyLocal, corev1.ServiceExternalTrafficPolicyCluster)
	case 5:
		spec.SessionAffinity, spec.SessionAffinityConfig = corev1.ServiceAffinityNone, nil
		if g.chance(60) {
			spec.SessionAffinity = corev1.ServiceAffinityClientIP
		}
	case 6:
		spec.LoadBalancerSourceRanges = g.ranges()
	case 7, 8:
		spec.ExternalIPs = nil
		if g.chance(70) {
			spec.ExternalIPs = []string{fmt.Sprintf("203.0.113.%d", 64+g.IntN(3))}
		}
		if g.chance(40) {
			spec.ExternalIPs = append(spec.ExternalIPs, fmt.Sprintf("2001:db8:113:0:1::%d", 1+g.IntN(3)))
		}
	case 9:
		no := g.chance(50)
		spec.AllocateLoadBalancerNodePorts = &no
	case 10:
		svc.Labels = nil
		if g.chance(20) {
			svc.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "other"}
		}
	}
}

func (g generator) ranges() []string {
	all := []string{outside4 + "/32", "10.244.1.0/24", "10.0.0.0/24", "192.0.2.0/24", outside6 + "/128", "2001:db8:244::/48"}
	g.Shuffle(len(all), func(i, k int) { all[i], all[k] = all[k], all[i] })
	return all[:g.IntN(3)]
}

// ingress makes what the status of a LoadBalancer says.
func (g generator) ingress() []corev1.LoadBalancerIngress {
	var all []corev1.LoadBalancerIngress
	add := func(address string) {
		mode := oneOf(g, corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy)
		all = append(all, corev1.LoadBalancerIngress{IP: address, IPMode: &mode})
	}
	if g.chance(85) {
		add(fmt.Sprintf("198.51.100.%d", 120+g.IntN(3)))
	}
	if g.chance(50) {
		add(fmt.Sprintf("2001:db8:51::%d", 1+g.IntN(3)))
	}
	if g.chance(10) {
		add(oneOf(g, a4, b4, a6, b6))
	}
	return all
}

// server is somebody who answers at ports 8080 and 8081.
type server struct{ name, node, v4, v6 string }

// servers are the pods, the nodes and a machine outside of the cluster.
var servers = []server{
	{"a1", "a", "10.244.1.2", "2001:db8:244:1::2"},
	{"a2", "a", "10.244.1.3", "2001:db8:244:1::3"},
	{"b1", "b", "10.244.2.2", "2001:db8:244:2::2"},
	{"b2", "b", "10.244.2.3", "2001:db8:244:2::3"},
	{"a", "a", a4, a6},
	{"b", "b", b4, b6},
	{"outside", "", outside4, outside6},
}

// slice makes an EndpointSlice of a Service.
func (g generator) slice(svc *corev1.Service, name string, v4 bool) *discoveryv1.EndpointSlice {
	sl := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: svc.Name}},
		AddressType: discoveryv1.AddressTypeIPv6,
	}
	if v4 {
		sl.AddressType = discoveryv1.AddressTypeIPv4
	}
	if other := svc.Labels["service.kubernetes.io/service-proxy-name"]; other != "" && g.chance(80) {
		sl.Labels["service.kubernetes.io/service-proxy-name"] = other
	}
	for _, p := range svc.Spec.Ports {
		if g.chance(4) {
			continue
		}
		port := p.TargetPort.IntVal
		sl.Ports = append(sl.Ports, discoveryv1.EndpointPort{Name: &p.Name, Protocol: &p.Protocol, Port: &port})
	}
	g.members(sl)
	return sl
}

// members gives a slice other endpoints.
func (g generator) members(sl *discoveryv1.EndpointSlice) {
	all := slices.Clone(servers)
	g.Shuffle(len(all), func(i, k int) { all[i], all[k] = all[k], all[i] })
	// The usual: pods, all of them ready.
	usual, hints := g.chance(50), g.chance(30)
	if usual {
		all = slices.DeleteFunc(all, func(s server) bool { return len(s.name) != 2 })
	}
	sl.Endpoints = nil
	for _, s := range all[:g.IntN(4)] {
		sl.Endpoints = append(sl.Endpoints, g.endpoint(s, sl.AddressType == discoveryv1.AddressTypeIPv4, usual, hints))
	}
}

func (g generator) endpoint(s server, v4, ready, hints bool) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{s.v6}}
	if v4 {
		e.Addresses[0] = s.v4
	}
	if s.node != "" {
		e.NodeName, e.Zone = &s.node, &s.node
	}
	yes, no := true, false
	e.Conditions = discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no}
	if !ready {
		switch g.IntN(10) {
		case 0, 1:
			e.Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &no}
		case 2, 3:
			e.Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
		case 4:
			e.Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &yes}
		case 5:
			e.Conditions = discoveryv1.EndpointConditions{}
		}
	}
	if !hints || g.chance(5) {
		return e
	}
	e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: oneOf(g, "a", "b")}}}
	if g.chance(30) {
		e.Hints.ForNodes = []discoveryv1.ForNode{{Name: oneOf(g, "a", "b")}}
	}
	return e
}
