package nat

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	conntrack "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/service"
)

// Connection tracking leads a connection where it went first. That is right until
// its backend is gone:
//
//   - a UDP client may send from one port for ever, and would be led to nobody;
//   - a TCP connection that has ended is remembered for up to two minutes, and a
//     client that uses its port again would be led where it went;
//   - a SYN that nobody answers would be sent again to the same nobody;
//   - what was sent to an address before it was a listener's was not translated, and
//     what follows from the same port would not be either.
//
// What is established goes on: a backend that has left a service may well live.

// flow is the way of packets to a listener. What was not translated has the
// listener for a backend.
type flow struct {
	protocol service.Protocol
	listener netip.AddrPort
	backend  netip.AddrPort
}

// stale are flows that must not go on. Those that are false are right (again).
type stale map[flow]bool

// at notes the flows to a listener that become stale when other services have it.
func (s stale) at(at service.Listener, before, after []*service.Service, slots slotTable) {
	was, now := targetsAt(at, before, slots), targetsAt(at, after, slots)
	for _, b := range now {
		s[flow{at.Protocol, at.Address, b}] = false
	}
	if len(now) > 0 && len(was) == 0 {
		s.untranslated(at)
	}
	left := backendsAt(at, after)
	for _, b := range backendsAt(at, before) {
		if slices.Contains(now, b) {
			continue
		}
		switch {
		case at.Protocol == service.UDP && servesStill(b, after):
			// Who sends goes on with it, as connections do.
		case at.Protocol == service.UDP || !slices.Contains(left, b) || slices.Contains(was, b):
			// Once when it takes no more, and once more when it is gone: until
			// then connections have ended.
			s[flow{at.Protocol, at.Address, b}] = true
		}
	}
}

// servesStill reports whether the source of a backend says that it answers, though it
// gets nothing new.
func servesStill(b netip.AddrPort, of []*service.Service) bool {
	for _, s := range of {
		if s.Of != nil && slices.ContainsFunc(s.Backends, func(o service.Backend) bool {
			return o.Address == b && !o.Unserving && !o.Down && !o.Drained
		}) {
			return true
		}
	}
	return false
}

// untranslated notes who sent to a listener before it was one: whoever goes on from
// the same port would never be translated.
func (s stale) untranslated(at service.Listener) {
	s[flow{at.Protocol, at.Address, at.Address}] = true
}

