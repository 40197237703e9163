// Package relay copies bytes between two connections until both sides have said all
// they had to say. What one side does the other is told: an end of its sending as an end,
// an abort (RST) as an abort.
//
// Between two TCP sockets bytes do not pass through this process: they are spliced
// (splice(2)), and while a connection is silent it holds neither a buffer nor a pipe.
package relay

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is one side.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// ErrIdle ends a relay on which nothing was sent for too long.
var ErrIdle = errors.New("nothing was sent for too long")

// early is a side that has sent something before it was a side of a relay.
type early struct {
	Conn
	sent []byte
}

// WithEarly returns a side of which some bytes were read already.
func WithEarly(c Conn, sent []byte) Conn {
	if len(sent) == 0 {
		return c
	}
	return &early{c, sent}
}

// Counts are the bytes that were copied so far. They may be read at any time.
type Counts struct{ Sent, Received atomic.Uint64 } // by the client; by the client

// Relay copies between a client and its target until both have ended, one has failed, or
// nothing was sent for as long as idle. Both are closed then. The error says why it ended
// before its time: that of the side that failed.
func Relay(client, target Conn, idle time.Duration, counts *Counts) error {
	r := &relay{sides: [2]Conn{client, target}, idle: idle}
	r.touch()
	r.timer = time.AfterFunc(idle, r.look)
	defer r.timer.Stop()
	var other sync.WaitGroup
	other.Go(func() { r.pump(target, client, &counts.Sent) })
	r.pump(client, target, &counts.Received)
	other.Wait()
	client.Close()
	target.Close()
	return r.failure()
}

type relay struct {
	sides [2]Conn
	idle  time.Duration
	timer *time.Timer
	last  atomic.Int64 // when something was sent last, since start, in ns
	left  int          // what the kernel had still to send when it was looked last

	mu  sync.Mutex
	err error
}

var start = time.Now()

func (r *relay) touch() { r.last.Store(int64(time.Since(start))) }

// look ends the relay if it was idle for too long, and looks again when it could be.
func (r *relay) look() {
	left := r.idle - (time.Since(start) - time.Duration(r.last.Load()))
	if left <= 0 {
		// What was given to the kernel may still be on its way to a slow reader.
		queued := unsent(r.sides[0]) + unsent(r.sides[1])
		if queued == 0 || queued == r.left {
			r.abort(ErrIdle)
			return
		}
		r.left, left = queued, r.idle
	}
	r.timer.Reset(left)
}

// unsent returns how many bytes the kernel has of a socket that the other end has not
// confirmed (SIOCOUTQ, tcp(7)).
func unsent(c Conn) int {
	if e, ok := c.(*early); ok {
		c = e.Conn
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		return 0
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	_ = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n
}

func (r *relay) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// pump copies in one direction.
func (r *relay) pump(to, from Conn, n *atomic.Uint64) {
	if err := r.copy(to, from, n); err != nil {
		r.abort(err)
		return
	}
	// Whoever has closed its end for reading, too, is no failure.
	if err := to.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, net.ErrClosed) {
		r.abort(err)
	}
}

// abort ends both sides at once. The first reason is kept.
func (r *relay) abort(err error) {
	r.mu.Lock()
	if r.err == nil {
		r.err = err
	}
	r.mu.Unlock()
	for _, c := range r.sides {
		Abort(c)
	}
}

// Abort closes a connection so that its other end is told of a failure (RST) and not of
// an end.
func Abort(c net.Conn) {
	if e, ok := c.(*early); ok {
		c = e.Conn
	}
	// TLS would say that all is said.
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = t.NetConn()
	}
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	c.Close()
}

func (r *relay) copy(to, from Conn, n *atomic.Uint64) error {
	if e, ok := to.(*early); ok {
		to = e.Conn
	}
	if e, ok := from.(*early); ok {
		if _, err := to.Write(e.sent); err != nil {
			return err
		}
		n.Add(uint64(len(e.sent)))
		from = e.Conn
	}
	t, isTCP := to.(*net.TCPConn)
	f, isAlso := from.(*net.TCPConn)
	if isTCP && isAlso {
		return r.splice(t, f, n)
	}
	return r.through(to, from, n)
}

// write writes piece by piece: each that is taken shows that nobody is idle.
func (r *relay) write(to Conn, b []byte, n *atomic.Uint64) error {
	r.touch()
	for piece := range slices.Chunk(b, pieceSize) {
		if _, err := to.Write(piece); err != nil {
			return err
		}
		r.touch()
		n.Add(uint64(len(piece)))
	}
	return nil
}

const (
	bufferSize = 32 << 10
	pieceSize  = 8 << 10
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// through copies by way of this process.
func (r *relay) through(to, from Conn, n *atomic.Uint64) error {
	b := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(b)
	for {
		got, err := from.Read(b[:])
		if got > 0 {
			if err := r.write(to, b[:got], n); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
