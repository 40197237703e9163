package flow

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// way looks whether the connection can get from the process, or from this host, to the
// backends that take it: the best choice is worth nothing without a route.
func (e *Explanation) way(v *socket.View, q Question) {
	var fine, lost []string
	chained := ""
	for _, b := range e.Backends {
		if !b.Takes {
			continue
		}
		to := netip.MustParseAddrPort(b.Address)
		problem, local, err := route(q.PID, to.Addr())
		if other := find(v, service.Listener{Address: to, Protocol: q.Protocol}); other != nil && !local {
			e.step("chain", "%s is itself a listener, of the service %s; what is translated once is not translated again", to, other.Name)
			chained = fmt.Sprintf("%s, which is itself a virtual address, of the service %s, and is not translated again: no server has it; name the servers themselves as backends",
				to, other.Name)
		}
		switch {
		case err != nil:
			e.step("route", "to %s: not known: %v", to.Addr(), err)
			fine = append(fine, b.Address)
		case problem != "":
			e.step("route", "to %s: %s", to.Addr(), problem)
			lost = append(lost, fmt.Sprintf("%s (%s)", to.Addr(), problem))
		default:
			fine = append(fine, b.Address)
		}
	}
	whose := "this host has"
	if q.PID != 0 {
		whose = fmt.Sprintf("process %d, in its network namespace, has", q.PID)
	}
	switch {
	case chained != "" && len(fine)+len(lost) == 1:
		e.conclude(Chained, "connect() to %s goes to %s.", e.Destination, chained)
	case len(fine) == 0 && len(lost) > 0:
		e.conclude(NoRoute, "connect() to %s fails, because %s no way to any backend: %s; add a route or an address there.", e.Destination, whose, strings.Join(lost, ", "))
	case len(lost) > 0:
		e.Conclusion = strings.TrimSuffix(e.Conclusion, ".") + fmt.Sprintf("; but %s no way to %s.", whose, strings.Join(lost, ", "))
	}
}

// route asks the kernel for the way to an address from the network namespace of a
// process, 0 for this one. problem says why there is none. local says that the address
// is one of the namespace itself.
func route(pid int, to netip.Addr) (problem string, local bool, err error) {
	if to.Is6() && to.IsLinkLocalUnicast() {
		return "a link-local address without a zone cannot be connected to", false, nil
	}
	if pid != 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		back, err := enter(pid)
		if err != nil {
			return "", false, err
		}
		defer back()
	}
	routes, err := netlink.RouteGet(to.AsSlice())
	switch {
	case errors.Is(err, unix.ENETUNREACH):
		return "network is unreachable: there is no route", false, nil
	case errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EINVAL):
		return fmt.Sprintf("%v: a route says so", err), false, nil
	case err != nil:
		return "", false, err
	}
	for _, r := range routes {
		local = local || r.Type == unix.RTN_LOCAL
	}
	return "", local, nil
}

// enter has the calling thread, which is locked, belong to the network namespace of a
// process, until back is called.
func enter(pid int) (back func(), err error) {
	own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	other, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(own)
		return nil, err
	}
	defer unix.Close(other)
	if err := unix.Setns(other, unix.CLONE_NEWNET); err != nil {
		unix.Close(own)
		return nil, err
	}
	return func() {
		defer unix.Close(own)
		if unix.Setns(own, unix.CLONE_NEWNET) != nil {
			// The thread must not be used for anything else: it ends with its goroutine.
			runtime.LockOSThread()
		}
	}, nil
}