// targetsAt returns the backends to which a listener leads, whoever comes.
func targetsAt(at service.Listener, of []*service.Service, slots slotTable) []netip.AddrPort {
	world, pods := leads(at, of)
	family := service.FamilyOf(at.Address.Addr())
	var all []netip.AddrPort
	for _, w := range []*lead{world, pods} {
		if w != nil {
			all = append(all, slots.of(w.to, family)...)
		}
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return slices.Compact(all)
}

// backendsAt returns all backends of the services that have a listener, of its family.
func backendsAt(at service.Listener, of []*service.Service) []netip.AddrPort {
	var all []netip.AddrPort
	for _, s := range of {
		for _, b := range s.Backends {
			if b.Address.Addr().Is4() == at.Address.Addr().Is4() {
				all = append(all, b.Address)
			}
		}
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return slices.Compact(all)
}

// found notes the flows that an earlier agent, or none, led where they must not go on.
func (s stale) found(c *change) {
	each := func(all []element, do func(flow)) {
		for _, e := range all {
			if e.in.name == setSlots || e.in.name == setMembers {
				l, _ := splitListener(e.key, e.in.family)
				do(flow{l.Protocol, l.Address, splitTarget(e.data, e.in.family)})
			}
		}
	}
	each(c.remove, func(f flow) { s[f] = true })
	each(c.add, func(f flow) { delete(s, f) }) // it has another slot
	for _, e := range c.add {
		if (e.in.name == setServices || e.in.name == setPodsTo) && e.data != chainDrop && e.data != chainRefuse {
			l, _ := splitListener(e.key, e.in.family)
			s.untranslated(l)
		}
	}
}

// forget has conntrack forget stale flows, soon. The change that made them so is in
// force already.
func (p *Plane) forget(s stale) {
	if len(s) == 0 {
		return
	}
	p.staleMu.Lock()
	for f, is := range s {
		if is {
			p.stale[f] = true
			continue
		}
		delete(p.stale, f)
		delete(p.later, f)
	}
	p.staleMu.Unlock()
	select {
	case p.staleWake <- struct{}{}:
	default:
	}
}

// shaking is how long handshakes have to go on that were under way when their
// backend was removed: without its entry the answer to a SYN is lost, and the client
// waits a second.
const shaking = 500 * time.Millisecond

// Run has conntrack forget what changes make stale, until the context ends: first
// what has ended, then what could not begin. It also forgets which pods had to be
// tracked and need not be any more.
func (p *Plane) Run(ctx context.Context) {
	rest := time.NewTimer(time.Hour)
	rest.Stop()
	defer rest.Stop()
	resting := false
	reviews := time.NewTicker(reviewEvery)
	defer reviews.Stop()
	for {
		var s stale
		all := false
		select {
		case <-ctx.Done():
			return
		case <-reviews.C:
			if err := p.review(); err != nil {
				p.log.Warn("pods stay tracked whose packets are not translated any more", "error", err)
			}
			continue
		case <-rest.C:
			s, all, resting = p.take(&p.later), true, false
		case <-p.staleWake:
			// Changes that go on must not put it off for ever.
			if s = p.take(&p.stale); p.postpone(s) && !resting {
				rest.Reset(shaking)
				resting = true
			}
		}
		if err := s.flush(all); err != nil {
			p.log.Warn("conntrack keeps flows to backends that are gone", "error", err)
		}
	}
}

func (p *Plane) take(from *stale) stale {
	p.staleMu.Lock()
	defer p.staleMu.Unlock()
	s := *from
	*from = make(stale)
	return s
}

// postpone notes the flows that may have handshakes under way, and returns whether
// there are any.
func (p *Plane) postpone(s stale) bool {
	p.staleMu.Lock()
	defer p.staleMu.Unlock()
	for f := range s {
		if f.protocol == service.TCP {
			p.later[f] = true
		}
	}
	return len(p.later) > 0
}

// manyFlows is from how many flows on all of conntrack is read once, instead of
// looked through by the kernel for each.
const manyFlows = 100

// flush has conntrack forget the flows. A kernel that cannot look for them itself
// (Linux before 6.8) refuses what it is asked, because it is no whole entry.
func (s stale) flush(all bool) error {
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
	if n := len(left[0]); n > 0 && n <= manyFlows && left[0].flushEach(all) == nil {
		left[0] = nil
	}
	for i, family := range []conntrack.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if err := left[i].flushByReading(family, all); err != nil {
			return err
		}
	}
	return nil
}

func (s stale) flushByReading(f conntrack.InetFamily, all bool) error {
	if len(s) == 0 {
		return nil
	}
	matches := filter{s, all}
	_, err := conntrack.ConntrackDeleteFilters(conntrack.ConntrackTable, f, matches)
	for tries := 0; errors.Is(err, conntrack.ErrDumpInterrupted) && tries < 3; tries++ {
		// What changed meanwhile may not have been seen.
		_, err = conntrack.ConntrackDeleteFilters(conntrack.ConntrackTable, f, matches)
	}
	return err
}

// filter is stale flows as the library looks for them.
type filter struct {
	stale
	all bool // also handshakes without an answer
}

// MatchConntrackFlow implements conntrack.CustomConntrackFilter.
func (s filter) MatchConntrackFlow(f *conntrack.ConntrackFlow) bool {
	to, ok1 := netip.AddrFromSlice(f.Forward.DstIP)
	by, ok2 := netip.AddrFromSlice(f.Reverse.SrcIP)
	if !ok1 || !ok2 || !s.stale[flow{
		service.Protocol(f.Forward.Protocol),
		netip.AddrPortFrom(to.Unmap(), f.Forward.DstPort), netip.AddrPortFrom(by.Unmap(), f.Reverse.SrcPort),
	}] {
		return false
	}
	tcp, ok := f.ProtoInfo.(*conntrack.ProtoInfoTCP)
	return !ok || forgettable(tcp.State, s.all)
}

// States of TCP in linux/netfilter/nf_conntrack_tcp.h.
const (
	tcpSynSent = 1
	tcpFinWait = 4 // and what follows, up to tcpClose: somebody has begun to end it
	tcpClose   = 8
)

// forgettable reports whether a connection in this state has no use for its backend;
// all says that there was time for an answer.
func forgettable(state uint8, all bool) bool {
	return state >= tcpFinWait && state <= tcpClose || all && state == tcpSynSent
}

// Messages, attributes and flags of linux/netfilter/nfnetlink_conntrack.h and of
// net/netfilter/nf_conntrack_netlink.c, where the flags are not for others to
// include.
const (
	msgGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1 // IPCTNL_MSG_CT_GET
	msgDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE

	attrTupleOrig, attrTupleReply  = 1, 2
	attrStatus, attrStatusMask     = 3, 26
	attrProtoInfo                  = 4
	attrID                         = 12
	attrFilter                     = 25
	attrTupleIP, attrTupleProto    = 1, 2
	attrIPv4Src, attrIPv4Dst       = 1, 2
	attrIPv6Src                    = 3
	attrProtoNum                   = 1
	attrProtoSrc, attrProtoDst     = 2, 3
	attrProtoInfoTCP, attrTCPState = 1, 1
	attrFilterOrig, attrFilterRepl = 1, 2

	byIPSrc, byIPDst     = 1 << 0, 1 << 1
	byProtoNum           = 1 << 3
	byPortSrc, byPortDst = 1 << 4, 1 << 5
)

// header is struct nfgenmsg of IPv4.
var header = []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}

