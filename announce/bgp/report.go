package bgp

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"

	"github.com/pentad/pentad/announce"
	"github.com/pentad/pentad/announce/bfd"
)

// State is that of a session (RFC 4271, section 8.2.2).
type State string

// The states.
const (
	Idle        State = "idle"
	Connect     State = "connect"
	Active      State = "active"
	OpenSent    State = "open-sent"
	OpenConfirm State = "open-confirm"
	Established State = "established"
)

func stateOf(s bgp.FSMState) State {
	switch s {
	case bgp.BGP_FSM_CONNECT:
		return Connect
	case bgp.BGP_FSM_ACTIVE:
		return Active
	case bgp.BGP_FSM_OPENSENT:
		return OpenSent
	case bgp.BGP_FSM_OPENCONFIRM:
		return OpenConfirm
	case bgp.BGP_FSM_ESTABLISHED:
		return Established
	}
	return Idle
}

// Report is how a peer is.
type Report struct {
	Address  netip.Addr
	AS       uint32
	State    State
	Since    time.Time // established, or not
	Hold     time.Duration
	Why      string // it is not established; empty: not known
	Ups      uint64 // how often it was established
	Services []string
	Prefixes []netip.Prefix // that it is told
	Takes    map[bool]bool  // families that it takes; true: IPv4; nil: not known
	NoHop    map[bool]bool  // families for which this host has no address on its segment
	BFD      *bfd.Report    // nil: it is not watched
}

// Words says in a few words how the session is.
func (r Report) Words() string {
	if r.State == Established {
		return fmt.Sprintf("established since %s", r.Since.Format(time.DateTime))
	}
	words := fmt.Sprintf("the session is %s since %s", r.State, r.Since.Format(time.DateTime))
	if r.Since.IsZero() {
		words = "there is no session"
	}
	if r.Why != "" {
		words += ": " + r.Why
	}
	return words
}

// Problem says why the peer is not told of a VIP of which nothing is missing; empty: it
// is.
func (r Report) Problem(v announce.VIP) string {
	if len(announce.Told([]announce.VIP{v}, r.Services)) == 0 {
		return "it is told of other services only"
	}
	if r.State != Established {
		return r.Words()
	}
	if problem := r.familyProblem(v.Address.Is4()); problem != "" {
		return problem
	}
	if !r.Tells(v.Address) {
		return "it is about to be told"
	}
	return ""
}

// Tells reports whether an address is among what the peer is told, or would be.
func (r Report) Tells(a netip.Addr) bool {
	return slices.ContainsFunc(r.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// familyProblem says why the peer cannot be told of a family; empty: it can.
func (r Report) familyProblem(is4 bool) string {
	name := "IPv6"
	if is4 {
		name = "IPv4"
	}
	if r.NoHop[is4] {
		return fmt.Sprintf("this host has no %s address on its segment; give it one, or write nextHop", name)
	}
	if r.Takes != nil && !r.Takes[is4] {
		return fmt.Sprintf("it takes no %s routes from this host: activate that address family there", name)
	}
	return ""
}

// reason says in words why a session ended, as gobgp tells it; empty: it began.
func reason(why api.PeerState_DisconnectReason, message string) string {
	switch why {
	case api.PeerState_DISCONNECT_REASON_HOLD_TIMER_EXPIRED:
		return "it said nothing for the hold time"
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_RECEIVED, api.PeerState_DISCONNECT_REASON_HARD_RESET:
		return "it says: " + told(message)
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_SENT:
		return "it was told: " + told(message)
	case api.PeerState_DISCONNECT_REASON_READ_FAILED:
		return "it closed the connection"
	case api.PeerState_DISCONNECT_REASON_WRITE_FAILED:
		return "nothing can be sent to it"
	case api.PeerState_DISCONNECT_REASON_GRACEFUL_RESTART:
		return "it restarts"
	case api.PeerState_DISCONNECT_REASON_BAD_PEER_AS:
		return "it is of another autonomous system than the file says"
	}
	return ""
}

// told says in words what gobgp says of a NOTIFICATION, of which it names code and subcode.
func told(message string) string {
	_, text, _ := strings.Cut(message, " ")
	_, last, _ := strings.Cut(text, "subcode ")
	var code, subcode uint8
	_, err1 := fmt.Sscanf(text, "code %d", &code)
	_, err2 := fmt.Sscanf(last, "%d", &subcode)
	if err1 != nil || err2 != nil {
		return text
	}
	return notification(code, subcode)
}

// notification says in words what a NOTIFICATION means.
func notification(code, subcode uint8) string {
	if words, ok := notifications[[2]uint8{code, subcode}]; ok {
		return words
	}
	return bgp.NewNotificationErrorCode(code, subcode).String()
}

// notifications are the ones that configuration can mend, by code and subcode (RFC 4271,
// section 6; RFC 4486; RFC 8203; RFC 9384).
var notifications = map[[2]uint8]string{
	{2, 2}:  "the autonomous system of this host is not the one that it expects: compare announce.bgp.as with its configuration",
	{2, 3}:  "the router ID of this host is not valid to it, or is its own: write another announce.bgp.routerID",
	{2, 6}:  "the hold time is too short for it: raise holdTime",
	{4, 0}:  "it has heard nothing of this host for the hold time",
	{6, 1}:  "more VIPs are announced than it takes: raise its limit, or announce aggregates",
	{6, 2}:  "it was shut down by its administrator",
	{6, 3}:  "this host is not one of its peers any more",
	{6, 4}:  "it was reset by its administrator",
	{6, 5}:  "it does not want a session with this host: is it configured there?",
	{6, 6}:  "its configuration has changed",
	{6, 7}:  "both had opened a connection, and the other one stays",
	{6, 10}: "its BFD says that this host is gone",
}
