// Package bfd notices within a fraction of a second that the way to a neighbour is dead:
// Bidirectional Forwarding Detection, RFC 5880, in asynchronous mode over a single hop as
// RFC 5881 has it. There is no authentication, no echo and no demand mode of our own.
//
// Session is the state machine and reads no clock; Speaker is its edge to the network.
// What is concluded from the state of a session is the business of who asked for it.
package bfd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// State is that of a session (RFC 5880, section 4.1).
type State uint8

// The states, by their numbers in packets.
const (
	AdminDown State = iota
	Down
	Init
	Up
)

// String returns the state in lower case.
func (s State) String() string {
	if int(s) < len(states) {
		return states[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

var states = []string{"admin down", "down", "init", "up"}

// Diagnostic is why a session left the state up last (RFC 5880, section 4.1).
type Diagnostic uint8

// The diagnostics that are sent from here.
const (
	NoDiagnostic    Diagnostic = 0
	Expired         Diagnostic = 1 // nothing was heard for the detection time
	NeighborDown    Diagnostic = 3 // the neighbour says that its session is down
	AdministratedIt Diagnostic = 7 // it was taken down on purpose
)

var diagnostics = []string{
	"no diagnostic", "nothing was heard from it for the detection time", "its echo function failed", "it says that its session is down",
	"its forwarding plane was reset", "its path is down", "a concatenated path of it is down", "it was taken down on purpose", "a reverse concatenated path of it is down",
}

// String says what the diagnostic means.
func (d Diagnostic) String() string {
	if int(d) < len(diagnostics) {
		return diagnostics[d]
	}
	return fmt.Sprintf("diagnostic %d", uint8(d))
}

// Packet is a control packet (RFC 5880, section 4.1).
type Packet struct {
	Diagnostic  Diagnostic
	State       State
	Poll, Final bool
	Independent bool  // the sender's forwarding goes on without its control plane
	Demand      bool  // the sender wants nothing more once both are up
	Multiplier  uint8 // of intervals without a packet after which the sender counts as dead
	Mine, Yours uint32

	// What the sender can do, in whole microseconds.
	DesiredTx  time.Duration // as often it would like to send
	RequiredRx time.Duration // as often it can take packets; 0: it wants none
	EchoRx     time.Duration // the same for echo packets; 0: it has no echo function
}

const (
	version    = 1
	packetSize = 24
)

// Bits of the second byte of a packet.
const (
	bitPoll        = 1 << 5
	bitFinal       = 1 << 4
	bitIndependent = 1 << 3
	bitAuth        = 1 << 2
	bitDemand      = 1 << 1
	bitMultipoint  = 1 << 0
)

// ErrMalformed says that a packet is none, or none that RFC 5880, section 6.8.6, lets
// anybody believe.
var ErrMalformed = errors.New("no valid BFD packet")

// Parse reads a packet. The error is ErrMalformed with the reason.
func Parse(b []byte) (Packet, error) {
	if len(b) < packetSize {
		return Packet{}, fmt.Errorf("%w: it has %d bytes", ErrMalformed, len(b))
	}
	bits := b[1]
	p := Packet{
		Diagnostic: Diagnostic(b[0] & 0x1f), State: State(bits >> 6),
		Poll: bits&bitPoll != 0, Final: bits&bitFinal != 0, Independent: bits&bitIndependent != 0, Demand: bits&bitDemand != 0,
		Multiplier: b[2], Mine: binary.BigEndian.Uint32(b[4:]), Yours: binary.BigEndian.Uint32(b[8:]),
		DesiredTx: microseconds(b[12:]), RequiredRx: microseconds(b[16:]), EchoRx: microseconds(b[20:]),
	}
	switch length := int(b[3]); {
	case b[0]>>5 != version:
		return p, fmt.Errorf("%w: its version is %d", ErrMalformed, b[0]>>5)
	case length < packetSize || length > len(b):
		return p, fmt.Errorf("%w: its length is given as %d of %d bytes", ErrMalformed, length, len(b))
	case bits&bitAuth != 0:
		return p, fmt.Errorf("%w: it is authenticated, and no key is known", ErrMalformed)
	case bits&bitMultipoint != 0:
		return p, fmt.Errorf("%w: it is of a multipoint session", ErrMalformed)
	case p.Multiplier == 0:
		return p, fmt.Errorf("%w: its multiplier is 0", ErrMalformed)
	case p.Mine == 0:
		return p, fmt.Errorf("%w: its sender has no discriminator", ErrMalformed)
	case p.Yours == 0 && p.State != Down && p.State != AdminDown:
		return p, fmt.Errorf("%w: it is for no session, in the state %s", ErrMalformed, p.State)
	case p.Poll && p.Final:
		return p, fmt.Errorf("%w: it asks and answers at once", ErrMalformed)
	}
	return p, nil
}

// Append writes a packet behind b.
func (p Packet) Append(b []byte) []byte {
	bits := byte(p.State) << 6
	for _, x := range []struct {
		is  bool
		bit byte
	}{{p.Poll, bitPoll}, {p.Final, bitFinal}, {p.Independent, bitIndependent}, {p.Demand, bitDemand}} {
		if x.is {
			bits |= x.bit
		}
	}
	b = append(b, version<<5|byte(p.Diagnostic)&0x1f, bits, p.Multiplier, packetSize)
	for _, v := range []uint32{p.Mine, p.Yours, inMicroseconds(p.DesiredTx), inMicroseconds(p.RequiredRx), inMicroseconds(p.EchoRx)} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func microseconds(b []byte) time.Duration {
	return time.Duration(binary.BigEndian.Uint32(b)) * time.Microsecond
}

func inMicroseconds(d time.Duration) uint32 { return uint32(d / time.Microsecond) }
