package agent

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// drain is somebody who asks to drain backends, or to end that, and waits.
type drain struct {
	api.DrainRequest
	done chan drainOutcome
}

type drainOutcome struct {
	answer api.DrainAnswer
	err    error
}

// pendingDrain is a drain that the kernel does not have yet.
type pendingDrain struct {
	drain
	answer      api.DrainAnswer
	before, set states
	number      uint64
}

// onDrain sets or ends the draining of backends. Who asks is answered when the kernel
// has it.
func (a *Agent) onDrain(d drain) {
	p, err := a.prepareDrain(d, time.Now())
	if err != nil {
		d.done <- drainOutcome{err: err}
		return
	}
	for k, st := range p.set {
		a.states.set(k, st)
	}
	a.publish()
	p.number = a.known.number
	a.pending = append(a.pending, p)
	a.answerDrains()
}

// prepareDrain finds out what a request changes, and refuses what makes no sense.
func (a *Agent) prepareDrain(d drain, now time.Time) (pendingDrain, error) {
	p := pendingDrain{drain: d, before: make(states), set: make(states)}
	if a.inbox.file.Config == nil {
		return p, fmt.Errorf("%w: no configuration is in force yet; `pentad status` says why", api.ErrRefused)
	}
	targets, err := a.drainTargets(d.DrainRequest)
	if err != nil {
		return p, err
	}
	for k, b := range targets {
		before := a.states[k]
		after, err := drained(before, d.DrainRequest, now)
		if err != nil {
			return p, err
		}
		s := a.known.services.Find(k.Service)
		after.lasting = after.drained && (s == nil || s.Source == service.SourceFile)
		p.before[k], p.set[k] = before, after
		p.answer.Backends = append(p.answer.Backends, api.Drained{
			Service: k.Service, Address: k.Address, Was: before.drained == d.Drained, Note: a.stillOut(k, b, d.Drained),
		})
	}
	slices.SortFunc(p.answer.Backends, func(x, y api.Drained) int {
		return cmp.Or(cmp.Compare(x.Service, y.Service), x.Address.Compare(y.Address))
	})
	if d.Drained {
		p.answer.Refusing = a.refusingWith(p.set, now, a.loads())
	}
	if len(p.answer.Refusing) > 0 && !d.Force {
		return p, fmt.Errorf("%w: then %s would refuse every connection, because no other backend takes any; --force drains all the same",
			api.ErrRefused, strings.Join(p.answer.Refusing, ", "))
	}
	return p, nil
}

// stillOut says why a backend takes nothing though it is not drained any more.
func (a *Agent) stillOut(k health.Key, b *service.Backend, drained bool) string {
	switch {
	case drained || b == nil:
		return ""
	case a.drainedByFile(k):
		return "the file says admin: drain, so that it takes no connections all the same"
	case b.Weight == 0:
		return "its weight is 0, so that it takes no connections all the same"
	case b.Down:
		return "its probe fails, so that it takes no connections all the same"
	}
	return ""
}

// drainedByFile reports whether the file itself drains a backend.
func (a *Agent) drainedByFile(k health.Key) bool {
	for _, s := range a.inbox.file.Services {
		if s.Name == k.Service {
			return slices.ContainsFunc(s.Backends, func(b service.Backend) bool { return b.Address == k.Address && b.Drained })
		}
	}
	return false
}

// drainTargets returns the backends that a request is about. Those that are drained
// though they are not in the file now are nil.
func (a *Agent) drainTargets(r api.DrainRequest) (map[health.Key]*service.Backend, error) {
	found := make(map[health.Key]*service.Backend)
	isMeant := func(b netip.AddrPort) bool { return b == r.Address || r.Host.IsValid() && b.Addr() == r.Host }
	for _, s := range a.known.services.Services {
		if r.Service != "" && s.Name != r.Service {
			continue
		}
		for i := range s.Backends {
			if b := &s.Backends[i]; isMeant(b.Address) {
				found[health.Key{Service: s.Name, Address: b.Address}] = b
			}
		}
	}
	for k, st := range a.states {
		if _, known := found[k]; !known && st.lasting && !r.Drained && (r.Service == "" || r.Service == k.Service) && isMeant(k.Address) {
			found[k] = nil
		}
	}
	what := r.Address.String()
	if r.Host.IsValid() {
		what = r.Host.String()
	}
	switch {
	case len(found) > 0:
		return found, nil
	case r.Service == "":
		return nil, fmt.Errorf("no service has the backend %s: %w; `pentad backend list` shows all", what, api.ErrNotFound)
	case a.known.services.Find(r.Service) == nil:
		return nil, fmt.Errorf("service %s: %w%s; `pentad service list` shows them", r.Service, api.ErrNotFound, a.nearestService(r.Service))
	}
	return nil, fmt.Errorf("service %s: backend %s: %w; `pentad service show %s` shows them", r.Service, what, api.ErrNotFound, r.Service)
}

