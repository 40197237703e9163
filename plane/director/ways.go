package director

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// waysTo finds out by which interface each real server is reached. It has to be on a
// segment of this host: a router would send the packet, which is for the VIP, back here.
func waysTo(reals []netip.Addr) map[netip.Addr]way {
	all := make(map[netip.Addr]way, len(reals))
	for _, a := range reals {
		all[a] = wayTo(a)
	}
	return all
}

func wayTo(a netip.Addr) way {
	routes, err := netlink.RouteGet(a.AsSlice())
	switch {
	case err != nil || len(routes) == 0:
		return way{why: "there is no route to it"}
	case routes[0].Type == unix.RTN_LOCAL:
		return way{local: true}
	case routes[0].Type != unix.RTN_UNICAST:
		return way{why: "there is no route to it"}
	case routes[0].Gw != nil || routes[0].Via != nil:
		return way{why: fmt.Sprintf("it is behind the router %s, and has to be on a segment of this host", routes[0].Gw)}
	}
	return way{ifindex: routes[0].LinkIndex}
}
