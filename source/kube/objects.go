package kube

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
)

// A cluster may have a hundred thousand endpoints: what the informers keep are
// the types below, with what is looked at and nothing else.

// meta is what client-go needs to know of a kept object.
type meta struct {
	metav1.ObjectMeta
}

func keepMeta(m *metav1.ObjectMeta) meta {
	return meta{metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, ResourceVersion: m.ResourceVersion, UID: m.UID}}
}

// clusterService is a Service.
type clusterService struct {
	meta
	created     time.Time
	headless    bool // also ExternalName: nothing to serve
	clusterIPs  []netip.Addr
	externalIPs []netip.Addr
	ingress     []netip.Addr
	ports       []servicePort
	v4, v6      bool
	nodePorts   bool // of a type that has them

	affinity      time.Duration
	internalLocal bool
	externalLocal bool
	checkPort     uint16
	sources       []netip.Prefix
	annotations   map[string]string // ours
	problems      []string          // with what was read
}

type servicePort struct {
	name     string
	protocol corev1.Protocol
	port     uint16
	nodePort uint16
}

// slice is an EndpointSlice.
type slice struct {
	meta
	service   string
	ports     []slicePort
	endpoints []endpoint
}

type slicePort struct {
	name     string
	protocol corev1.Protocol
	port     uint16
}

// endpoint is one endpoint. Nodes and zones are few: their names are shared.
type endpoint struct {
	address netip.Addr
	node    unique.Handle[string]
	zone    unique.Handle[string]
	ready   bool
	// serving and terminating: it answers still, and should not be sent more
	// unless nobody else is left (KEP-1669).
	serving, terminating bool
	nodeHints, zoneHints []unique.Handle[string]
}

// node is the Node that this is.
type node struct {
	meta
	addresses []netip.Addr // all that the status names
	primary   []netip.Addr // of these, the first of each family, internal ones first
	zone      string
	pods      []netip.Prefix
	leaving   bool
}

func (n *node) equal(o *node) bool {
	return n != nil && o != nil && n.zone == o.zone && n.leaving == o.leaving &&
		slices.Equal(n.addresses, o.addresses) && slices.Equal(n.pods, o.pods)
}

var errUnexpected = errors.New("unexpected object")

// trim turns what the API server sent into what is kept.
func trim(object any) (any, error) {
	switch o := object.(type) {
	case *corev1.Service:
		return trimService(o), nil
	case *discoveryv1.EndpointSlice:
		return trimSlice(o), nil
	case *corev1.Node:
		return trimNode(o), nil
	case *networkingv1.ServiceCIDR:
		return trimCIDR(o), nil
	case *clusterService, *slice, *node, *cidr:
		return o, nil
	}
	return nil, fmt.Errorf("%w %T", errUnexpected, object)
}

func trimService(o *corev1.Service) *clusterService {
	s := &clusterService{meta: keepMeta(&o.ObjectMeta), created: o.CreationTimestamp.Time}
	spec := &o.Spec
	s.headless = spec.Type == corev1.ServiceTypeExternalName || spec.ClusterIP == "" || spec.ClusterIP == corev1.ClusterIPNone
	if s.headless {
		return s
	}
	ips := spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{spec.ClusterIP}
	}
	s.clusterIPs = s.addresses("clusterIPs", ips)
	s.externalIPs = s.addresses("externalIPs", spec.ExternalIPs)
	for _, a := range s.clusterIPs {
		s.v4, s.v6 = s.v4 || a.Is4(), s.v6 || a.Is6()
	}
	for _, p := range spec.Ports {
		s.ports = append(s.ports, servicePort{
			strings.Clone(p.Name), intern(p.Protocol), uint16(p.Port), uint16(p.NodePort),
		})
	}
	if spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		s.affinity = time.Duration(corev1.DefaultClientIPServiceAffinitySeconds) * time.Second
		if c := spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			s.affinity = time.Duration(*c.ClientIP.TimeoutSeconds) * time.Second
		}
	}
	s.internalLocal = spec.InternalTrafficPolicy != nil && *spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	s.externalLocal = spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	s.nodePorts = spec.Type == corev1.ServiceTypeNodePort || spec.Type == corev1.ServiceTypeLoadBalancer
	if spec.Type == corev1.ServiceTypeLoadBalancer {
		s.loadBalancer(o)
	}
	for k, v := range o.Annotations {
		if strings.HasPrefix(k, config.AnnotationPrefix) {
			if s.annotations == nil {
				s.annotations = make(map[string]string)
			}
			s.annotations[strings.Clone(k)] = strings.Clone(v)
		}
	}
	return s
}

func (s *clusterService) loadBalancer(o *corev1.Service) {
	var ips []string
	for _, in := range o.Status.LoadBalancer.Ingress {
		// With ipMode Proxy the load balancer must see the traffic of pods, too (KEP-1860).
		if in.IP != "" && (in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP) {
			ips = append(ips, in.IP)
		}
	}
	s.ingress = s.addresses("status.loadBalancer", ips)
	if s.externalLocal {
		s.checkPort = uint16(o.Spec.HealthCheckNodePort)
	}
	for _, text := range o.Spec.LoadBalancerSourceRanges {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			s.problems = append(s.problems, fmt.Sprintf(
				"loadBalancerSourceRanges: %q is no address range and lets nobody in; write one such as 192.0.2.0/24", text))
			// An unreadable range must not mean that everybody may come.
			s.sources = append(s.sources, netip.PrefixFrom(netip.IPv6Unspecified(), 128))
			continue
		}
		s.sources = append(s.sources, p.Masked())
	}
	slices.SortFunc(s.sources, netip.Prefix.Compare)
	s.sources = slices.Compact(s.sources)
}

