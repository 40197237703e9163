package l2

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// membership has the card of an interface take frames to a multicast address, for as long
// as the socket is open (packet(7)).
func membership(c syscall.RawConn, index uint32, group net.HardwareAddr) error {
	m := &unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_MULTICAST, Alen: uint16(len(group))}
	copy(m.Address[:], group)
	var err error
	if ctl := c.Control(func(fd uintptr) {
		err = unix.SetsockoptPacketMreq(int(fd), unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, m)
	}); ctl != nil {
		return ctl
	}
	if err != nil {
		return fmt.Errorf("multicast: %w", err)
	}
	return nil
}

// Questions for an IPv6 address go to a multicast group that belongs to it. The kernel
// joins it, and tells switches, for each proxied neighbour; whether it would answer by
// itself (proxy_ndp) does not matter, because the program is before it. Unlike a socket's, that membership does not end with the agent.

// joinGroup has an interface take questions for a VIP.
func joinGroup(index uint32, vip netip.Addr) error {
	if vip.Is4() {
		return nil
	}
	if err := netlink.NeighSet(proxied(index, vip)); err != nil {
		return fmt.Errorf("the multicast group of %s: %w", vip, err)
	}
	return nil
}

// leaveGroup undoes joinGroup. The interface may be gone.
func leaveGroup(index uint32, vip netip.Addr) error {
	if vip.Is4() {
		return nil
	}
	err := netlink.NeighDel(proxied(index, vip))
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return nil
	}
	return fmt.Errorf("the multicast group of %s: %w", vip, err)
}

func proxied(index uint32, vip netip.Addr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: int(index), Family: netlink.FAMILY_V6, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_PROXY, IP: vip.AsSlice()}
}

// areJoined reports whether an interface takes questions for all VIPs. An interface that
// goes down forgets.
func areJoined(index uint32, vips map[netip.Addr]bool) bool {
	all, err := netlink.NeighProxyList(int(index), netlink.FAMILY_V6)
	if err != nil {
		return true // it cannot be seen now
	}
	there := make(map[netip.Addr]bool, len(all))
	for _, n := range all {
		if a, ok := netip.AddrFromSlice(n.IP); ok {
			there[a] = true
		}
	}
	for vip := range vips {
		if vip.Is6() && !there[vip] {
			return false
		}
	}
	return true
}
