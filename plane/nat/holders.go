package nat

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/service"
)

// holders are the services that have a listener for packets, by its address and
// protocol, sorted by name. One has several where clients in different places are
// led to different backends, or where a source gives what it should not. What the
// kernel has of a listener follows from all of them together, so that it is the same
// whatever came first.
type holders map[service.Listener][]*service.Service

// forPackets reports whether a listener answers any clients whose packets pass here.
func forPackets(l service.Listener) bool { return l.From.Has(service.FromWorld | service.FromPods) }

// places returns where a service listens for packets, each place once.
func places(s *service.Service) []service.Listener {
	var all []service.Listener
	if s.Forward != service.ForwardNAT {
		return nil
	}
	for _, l := range s.Listeners {
		if at := l.At(); forPackets(l) && (len(all) == 0 || all[len(all)-1] != at) {
			all = append(all, at) // sorted: the same are neighbours
		}
	}
	return all
}

func (h holders) add(s *service.Service) {
	for _, at := range places(s) {
		i, _ := slices.BinarySearchFunc(h[at], s.Name, compareName)
		h[at] = slices.Insert(slices.Clone(h[at]), i, s)
	}
}

func (h holders) remove(s *service.Service) {
	for _, at := range places(s) {
		rest := slices.DeleteFunc(slices.Clone(h[at]), func(o *service.Service) bool { return o.Name == s.Name })
		if len(rest) == 0 {
			delete(h, at)
			continue
		}
		h[at] = rest
	}
}

func compareName(s *service.Service, name string) int { return strings.Compare(s.Name, name) }

// lead is what clients in some places are led to.
type lead struct {
	to       *service.Service
	listener service.Listener
}

// leads returns what leads those who come from the world, and the pods, at a
// listener; nil: nothing. Where several would, the first by name does.
func leads(at service.Listener, of []*service.Service) (world, pods *lead) {
	for _, s := range of {
		i, _ := slices.BinarySearchFunc(s.Listeners, at, service.Listener.Compare)
		for ; i < len(s.Listeners) && s.Listeners[i].At() == at; i++ {
			l := s.Listeners[i]
			if world == nil && l.From.Has(service.FromWorld) {
				world = &lead{s, l}
			}
			if pods == nil && l.From.Has(service.FromPods) {
				pods = &lead{s, l}
			}
		}
	}
	return world, pods
}

// equal reports whether both lead to the same, for the same reason.
func (l *lead) equal(o *lead) bool { return l == o || l != nil && o != nil && *l == *o }

// slotTable remembers the slots of services, by family, while a change is put together:
// a service may have many listeners.
type slotTable map[slotsKey][]netip.AddrPort

type slotsKey struct {
	of     *service.Service
	family service.Family
}

func (t slotTable) of(s *service.Service, family service.Family) []netip.AddrPort {
	key := slotsKey{s, family}
	found, known := t[key]
	if !known {
		found = slotsOf(s, family)
		t[key] = found
	}
	return found
}

// elementsAt is all that the sets have of a listener, except what concerns addresses
// alone. It is pure. chains gets the chains that it needs.
func elementsAt(at service.Listener, of []*service.Service, slots slotTable, chains map[string]chain) []element {
	world, pods := leads(at, of)
	key, family := listenerKey(at), service.FamilyOf(at.Address.Addr())
	if world.equal(pods) {
		return appendSources(world.elements(setServices, slots, chains, setPodsTo), key, sourcesOf(world), family)
	}
	all := append(world.elements(setServices, slots, chains), pods.elements(setPodsTo, slots, chains)...)
	return appendSources(once(all), key, sourcesOf(world, pods), family)
}

// sourcesOf returns who may come by any of the ways, sorted.
func sourcesOf(ways ...*lead) []netip.Prefix {
	var all []netip.Prefix
	for _, w := range ways {
		if w != nil && w.listener.Guarded {
			all = append(all, w.to.Sources...)
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all)
}

// once leaves out elements in places that are taken: what two ways have in common.
func once(all []element) []element {
	type place struct {
		in  set
		key string
	}
	seen := make(map[place]bool, len(all))
	return slices.DeleteFunc(all, func(e element) bool {
		at := place{e.in, e.key}
		taken := seen[at]
		seen[at] = true
		return taken
	})
}

// elements is what one way needs: its verdict in the sets named, and its slots.
func (w *lead) elements(in setName, slots slotTable, chains map[string]chain, also ...setName) []element {
	if w == nil {
		return nil
	}
	s, l := w.to, w.listener
	family := service.FamilyOf(l.Address.Addr())
	at := slots.of(s, family)
	key := listenerKey(l)
	c := chain{family: family, pods: in == setPodsTo, slots: len(at), hashed: s.Balance == service.SourceHash, affinity: s.Affinity, guarded: l.Guarded}
	if s.Affinity > 0 {
		c.home = homeOf(s.Name, family)
	}
	verdict := c.name()
	switch {
	case len(at) > 0:
		chains[verdict] = c
	case s.Elsewhere.Has(l.Address.Addr()):
		verdict = chainDrop
	default:
		verdict = chainRefuse
	}
	var all []element
	for _, name := range append([]setName{in}, also...) {
		all = append(all, element{set{name, family}, key, verdict, s.Name})
	}
	if len(at) > 0 && s.Affinity > 0 {
		chains[c.sticks().name()] = c.sticks()
	}
	return appendSlots(all, c, key, at)
}
