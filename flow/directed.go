package flow

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/plane/director"
	"github.com/pentad/pentad/service"
)

// ExplainDirected walks the way of packets from an address to a VIP that a director
// sends on.
func ExplainDirected(v *director.View, x director.VIP, from netip.Addr, q Question) *Explanation {
	dest := service.Listener{Address: q.Destination, Protocol: q.Protocol}
	e := &Explanation{Destination: dest.String(), Service: x.Service}
	e.step("client", "%s", from)
	if from.Is4() != dest.Address.Addr().Is4() {
		return e.conclude(NoRoute, "%s cannot reach %s, because one is IPv4 and the other IPv6.", from, dest)
	}
	e.step("listener", "%s belongs to the service %s (forward: direct)", dest, x.Service)
	if at := interfaceTo(from); at != "" && !slices.Contains(v.Interfaces, at) {
		e.step("director", "at %s", orNone(v.Interfaces))
		return e.conclude(Passes, "Packets from %s to %s are not directed if they arrive at %s, by which it is reached: the director is at %s. Add the interface to director.interfaces.",
			from, dest, at, orNone(v.Interfaces))
	}
	e.step("director", "at %s", orNone(v.Interfaces))
	var takes []string
	unreachable := 0
	for _, r := range x.Reals {
		e.step("real server", "%s", describeReal(r))
		if r.Slots > 0 && !r.Local && r.Interface == "" {
			unreachable++
		} else if r.Slots > 0 {
			takes = append(takes, fmt.Sprintf("%s (%.0f%%)", r.Address, 100*float64(r.Slots)/director.Slots))
		}
	}
	if x.Changing {
		e.step("table", "it has changed: what was there before goes where it went")
	}
	if unreachable > 0 {
		e.step("dropped", "what goes to %d real servers that are on no segment of this host", unreachable)
	}
	if len(takes) == 0 && unreachable > 0 {
		return e.conclude(Dropped, "Packets from %s to %s are dropped, because no real server of the service %s is on a segment of this host.", from, dest, x.Service)
	}
	if len(takes) == 0 {
		return e.conclude(Dropped, "Packets from %s to %s are dropped, because no real server of the service %s is usable.", from, dest, x.Service)
	}
	to, by := strings.Join(takes, ", "), "by the hash of addresses and ports"
	if a, ok := x.Chosen(from); ok {
		to, by = a.String(), "by the hash of the client's address"
	}
	return e.conclude(Reaches, "Packets from %s to %s go on as they are, %s, to %s, which has to have the address %s and answers the client by itself.", from, dest, by, to, dest.Address.Addr())
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "no interface"
	}
	return strings.Join(names, ", ")
}

func describeReal(r director.Real) string {
	where := "there is no way to it on a segment of this host"
	switch {
	case r.Local:
		where = "this host"
	case r.Interface != "":
		where = "at " + r.Interface
	}
	state := fmt.Sprintf("%.1f%% of the table", 100*float64(r.Slots)/director.Slots)
	switch {
	case r.Down:
		state = "down, or not wanted any more"
	case r.Drains:
		state = "drains: it keeps what it has"
	case r.Slots == 0:
		state = "takes nothing new: another group serves"
	}
	return fmt.Sprintf("%s, %s, %s", r.Address, where, state)
}
