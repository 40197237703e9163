package socket

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// Connection is one connection through a VIP that is not over.
type Connection struct {
	Cookie      uint64 // of the socket
	Service     string // empty: the backend was removed
	VIP         netip.AddrPort
	Backend     netip.AddrPort
	Protocol    service.Protocol
	Begun       time.Time // of connect(), to a tick of the kernel
	Established bool      // always false for UDP
}

// Connections returns the connections that are in flight, from the maps under the
// pin directory.
func Connections(dir string) ([]Connection, error) {
	set, err := openCurrent(dir)
	if err != nil {
		return nil, err
	}
	defer set.close()
	in, err := inspect(set)
	if err != nil {
		return nil, err
	}
	c, err := host.NewClock()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	now, err := c.Now()
	if err != nil {
		return nil, err
	}
	wall := time.Now()
	places, err := dump[uint32, kernelSocket](set.maps[kernelMapSockets])
	if err != nil {
		return nil, fmt.Errorf("map sockets: %w", err)
	}
	more, err := dump[uint64, kernelSocket](set.maps[kernelMapSocketsMore])
	if err != nil {
		return nil, fmt.Errorf("map sockets_more: %w", err)
	}
	var all []Connection
	for _, values := range [][]kernelSocket{places.values, more.values} {
		for i := range values {
			s := &values[i]
			if s.Cookie == 0 || s.Life&uint64(kernelLifeLIFE_COUNTED) == 0 {
				continue
			}
			all = append(all, Connection{
				Cookie: s.Cookie, Service: in.serviceOf(uint32(s.Backend)), Protocol: service.Protocol(s.Protocol),
				VIP:         netip.AddrPortFrom(address(s.Vip), bigEndian(s.VipPort)),
				Backend:     netip.AddrPortFrom(address(s.Addr), bigEndian(s.Port)),
				Begun:       wall.Add(-c.Duration(uint64(uint32(now) - uint32(s.Life>>32)))),
				Established: s.Life&uint64(kernelLifeLIFE_ESTABLISHED) != 0,
			})
		}
	}
	return all, nil
}

func (in *inspection) serviceOf(backend uint32) string {
	if int(backend) >= len(in.backends) {
		return ""
	}
	if owner := in.services[in.backends[backend].Service]; owner != nil {
		return owner.name
	}
	return ""
}

// openCurrent opens the set of maps under a pin directory, to read. The error is
// ErrNothingInstalled or ErrNewer, or says what could not be opened.
func openCurrent(dir string) (*mapSet, error) {
	set, _, err := openAndTell(filepath.Join(dir, planeDir), true)
	return set, err
}
