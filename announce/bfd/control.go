package bfd

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// arrivalOf returns the time to live with which a packet arrived, and the number of the
// interface, as its control messages have them; -1 and 0: they do not say.
func arrivalOf(control []byte) (ttl int, index uint32) {
	ttl = -1
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return ttl, 0
	}
	for _, m := range messages {
		level, kind := m.Header.Level, m.Header.Type
		switch {
		case len(m.Data) < 4:
		case level == unix.IPPROTO_IP && kind == unix.IP_TTL, level == unix.IPPROTO_IPV6 && kind == unix.IPV6_HOPLIMIT:
			ttl = int(int32(binary.NativeEndian.Uint32(m.Data)))
		case level == unix.IPPROTO_IP && kind == unix.IP_PKTINFO: // struct in_pktinfo
			index = binary.NativeEndian.Uint32(m.Data)
		case level == unix.IPPROTO_IPV6 && kind == unix.IPV6_PKTINFO && len(m.Data) >= 20: // struct in6_pktinfo
			index = binary.NativeEndian.Uint32(m.Data[16:])
		}
	}
	return ttl, index
}

// interfaceTo returns the number of the interface by which a neighbour is reached.
func interfaceTo(a netip.Addr) (uint32, error) {
	if a.Zone() != "" {
		if id := zoneID(a.Zone()); id != 0 {
			return id, nil
		}
		return 0, fmt.Errorf("there is no interface %s", a.Zone())
	}
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return 0, fmt.Errorf("there is no way to %s", a)
	}
	return uint32(routes[0].LinkIndex), nil
}

// addressOf returns the address of a sender; that of one of the same link has its zone.
func addressOf(s unix.Sockaddr) netip.Addr {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(s.Addr)
	case *unix.SockaddrInet6:
		a := netip.AddrFrom16(s.Addr)
		if s.ZoneId != 0 && a.IsLinkLocalUnicast() {
			return a.WithZone(zoneName(s.ZoneId))
		}
		return a
	}
	return netip.Addr{}
}

func zoneName(id uint32) string {
	if i, err := net.InterfaceByIndex(int(id)); err == nil {
		return i.Name
	}
	return strconv.FormatUint(uint64(id), 10)
}

// zoneID returns the index of an interface; 0: there is none of that name.
func zoneID(name string) uint32 {
	if name == "" {
		return 0
	}
	if i, err := net.InterfaceByName(name); err == nil {
		return uint32(i.Index)
	}
	n, _ := strconv.ParseUint(name, 10, 32)
	return uint32(n)
}
