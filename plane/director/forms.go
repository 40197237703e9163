package director

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/service"
)

// The forms that addresses and listeners have in maps: IPv4 as ::ffff:a.b.c.d, all in
// network order.

func kernelAddressOf(a netip.Addr) (k kernelAddress) {
	b := a.As16()
	for i := range k.Word {
		k.Word[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return k
}

func addressOf(k kernelAddress) netip.Addr {
	var b [16]byte
	for i, w := range k.Word {
		binary.LittleEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

func vipKeyOf(l service.Listener) kernelVipKey {
	k := kernelVipKey{Addr: kernelAddressOf(l.Address.Addr()), Port: bits.ReverseBytes16(l.Address.Port()), Protocol: unix.IPPROTO_TCP}
	if l.Protocol == service.UDP {
		k.Protocol = unix.IPPROTO_UDP
	}
	return k
}

func listenerOf(k kernelVipKey) service.Listener {
	l := service.Listener{Address: netip.AddrPortFrom(addressOf(k.Addr), bits.ReverseBytes16(k.Port)), Protocol: service.TCP}
	if k.Protocol == unix.IPPROTO_UDP {
		l.Protocol = service.UDP
	}
	return l
}
