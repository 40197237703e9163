// Package flow tells people what connections do: it puts the events of the
// kernel together to flows, finds the processes behind connections, and explains
// what the kernel would decide.
//
// It only reads. Nothing that a connection needs may depend on it, and it works
// with the agent dead.
package flow

import (
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Flow is one connection, as far as it is known.
type Flow struct {
	Event    string // what happened last: an event of package socket, or "open"
	Time     time.Time
	Cookie   uint64 // of the socket; 0 when none was translated
	PID      int    // 0: not known
	Command  string
	Cgroup   string         // of the process; empty: not known
	Client   netip.AddrPort // the socket's own address; not valid: not known
	UID      uint32         // of the socket, if HasOwner
	HasOwner bool
	Service  string // empty: gone since
	VIP      netip.AddrPort
	Backend  netip.AddrPort // not valid when there was none
	Protocol service.Protocol
	Outcome  string        // in words
	RTT      time.Duration // of the handshake, later smoothed; 0: not known
	Duration time.Duration // since connect()
	HasBytes bool          // Sent and Received are known
	Sent     uint64        // bytes, of TCP
	Received uint64
}

// Tracker puts events together. It remembers connections from their first event
// to their last.
type Tracker struct {
	// Agent is the process of the agent, 0 when there is none: a connection that is
	// closed while it runs is closed by it, and not by the process that has it.
	Agent int
	// Whose has the cgroup and the user of processes looked up when they connect.
	Whose bool

	open map[uint64]begun
}

// begun is what later events of a connection do not know.
type begun struct {
	pid     int
	command string
	cgroup  string
	uid     uint32
	owned   bool // uid is known
	time    time.Time
	rtt     time.Duration
}

// maxOpen bounds what a Tracker remembers; beyond it flows lack their process.
const maxOpen = 1 << 18

// NewTracker returns a tracker that knows no connection.
func NewTracker() *Tracker { return &Tracker{open: make(map[uint64]begun)} }

// Note takes an event and returns the flow that it belongs to.
func (t *Tracker) Note(e socket.Event) Flow {
	f := Flow{
		Event: e.Kind.String(), Time: e.Time, Cookie: e.Cookie, PID: e.PID, Command: e.Command, Service: e.Service,
		VIP: e.VIP, Backend: e.Backend, Protocol: e.Protocol, RTT: e.RTT, Duration: e.Duration, Sent: e.Sent, Received: e.Received,
	}
	f.HasBytes = e.Kind == socket.Closed && e.Protocol == service.TCP
	f.Outcome = outcome(e)
	if e.Kind == socket.Closed && e.PID != 0 && e.PID == t.Agent {
		f.PID, f.Command, f.Outcome = 0, "", "reset by pentad: the backend is down, drained or gone"
	}
	switch e.Kind {
	case socket.Connect:
		b := begun{pid: e.PID, command: e.Command, time: e.Time}
		if t.Whose {
			b.look()
		}
		f.Cgroup, f.UID, f.HasOwner = b.cgroup, b.uid, b.owned
		if len(t.open) < maxOpen {
			t.open[e.Cookie] = b
		}
	case socket.Established:
		if b, ok := t.open[e.Cookie]; ok {
			b.rtt = e.RTT
			t.open[e.Cookie] = b
		}
		t.fill(&f)
	case socket.Failed, socket.Closed:
		t.fill(&f)
		delete(t.open, e.Cookie)
	}
	return f
}

// look finds out whose a process is. It may have ended.
func (b *begun) look() {
	if b.pid == 0 {
		return
	}
	b.cgroup, _ = cgroupOf(b.pid)
	var st unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d", b.pid), &st) == nil {
		b.uid, b.owned = st.Uid, true
	}
}

// fill adds what earlier events of the connection told.
func (t *Tracker) fill(f *Flow) {
	b, ok := t.open[f.Cookie]
	if !ok {
		return
	}
	// Who connected says more than who closed.
	f.PID, f.Command, f.Cgroup, f.UID, f.HasOwner = b.pid, b.command, b.cgroup, b.uid, b.owned
	f.Duration = f.Time.Sub(b.time)
	if f.RTT == 0 {
		f.RTT = b.rtt
	}
}

// outcome says in words what an event means.
func outcome(e socket.Event) string {
	switch e.Kind {
	case socket.Connect:
		return "goes to the backend"
	case socket.Refused:
		return "refused: no backend is usable"
	case socket.Established:
		return "established"
	case socket.Failed:
		return "failed: " + reason(e)
	case socket.Closed:
		return "closed"
	case socket.Ejected:
		return "the backend is ejected"
	case socket.Readmitted:
		return "the backend is used again"
	}
	return ""
}

func reason(e socket.Event) string {
	switch e.Error {
	case 0:
		return "for an unknown reason"
	case syscall.ETIMEDOUT:
		return "no answer in time"
	}
	return e.Error.Error()
}
