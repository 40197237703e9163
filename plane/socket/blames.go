package socket

import (
	"fmt"
	"math"
	"time"

	"github.com/pentad/pentad/host"
)

// blames is what clients met with at backends, by reference to the backend.
type blames struct {
	clock   *host.Clock
	now     uint64
	alive   bool // the agent's heartbeat is not over
	clients map[uint64][]kernelBlame
	common  map[uint64][]kernelBlame // of principals
}

// readBlames reads what every client blames backends for.
func (s *mapSet) readBlames(c *host.Clock) (*blames, error) {
	all, err := dump[kernelBlameKey, kernelBlame](s.maps[kernelMapBlames])
	if err != nil {
		return nil, fmt.Errorf("map blames: %w", err)
	}
	b := &blames{clock: c, clients: make(map[uint64][]kernelBlame), common: make(map[uint64][]kernelBlame)}
	if b.now, err = c.Now(); err != nil {
		return nil, err
	}
	var until uint64
	if err := s.maps[kernelMapHeartbeat].Lookup(uint32(0), &until); err != nil {
		return nil, fmt.Errorf("map heartbeat: %w", err)
	}
	b.alive = b.now < until
	for i, k := range all.keys {
		// Principals have 32 bits, clients 64.
		of := b.clients
		if k.Client <= math.MaxUint32 {
			of = b.common
		}
		of[k.Backend] = append(of[k.Backend], all.values[i])
	}
	return b, nil
}

// reference names a backend as the programs do.
func (p *place) reference() uint64 { return uint64(p.hot.generation)<<32 | uint64(p.index) }

// load reads the kernel's form of one backend.
func (b *blames) load(l *kernelLoad, policy *kernelServiceInfo, ref uint64) Load {
	load := Load{
		InFlight: l.Inflight + l.Datagrams,
		RTT:      time.Duration(l.Rtt) * time.Microsecond, Response: time.Duration(l.LastResponse) * time.Microsecond,
		Connections: l.Connections, Failed: uint64(l.Failed), Ejections: uint64(l.EjectedEver),
	}
	if l.Rtt != 0 || l.LastResponse != 0 {
		load.Measured = b.clock.Duration(uint64(uint32(b.now) - l.Measured))
	}
	if l.Blamed == 0 || int32(l.Blamed-uint32(b.now)) <= 0 {
		return load
	}
	var last uint64
	for _, c := range b.clients[ref] {
		load.Failures = max(load.Failures, c.Failures)
		if c.Ejected == 0 || policy.Failures == 0 {
			continue
		}
		load.Ejected = true
		load.Clients++
		last = max(last, c.Failed)
		load.Trial = load.Trial || c.Ejected&1 != 0
		if until := b.until(&c, policy); until > b.now && c.Ejected&1 == 0 {
			load.For = max(load.For, b.clock.Duration(until-b.now))
		}
	}
	if last != 0 && last <= b.now {
		load.FailedAgo = b.clock.Duration(b.now - last)
	}
	until := l.Shunned >> 1
	for _, c := range b.common[ref] {
		until = max(until, c.Ejected>>1)
	}
	if until > b.now && policy.Failures > 0 {
		load.Ejected, load.Shunned = true, true
		load.For = max(load.For, b.clock.Duration(until-b.now))
	}
	return load
}

// until is ejected_until of bpf/blame.h.
func (b *blames) until(c *kernelBlame, policy *kernelServiceInfo) uint64 {
	until := c.Ejected >> 1
	if policy.Verdict == 0 || !b.alive {
		return until
	}
	return min(until, c.Failed+uint64(policy.Verdict)*uint64(b.clock.Hz)/1000)
}

// heartbeatFor is how long the programs take the agent for alive after a beat.
const heartbeatFor = 3 * time.Second

// beat tells the programs that the agent lives and probes. Without a beat for
// three seconds they rely on what connections meet with alone.
func (p *Plane) beat() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.set == nil || p.clock == nil {
		return nil
	}
	now, err := p.clock.Now()
	if err != nil {
		return err
	}
	if err := p.set.maps[kernelMapHeartbeat].Put(uint32(0), now+p.clock.Jiffies(heartbeatFor)); err != nil {
		return fmt.Errorf("map heartbeat: %w", err)
	}
	return nil
}
