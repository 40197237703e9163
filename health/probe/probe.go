// Package probe asks one backend whether it is well. A probe is a function of
// a context and an address; it keeps no state and decides nothing. There is one
// file a protocol, and the protocols are spoken by their own client libraries,
// unless those believe a server's word on how much memory its answer takes.
//
// A probe costs a bounded read and ends with its context, whatever the server
// does. It closes its connection by a reset: it is nobody's client, and thousands
// of sockets in TIME_WAIT would be its only trace. It never shows a password.
package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/service"
)

// Func probes one address. It returns nil when the backend is well, else why
// not. It ends when the context does.
type Func func(ctx context.Context, addr netip.AddrPort) error

// New returns the probe that the settings ask for. Sockets get the mark unless
// it is 0; the program of an exec probe makes its own sockets. The error says
// what the settings got wrong. What the probe returns is ErrOwn when the fault
// was the prober's.
func New(h service.Health, mark int) (Func, error) {
	f, err := newFunc(h, newDial(mark))
	if err != nil {
		return nil, err
	}
	return judged(f), nil
}

// judged marks which failures of a probe are the prober's own.
func judged(f Func) Func {
	return func(ctx context.Context, addr netip.AddrPort) error { return own(f(ctx, addr), ctx.Err()) }
}

func newFunc(h service.Health, dial dialFunc) (Func, error) {
	switch h.Probe {
	case service.ProbeTCP:
		return newTCP(dial), nil
	case service.ProbeTLS:
		return newTLS(h, dial), nil
	case service.ProbeHTTP:
		return newHTTP(h, dial)
	case service.ProbeGRPC:
		return newGRPC(h, dial), nil
	case service.ProbePostgres:
		return newPostgres(h, dial), nil
	case service.ProbeMySQL:
		return newMySQL(h, dial), nil
	case service.ProbeRedis:
		return newRedis(h, dial), nil
	case service.ProbeExec:
		return newExec(h), nil
	}
	return nil, fmt.Errorf("no such probe: %s", h.Probe)
}

// dialFunc opens a connection for a probe.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// newDial returns a dialFunc whose connections are reset when they close and
// can be read to a bound.
func newDial(mark int) dialFunc {
	d := &net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: false},
		ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
			var err error
			if e := c.Control(func(fd uintptr) { err = prepare(int(fd), mark) }); e != nil {
				return e
			}
			return err
		},
	}
	d.SetMultipathTCP(false)
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := d.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &bounded{Conn: c, left: maxRead}, nil
	}
}

func prepare(fd, mark int) error {
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return err
	}
	if mark == 0 {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
}

// maxRead is how many bytes a probe reads from a server at most. The longest
// honest answers are a chain of certificates and a page.
const maxRead = 256 << 10

var errTooMuch = fmt.Errorf("the server sent more than %d bytes", maxRead)

// bounded is a connection that can be read only so far.
type bounded struct {
	net.Conn
	left int
}

// Read reads, up to the bound.
func (b *bounded) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, errTooMuch
	}
	n, err := b.Conn.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// tlsConfig returns how to speak TLS: the certificate must have the name if one
// is given, and may be any if not.
func tlsConfig(h service.Health) *tls.Config {
	return &tls.Config{ServerName: h.Host, InsecureSkipVerify: h.Host == ""}
}

// errRole says that a database is well but is not what was asked for.
var errRole = errors.New("wrong role")

// checkRole compares the role of a database with the one that is wanted.
func checkRole(want service.Role, primary bool) error {
	if want == service.RoleAny || primary == (want == service.RolePrimary) {
		return nil
	}
	is := service.RoleReplica
	if primary {
		is = service.RolePrimary
	}
	return fmt.Errorf("%w: it is the %s, wanted: %s", errRole, is, want)
}
