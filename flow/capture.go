package flow

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/capture"
	"github.com/pentad/pentad/service"
)

// AddCapture goes on where no service has the destination: is the connection led to a
// proxy that the process does not know of?
func (e *Explanation) AddCapture(v *capture.View, q Question) error {
	if !v.Installed() || q.Protocol != service.TCP || e.Verdict != NoService && e.Verdict != OutOfScope {
		return nil
	}
	if q.PID == 0 {
		e.step("capture", "which processes are captured depends on who they are: name one with --pid")
		return nil
	}
	own, err1 := os.Readlink("/proc/self/ns/net")
	its, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", q.PID))
	if err1 == nil && err2 == nil && own != its {
		e.step("capture", "by none: the process is in another network namespace, of which those who capture here see nothing")
		return nil
	}
	c, err := connectionOf(q)
	if err != nil {
		return err
	}
	e.captured(v.Walk(c), q, fmt.Sprintf("process %d", q.PID))
	return nil
}

// AddCapturedPackets is AddCapture for packets that arrive from an address.
func (e *Explanation) AddCapturedPackets(v *capture.View, from netip.Addr, q Question) {
	if !v.Installed() || e.Verdict == Reaches || e.Verdict == Refused {
		return
	}
	c := capture.Connection{Destination: q.Destination, UDP: q.Protocol == service.UDP, Interface: interfaceTo(from), Local: isLocal(q.Destination.Addr())}
	if c.Interface == "" {
		e.step("capture", "there is no way to %s, so that it is not known at which interface its packets arrive", from)
		return
	}
	e.step("interface", "%s, if packets from %s come the way that packets to it go", c.Interface, from)
	e.captured(v.Walk(c), q, "packets from "+from.String())
}

func (e *Explanation) captured(o capture.Outcome, q Question, whose string) {
	dest := service.Listener{Address: q.Destination, Protocol: q.Protocol}
	switch {
	case o.Capture == "":
		e.step("capture", "by none: %s", o.Why)
	case o.Handed:
		e.step("capture", "by %s", o.Capture)
		e.conclude(Captured, "%s to %s is captured by %s and handed to %s as it is: the socket of the proxy has the address where it wanted to go.", first(whose), dest, o.Capture, o.To)
	case o.Redir:
		e.step("capture", "by %s", o.Capture)
		e.conclude(Captured, "%s to %s is captured by %s and led to port %d of this host, where the proxy is told where it wanted to go.",
			first(whose), dest, o.Capture, o.To.Port())
	case o.To.IsValid():
		e.step("capture", "by %s", o.Capture)
		without := ""
		if o.Direct {
			without = " While nobody listens there it goes where it wanted to go."
		}
		e.conclude(Captured, "%s to %s is captured by %s and led to %s, where the proxy is told where it wanted to go.%s", first(whose), dest, o.Capture, o.To, without)
	default:
		e.step("capture", "by %s", o.Capture)
		e.conclude(Refused, "%s to %s is captured by %s, whose proxy listens at no address of that family: it is refused. Add one to its listen.",
			first(whose), dest, o.Capture)
	}
}

// first begins a sentence.
func first(text string) string { return "A connection of " + text }

// connectionOf is what the kernel knows of a connection that a process begins.
func connectionOf(q Question) (capture.Connection, error) {
	c := capture.Connection{Destination: q.Destination}
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", q.PID))
	if err != nil {
		return c, fmt.Errorf("process %d: %w", q.PID, ErrNoProcess)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// "Uid:" is followed by the real, the effective, the saved and that of the file
		// system: a socket has the last (proc_pid_status(5)).
		fields := strings.Fields(lines.Text())
		if len(fields) != 5 {
			continue
		}
		n, err := strconv.ParseUint(fields[4], 10, 32)
		if err != nil {
			continue
		}
		switch fields[0] {
		case "Uid:":
			c.User = uint32(n)
		case "Gid:":
			c.Group = uint32(n)
		}
	}
	root, err := host.CgroupRoot()
	if err != nil {
		return c, err
	}
	cgroup, err := cgroupOf(q.PID)
	if err != nil {
		return c, err
	}
	at := root
	for name := range strings.SplitSeq(strings.Trim(cgroup, "/"), "/") {
		at = filepath.Join(at, name)
		if id, err := host.CgroupID(at); err == nil && name != "" {
			c.Cgroups = append(c.Cgroups, id)
		}
	}
	return c, nil
}

// interfaceTo returns by which interface packets go to an address; empty: by none.
func interfaceTo(a netip.Addr) string {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return ""
	}
	l, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return ""
	}
	return l.Attrs().Name
}

func isLocal(a netip.Addr) bool {
	routes, err := netlink.RouteGet(a.AsSlice())
	return a.IsMulticast() || err == nil && len(routes) > 0 && (routes[0].Type == unix.RTN_LOCAL || routes[0].Type == unix.RTN_BROADCAST || routes[0].Type == unix.RTN_ANYCAST)
}
