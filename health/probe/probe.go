// Package probe asks one backend whether it is well. A probe is a function of
// a context and an address; it keeps no state and decides nothing.
//
// Every probe closes its connection by a reset: a probe is nobody's client, and
// thousands of sockets in TIME_WAIT would be its only trace.
package probe

import (
	"context"
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
// it is 0. The error says what the settings got wrong.
func New(h service.Health, mark int) (Func, error) {
	switch h.Probe {
	case service.ProbeTCP:
		return newTCP(mark), nil
	case service.ProbeHTTP:
		return newHTTP(h, mark)
	}
	return nil, fmt.Errorf("no such probe: %s", h.Probe)
}

// dialer opens connections that are reset when they close.
func dialer(mark int) *net.Dialer {
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
	return d
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
