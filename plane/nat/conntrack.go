package nat

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/service"
)

// A UDP client may send for ever from the same port, and conntrack leads it where
// it went first. When a backend leaves a service, and when a service gets its first
// one, what conntrack knows of it has to go.

// flow is the way of datagrams to a listener. Without a backend they were not
// translated.
type flow struct {
	listener netip.AddrPort
	backend  netip.AddrPort
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter for the flows that
// are stale.
func (s stale) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	if f.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	to, ok1 := netip.AddrFromSlice(f.Forward.DstIP)
	by, ok2 := netip.AddrFromSlice(f.Reverse.SrcIP)
	if !ok1 || !ok2 {
		return false
	}
	at := flow{netip.AddrPortFrom(to.Unmap(), f.Forward.DstPort), netip.AddrPortFrom(by.Unmap(), f.Reverse.SrcPort)}
	if at.listener == at.backend {
		at.backend = netip.AddrPort{}
	}
	return s[at]
}

// stale are flows that must not go on.
type stale map[flow]bool

// staleAfter returns the flows that a change makes stale.
func staleAfter(c *change) stale {
	s := make(stale)
	each := func(all []element, do func(service.Listener, netip.AddrPort)) {
		for _, e := range all {
			if e.in.name != setSlots && e.in.name != setMembers {
				continue
			}
			if l, _ := splitListener(e.key, e.in.v4); l.Protocol == service.UDP {
				do(l, splitTarget(e.data, e.in.v4))
			}
		}
	}
	had := make(map[netip.AddrPort]bool)
	each(c.remove, func(l service.Listener, b netip.AddrPort) {
		had[l.Address] = true
		s[flow{l.Address, b}] = true
	})
	each(c.add, func(l service.Listener, b netip.AddrPort) {
		delete(s, flow{l.Address, b}) // it has another slot
		if !had[l.Address] {
			s[flow{listener: l.Address}] = true
		}
	})
	return s
}

// forgetStale has conntrack forget the flows that a change makes stale. The
// change is in force already: a datagram that comes now goes the new way.
func (p *Plane) forgetStale(c *change) {
	s := staleAfter(c)
	if len(s) == 0 {
		return
	}
	for _, f := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		n, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, s)
		if err != nil {
			p.log.Warn("conntrack keeps UDP flows to backends that are gone", "error", err)
			return
		}
		if n > 0 {
			p.log.Debug("conntrack forgot stale UDP flows", "flows", n)
		}
	}
}
