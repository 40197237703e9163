package pod

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/pod/attach"
)

// Other hosts: to each of their blocks there is one route. Over the network between hosts
// as it is (direct), or in UDP (vxlan: RFC 7348), where there are besides one neighbour
// and one forwarding entry for each host. All are functions of what is wanted, so that
// two hosts need not speak to each other to agree.

// The tunnel. Number and port are those of flannel, whose hosts understand ours.
const (
	tunnelName = "pentad.vxlan"
	tunnelID   = 1
	tunnelPort = 8472
)

// What the headers of the tunnel take (RFC 7348, section 5): outer Ethernet is not of the
// MTU of the device below, the inner one is.
const (
	tunnelOverhead4 = 50
	tunnelOverhead6 = 70
)

// hop is where packets to a block go.
type hop struct {
	via    netip.Addr
	onLink bool // at the tunnel
}

// neighbour is another host's end of the tunnel.
type neighbour struct {
	inner []netip.Addr // its addresses in the tunnel
	mac   [6]byte
	outer netip.Addr // where it is
}

// reach is how other hosts are reached. It is pure data.
type reach struct {
	hops       map[netip.Prefix]hop
	neighbours []neighbour
	own        neighbour // of this host; of no meaning without a tunnel
	hosts      int       // others
	tunnel     bool
}

// errNotListed says that this host is none of those of the file.
var errNotListed = errors.New("none of pods.hosts has an address of this host, so that it has no block")

// selfIn returns the host of the file that this one is.
func selfIn(hosts []config.PodHost, own map[netip.Addr]bool) (config.PodHost, error) {
	for _, h := range hosts {
		if slices.ContainsFunc(h.Addresses, func(a netip.Addr) bool { return own[a] }) {
			return h, nil
		}
	}
	return config.PodHost{}, errNotListed
}

// reachOf decides how this host, named self, reaches the others. It is pure.
func reachOf(c config.Pods, self string) reach {
	r := reach{hops: make(map[netip.Prefix]hop), tunnel: c.Overlay == config.OverlayVXLAN}
	for _, h := range c.Hosts {
		if len(h.Addresses) == 0 {
			continue // one that does not say where it is
		}
		n := neighbourOf(h)
		if h.Name == self {
			r.own = n
			continue
		}
		if c.Overlay == config.OverlayNone {
			continue
		}
		r.hosts++
		if r.tunnel {
			r.neighbours = append(r.neighbours, n)
		}
		for _, b := range h.Blocks {
			to := h.Addresses
			if r.tunnel {
				to = n.inner
			}
			for _, a := range to {
				if a.Is4() == b.Addr().Is4() {
					r.hops[b.Masked()] = hop{a, r.tunnel}
					break
				}
			}
		}
	}
	if r.tunnel && !r.own.outer.IsValid() {
		return reach{hops: make(map[netip.Prefix]hop)} // without a block it has no end of the tunnel
	}
	return r
}

// neighbourOf returns a host's end of the tunnel: its addresses are the first ones of its
// first blocks, and its link-layer address follows from its name.
func neighbourOf(h config.PodHost) neighbour {
	n := neighbour{outer: h.Addresses[0]}
	for _, is4 := range []bool{true, false} {
		i := slices.IndexFunc(h.Blocks, func(b netip.Prefix) bool { return b.Addr().Is4() == is4 })
		if i >= 0 {
			n.inner = append(n.inner, h.Blocks[i].Masked().Addr())
		}
	}
	sum := sha256.Sum256([]byte(h.Name))
	n.mac[0] = 0x02 // administered locally
	copy(n.mac[1:], sum[:5])
	return n
}

// apply has the kernel reach other hosts so. What grows is there before a route leads to
// it.
func (r reach) apply(mtu int) error {
	var index int
	if r.tunnel {
		link, err := r.setTunnel(mtu)
		if err != nil {
			return fmt.Errorf("the tunnel %s: %w", tunnelName, err)
		}
		index = link.Attrs().Index
		if err := r.setNeighbours(index); err != nil {
			return fmt.Errorf("the tunnel %s: %w", tunnelName, err)
		}
	}
	err := r.setRoutes(index)
	if !r.tunnel {
		err = errors.Join(err, removeTunnel())
	}
	return err
}

