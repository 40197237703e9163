package socket

import "context"

// ErrEnded is what a walk says whose programs were replaced.
var ErrEnded = errEnded

// Walker is somebody who walks over the sockets.
type Walker struct{ s *sweeper }

// Walk begins a walk that goes on until End.
func (p *Plane) Walk() Walker {
	p.sweeper.mu.Lock()
	return Walker{p.sweeper}
}

// End ends it.
func (w Walker) End() {
	w.s.mu.Unlock()
	w.s.release()
}

// Again walks with the same programs.
func (w Walker) Again(ctx context.Context) error {
	_, err := w.s.sweep(ctx, false)
	return err
}

// Of reports whether the walk is with the programs that the plane has now.
func (w Walker) Of(p *Plane) bool { return p.sweeper == w.s }

// Closed reports whether its programs were let go of.
func (w Walker) Closed() bool { return w.s.udp == nil }
