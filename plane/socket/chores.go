package socket

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// chores are what a plane does by itself, beside Apply and without the lock that
// Apply waits for: they walk over /proc and the sockets of every network namespace.
type chores struct {
	wake    chan struct{} // something was applied
	recount atomic.Bool   // sockets may be gone though no hook told so
	said    string        // what was logged last
}

// How often the programs are told that the agent lives, and the sockets looked at.
const (
	beatEvery  = time.Second
	sweepEvery = time.Second      // for those of backends that are down or gone, if there are any
	countEvery = 10 * time.Second // for UDP sockets that were disconnected
)

// wakeUp has the chores done at once.
func (c *chores) wakeUp() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run tells the programs that somebody probes, closes connections to backends that
// are down or gone where their service wants that, and ends what the maps have of
// sockets that are no more, until the context ends.
func (p *Plane) Run(ctx context.Context) {
	var beside sync.WaitGroup // of the walks, however long they take
	defer beside.Wait()
	beside.Go(func() { p.beatUntil(ctx) })
	beside.Go(func() { p.watchScope(ctx) })
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	count := time.NewTicker(countEvery)
	defer count.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.chores.wake:
			p.say(ctx, p.sweep(ctx))
		case <-sweep.C:
			p.say(ctx, p.sweep(ctx))
		case <-count.C:
			p.say(ctx, p.countBack(ctx, false))
		}
		if p.chores.recount.Swap(false) {
			// If it fails the next Distrust has it made again: a namespace that cannot
			// be entered is no reason to walk every second.
			p.say(ctx, p.countBack(ctx, true))
		}
	}
}

func (p *Plane) beatUntil(ctx context.Context) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for said := false; ; {
		if err := p.beat(); err != nil && !said {
			said = true
			p.opts.Log.Warn("the programs do not know that the agent is alive", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// say logs once what keeps the chores from looking at every socket.
func (p *Plane) say(ctx context.Context, err error) {
	if err == nil || ctx.Err() != nil || errors.Is(err, errEnded) || err.Error() == p.chores.said {
		return
	}
	p.chores.said = err.Error()
	p.opts.Log.Warn("not every socket could be looked at: connections to backends that are gone may be left", "error", err)
}

// sweep closes the connections to backends that are down or gone, where their service
// wants that.
func (p *Plane) sweep(ctx context.Context) error {
	s, byDiag, err := p.doomed()
	if len(byDiag) > 0 {
		n, diagErr := destroy(ctx, byDiag)
		p.opts.Log.Info("connections to backends that are down or gone were closed", "connections", n)
		err = errors.Join(err, diagErr)
	}
	if s == nil {
		return err
	}
	_, walkErr := s.sweep(ctx, false)
	return errors.Join(err, walkErr)
}

// doomed returns who has to walk, if there is anything to close; and, on a kernel where
// the walk cannot do it, what has to be closed.
func (p *Plane) doomed() (s *sweeper, byDiag map[uint64][]netip.AddrPort, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ledger == nil || p.sweeper == nil {
		return nil, nil, nil
	}
	for index, scope := range p.ledger.resets {
		l, err := p.set.readLoad(index)
		if err != nil {
			return nil, nil, err
		}
		if l.Datagrams == 0 && (l.Inflight == 0 || scope != uint8(kernelResetScopeRESET_ALL)) {
			continue
		}
		if p.opts.Diag || !haveSockDestroy() {
			byDiag, err = p.set.doomed(p.ledger.resets)
		}
		return p.sweeper, byDiag, err
	}
	return nil, nil, nil
}

// CountBack walks over the sockets of every network namespace once, as Run does by itself
// every ten seconds while there is a listener of UDP.
func (p *Plane) CountBack(ctx context.Context) error { return p.countBack(ctx, true) }

// countBack ends what the maps have of sockets that are no more though no hook told
// so: UDP sockets that were disconnected and live on; with all also sockets that were
// closed while somebody had taken the hooks away.
func (p *Plane) countBack(ctx context.Context, all bool) error {
	p.mu.Lock()
	s := p.sweeper
	idle := s == nil || !all && !p.ledger.hasUDP()
	p.mu.Unlock()
	if idle {
		return nil
	}
	walk, err := s.sweep(ctx, !all)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sweeper != s || p.set == nil {
		return nil // the next walk counts
	}
	return p.set.dropNames(walk)
}
