package probe

import (
	"context"
	"errors"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrOwn says that a probe came to nothing by a fault of the prober: it had no
// file, memory or port left, was forbidden to send, or was called off. It says
// nothing of the backend.
var ErrOwn = errors.New("the probe could not be made")

// ownErrors are what the kernel refuses a prober for its own sake.
var ownErrors = []error{
	unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.EADDRNOTAVAIL, unix.EPERM, unix.EAGAIN,
	context.Canceled,
}

func isOwn(err error) bool {
	for _, own := range ownErrors {
		if errors.Is(err, own) {
			return true
		}
	}
	return false
}

// ownError is a fault of the prober; its text is that of the fault.
type ownError struct{ error }

// Is makes it ErrOwn, and Unwrap what it was.
func (ownError) Is(target error) bool { return target == ErrOwn }
func (e ownError) Unwrap() error      { return e.error }

// own marks what a probe returned, if it is a fault of the prober. Libraries do
// not always hand on what their connection met with: noted is what dialing said.
func own(err, noted error) error {
	switch {
	case err == nil:
		return nil
	case isOwn(err):
		return ownError{err}
	case isOwn(noted):
		return ownError{noted}
	}
	return err
}

// dialing is what the dials of one probe led to.
type dialing struct {
	mu    sync.Mutex
	fault error
	conns []net.Conn
}

// noted returns the last fault that was met with.
func (d *dialing) noted() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.fault
}

// close closes what was opened: some libraries take their time for it.
func (d *dialing) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.conns {
		_ = c.Close()
	}
}

// through returns dial, which keeps what came of it.
func (d *dialing) through(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		d.mu.Lock()
		defer d.mu.Unlock()
		if err != nil {
			d.fault = err
			return nil, err
		}
		d.conns = append(d.conns, c)
		return c, nil
	}
}
