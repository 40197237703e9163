package service

import (
	"maps"
	"slices"
)

// Load is what of the load of a backend has to do with whether it takes connections.
type Load struct {
	InFlight uint32 // connections
	Ejected  bool   // somebody avoids it after failed connects
}

// Candidate is a backend as the next connection finds it.
type Candidate struct {
	Backend
	State State
	// Takes says that the next connection may go there. An ejected backend takes
	// connections, too, where so much of its group is ejected that it does not count.
	Takes bool
}

// Choice is what becomes of connections to the listeners of one family of a service.
// All that people are told of it derives from this one answer.
type Choice struct {
	Candidates []Candidate // those of the family, in the order of the service
	Group      uint32      // the one that takes connections, if any does
	Panic      bool        // so much of it is ejected that ejection does not count
}

// Takers returns the backends to which the next connection may go. Without any it is
// refused.
func (c Choice) Takers() []Candidate {
	return slices.DeleteFunc(slices.Clone(c.Candidates), func(x Candidate) bool { return !x.Takes })
}

// Choose returns what becomes of connections of a family, with the loads that backends
// have. It is what bpf/choose.h does.
func (s *Service) Choose(family Family, load func(Backend) Load) Choice {
	var c Choice
	groups := make(map[uint32]*census)
	for _, b := range s.Backends {
		if FamilyOf(b.Address.Addr()) != family {
			continue
		}
		x := Candidate{Backend: b, State: s.stateUnder(b, load(b))}
		c.Candidates = append(c.Candidates, x)
		if b.Usable() {
			g := groups[b.Group]
			if g == nil {
				g = &census{number: b.Group}
				groups[b.Group] = g
			}
			g.add(x.State)
		}
	}
	group := pick(groups, s.Breaker.MaxEjected)
	if group == nil {
		return c
	}
	c.Group, c.Panic = group.number, group.panics(s.Breaker.MaxEjected)
	for i := range c.Candidates {
		x := &c.Candidates[i]
		switch {
		case x.Group != c.Group:
		case x.State == Standby:
			x.State, x.Takes = Serving, true
		case x.State == Ejected:
			x.Takes = c.Panic
		}
	}
	return c
}

// stateUnder returns the state of a backend under a load, as if another group served.
func (s *Service) stateUnder(b Backend, l Load) State {
	switch {
	case b.Down:
		return Down
	case b.Drained:
		return Drained
	case b.Weight == 0:
		return WeightZero
	case s.Breaker.MaxConnections > 0 && int(l.InFlight) >= s.Breaker.MaxConnections:
		return Full
	case l.Ejected:
		return Ejected
	}
	return Standby
}

// census counts the usable backends of one group.
type census struct {
	number                 uint32
	members, ejected, free int
}

func (g *census) add(s State) {
	g.members++
	switch s {
	case Ejected:
		g.ejected++
	case Standby:
		g.free++
	}
}

// panics reports whether more of the group is ejected than may be.
func (g *census) panics(maxEjected int) bool { return g.ejected*100 > maxEjected*g.members }

// pick returns the group that takes connections: the first with a free backend that is
// not in panic, else the first in panic with any that is not full, else nil.
func pick(groups map[uint32]*census, maxEjected int) *census {
	var desperate *census
	for _, n := range slices.Sorted(maps.Keys(groups)) {
		g := groups[n]
		switch {
		case !g.panics(maxEjected) && g.free > 0:
			return g
		case g.panics(maxEjected) && desperate == nil:
			desperate = g
		}
	}
	return desperate
}
