package socks5

import (
	"bytes"
	"fmt"
	"time"
)

// MaxHeader is the most that stands before the content of a datagram, in bytes.
const MaxHeader = 3 + maxAddress

// Datagram is one datagram between a client and the server's relay (RFC 1928, section 7).
type Datagram struct {
	Fragment byte // 0: it is whole; else its number, with the highest bit at the last
	Address  Address
	Content  []byte
}

// Clone returns a datagram that shares no memory with the one that was received.
func (d Datagram) Clone() Datagram {
	d.Content = bytes.Clone(d.Content)
	return d
}

// ParseDatagram reads what a relay got. The content is part of b.
func ParseDatagram(b []byte) (Datagram, error) {
	if len(b) < 3 || b[0] != 0 || b[1] != 0 {
		return Datagram{}, fmt.Errorf("%w: a datagram without a header", ErrMalformed)
	}
	r := bytes.NewReader(b[3:])
	to, err := readAddress(r)
	if err != nil {
		return Datagram{}, err
	}
	return Datagram{b[2], to, b[len(b)-r.Len():]}, nil
}

// AppendHeader writes what stands before the content of a datagram that is whole.
func AppendHeader(b []byte, a Address) []byte { return appendAddress(append(b, 0, 0, 0), a) }

// Bounds of reassembly (RFC 1928, section 7: a timer of no less than 5 seconds).
const (
	fragmentsWait = 5 * time.Second
	maxDatagram   = 65507 // what a datagram over IPv4 can hold
)

// Fragments puts the fragments of one sender together. It keeps one datagram at a time, as
// the RFC has it.
type Fragments struct {
	to      Address
	last    byte // the highest number that was taken; 0: there is none
	content []byte
	began   time.Time
}

const isLast = 0x80

// Add takes a datagram that has come at a time, and returns one that is whole, if there
// is one now. What does not follow the fragment before it is dropped with what there was.
func (f *Fragments) Add(d Datagram, now time.Time) (whole Datagram, ok bool) {
	if d.Fragment == 0 {
		*f = Fragments{} // "to be re-initialized and the associated fragments abandoned"
		return d, true
	}
	number := d.Fragment &^ isLast
	if f.last != 0 && (now.Sub(f.began) >= fragmentsWait || number <= f.last) {
		*f = Fragments{}
	}
	if number != f.last+1 || f.last != 0 && d.Address != f.to || len(f.content)+len(d.Content) > maxDatagram {
		*f = Fragments{}
		return Datagram{}, false
	}
	if number == 1 {
		f.to, f.began = d.Address, now
	}
	f.last = number
	f.content = append(f.content, d.Content...)
	if d.Fragment&isLast == 0 {
		return Datagram{}, false
	}
	whole = Datagram{Address: f.to, Content: f.content}
	*f = Fragments{}
	return whole, true
}
