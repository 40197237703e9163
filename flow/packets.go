package flow

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/ipam"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
)

// AddPackets says what packets to the destination find that arrive from elsewhere
// or from pods, and what becomes of a connection that no hook translates.
func (e *Explanation) AddPackets(v *nat.View, q Question) {
	found := false
	for _, m := range v.Mappings {
		if m.Listener.Address != q.Destination || m.Listener.Protocol != q.Protocol {
			continue
		}
		found = true
		whose := "of other hosts"
		switch from := m.Listener.From; {
		case from.Has(service.FromPods) && from.Has(service.FromWorld):
			whose = "of other hosts and of pods"
		case from.Has(service.FromPods):
			whose = "of pods"
		}
		if m.Listener.Guarded {
			whose += ", in the source ranges of the service,"
		}
		what := "are led to " + strings.Join(addresses(m), ", ")
		switch {
		case len(m.Backends) == 0 && m.Dropped:
			what = "are dropped, because this host has no backend and others have"
		case len(m.Backends) == 0:
			what = "are refused, because there is no usable backend"
		}
		e.step("packets", "%s %s (%s)", whose, what, m.Service)
		if !e.Works && len(m.Backends) > 0 {
			e.Conclusion = strings.TrimSuffix(e.Conclusion, ".") + fmt.Sprintf("; packets %s %s, though.", whose, what)
		}
	}
	if !found && !e.Works {
		e.nobody(v, service.Listener{Address: q.Destination, Protocol: q.Protocol})
	}
}

func addresses(m nat.Mapping) []string {
	all := make([]string, len(m.Backends))
	for i, b := range m.Backends {
		all[i] = b.Address.String()
	}
	return all
}

// nobody says what becomes of packets to an address that only a service can have,
// where none listens. It reports whether it is such an address.
func (e *Explanation) nobody(v *nat.View, dest service.Listener) bool {
	reserved, found := ipam.Find(v.Reserved, dest.Address.Addr())
	if !found {
		return false
	}
	if v.Taken(dest.Address.Addr()) {
		var has []string
		for _, m := range v.Mappings {
			if m.Listener.Address.Addr() == dest.Address.Addr() {
				has = append(has, fmt.Sprintf("%s (%s)", m.Listener, m.Service))
			}
		}
		e.step("reserved", "%s is for Services alone, and one has this address", reserved)
		e.conclude(Refused, "The connection to %s is refused, because the Service with this address has no such port; it has %s.",
			dest, strings.Join(slices.Compact(has), ", "))
		return true
	}
	e.step("reserved", "%s is for Services alone, and none has this address", reserved)
	e.conclude(Dropped, "Packets to %s are dropped, because no Service has this address of the range %s, which the cluster keeps for Services: "+
		"look for the address in `kubectl get services -A`; a client may remember that of a deleted Service.", dest, reserved)
	return true
}

// AddWarnings says what of the cluster makes no sense and concerns the destination:
// sentences that name it, or one of the services that listen there.
func (e *Explanation) AddWarnings(q Question, services, warnings []string) {
	first := ""
	for _, w := range warnings {
		concerns := mentions(w, q.Destination) || slices.ContainsFunc(services, func(name string) bool {
			object, _, _ := strings.Cut(name, ":") // NAMESPACE/NAME of NAMESPACE/NAME:PORT
			return strings.HasPrefix(w, "Service "+object+": ")
		})
		if !concerns {
			continue
		}
		e.step("cluster", "%s", w)
		if first == "" {
			first = w
		}
	}
	if first != "" && !e.Works {
		e.Conclusion = strings.TrimSuffix(e.Conclusion, ".") + "; in the cluster, " + strings.TrimSuffix(first, ".") + "."
	}
}

// mentions reports whether a text names an address, alone or with its port.
func mentions(text string, dest netip.AddrPort) bool {
	for word := range strings.FieldsSeq(text) {
		word, _, _ = strings.Cut(strings.Trim(word, `,;:()"`), "/") // without the protocol
		if a, err := netip.ParseAddr(word); err == nil && a == dest.Addr() {
			return true
		}
		if a, err := netip.ParseAddrPort(word); err == nil && a == dest {
			return true
		}
	}
	return false
}