func (a *Agent) nearestService(name string) string {
	names := make([]string, len(a.known.services.Services))
	for i, s := range a.known.services.Services {
		names[i] = s.Name
	}
	return service.Nearest(name, names)
}

// loads returns the load of every backend; an empty one where it cannot be read.
func (a *Agent) loads() func(*service.Service, service.Family) service.Choice {
	v, err := socket.Read(a.opts.Pins)
	if err != nil {
		v = &socket.View{}
	}
	return v.Choose
}

// refusingWith returns the listeners that take connections now and would not with other
// states of backends.
func (a *Agent) refusingWith(changed states, now time.Time, choose func(*service.Service, service.Family) service.Choice) []string {
	with := maps.Clone(a.states)
	for k, st := range changed {
		with.set(k, st)
	}
	var refusing []string
	touched := make(map[string]bool)
	for k := range changed {
		touched[k.Service] = true
	}
	for _, name := range slices.Sorted(maps.Keys(touched)) {
		before := a.known.services.Find(name)
		if before == nil {
			continue
		}
		after := with.overOne(before, now)
		for _, l := range before.Listeners {
			f := service.FamilyOf(l.Address.Addr())
			if len(choose(before, f).Takers()) > 0 && !servesBeside(choose(after, f)) {
				refusing = append(refusing, fmt.Sprintf("%s (%s)", l, name))
			}
		}
	}
	return refusing
}

// servesBeside reports whether anybody would serve whom nobody avoids: who is ejected and
// used all the same, because no other is left, is not the one to rely on.
func servesBeside(c service.Choice) bool {
	return slices.ContainsFunc(c.Takers(), func(x service.Candidate) bool { return x.State == service.Serving })
}

// drained returns the state of a backend after a request at a time.
func drained(s state, r api.DrainRequest, now time.Time) (state, error) {
	if r.Timeout < 0 {
		return s, fmt.Errorf("timeout %s: %w: it is negative", r.Timeout, api.ErrRefused)
	}
	s.drained, s.drainUntil = r.Drained, 0
	if !r.Drained || r.Timeout == 0 {
		return s, nil
	}
	// The next second, and not by time.Add, which overflows.
	part := time.Duration(now.Nanosecond()) + r.Timeout%time.Second
	until := now.Unix() + int64(r.Timeout/time.Second) + int64((part+time.Second-1)/time.Second)
	if until > math.MaxUint32 {
		return s, fmt.Errorf("timeout %s: %w: it ends after the year 2106", r.Timeout, api.ErrRefused)
	}
	s.drainUntil = uint32(until)
	return s, nil
}

// answerDrains answers those of whom it is known what became of it. Who is told that it
// failed does not see it happen later.
func (a *Agent) answerDrains() {
	var left []pendingDrain
	undone := false
	for _, p := range a.pending {
		done, err := a.outcomeOf(p.number)
		if !done {
			left = append(left, p)
			continue
		}
		if err == nil {
			for _, b := range p.answer.Backends {
				a.log.Info("backend drain", "service", b.Service, "backend", b.Address, "drained", p.Drained)
			}
			a.saveDrains()
		} else {
			undone = a.undo(p) || undone
			a.saveDrains()
		}
		p.done <- drainOutcome{p.answer, err}
	}
	a.pending = left
	if undone {
		a.publish()
	}
}

// undo takes back what a drain has set, unless it was set anew since.
func (a *Agent) undo(p pendingDrain) (changed bool) {
	for k, set := range p.set {
		if a.states[k] == set {
			a.states.set(k, p.before[k])
			changed = true
		}
	}
	return changed
}
