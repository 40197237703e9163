package socket

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
)

// Kernels before 6.5 have no bpf_sock_destroy. There the sockets to close are
// found in the maps, and closed through sock_diag(7), which needs a kernel with
// CONFIG_INET_DIAG_DESTROY.

// sockDestroy is SOCK_DESTROY of linux/sock_diag.h.
const sockDestroy = 21

// doomed returns the sockets to close by their cookies, and the backends that they
// must be connected to.
func (s *mapSet) doomed(resets map[uint32]uint8) (map[uint64][]netip.AddrPort, error) {
	backends, err := dump[uint32, kernelBackend](s.maps[kernelMapBackends])
	if err != nil {
		return nil, fmt.Errorf("map backends: %w", err)
	}
	places, err := dump[uint32, kernelSocket](s.maps[kernelMapSockets])
	if err != nil {
		return nil, fmt.Errorf("map sockets: %w", err)
	}
	more, err := dump[uint64, kernelSocket](s.maps[kernelMapSocketsMore])
	if err != nil {
		return nil, fmt.Errorf("map sockets_more: %w", err)
	}
	found := make(map[uint64][]netip.AddrPort)
	for _, values := range [][]kernelSocket{places.values, more.values} {
		for i := range values {
			v := &values[i]
			index, generation := uint32(v.Backend), uint32(v.Backend>>32)
			if v.Cookie == 0 || resets[index] == 0 {
				continue
			}
			if backends.values[index].Reset == uint8(kernelResetScopeRESET_UDP) && v.Protocol != unix.IPPROTO_UDP {
				continue
			}
			// The generation grows by one when a backend is removed.
			if backends.values[index].Generation-generation <= 1 {
				found[v.Cookie] = append(found[v.Cookie], netip.AddrPortFrom(address(v.Addr), bigEndian(v.Port)))
			}
		}
	}
	return found, nil
}

// destroy closes the sockets with these cookies in every network namespace, and
// returns how many it closed.
func destroy(ctx context.Context, cookies map[uint64][]netip.AddrPort) (int, error) {
	n := 0
	err := host.InNamespaces(ctx, func() error {
		var errs []error
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			tcp, err := netlink.SocketDiagTCP(family)
			errs = append(errs, err)
			udp, err := netlink.SocketDiagUDP(family)
			errs = append(errs, err)
			for i, s := range append(tcp, udp...) {
				cookie := uint64(s.ID.Cookie[1])<<32 | uint64(s.ID.Cookie[0])
				to, _ := netip.AddrFromSlice(s.ID.Destination)
				if !slices.Contains(cookies[cookie], netip.AddrPortFrom(to.Unmap(), s.ID.DestinationPort)) {
					continue
				}
				protocol := uint8(unix.IPPROTO_TCP)
				if i >= len(tcp) {
					protocol = unix.IPPROTO_UDP
				}
				err := destroyOne(s, protocol)
				if err == nil {
					n++
				} else if !errors.Is(err, unix.ENOENT) {
					errs = append(errs, fmt.Errorf("closing a socket: %w", err))
				}
			}
		}
		return errors.Join(errs...)
	})
	return n, err
}

// diagRequest is struct inet_diag_req_v2 of linux/inet_diag.h.
type diagRequest [56]byte

// Len and Serialize implement nl.NetlinkRequestData.
func (d *diagRequest) Len() int { return len(d) }

// Serialize returns the bytes.
func (d *diagRequest) Serialize() []byte { return d[:] }

func destroyOne(s *netlink.Socket, protocol uint8) error {
	var d diagRequest
	d[0], d[1] = s.Family, protocol
	binary.NativeEndian.PutUint32(d[4:], 0xffffffff) // in every state
	binary.BigEndian.PutUint16(d[8:], s.ID.SourcePort)
	binary.BigEndian.PutUint16(d[10:], s.ID.DestinationPort)
	source, destination := s.ID.Source.To16(), s.ID.Destination.To16()
	if s.Family == unix.AF_INET {
		source, destination = s.ID.Source.To4(), s.ID.Destination.To4()
	}
	copy(d[12:28], source)
	copy(d[28:44], destination)
	binary.NativeEndian.PutUint32(d[44:], s.ID.Interface)
	binary.NativeEndian.PutUint32(d[48:], s.ID.Cookie[0])
	binary.NativeEndian.PutUint32(d[52:], s.ID.Cookie[1])
	r := nl.NewNetlinkRequest(sockDestroy, unix.NLM_F_ACK)
	r.AddData(&d)
	_, err := r.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}