// ExplainPackets walks through what the kernel does with a connection that arrives
// as packets from an address: one of another host, or of a pod of this one.
func ExplainPackets(v *nat.View, from netip.Addr, q Question) *Explanation {
	dest := service.Listener{Address: q.Destination, Protocol: q.Protocol}
	e := &Explanation{Destination: dest.String()}
	place, whose := service.FromWorld, "another host"
	if r, pod := ipam.Find(v.Pods, from); pod {
		place, whose = service.FromPods, fmt.Sprintf("a pod of this host (%s)", r)
	}
	e.step("client", "%s, %s", from, whose)
	if from.Is4() != dest.Address.Addr().Is4() {
		return e.conclude(NoRoute, "%s cannot reach %s, because one is IPv4 and the other IPv6.", from, dest)
	}
	i := slices.IndexFunc(v.Mappings, func(m nat.Mapping) bool {
		return m.Listener.Address == dest.Address && m.Listener.Protocol == dest.Protocol && m.Listener.From.Has(place)
	})
	if i < 0 {
		return e.noMapping(v, dest, place)
	}
	m := v.Mappings[i]
	e.Service = m.Service
	e.step("listener", "%s belongs to the service %s", dest, m.Service)
	switch {
	case len(m.Backends) == 0 && m.Dropped:
		return e.conclude(Dropped, "Packets from %s to %s are dropped, because this host has no backend of the service %s and others have "+
			"(externalTrafficPolicy Local): the load balancer should send them to a host that has one.", from, dest, m.Service)
	case len(m.Backends) == 0:
		return e.conclude(Refused, "%s is refused at %s, because no backend of the service %s is usable.", from, dest, m.Service)
	}
	if m.Listener.Guarded {
		r, in := ipam.Find(m.Sources, from)
		if !in {
			e.step("source ranges", "none contains %s", from)
			return e.conclude(Dropped, "Packets from %s to %s are dropped, because the address is in none of the source ranges of the service %s: %s.",
				from, dest, m.Service, ranges(m.Sources))
		}
		e.step("source ranges", "%s contains it", r)
	}
	return e.mapping(v, m, from)
}

func ranges(all []ipam.Range) string {
	words := make([]string, len(all))
	for i, r := range all {
		words[i] = r.String()
	}
	return strings.Join(words, ", ")
}

// noMapping explains packets to what is no listener for them.
func (e *Explanation) noMapping(v *nat.View, dest service.Listener, place service.From) *Explanation {
	e.step("listener", "none is %s", dest)
	if e.nobody(v, dest) {
		return e
	}
	others := "of pods of this host"
	if place == service.FromPods {
		others = "of other hosts"
	}
	for _, m := range v.Mappings {
		if m.Listener.At() == dest {
			return e.conclude(Passes, "Packets to %s go on as they are: the service %s is there for those %s only.", dest, m.Service, others)
		}
	}
	return e.conclude(Passes, "Packets to %s go on as they are: it is no address of a service for packets; `pentad service list` shows those that are.", dest)
}

// AddOwnServices says that packets go past services that sockets of this host see.
func (e *Explanation) AddOwnServices(names []string) {
	if e.Verdict != Passes || len(names) == 0 {
		return
	}
	e.conclude(Passes, "Packets to %s go on as they are: the service %s is there for sockets of this host only (forward: none); with \"forward: nat\" it answers others, too.",
		e.Destination, strings.Join(names, ", "))
}

// mapping explains the choice of a backend and of the client's address.
func (e *Explanation) mapping(v *nat.View, m nat.Mapping, from netip.Addr) *Explanation {
	dest := m.Listener.At()
	if m.Hashed {
		e.step("balance", "source-hash: the hash of the client's address is its place in a table")
	} else {
		e.step("balance", "random: one backend by weight")
	}
	total := 0
	for _, b := range m.Backends {
		total += b.Slots
	}
	among := m.Backends
	if m.Affinity > 0 {
		b, remembered := v.Remembered(from, dest)
		e.step("affinity", "a client that was here within %s goes where it went", m.Affinity)
		if i := slices.IndexFunc(among, func(s nat.Share) bool { return s.Address == b }); remembered && i >= 0 {
			e.step("remembered", "%s went to %s", from, b)
			among = among[i : i+1]
		}
	}
	var kept, replaced []string
	for _, b := range among {
		text, keeps := sourceOf(v, b, from)
		e.step("backend", "%s, %d of %d slots: %s", b.Address, b.Slots, total, text)
		if keeps {
			kept = append(kept, b.Address.String())
		} else {
			replaced = append(replaced, b.Address.String())
		}
	}
	verb := "goes to"
	if len(among) > 1 {
		verb = "goes to one of"
	}
	seen := fmt.Sprintf("which sees %s", from)
	switch {
	case len(kept) == 0:
		seen = "which sees an address of this host instead"
	case len(replaced) > 0:
		seen = fmt.Sprintf("of which %s would see %s, and %s an address of this host instead", strings.Join(kept, ", "), from, strings.Join(replaced, ", "))
	}
	all := make([]string, len(among))
	for i, b := range among {
		all[i] = b.Address.String()
	}
	return e.conclude(Reaches, "A connection from %s to %s %s %s, %s.", from, dest, verb, strings.Join(all, ", "), seen)
}

// sourceOf says whether a backend sees the client's address, and why.
func sourceOf(v *nat.View, b nat.Share, from netip.Addr) (text string, keeps bool) {
	_, pod := ipam.Find(v.Pods, from)
	switch {
	case b.Address.Addr() == from:
		return "the client itself, which would answer itself directly: it sees an address of this host instead", false
	case b.Local:
		return "on this host, where its replies pass: it sees the client's address", true
	case pod:
		return "elsewhere; replies to a pod of this host come here: it sees the client's address", true
	}
	return "elsewhere; its replies would not come here: it sees an address of this host instead", false
}
