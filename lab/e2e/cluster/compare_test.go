package cluster

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// questions are all that is asked after a change: everything that a Service has or had,
// from everywhere.
func (h *history) questions() []question {
	var all []question
	for _, s := range h.subjects {
		for _, what := range s.addresses() {
			for place := range h.places() {
				all = append(all, question{place, "ask", what})
				if strings.HasPrefix(what, "udp ") {
					all = append(all, question{place, "steady", what})
				}
			}
		}
		if port := s.svc.Spec.HealthCheckNodePort; port != 0 {
			for _, node := range []string{a4, b4, a6, b6} {
				all = append(all, question{"outside", "ask", "http " + hostPort(node, port)})
			}
		}
	}
	return all
}

// settled is how long a difference must last to be one; and it must be seen often
// enough not to be chance.
const settled = 15 * time.Second

// same reports whether both halves say the same and both keep the connections that
// they should.
func (h *history) same() bool {
	questions := h.questions()
	h.tally["compared"] += len(questions)
	choices := h.choices()
	times, wait, until := 8, 500*time.Millisecond, time.Now().Add(settled)
	for round := 1; ; round++ {
		left := make(map[question]string)
		heard := h.pair.ask(h.t, questions, times, wait)
		maps.Copy(h.last, heard)
		for q, got := range heard {
			switch why, meant := h.difference(q, got, choices[q.what]); {
			case why == "":
			case meant:
				h.tally[why]++
			default:
				left[q] = fmt.Sprintf("%s: pentad %v, kube-proxy %v", why, got.ours, got.theirs)
			}
		}
		if len(left) == 0 {
			return h.connectionsStay()
		}
		if round > 4 && time.Now().After(until) {
			for _, q := range slices.SortedFunc(maps.Keys(left), func(a, b question) int {
				return strings.Compare(a.what+a.place, b.what+b.place)
			}) {
				h.t.Logf("step %d: %s by %s from %s: %s", h.step, q.what, q.verb, q.place, left[q])
			}
			h.describe()
			return false
		}
		// The second SYN of a connection is sent after one second.
		questions, times, wait = slices.Collect(maps.Keys(left)), min(2*times, 60), quickly
		time.Sleep(100 * time.Millisecond)
	}
}

// describe logs what pentad says of itself.
func (h *history) describe() {
	for _, n := range []*node{h.ours.a, h.ours.b} {
		for _, command := range []string{"status", "backend list"} {
			out, err := n.pentad(strings.Fields(command)...)
			h.t.Logf("pentad %s on %s: %v\n%s", command, n.name, err, out)
		}
	}
}

// choice is how one server is chosen of those that there are.
type choice struct {
	sticky bool // each client has one, which need not be the same in both halves
	picky  bool // by latency: some may be left out for a while
}

// choices are how the servers of addresses are chosen.
func (h *history) choices() map[string]choice {
	all := make(map[string]choice)
	for _, s := range h.subjects {
		for what := range s.asked {
			c := all[what]
			c.sticky = c.sticky || s.svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP
			c.picky = c.picky || s.svc.Annotations == nil
			all[what] = c
		}
	}
	return all
}

