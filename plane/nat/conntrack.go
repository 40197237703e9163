package nat

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/service"
)

// Connection tracking leads a connection where it went first. That is right until
// its backend is gone:
//
//   - a UDP client may send from one port for ever, and would be led to nobody;
//   - what comes on a TCP connection to a backend that was removed must not vanish:
//     without its entry another backend answers it with a reset, and the client
//     connects anew;
//   - a TCP connection that has ended is remembered for a while, and a client that
//     uses its port again would be led where it went.

// flow is the way of packets to a listener. Without a backend they were not
// translated.
type flow struct {
	protocol service.Protocol
	listener netip.AddrPort
	backend  netip.AddrPort
}

// stale are flows that must not go on. Those that are false may end by themselves:
// only what has ended is forgotten.
type stale map[flow]bool

// States of a TCP connection that has ended or is about to
// (linux/netfilter/nf_conntrack_tcp.h).
const (
	tcpLastAck  = 6
	tcpTimeWait = 7
	tcpClose    = 8
)

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (s stale) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	to, ok1 := netip.AddrFromSlice(f.Forward.DstIP)
	by, ok2 := netip.AddrFromSlice(f.Reverse.SrcIP)
	if !ok1 || !ok2 {
		return false
	}
	at := flow{
		service.Protocol(f.Forward.Protocol),
		netip.AddrPortFrom(to.Unmap(), f.Forward.DstPort), netip.AddrPortFrom(by.Unmap(), f.Reverse.SrcPort),
	}
	if at.listener == at.backend {
		at.backend = netip.AddrPort{}
	}
	living, known := s[at]
	if !known || living {
		return known
	}
	tcp, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP)
	return ok && tcp.State >= tcpLastAck && tcp.State <= tcpClose
}

// between notes the flows that become stale when one service becomes the other.
func (s stale) between(before, after *service.Service) {
	for _, l := range before.Listeners {
		if !l.From.Has(service.FromWorld | service.FromGuests) {
			continue
		}
		v4 := l.Address.Addr().Is4()
		there := slices.ContainsFunc(after.Listeners, func(o service.Listener) bool { return o.At() == l.At() })
		was, now := slotsOf(before, v4), slotsOf(after, v4)
		if !there {
			now = nil
		}
		if l.Protocol == service.UDP && len(was) == 0 && len(now) > 0 {
			s[flow{l.Protocol, l.Address, netip.AddrPort{}}] = true
		}
		for _, b := range before.Backends {
			if b.Address.Addr().Is4() != v4 || slices.Contains(now, b.Address) {
				continue
			}
			left := !slices.ContainsFunc(after.Backends, func(o service.Backend) bool { return o.Address == b.Address })
			f := flow{l.Protocol, l.Address, b.Address}
			switch {
			case l.Protocol == service.UDP, left && there && before.OnDown == service.Reset:
				s[f] = true
			case slices.Contains(was, b.Address):
				s[f] = s[f] || false
			}
		}
	}
}

// found notes the flows that elements in the kernel say an earlier agent left.
func (s stale) found(c *change) {
	for _, e := range c.remove {
		if e.in.name != setSlots && e.in.name != setMembers {
			continue
		}
		l, _ := splitListener(e.key, e.in.v4)
		s[flow{l.Protocol, l.Address, splitTarget(e.data, e.in.v4)}] = l.Protocol == service.UDP
	}
	for _, e := range c.add {
		if e.in.name == setSlots || e.in.name == setMembers {
			l, _ := splitListener(e.key, e.in.v4)
			delete(s, flow{l.Protocol, l.Address, splitTarget(e.data, e.in.v4)}) // it has another slot
		}
	}
}

// forget has conntrack forget stale flows. The change that made them so is in
// force already.
func (p *Plane) forget(s stale) {
	if len(s) == 0 {
		return
	}
	p.staleMu.Lock()
	for f, living := range s {
		p.stale[f] = p.stale[f] || living
	}
	p.staleMu.Unlock()
	select {
	case p.staleWake <- struct{}{}:
	default:
	}
}

// forgetEvery bounds how often all that conntrack knows is looked through: on a
// busy node that is a hundred thousand entries.
const forgetEvery = time.Second

// Run has conntrack forget what changes make stale, at once after a change that
// nobody expected and once a second while there are many, until the context ends.
func (p *Plane) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.staleWake:
		}
		p.staleMu.Lock()
		s := p.stale
		p.stale = make(stale)
		p.staleMu.Unlock()
		for _, f := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, s)
			if errors.Is(err, netlink.ErrDumpInterrupted) {
				p.forget(s) // what changed meanwhile may not have been seen
			} else if err != nil {
				p.log.Warn("conntrack keeps flows to backends that are gone", "error", err)
				break
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(forgetEvery):
		}
	}
}
