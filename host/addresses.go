package host

import (
	"net"
	"net/netip"
)

// Addresses returns the addresses of all interfaces in the network namespace of this
// process.
func Addresses() (map[netip.Addr]bool, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	all := make(map[netip.Addr]bool, len(addresses))
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok {
			ip, _ := netip.AddrFromSlice(n.IP)
			all[ip.Unmap()] = true
		}
	}
	return all, nil
}
