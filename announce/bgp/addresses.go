package bgp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
)

// errNoID says that no router ID can be found.
var errNoID = errors.New("this host has no IPv4 address by which routers could tell it from others: write announce.bgp.routerID")

// routerID returns the one of the file; without one the address from which the first
// peer is spoken to that has one of IPv4, or else the first of an interface. What is on a
// loopback may be on other hosts, too.
func routerID(c config.BGP) (netip.Addr, error) {
	if c.RouterID.IsValid() {
		return c.RouterID, nil
	}
	for _, p := range c.Peers {
		if p.Source.Is4() {
			return p.Source, nil
		}
		if !p.Address.Is4() {
			continue
		}
		if routes, err := netlink.RouteGet(p.Address.AsSlice()); err == nil && len(routes) > 0 {
			if a, ok := netip.AddrFromSlice(routes[0].Src); ok && a.Unmap().Is4() {
				return a.Unmap(), nil
			}
		}
	}
	return firstAddress()
}

// firstAddress returns the least IPv4 address of an interface that is no loopback.
func firstAddress() (first netip.Addr, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return first, err
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback != 0 {
			continue
		}
		a, err := addressOn(l, true, netip.Addr{}, nil)
		if err == nil && a.IsValid() && (!first.IsValid() || a.Less(first)) {
			first = a
		}
	}
	if !first.IsValid() {
		return first, errNoID
	}
	return first, nil
}

// nextHops returns where a peer is told to send packets of each family; true: IPv4. An
// unspecified one is the address from which we speak to it. A family without one cannot
// be announced. What the peer was told before stays as long as it is there; refused are
// addresses that will not do.
func nextHops(peer config.Peer, before map[bool]netip.Addr, refused func(netip.Addr) bool) (map[bool]netip.Addr, error) {
	hops := make(map[bool]netip.Addr)
	for _, a := range peer.NextHops {
		hops[a.Is4()] = a
	}
	is4 := peer.Address.Is4()
	if _, ok := hops[is4]; !ok {
		hops[is4] = unspecified(is4)
	}
	if _, ok := hops[!is4]; ok {
		return hops, nil
	}
	link, err := linkTo(peer)
	if err != nil {
		return hops, err
	}
	a, err := addressOn(link, !is4, before[!is4], refused)
	if err != nil {
		return hops, err
	}
	if a.IsValid() {
		hops[!is4] = a
	}
	return hops, nil
}

func unspecified(is4 bool) netip.Addr {
	if is4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// linkTo returns the interface by which a peer is reached.
func linkTo(peer config.Peer) (netlink.Link, error) {
	if zone := peer.Address.Zone(); zone != "" {
		return netlink.LinkByName(zone)
	}
	routes, err := netlink.RouteGet(peer.Address.AsSlice())
	if err != nil {
		return nil, fmt.Errorf("there is no way to it: %w", err)
	}
	if len(routes) == 0 {
		return nil, errors.New("there is no way to it")
	}
	return netlink.LinkByIndex(routes[0].LinkIndex)
}

// addressOn returns an address of an interface that others can send to: the one of before,
// if it is there still, or else the least of those that are of a segment and stay. An
// invalid one: it has none of the family.
func addressOn(link netlink.Link, is4 bool, before netip.Addr, refused func(netip.Addr) bool) (best netip.Addr, err error) {
	family := netlink.FAMILY_V6
	if is4 {
		family = netlink.FAMILY_V4
	}
	all, err := netlink.AddrList(link, family)
	if err != nil {
		return netip.Addr{}, err
	}
	const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
	ofSegment := false
	for _, a := range all {
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		temporary := !is4 && a.Flags&unix.IFA_F_TEMPORARY != 0 // of IPv4 the bit says secondary
		if !ok || !ip.IsGlobalUnicast() || ip.IsLinkLocalUnicast() || a.Flags&unusable != 0 || temporary || a.Scope != int(netlink.SCOPE_UNIVERSE) || refused != nil && refused(ip) {
			continue
		}
		if ip == before {
			return ip, nil
		}
		ones, bits := a.Mask.Size()
		segment := ones < bits // what has all bits is an address of its own, which may move
		if !best.IsValid() || segment && !ofSegment || segment == ofSegment && ip.Less(best) {
			best, ofSegment = ip, segment
		}
	}
	return best, nil
}
