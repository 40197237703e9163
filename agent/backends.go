package agent

import (
	"net/netip"
	"slices"
	"time"

	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/service"
)

// state is what is known of a backend beyond its configuration.
type state struct {
	down, drained bool
	// lasting says of a drained backend that it stays so when its line is taken out of
	// the file and comes back, because an operator has said so of what the file names.
	lasting    bool
	drainUntil uint32 // Unix seconds: when to close what a drained backend has left; 0: never
}

// states are those of all backends of which anything is known. They go with their
// backend: who gets its address later is another one. Only what an operator has drained
// of the file's services stays drained.
type states map[health.Key]state

func (all states) set(k health.Key, s state) {
	if s == (state{}) {
		delete(all, k)
	} else {
		all[k] = s
	}
}

// over puts what is known at a time over configured services. Services of whose
// backends nothing is known are the same pointers.
func (all states) over(services []*service.Service, now time.Time) []*service.Service {
	if len(all) == 0 {
		return services
	}
	touched := make(map[string]bool, len(all))
	for k := range all {
		touched[k.Service] = true
	}
	out := make([]*service.Service, len(services))
	for i, s := range services {
		out[i] = s
		if touched[s.Name] {
			out[i] = all.overOne(s, now)
		}
	}
	return out
}

func (all states) overOne(s *service.Service, now time.Time) *service.Service {
	c := *s
	c.Backends = make([]service.Backend, len(s.Backends))
	for i, b := range s.Backends {
		st := all[health.Key{Service: s.Name, Address: b.Address}]
		b.Down = st.down && s.Health.Probe != service.ProbeNone
		b.Drained, b.DrainUntil = b.Drained || st.drained, st.drainUntil
		b.DrainOver = st.drainUntil > 0 && uint32(now.Unix()) >= st.drainUntil
		c.Backends[i] = b
	}
	return &c
}

// renamed returns the states as they are when services, new name to old, have other
// names.
func (all states) renamed(names map[string]string) states {
	now := make(map[string]string, len(names))
	for name, old := range names {
		now[old] = name
	}
	out := make(states, len(all))
	for k, st := range all {
		if name, ok := now[k.Service]; ok {
			k.Service = name
		}
		out[k] = st
	}
	return out
}

// prune forgets backends that are not in the snapshot, unless their service may be one
// of those that keeps says of.
func (all states) prune(snap *service.Snapshot, keeps func(name string) bool) {
	has := make(map[string]map[netip.AddrPort]bool)
	for k := range all {
		s := snap.Find(k.Service)
		if s == nil && keeps(k.Service) || s != nil && backendsOf(has, s)[k.Address] {
			continue
		}
		st := all[k]
		st.down = false
		if !st.lasting {
			st = state{}
		}
		all.set(k, st)
	}
}

// backendsOf returns the addresses of a service's backends, and remembers them.
func backendsOf(known map[string]map[netip.AddrPort]bool, s *service.Service) map[netip.AddrPort]bool {
	if known[s.Name] == nil {
		known[s.Name] = make(map[netip.AddrPort]bool, len(s.Backends))
		for _, b := range s.Backends {
			known[s.Name][b.Address] = true
		}
	}
	return known[s.Name]
}

func hasBackend(s *service.Service, a netip.AddrPort) bool {
	return slices.ContainsFunc(s.Backends, func(b service.Backend) bool { return b.Address == a })
}

// nextDrainOver returns the next time after now at which the time to drain of a backend
// is over, in Unix seconds; 0: there is none.
func (all states) nextDrainOver(now time.Time) uint32 {
	next := uint32(0)
	for _, s := range all {
		if s.drainUntil > uint32(now.Unix()) && (next == 0 || s.drainUntil < next) {
			next = s.drainUntil
		}
	}
	return next
}