// setTunnel makes the device of the tunnel what it should be. What cannot be changed of
// one that is there has it made anew.
func (r reach) setTunnel(mtu int) (netlink.Link, error) {
	below, err := linkWith(r.own.outer)
	if err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = tunnelName, mtu, r.own.mac[:]
	wanted := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: tunnelID, VtepDevIndex: below.Attrs().Index, SrcAddr: r.own.outer.AsSlice(), Port: tunnelPort}
	there, err := netlink.LinkByName(tunnelName)
	if err == nil {
		v, ok := there.(*netlink.Vxlan)
		if !ok || v.VxlanId != tunnelID || v.Port != tunnelPort || v.Learning || v.VtepDevIndex != wanted.VtepDevIndex || !v.SrcAddr.Equal(wanted.SrcAddr) {
			if err := netlink.LinkDel(there); err != nil {
				return nil, err
			}
			there = nil
		}
	} else if !errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, err
	} else {
		there = nil
	}
	if there == nil {
		if err := netlink.LinkAdd(wanted); err != nil {
			return nil, err
		}
		if there, err = netlink.LinkByName(tunnelName); err != nil {
			return nil, err
		}
	}
	if there.Attrs().HardwareAddr.String() != net.HardwareAddr(r.own.mac[:]).String() {
		if err := netlink.LinkSetHardwareAddr(there, r.own.mac[:]); err != nil {
			return nil, err
		}
	}
	if there.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(there, mtu); err != nil {
			return nil, err
		}
	}
	if err := r.dropAddresses(there); err != nil {
		return nil, err
	}
	for _, a := range r.own.inner {
		if err := netlink.AddrReplace(there, &netlink.Addr{IPNet: attach.HostNet(a), Flags: unix.IFA_F_NODAD}); err != nil {
			return nil, err
		}
	}
	return there, netlink.LinkSetUp(there)
}

// dropAddresses takes those away that the device of the tunnel had for another block.
func (r reach) dropAddresses(link netlink.Link) error {
	all, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, x := range all {
		a, _ := netip.AddrFromSlice(x.IP)
		if a = a.Unmap(); !a.IsGlobalUnicast() || slices.Contains(r.own.inner, a) {
			continue
		}
		if err := netlink.AddrDel(link, &x); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return err
		}
	}
	return nil
}

// linkWith returns the interface that has an address.
func linkWith(a netip.Addr) (netlink.Link, error) {
	links, err := attach.Links()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(addresses, func(x netlink.Addr) bool { return x.IP.Equal(a.AsSlice()) }) {
			return l, nil
		}
	}
	return nil, fmt.Errorf("no interface has the address %s", a)
}

// removeTunnel removes the device of the tunnel. There may be none.
func removeTunnel() error {
	l, err := netlink.LinkByName(tunnelName)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}

// entry is a neighbour or a forwarding entry, as text, to be compared.
type entry struct{ mac, address string }

// entries returns what the tunnel has to know: neighbours and forwarding entries.
func (r reach) entries() (neighbours, forwarding map[entry]bool) {
	neighbours, forwarding = make(map[entry]bool), make(map[entry]bool)
	for _, n := range r.neighbours {
		mac := net.HardwareAddr(n.mac[:]).String()
		forwarding[entry{mac, n.outer.String()}] = true
		for _, a := range n.inner {
			neighbours[entry{mac, a.String()}] = true
		}
	}
	return neighbours, forwarding
}

// known returns what the tunnel knows.
func known(index int) (neighbours, forwarding map[entry]netlink.Neigh, err error) {
	neighbours, forwarding = make(map[entry]netlink.Neigh), make(map[entry]netlink.Neigh)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6, unix.AF_BRIDGE} {
		all, err := netlink.NeighList(index, family)
		if err != nil {
			return nil, nil, err
		}
		for _, n := range all {
			if n.LinkIndex != index || n.State&netlink.NUD_PERMANENT == 0 || n.IP == nil {
				continue // multicast, or learned by ARP: nobody answers there
			}
			to := neighbours
			if family == unix.AF_BRIDGE {
				to = forwarding
			}
			a, _ := netip.AddrFromSlice(n.IP)
			to[entry{n.HardwareAddr.String(), a.Unmap().String()}] = n
		}
	}
	return neighbours, forwarding, nil
}

