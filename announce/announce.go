// Package announce decides which VIPs the network is told of. Its rooms tell it: bgp to
// routers, l2 to the hosts of a segment; bfd notices when a router is gone.
//
// A VIP is announced only while this host does something for it: one of its services has
// a usable backend, and the plane that forwards its packets has it in the kernel. The
// package is pure.
package announce

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/pentad/pentad/service"
)

// VIP is an address that others may be told of.
type VIP struct {
	Address  netip.Addr
	Services []string // the names of those that have it, sorted
	Working  []string // of these, those for whose sake others are told
	// Missing says why others are not told, as the end of a sentence that begins with
	// the address; empty: they are.
	Missing string
}

// WithdrawnFor is how long nothing is announced after everything was withdrawn, because
// `pentad down` is about to end this agent. If it does not come to its end, what was
// announced is so again.
const WithdrawnFor = 15 * time.Second

// ErrWithdrawn says that this is so.
var ErrWithdrawn = errors.New("all VIPs were withdrawn a moment ago, as `pentad down` asks before it ends the agent")

// Standing is what is in the kernel: the services as each plane that forwards has them;
// nil: it has none.
type Standing map[service.Forward]*service.Snapshot

// VIPs returns all addresses that others may be told of, sorted. directs says whether
// this host is a director; unheard are services whose backends no probe has told anything
// of yet.
func VIPs(services *service.Snapshot, directs bool, in Standing, unheard map[string]bool) []VIP {
	found := make(map[netip.Addr]*VIP)
	reasons := make(map[netip.Addr][]string)
	for _, s := range services.Services {
		if s.Forward == service.ForwardNone || s.Forward == service.ForwardDirect && !directs {
			continue
		}
		for _, l := range s.Listeners {
			if !isForOthers(s, l) {
				continue
			}
			missing := missingFor(s, l, in)
			if missing == "" && unheard[s.Name] {
				missing = "no backend of the service " + s.Name + " was probed yet"
			}
			v := found[l.Address.Addr()]
			if v == nil {
				v = &VIP{Address: l.Address.Addr()}
				found[v.Address] = v
			}
			if !slices.Contains(v.Services, s.Name) {
				v.Services = append(v.Services, s.Name)
			}
			if missing != "" {
				reasons[v.Address] = append(reasons[v.Address], missing)
			} else if !slices.Contains(v.Working, s.Name) {
				v.Working = append(v.Working, s.Name)
			}
		}
	}
	all := make([]VIP, 0, len(found))
	for _, v := range found {
		slices.Sort(v.Services)
		slices.Sort(v.Working)
		if len(v.Working) == 0 {
			v.Missing = strings.Join(slices.Compact(reasons[v.Address]), ", and ")
		}
		all = append(all, *v)
	}
	slices.SortFunc(all, func(a, b VIP) int { return a.Address.Compare(b.Address) })
	return all
}

// isForOthers reports whether a listener is one that others are told of: of the file
// every one, of a cluster those of load balancers.
func isForOthers(s *service.Service, l service.Listener) bool {
	a := l.Address.Addr()
	if a.IsLoopback() || a.IsLinkLocalUnicast() {
		return false
	}
	return l.From.Has(service.FromWorld) && (s.Source != service.SourceKubernetes || l.Public)
}

// missingFor says why a listener is no reason to tell others of its address; empty: it is
// one.
func missingFor(s *service.Service, l service.Listener, in Standing) string {
	if _, ok := s.ServingGroup(service.FamilyOf(l.Address.Addr())); !ok {
		return "no backend of the service " + s.Name + " is usable"
	}
	there := in[s.Forward]
	if there == nil {
		return "it is not in the kernel yet (forward: " + s.Forward.String() + ")"
	}
	t := there.Find(s.Name)
	if t == nil || !slices.ContainsFunc(t.Listeners, func(o service.Listener) bool { return o.At() == l.At() }) {
		return "the service " + s.Name + " is not in the kernel yet (forward: " + s.Forward.String() + ")"
	}
	if _, ok := t.ServingGroup(service.FamilyOf(l.Address.Addr())); !ok {
		return "the kernel does not know yet which backends of the service " + s.Name + " are usable"
	}
	return ""
}

// Told returns the VIPs that others are told of, among those of some services; none: of
// all.
func Told(all []VIP, services []string) (told []VIP) {
	for _, v := range all {
		ofThem := len(services) == 0 || slices.ContainsFunc(v.Working, func(name string) bool { return slices.Contains(services, name) })
		if len(v.Working) > 0 && ofThem {
			told = append(told, v)
		}
	}
	return told
}

// Prefixes returns what is announced for VIPs, sorted: each by itself, but for those that
// an aggregate covers.
func Prefixes(told []VIP, aggregates []netip.Prefix) []netip.Prefix {
	all := make([]netip.Prefix, 0, len(told))
	for _, v := range told {
		all = append(all, prefixOf(v.Address, aggregates))
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all)
}

// prefixOf returns the widest aggregate that covers an address, or the address itself.
func prefixOf(a netip.Addr, aggregates []netip.Prefix) netip.Prefix {
	p := netip.PrefixFrom(a, a.BitLen())
	for _, g := range aggregates {
		if g.Contains(a) && g.Bits() < p.Bits() {
			p = g.Masked()
		}
	}
	return p
}