// difference says what is not the same, and whether that is meant.
func (h *history) difference(q question, got answers, how choice) (why string, meant bool) {
	ours, theirs := split(got.ours), split(got.theirs)
	served, servedThere := len(ours.servers) > 0, len(theirs.servers) > 0
	switch {
	case strings.HasPrefix(q.what, "http "):
		if good(got.ours) != good(got.theirs) {
			return "health check", false
		}
		return "", false
	case q.verb == "steady" && !served && servedThere && !h.servedThere(q):
		return "kube-proxy goes on with datagrams for what is gone", true
	case q.verb == "steady" && served && !servedThere && h.servedThere(q):
		return "kube-proxy leaves datagrams where they went before there was a service", true
	case !served && servedThere && h.closedTo(q):
		return "source ranges of the other family let nobody in", true
	case served != servedThere:
		return "served by one only", false
	case !served && q.verb == "steady":
		return "", false // an unconnected socket hears of no ICMP
	case !served:
		return h.failures(q, got)
	case len(ours.failures) > 0:
		return "fails at times", false
	case q.verb == "steady":
		return "", false
	case how.sticky && len(ours.servers) > 1:
		return "affinity", false
	case how.sticky && !within(ours.servers, h.usableThere(q)):
		return "stays with a server that nobody should have", false
	case how.sticky:
	case how.picky && within(ours.servers, theirs.servers):
	case !maps.Equal(keysOf(ours.servers), keysOf(theirs.servers)):
		return "other servers", false
	}
	for server, clients := range ours.servers {
		if there, ok := theirs.servers[server]; ok && !maps.Equal(keysOf(clients), keysOf(there)) {
			if why, meant = h.client(q, clients); !meant {
				return why, meant
			}
		}
	}
	return why, meant
}

// usableThere are the servers to which kube-proxy leads anybody at an address: of a
// service with affinity each client shows one.
func (h *history) usableThere(q question) map[string]heard {
	all := make(map[string]heard)
	for other, got := range h.last {
		if other.what == q.what && other.verb == q.verb {
			maps.Copy(all, split(got.theirs).servers)
		}
	}
	for _, s := range h.subjects {
		if !s.asked[q.what] {
			continue
		}
		// Seven clients may not meet all that there are.
		for _, sl := range h.slicesOf(s) {
			for _, e := range sl.Endpoints {
				for _, known := range servers {
					if (e.Addresses[0] == known.v4 || e.Addresses[0] == known.v6) && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
						all[known.name] = nil
					}
				}
			}
		}
	}
	return all
}

// good is how a health check says that there are endpoints, and how many. Where a
// Service has no address of a family, kube-proxy refuses to be asked at all.
func good(h heard) string {
	if said := h.only(); said != "200" {
		return ""
	}
	return slices.Collect(maps.Keys(h))[0]
}

// servedThere reports whether kube-proxy serves who asks for the first time.
func (h *history) servedThere(q question) bool {
	return len(split(h.last[question{q.place, "ask", q.what}].theirs).servers) > 0
}

// guards reports whether an address is one of a load balancer with source ranges at
// which nobody is served.
func (h *history) guards(what, to string) bool {
	for _, s := range h.subjects {
		isIngress := slices.ContainsFunc(s.svc.Status.LoadBalancer.Ingress, func(in corev1.LoadBalancerIngress) bool { return in.IP == to })
		if s.asked[what] && isIngress && len(s.svc.Spec.LoadBalancerSourceRanges) > 0 && !h.served(what) {
			return true
		}
	}
	return false
}

// served reports whether anybody is served at an address.
func (h *history) served(what string) bool {
	for q, got := range h.last {
		if q.what == what && len(split(got.ours).servers) > 0 {
			return true
		}
	}
	return false
}

// closedTo reports whether an address is one of a load balancer whose source ranges are
// all of the other family: then kube-proxy asks nobody who he is.
func (h *history) closedTo(q question) bool {
	_, address, _ := strings.Cut(q.what, " ")
	to := netip.MustParseAddrPort(address).Addr()
	for _, s := range h.subjects {
		isIngress := slices.ContainsFunc(s.svc.Status.LoadBalancer.Ingress, func(in corev1.LoadBalancerIngress) bool { return in.IP == to.String() })
		ranges := s.svc.Spec.LoadBalancerSourceRanges
		if s.asked[q.what] && isIngress && len(ranges) > 0 && !slices.ContainsFunc(ranges, func(r string) bool {
			return netip.MustParsePrefix(r).Addr().Is4() == to.Is4()
		}) {
			return true
		}
	}
	return false
}

