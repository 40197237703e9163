package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"unique"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

// surroundings are what the translation of every Service depends on.
type surroundings struct {
	node      unique.Handle[string]
	zone      unique.Handle[string]
	nodePorts []netip.Addr        // where NodePorts are served
	own       map[netip.Addr]bool // all addresses of this host
	allowed   []netip.Prefix      // externalIPs for everybody
	ranges    []netip.Prefix      // of ServiceCIDRs
}

// translation is what one Service becomes on this node.
type translation struct {
	services []want // one for each port, two or three where policies differ
	check    *source.Check
	problems []string
	unserved int             // ports of a protocol that is not served
	stray    netip.Addr      // an endpoint in a range of a ServiceCIDR, if one is
	origin   *service.Origin // of all services
}

// translate is pure: the same objects give the same services, in the same order.
func translate(s *clusterService, all []*slice, at *surroundings) translation {
	t := translation{problems: slices.Clone(s.problems)}
	if s.headless {
		return t
	}
	t.problems = append(t.problems, s.checkLocal()...)
	t.origin = &service.Origin{Name: s.key().String(), Endpoints: addressesOf(all)}
	wrong := make(map[string]int) // annotations, by how many ports refuse them
	served := 0
	for _, p := range s.ports {
		if _, ok := protocols[p.protocol]; !ok {
			t.unserved++
			t.problems = append(t.problems, fmt.Sprintf(
				"port %d/%s is not served: pentad serves TCP and UDP; reach the pods without a ClusterIP (a headless Service)", p.port, p.protocol))
			continue
		}
		served++
		for _, err := range t.port(s, p, all, at) {
			wrong[err.Error()]++
		}
	}
	for _, text := range slices.Sorted(maps.Keys(wrong)) {
		// What concerns TCP is no mistake beside a port of UDP.
		if wrong[text] == served {
			t.problems = append(t.problems, text+"; the annotation is ignored")
		}
	}
	if s.checkPort != 0 {
		t.check = s.check(all, at)
	}
	t.stray = stray(all, at.ranges)
	return t
}

// A port of a Service may have clients that see different endpoints: those to
// whom the policy Cluster applies, and those for whom a policy says Local. Each
// such set is a service of its own. What is wrong with annotations is returned.
func (t *translation) port(s *clusterService, p servicePort, all []*slice, at *surroundings) (wrong []error) {
	endpoints := t.endpoints(p, all)
	base := fmt.Sprintf("%s/%s:%s", s.Namespace, s.Name, cmp.Or(p.name, strconv.Itoa(int(p.port))))
	cluster := &want{Service: &service.Service{Source: service.SourceKubernetes, Name: base, Of: t.origin}}
	internal := &want{Service: &service.Service{Source: service.SourceKubernetes, Name: base + "/internal", Of: t.origin}}
	external := &want{Service: &service.Service{Source: service.SourceKubernetes, Name: base + "/external", Of: t.origin, Elsewhere: elsewhere(endpoints)}}
	s.listen(p, at, cluster, internal, external, &t.problems)

	chosen := byFamily(endpoints, at, inCluster)
	local := byFamily(endpoints, at, onNode)
	for _, x := range []struct {
		to     *want
		among  []candidate
		chosen func(candidate) bool
	}{{cluster, endpoints, chosen}, {internal, here(endpoints, at), local}, {external, here(endpoints, at), local}} {
		if len(x.to.Listeners) == 0 {
			continue
		}
		x.to.sort()
		wrong = config.Annotate(s.annotations, x.to.Service)
		x.to.Affinity, x.to.Sources = s.affinity, s.sources
		x.to.Backends = backends(x.among, x.chosen, at)
		t.services = append(t.services, *x.to)
	}
	return wrong
}

// sort puts the listeners in order. What is asked for twice in the same way is one.
func (w *want) sort() {
	type wish struct {
		service.Listener
		as asked
	}
	wishes := make([]wish, len(w.Listeners))
	for i, l := range w.Listeners {
		wishes[i] = wish{l, w.as[i]}
	}
	slices.SortStableFunc(wishes, func(a, b wish) int { return cmp.Or(a.Compare(b.Listener), cmp.Compare(a.as, b.as)) })
	wishes = slices.Compact(wishes)
	w.Listeners, w.as = w.Listeners[:0], w.as[:0]
	for _, x := range wishes {
		w.Listeners, w.as = append(w.Listeners, x.Listener), append(w.as, x.as)
	}
}