// setNeighbours makes what the tunnel knows just what it has to.
func (r reach) setNeighbours(index int) error {
	wantNeighbours, wantForwarding := r.entries()
	neighbours, forwarding, err := known(index)
	if err != nil {
		return err
	}
	var errs []error
	for e := range wantForwarding {
		if _, ok := forwarding[e]; !ok {
			errs = append(errs, netlink.NeighSet(e.neigh(index, unix.AF_BRIDGE, netlink.NTF_SELF)))
		}
	}
	for e := range wantNeighbours {
		if _, ok := neighbours[e]; !ok {
			errs = append(errs, netlink.NeighSet(e.neigh(index, 0, 0)))
		}
	}
	for e, n := range forwarding {
		if !wantForwarding[e] {
			n.Family, n.Flags = unix.AF_BRIDGE, netlink.NTF_SELF
			errs = append(errs, netlink.NeighDel(&n))
		}
	}
	for e, n := range neighbours {
		if !wantNeighbours[e] {
			errs = append(errs, netlink.NeighDel(&n))
		}
	}
	return errors.Join(errs...)
}

func (e entry) neigh(index, family, flags int) *netlink.Neigh {
	a := netip.MustParseAddr(e.address)
	mac, _ := net.ParseMAC(e.mac) // it was one
	if family == 0 {
		if family = netlink.FAMILY_V6; a.Is4() {
			family = netlink.FAMILY_V4
		}
	}
	return &netlink.Neigh{LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT, Flags: flags, IP: a.AsSlice(), HardwareAddr: mac}
}

// setRoutes makes the routes to other hosts just these.
func (r reach) setRoutes(index int) error {
	there, err := routesToHosts()
	if err != nil {
		return err
	}
	var errs []error
	for p, h := range r.hops {
		if x, ok := there[p]; ok && leads(x, h, index) {
			delete(there, p)
			continue
		}
		route := &netlink.Route{Dst: prefixNet(p), Gw: h.via.AsSlice(), Protocol: host.RouteProtocol}
		if h.onLink {
			route.LinkIndex, route.Flags = index, int(netlink.FLAG_ONLINK)
		}
		// What somebody else has made is not replaced.
		set := netlink.RouteAdd
		if _, ours := there[p]; ours {
			set = netlink.RouteReplace
		}
		if err := set(route); err != nil {
			errs = append(errs, fmt.Errorf("the route to %s by %s: %w", p, h.via, err))
		}
		delete(there, p)
	}
	for _, x := range there {
		if err := netlink.RouteDel(&x); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func leads(x netlink.Route, h hop, index int) bool {
	return x.Gw.Equal(h.via.AsSlice()) && (!h.onLink || x.LinkIndex == index)
}

func prefixNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// routesToHosts returns the routes of ours that lead to other hosts.
func routesToHosts() (map[netip.Prefix]netlink.Route, error) {
	found := make(map[netip.Prefix]netlink.Route)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: host.RouteProtocol, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("routes cannot be listed: %w", err)
		}
		for _, x := range all {
			if x.Dst == nil || x.Gw == nil || x.Type != unix.RTN_UNICAST {
				continue
			}
			a, _ := netip.AddrFromSlice(x.Dst.IP)
			ones, _ := x.Dst.Mask.Size()
			found[netip.PrefixFrom(a.Unmap(), ones)] = x
		}
	}
	return found, nil
}

// isApplied reports whether the kernel reaches other hosts so.
func (r reach) isApplied(mtu int) bool {
	there, err := routesToHosts()
	if err != nil {
		return true // it cannot be seen now
	}
	index := 0
	if r.tunnel {
		l, err := netlink.LinkByName(tunnelName)
		if err != nil || l.Attrs().Flags&net.FlagUp == 0 || l.Attrs().MTU != mtu || l.Attrs().HardwareAddr.String() != net.HardwareAddr(r.own.mac[:]).String() {
			return false
		}
		index = l.Attrs().Index
		neighbours, forwarding, err := known(index)
		if err != nil {
			return true
		}
		wantNeighbours, wantForwarding := r.entries()
		if !sameKeys(neighbours, wantNeighbours) || !sameKeys(forwarding, wantForwarding) {
			return false
		}
	}
	if len(there) != len(r.hops) {
		return false
	}
	for p, h := range r.hops {
		if x, ok := there[p]; !ok || !leads(x, h, index) {
			return false
		}
	}
	return true
}

func sameKeys(is map[entry]netlink.Neigh, want map[entry]bool) bool {
	return len(is) == len(want) && !slices.ContainsFunc(slices.Collect(maps.Keys(is)), func(e entry) bool { return !want[e] })
}