// client judges another address of the client than kube-proxy lets the server see. To
// see the client's own is better.
func (h *history) client(q question, clients heard) (why string, meant bool) {
	_, address, _ := strings.Cut(q.what, " ")
	own := ownAddress(q.place, netip.MustParseAddrPort(address).Addr().Is4())
	if len(clients) == 1 && clients[own] > 0 {
		return "the client is seen as itself", true
	}
	return "the client is seen as somebody else", false
}

// failures compares how both fail. A Service with the internal policy Local that has
// no endpoint on the node says so at once, where kube-proxy lets the client wait; and so
// does one without endpoints to those whom its source ranges would not let in.
func (h *history) failures(q question, got answers) (why string, meant bool) {
	if maps.Equal(keysOf(got.ours), keysOf(got.theirs)) {
		return "", false
	}
	_, address, _ := strings.Cut(q.what, " ")
	to := netip.MustParseAddrPort(address).Addr().String()
	if got.ours.only() == refused && got.theirs.only() == nothing && h.guards(q.what, to) {
		return "without endpoints: refused before it is asked who it is", true
	}
	for _, s := range h.subjects {
		policy := s.svc.Spec.InternalTrafficPolicy
		if s.asked[q.what] && policy != nil && *policy == corev1.ServiceInternalTrafficPolicyLocal &&
			slices.Contains(s.svc.Spec.ClusterIPs, to) && got.ours.only() == refused && got.theirs.only() == nothing {
			return "internal policy Local without endpoints: refused at once", true
		}
	}
	return "fails in another way", false
}

func ownAddress(place string, v4 bool) string {
	for _, s := range servers {
		if s.name == place && v4 {
			return s.v4
		} else if s.name == place {
			return s.v6
		}
	}
	return ""
}

// parts is what was heard: who answered, and as whom it saw the client; and failures.
type parts struct {
	servers  map[string]heard
	failures heard
}

func split(h heard) parts {
	p := parts{servers: make(map[string]heard), failures: make(heard)}
	for answer, n := range h {
		server, client, _ := strings.Cut(answer, " ")
		if !isServer(server) {
			p.failures[answer] += n
			continue
		}
		if p.servers[server] == nil {
			p.servers[server] = make(heard)
		}
		p.servers[server][client] += n
	}
	return p
}

// within reports whether all of some are of others.
func within[V any](some, others map[string]V) bool {
	for k := range some {
		if _, ok := others[k]; !ok {
			return false
		}
	}
	return true
}

func keysOf[V any](m map[string]V) map[string]bool {
	keys := make(map[string]bool)
	for k := range m {
		keys[k] = true
	}
	return keys
}

// connectionsStay reports whether every connection that was held is alive whose
// endpoint is one of its Service.
func (h *history) connectionsStay() bool {
	// Longer than an endpoint may be missing without being gone.
	time.Sleep(1500 * time.Millisecond)
	var questions []question
	for q := range h.holds {
		questions = append(questions, question{q.place, "alive", q.what})
	}
	ok := true
	for q, got := range h.pair.ask(h.t, questions, 1, quickly) {
		if got.ours.only() == "alive" {
			continue
		}
		held := question{q.place, "hold", q.what}
		server := h.holds[held]
		delete(h.holds, held)
		switch {
		case h.lives(q.what, server):
			h.t.Logf("step %d: the connection of %s to %s by %s ended: pentad %v, kube-proxy %v", h.step, q.place, server, q.what, got.ours, got.theirs)
			ok = false
		case got.theirs.only() == "alive":
			h.tally["connections to endpoints that are gone end"]++
		}
	}
	return ok
}

// lives reports whether a server is an endpoint of the Service that has an address.
func (h *history) lives(what, server string) bool {
	_, to, _ := strings.Cut(what, " ")
	address := ownAddress(server, netip.MustParseAddrPort(to).Addr().Is4())
	for _, s := range h.subjects {
		if s.gone || !s.asked[what] {
			continue
		}
		for _, sl := range h.slicesOf(s) {
			for _, e := range sl.Endpoints {
				if e.Addresses[0] == address && len(sl.Ports) > 0 {
					return true
				}
			}
		}
	}
	return false
}
