package flow

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
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
	case o.To.IsValid() && !isListening(o.To, q.Protocol):
		e.step("capture", "by %s", o.Capture)
		e.step("proxy", "nobody listens at %s", o.To)
		if o.Direct {
			e.conclude(Passes, "%s to %s goes where it wanted to go: it would be captured by %s, whose proxy does not listen at %s (onProxyDown: direct).", first(whose), dest, o.Capture, o.To)
			return
		}
		e.conclude(Refused, "%s to %s is captured by %s, whose proxy does not listen at %s: it is refused. Is the agent, or that program, running?", first(whose), dest, o.Capture, o.To)
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

// isListening reports whether a socket of this network namespace takes what is led to an
// address. What cannot be seen is taken for there.
func isListening(at netip.AddrPort, p service.Protocol) bool {
	const listening, unconnected = "0A", "07" // enum of include/net/tcp_states.h
	file, state := "/proc/self/net/tcp", listening
	if p == service.UDP {
		file, state = "/proc/self/net/udp", unconnected
	}
	families := []string{file + "6"} // one of IPv6 may take IPv4, too
	if at.Addr().Is4() {
		families = append(families, file)
	}
	seen := false
	for _, name := range families {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		seen = true
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			// "sl local_address rem_address st ...", addresses in words of this machine, see
			// proc_pid_net(5).
			fields := strings.Fields(lines.Text())
			if len(fields) < 4 || fields[3] != state {
				continue
			}
			address, port, _ := strings.Cut(fields[1], ":")
			if n, err := strconv.ParseUint(port, 16, 16); err == nil && uint16(n) == at.Port() && isAt(address, at.Addr()) {
				f.Close()
				return true
			}
		}
		f.Close()
	}
	return !seen
}

// isAt reports whether a socket with an address in hexadecimal takes what is for another.
func isAt(text string, a netip.Addr) bool {
	if strings.Trim(text, "0") == "" || a.IsUnspecified() {
		return true
	}
	b, err := hex.DecodeString(text)
	if err != nil || len(b)%4 != 0 {
		return false
	}
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], binary.NativeEndian.Uint32(b[i:]))
	}
	have, ok := netip.AddrFromSlice(b)
	return ok && have.Unmap() == a
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
		real, err1 := strconv.ParseUint(fields[1], 10, 32)
		files, err2 := strconv.ParseUint(fields[4], 10, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		switch fields[0] {
		case "Uid:":
			c.RealUser, c.User = uint32(real), uint32(files)
		case "Gid:":
			c.RealGroup, c.Group = uint32(real), uint32(files)
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