// flushEach has the kernel look for the flows, which are of IPv4.
func (s stale) flushEach(all bool) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	for f := range s {
		if err := f.flush(conn, all); err != nil {
			return fmt.Errorf("flow %s by %s: %w", f.listener, f.backend, err)
		}
	}
	return nil
}

func (f flow) flush(conn *netlink.Conn, all bool) error {
	data, err := f.message()
	if err != nil {
		return err
	}
	if f.protocol != service.TCP {
		_, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: msgDelete, Flags: netlink.Request | netlink.Acknowledge}, Data: data,
		})
		return err
	}
	found, err := conn.Execute(netlink.Message{Header: netlink.Header{Type: msgGet, Flags: netlink.Request | netlink.Dump}, Data: data})
	if err != nil {
		return err
	}
	for _, m := range found {
		e, err := parseEntry(m.Data)
		if err != nil {
			return err
		}
		if !forgettable(e.state, all) {
			continue
		}
		_, err = conn.Execute(netlink.Message{
			Header: netlink.Header{Type: msgDelete, Flags: netlink.Request | netlink.Acknowledge}, Data: append(slices.Clone(header), e.name...),
		})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// entry is one connection of TCP as conntrack knows it.
type entry struct {
	name  []byte // the attributes that name it
	state uint8
}

func parseEntry(data []byte) (e entry, err error) {
	ad, err := netlink.NewAttributeDecoder(data[len(header):])
	if err != nil {
		return e, err
	}
	var name []netlink.Attribute
	for ad.Next() {
		switch ad.Type() {
		case attrTupleOrig:
			name = append(name, netlink.Attribute{Type: attrTupleOrig | unix.NLA_F_NESTED, Data: ad.Bytes()})
		case attrID:
			name = append(name, netlink.Attribute{Type: attrID, Data: ad.Bytes()})
		case attrProtoInfo:
			ad.Nested(func(info *netlink.AttributeDecoder) error {
				for info.Next() {
					if info.Type() == attrProtoInfoTCP {
						info.Nested(func(tcp *netlink.AttributeDecoder) error {
							for tcp.Next() {
								if tcp.Type() == attrTCPState {
									e.state = tcp.Uint8()
								}
							}
							return nil
						})
					}
				}
				return nil
			})
		}
	}
	if err := ad.Err(); err != nil {
		return e, err
	}
	e.name, err = netlink.MarshalAttributes(name)
	return e, err
}

// message names all entries of a flow: by where they wanted to go and by who
// answers.
func (f flow) message() ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
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
	return append(slices.Clone(header), attributes...), err
}
