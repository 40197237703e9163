package nat

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	conntrack "github.com/vishvananda/netlink"
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
//   - a connection that has ended is remembered for up to two minutes, and a client
//     that uses its port again would be led where it went.

// flow is the way of packets to a listener. What was not translated has the
// listener for a backend.
type flow struct {
	protocol service.Protocol
	listener netip.AddrPort
	backend  netip.AddrPort
}

// stale are flows that must not go on.
type stale map[flow]bool

// between notes the flows that become stale when one service becomes the other. A
// backend that only takes no more new ones keeps those of TCP.
func (s stale) between(before, after *service.Service) {
	for _, l := range before.Listeners {
		if !l.From.Has(service.FromWorld | service.FromGuests) {
			continue
		}
		v4 := l.Address.Addr().Is4()
		there := slices.ContainsFunc(after.Listeners, func(o service.Listener) bool { return o.At() == l.At() })
		now := slotsOf(after, v4)
		if l.Protocol == service.UDP && there && len(now) > 0 && len(slotsOf(before, v4)) == 0 {
			s[flow{l.Protocol, l.Address, l.Address}] = true
		}
		for _, b := range before.Backends {
			if b.Address.Addr().Is4() != v4 || there && slices.Contains(now, b.Address) {
				continue
			}
			left := !slices.ContainsFunc(after.Backends, func(o service.Backend) bool { return o.Address == b.Address })
			if l.Protocol == service.UDP || left && there && before.OnDown == service.Reset {
				s[flow{l.Protocol, l.Address, b.Address}] = true
			}
		}
	}
}

// found notes the flows that an earlier agent led to backends that are gone.
func (s stale) found(c *change) {
	each := func(all []element, do func(flow)) {
		for _, e := range all {
			if e.in.name == setSlots || e.in.name == setMembers {
				l, _ := splitListener(e.key, e.in.v4)
				do(flow{l.Protocol, l.Address, splitTarget(e.data, e.in.v4)})
			}
		}
	}
	each(c.remove, func(f flow) { s[f] = true })
	each(c.add, func(f flow) { delete(s, f) }) // it has another slot
}

// forget has conntrack forget stale flows, soon. The change that made them so is in
// force already.
func (p *Plane) forget(s stale) {
	if len(s) == 0 {
		return
	}
	p.staleMu.Lock()
	for f := range s {
		p.stale[f] = true
	}
	p.staleMu.Unlock()
	select {
	case p.staleWake <- struct{}{}:
	default:
	}
}

// Run has conntrack forget what changes make stale, until the context ends.
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
		if err := s.flush(); err != nil {
			p.log.Warn("conntrack keeps flows to backends that are gone", "error", err)
		}
	}
}

// manyFlows is from how many flows on all of conntrack is read once, instead of
// looked through by the kernel for each.
const manyFlows = 100

// flush has conntrack forget the flows. A kernel that cannot look for them itself
// (Linux before 6.8) refuses what it is asked, because it is no whole entry.
func (s stale) flush() error {
	var left [2]stale // by family, 4 and 6
	for i := range left {
		left[i] = make(stale)
	}
	for f := range s {
		if f.listener.Addr().Is4() {
			left[0][f] = true
		} else {
			left[1][f] = true
		}
	}
	// Of IPv6 the kernel finds all but what it is asked for: it takes equal
	// addresses for different ones (ctnetlink_filter_match_tuple in Linux 6.18).
	if n := len(left[0]); n > 0 && n <= manyFlows && left[0].flushEach() == nil {
		left[0] = nil
	}
	for i, family := range []conntrack.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if err := left[i].flushByReading(family); err != nil {
			return err
		}
	}
	return nil
}

func (s stale) flushByReading(f conntrack.InetFamily) error {
	if len(s) == 0 {
		return nil
	}
	_, err := conntrack.ConntrackDeleteFilters(conntrack.ConntrackTable, f, s)
	for tries := 0; errors.Is(err, conntrack.ErrDumpInterrupted) && tries < 3; tries++ {
		// What changed meanwhile may not have been seen.
		_, err = conntrack.ConntrackDeleteFilters(conntrack.ConntrackTable, f, s)
	}
	return err
}

// MatchConntrackFlow implements conntrack.CustomConntrackFilter.
func (s stale) MatchConntrackFlow(f *conntrack.ConntrackFlow) bool {
	to, ok1 := netip.AddrFromSlice(f.Forward.DstIP)
	by, ok2 := netip.AddrFromSlice(f.Reverse.SrcIP)
	return ok1 && ok2 && s[flow{
		service.Protocol(f.Forward.Protocol),
		netip.AddrPortFrom(to.Unmap(), f.Forward.DstPort), netip.AddrPortFrom(by.Unmap(), f.Reverse.SrcPort),
	}]
}

// Attributes and flags of linux/netfilter/nfnetlink_conntrack.h and of
// net/netfilter/nf_conntrack_netlink.c, where the latter are not for others to
// include.
const (
	msgDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE

	attrTupleOrig, attrTupleReply  = 1, 2
	attrTupleIP, attrTupleProto    = 1, 2
	attrIPv4Src, attrIPv4Dst       = 1, 2
	attrProtoNum                   = 1
	attrProtoSrc, attrProtoDst     = 2, 3
	attrFilter                     = 25
	attrFilterOrig, attrFilterRepl = 1, 2

	byIPSrc, byIPDst     = 1 << 0, 1 << 1
	byProtoNum           = 1 << 3
	byPortSrc, byPortDst = 1 << 4, 1 << 5
)

// flushEach has the kernel look for the flows, which are of IPv4.
func (s stale) flushEach() error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	for f := range s {
		data, err := f.filter()
		if err != nil {
			return err
		}
		_, err = conn.Execute(netlink.Message{
			Header: netlink.Header{Type: msgDelete, Flags: netlink.Request | netlink.Acknowledge}, Data: data,
		})
		if err != nil {
			return fmt.Errorf("flow %s by %s: %w", f.listener, f.backend, err)
		}
	}
	return nil
}

// filter is the message that names all entries of a flow: by where they wanted to
// go and by who answers.
func (f flow) filter() ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	tuple := func(attr, ip, port uint16, at netip.AddrPort) {
		ae.Nested(attr, func(t *netlink.AttributeEncoder) error {
			t.Nested(attrTupleIP, func(a *netlink.AttributeEncoder) error {
				a.Bytes(ip, at.Addr().AsSlice())
				return nil
			})
			t.Nested(attrTupleProto, func(a *netlink.AttributeEncoder) error {
				a.ByteOrder = binary.BigEndian
				a.Uint8(attrProtoNum, uint8(f.protocol))
				a.Uint16(port, at.Port())
				return nil
			})
			return nil
		})
	}
	tuple(attrTupleOrig, attrIPv4Dst, attrProtoDst, f.listener)
	tuple(attrTupleReply, attrIPv4Src, attrProtoSrc, f.backend)
	ae.Nested(attrFilter, func(a *netlink.AttributeEncoder) error {
		a.ByteOrder = binary.NativeEndian
		a.Uint32(attrFilterOrig, byIPDst|byProtoNum|byPortDst)
		a.Uint32(attrFilterRepl, byIPSrc|byProtoNum|byPortSrc)
		return nil
	})
	attributes, err := ae.Encode()
	return append([]byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}, attributes...), err // struct nfgenmsg first
}