// listen adds the listeners of a port to the services whose endpoints they lead to.
func (s *clusterService) listen(p servicePort, at *surroundings, cluster, internal, external *want, problems *[]string) {
	add := func(to *want, as asked, l service.Listener, a netip.Addr, port uint16) {
		l.Address, l.Protocol = netip.AddrPortFrom(a, port), protocols[p.protocol]
		to.Listeners, to.as = append(to.Listeners, l), append(to.as, as)
	}
	// What comes from the world goes by the external policy; the sockets and
	// pods of this node always reach the whole cluster.
	outside := func(as asked, l service.Listener, a netip.Addr, port uint16) {
		if !s.externalLocal {
			add(cluster, as, l, a, port)
			return
		}
		world := l
		world.From &= service.FromWorld
		if world.From != 0 {
			add(external, as, world, a, port)
		}
		if l.From &^= service.FromWorld; l.From != 0 {
			add(cluster, as, l, a, port)
		}
	}
	for _, a := range s.clusterIPs {
		to := cluster
		if s.internalLocal {
			to = internal
		}
		add(to, asClusterIP, service.Listener{From: s.insiders()}, a, p.port)
	}
	if s.nodePorts && p.nodePort != 0 {
		for _, a := range at.nodePorts {
			if s.has(a) {
				outside(asNodePort, service.Listener{From: service.Anywhere, Held: true}, a, p.nodePort)
			}
		}
		for _, a := range loopbacks {
			if s.has(a) {
				add(cluster, asNodePort, service.Listener{From: service.FromHost, Held: true}, a, p.nodePort)
			}
		}
	}
	for _, a := range s.ingress {
		// An address of a family that the Service does not have is somebody else's.
		if !s.has(a) {
			continue
		}
		from, guarded := service.Anywhere, len(s.sources) > 0
		if guarded {
			// The address of a pod's socket is not known yet when it connects:
			// its packets are looked at instead. This node's own is.
			from = service.FromPods | service.FromWorld
			if at.within(s.sources, service.FamilyOf(a)) {
				from |= service.FromHost
			}
		}
		outside(asIngress, service.Listener{From: from, Guarded: guarded, Public: true}, a, p.port)
	}
	for _, a := range s.externalIPs {
		if slices.Contains(s.ingress, a) || !s.has(a) {
			continue
		}
		switch {
		case slices.ContainsFunc(at.allowed, func(r netip.Prefix) bool { return r.Contains(a) }):
			outside(asExternalIP, service.Listener{From: service.Anywhere}, a, p.port)
		case at.own[a]:
			*problems = append(*problems, fmt.Sprintf(
				"externalIPs: %s is an address of this node and not served, because others are reached there; allow it with "+
					"source.kubernetes.allowExternalIPs, or use a NodePort", a))
		default:
			outside(asExternalIP, service.Listener{From: service.FromWorld}, a, p.port)
		}
	}
}

// localAnnotation asks for something else than usual of what this node itself does
// with a ClusterIP.
const (
	localAnnotation = config.AnnotationPrefix + "local"
	localBypass     = "bypass"
)

// insiders returns the clients of the ClusterIPs. With bypass connect() leaves them
// alone: something on this node answers at the address itself, or wants to see it.
func (s *clusterService) insiders() service.From {
	if s.annotations[localAnnotation] == localBypass {
		return service.FromPods | service.FromWorld
	}
	return service.Anywhere
}

// checkLocal says what is wrong with the annotation, if anything is.
func (s *clusterService) checkLocal() []string {
	value, there := s.annotations[localAnnotation]
	if !there || value == localBypass {
		return nil
	}
	return []string{fmt.Sprintf("annotation %s: want %s; the annotation is ignored", localAnnotation, localBypass)}
}

// loopbacks are where processes of the host itself reach NodePorts besides, and
// what a server binds that wants all addresses.
var loopbacks = []netip.Addr{
	netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv4Unspecified(), netip.IPv6Loopback(), netip.IPv6Unspecified(),
}

func (s *clusterService) has(a netip.Addr) bool { return a.Is4() && s.v4 || a.Is6() && s.v6 }

// within reports whether an address of this host lies in one of the ranges.
func (at *surroundings) within(ranges []netip.Prefix, f service.Family) bool {
	for _, r := range ranges {
		for _, a := range at.nodePorts {
			if service.FamilyOf(a) == f && r.Contains(a) {
				return true
			}
		}
	}
	return false
}

// candidate is an endpoint with the port that it has for a port of the Service.
type candidate struct {
	*endpoint
	at netip.AddrPort
}

// endpoints gathers the endpoints of a port, sorted by address. An endpoint that
// stands in two slices, while it moves from one to the other, is there once:
// ready if either says so.
func (t *translation) endpoints(p servicePort, all []*slice) []candidate {
	var found []candidate
	for _, sl := range all {
		i := slices.IndexFunc(sl.ports, func(q slicePort) bool { return q.name == p.name && q.protocol == p.protocol })
		if i < 0 {
			continue
		}
		for j := range sl.endpoints {
			e := &sl.endpoints[j]
			if err := servable(e.address); err != nil {
				t.problems = append(t.problems, fmt.Sprintf("endpoint %s in EndpointSlice %s is not used: %v", e.address, sl.Name, err))
				continue
			}
			found = append(found, candidate{e, netip.AddrPortFrom(e.address, sl.ports[i].port)})
		}
	}
	slices.SortStableFunc(found, func(a, b candidate) int {
		return cmp.Or(a.at.Compare(b.at), rank(b.endpoint)-rank(a.endpoint))
	})
	return slices.CompactFunc(found, func(a, b candidate) bool { return a.at == b.at })
}