// addresses reads addresses that a service can have.
func (s *clusterService) addresses(field string, texts []string) []netip.Addr {
	var all []netip.Addr
	for _, text := range texts {
		a, err := parseAddr(text)
		if err == nil {
			err = servable(a)
		}
		if err != nil {
			s.problems = append(s.problems, fmt.Sprintf("%s: %s is not served: %v", field, text, err))
			continue
		}
		all = append(all, a)
	}
	return all
}

// parseAddr reads an address as the API server does, which has let leading zeros
// in earlier times.
func parseAddr(text string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		return a.Unmap(), nil
	}
	var octets []string
	for _, octet := range strings.Split(text, ".") {
		octets = append(octets, strings.TrimLeft(octet[:max(0, len(octet)-1)], "0")+octet[max(0, len(octet)-1):])
	}
	a, err := netip.ParseAddr(strings.Join(octets, "."))
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, errors.New("it is no IP address")
	}
	return a.Unmap(), nil
}

// servable says why nobody can be reached at an address through the network.
func servable(a netip.Addr) error {
	switch {
	case a.IsLoopback():
		return errors.New("a loopback address is another one in every pod")
	case a.IsLinkLocalUnicast():
		return errors.New("a link-local address has no meaning beyond its link")
	case a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return errors.New("a multicast or broadcast address has no single owner")
	case a.IsUnspecified():
		return errors.New("it is the unspecified address")
	}
	return nil
}

func trimSlice(o *discoveryv1.EndpointSlice) *slice {
	s := &slice{
		meta: keepMeta(&o.ObjectMeta), service: strings.Clone(o.Labels[discoveryv1.LabelServiceName]),
		endpoints: make([]endpoint, 0, len(o.Endpoints)),
	}
	if o.AddressType == discoveryv1.AddressTypeFQDN {
		return s
	}
	for _, p := range o.Ports {
		// A slice without a port number means all ports, which no Service can use.
		if p.Port == nil {
			continue
		}
		sp := slicePort{protocol: corev1.ProtocolTCP, port: uint16(*p.Port)}
		if p.Name != nil {
			sp.name = strings.Clone(*p.Name)
		}
		if p.Protocol != nil {
			sp.protocol = intern(*p.Protocol)
		}
		s.ports = append(s.ports, sp)
	}
	for i := range o.Endpoints {
		if e, ok := trimEndpoint(&o.Endpoints[i]); ok {
			s.endpoints = append(s.endpoints, e)
		}
	}
	return s
}

func trimEndpoint(o *discoveryv1.Endpoint) (endpoint, bool) {
	// All addresses of an endpoint are the same backend; consumers use the first.
	if len(o.Addresses) == 0 {
		return endpoint{}, false
	}
	a, err := parseAddr(o.Addresses[0])
	if err != nil {
		return endpoint{}, false
	}
	e := endpoint{address: a, node: unique.Make(deref(o.NodeName, "")), zone: unique.Make(deref(o.Zone, ""))}
	e.ready = deref(o.Conditions.Ready, true)
	e.serving = deref(o.Conditions.Serving, true)
	e.terminating = deref(o.Conditions.Terminating, false)
	if h := o.Hints; h != nil {
		for _, n := range h.ForNodes {
			e.nodeHints = append(e.nodeHints, unique.Make(n.Name))
		}
		for _, z := range h.ForZones {
			e.zoneHints = append(e.zoneHints, unique.Make(z.Name))
		}
	}
	return e, true
}

// toBeDeleted is the taint by which the cluster autoscaler announces that a node
// goes away; kube-proxy's health check heeds it, too (KEP-3836).
const toBeDeleted = "ToBeDeletedByClusterAutoscaler"

func trimNode(o *corev1.Node) *node {
	n := &node{meta: keepMeta(&o.ObjectMeta), zone: o.Labels[corev1.LabelTopologyZone], leaving: o.DeletionTimestamp != nil}
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for _, a := range o.Status.Addresses {
			ip, err := parseAddr(a.Address)
			if a.Type != kind || err != nil {
				continue
			}
			n.addresses = append(n.addresses, ip)
			if !slices.ContainsFunc(n.primary, func(p netip.Addr) bool { return p.Is4() == ip.Is4() }) {
				n.primary = append(n.primary, ip)
			}
		}
	}
	cidrs := o.Spec.PodCIDRs
	if len(cidrs) == 0 && o.Spec.PodCIDR != "" {
		cidrs = []string{o.Spec.PodCIDR}
	}
	for _, text := range cidrs {
		if p, err := netip.ParsePrefix(text); err == nil {
			n.pods = append(n.pods, p.Masked())
		}
	}
	for _, t := range o.Spec.Taints {
		n.leaving = n.leaving || t.Key == toBeDeleted
	}
	return n
}

func deref[T any](p *T, fallback T) T {
	if p == nil {
		return fallback
	}
	return *p
}

// intern keeps one copy of the few names of protocols.
func intern(p corev1.Protocol) corev1.Protocol {
	switch p {
	case corev1.ProtocolTCP, "":
		return corev1.ProtocolTCP
	case corev1.ProtocolUDP:
		return corev1.ProtocolUDP
	case corev1.ProtocolSCTP:
		return corev1.ProtocolSCTP
	}
	return corev1.Protocol(strings.Clone(string(p)))
}

// protocols are those that pentad serves.
var protocols = map[corev1.Protocol]service.Protocol{
	corev1.ProtocolTCP: service.TCP,
	corev1.ProtocolUDP: service.UDP,
}

func (s *clusterService) key() types.NamespacedName {
	return types.NamespacedName{Namespace: s.Namespace, Name: s.Name}
}
