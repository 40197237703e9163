package socket

import "context"

// ErrEnded is what a walk says whose programs were replaced.
var ErrEnded = errEnded

// Walker is somebody who walks over the sockets.
type Walker struct{ s *sweeper }

// Walk begins a walk. It ends, as one does at the next network namespace, when it is
// asked to.
func (p *Plane) Walk() Walker {
	s := p.sweeper
	s.mu.Lock()
	context.AfterFunc(s.over, s.mu.Unlock)
	return Walker{s}
}

// Again walks with the same programs.
func (w Walker) Again(ctx context.Context) error {
	_, err := w.s.sweep(ctx, false)
	return err
}

// Of reports whether the walk is with the programs that the plane has now.
func (w Walker) Of(p *Plane) bool { return p.sweeper == w.s }

// Ended reports whether it was asked to end.
func (w Walker) Ended() bool { return w.s.over.Err() != nil }