// addressesOf returns where the endpoints are, sorted, each address once.
func addressesOf(all []*slice) []netip.Addr {
	var addresses []netip.Addr
	for _, sl := range all {
		for _, e := range sl.endpoints {
			addresses = append(addresses, e.address)
		}
	}
	slices.SortFunc(addresses, netip.Addr.Compare)
	return slices.Compact(addresses)
}

// stray returns the first endpoint that has an address which only Services should
// have.
func stray(all []*slice, ranges []netip.Prefix) netip.Addr {
	for _, sl := range all {
		for _, e := range sl.endpoints {
			if slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(e.address) }) {
				return e.address
			}
		}
	}
	return netip.Addr{}
}

func rank(e *endpoint) int {
	switch {
	case e.ready:
		return 2
	case e.serving:
		return 1
	}
	return 0
}

// lastResort are endpoints that still answer while they end.
func lastResort(c candidate) bool { return c.serving && c.terminating }

func isReady(c candidate) bool { return c.ready }

// elsewhere says of which families any node has endpoints that can be used.
func elsewhere(all []candidate) (f service.Families) {
	for _, c := range all {
		if c.ready || lastResort(c) {
			f.V4, f.V6 = f.V4 || c.at.Addr().Is4(), f.V6 || c.at.Addr().Is6()
		}
	}
	return f
}

// byFamily lets each family of addresses choose by itself: what is ready, or hinted,
// in one of them says nothing of the other.
func byFamily(all []candidate, at *surroundings, choose func([]candidate, *surroundings) func(candidate) bool) func(candidate) bool {
	var families [2][]candidate
	for _, c := range all {
		i := family(c)
		families[i] = append(families[i], c)
	}
	chosen := [2]func(candidate) bool{choose(families[0], at), choose(families[1], at)}
	return func(c candidate) bool { return chosen[family(c)](c) }
}

func family(c candidate) int { return service.FamilyOf(c.at.Addr()).Index() }

// inCluster returns which endpoints the policy Cluster uses: ready ones, of these
// those meant for this node or its zone if hints are complete and name any; only
// without a ready one those that serve while they terminate.
func inCluster(all []candidate, at *surroundings) func(candidate) bool {
	if !slices.ContainsFunc(all, isReady) {
		return lastResort
	}
	forNode := func(c candidate) bool { return slices.Contains(c.nodeHints, at.node) }
	forZone := func(c candidate) bool { return slices.Contains(c.zoneHints, at.zone) }
	if hinted(all, func(c candidate) int { return len(c.nodeHints) }, forNode) {
		return func(c candidate) bool { return c.ready && forNode(c) }
	}
	if hinted(all, func(c candidate) int { return len(c.zoneHints) }, forZone) {
		return func(c candidate) bool { return c.ready && forZone(c) }
	}
	return isReady
}

// hinted reports whether every ready endpoint has hints and any is for us.
func hinted(all []candidate, hints func(candidate) int, forUs func(candidate) bool) bool {
	any := false
	for _, c := range all {
		if !c.ready {
			continue
		}
		if hints(c) == 0 {
			return false
		}
		any = any || forUs(c)
	}
	return any
}

func here(all []candidate, at *surroundings) []candidate {
	var mine []candidate
	for _, c := range all {
		if c.node == at.node {
			mine = append(mine, c)
		}
	}
	return mine
}

// onNode returns which endpoints the policy Local uses of those on this node.
// Hints mean nothing to it.
func onNode(all []candidate, at *surroundings) func(candidate) bool {
	if slices.ContainsFunc(here(all, at), isReady) {
		return isReady
	}
	return lastResort
}

// backends lists all endpoints: those that are not chosen have no weight, so that
// they take nothing new and finish what they have. Only what leaves the slices is
// removed.
func backends(all []candidate, chosen func(candidate) bool, at *surroundings) []service.Backend {
	list := make([]service.Backend, len(all))
	for i, c := range all {
		list[i] = service.Backend{Address: c.at, Zone: shorten(c.zone.Value()), Local: c.node == at.node}
		if chosen(c) {
			list[i].Weight = service.DefaultWeight
		}
		list[i].Unserving = !c.ready && !c.serving
	}
	return list
}

func shorten(zone string) string { return zone[:min(len(zone), service.MaxZone)] }

// check is the health check of a Service. Of its ready endpoints on this node each
// counts once; those of a family that the Service does not have are none of its own.
func (s *clusterService) check(all []*slice, at *surroundings) *source.Check {
	c := &source.Check{Port: s.checkPort, Namespace: s.Namespace, Name: s.Name}
	seen := make(map[netip.Addr]bool)
	for _, sl := range all {
		for _, e := range sl.endpoints {
			if !e.ready || e.node != at.node || !s.has(e.address) || seen[e.address] {
				continue
			}
			seen[e.address] = true
			if e.address.Is4() {
				c.Endpoints4++
			} else {
				c.Endpoints6++
			}
		}
	}
	return c
}
