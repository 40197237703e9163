package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

// loop is the one place where things change.
func (a *Agent) loop(ctx context.Context, failed <-chan error) error {
	drainOver := time.NewTimer(time.Hour)
	defer drainOver.Stop()
	for {
		setDrainOver(drainOver, a.states.nextDrainOver(time.Now()))
		select {
		case <-ctx.Done():
			a.log.Info("agent stops; the services stay in the kernel")
			return nil
		case err := <-failed:
			return err
		case u := <-a.updates:
			a.onUpdate(ctx, u)
		case c := <-a.changes:
			a.onHealth(c)
		case d := <-a.drains:
			a.onDrain(d)
		case o := <-a.outcomes:
			a.onOutcome(o)
		case <-drainOver.C:
			a.log.Info("the time to drain is over; the connections that are left are closed")
			a.publish()
		}
	}
}

// setDrainOver sets the timer for the next time to drain that will be over, in Unix
// seconds; 0: there is none.
func setDrainOver(t *time.Timer, next uint32) {
	t.Stop()
	if next > 0 {
		t.Reset(time.Until(time.Unix(int64(next), 0)))
	}
}

func (a *Agent) onUpdate(ctx context.Context, u source.Update) {
	switch {
	case u.Err != nil:
		a.rejectFile(u.Err)
	case u.From == service.SourceFile:
		a.takeFile(ctx, u)
	default:
		a.takeCluster(u)
	}
}

// rejectFile notes why the newest text of the file is not in force.
func (a *Agent) rejectFile(err error) {
	a.mu.Lock()
	a.invalid = err
	a.mu.Unlock()
	var all config.Errors
	if !errors.As(err, &all) {
		a.log.Error("configuration is not in force", "source", "file", "error", err)
		return
	}
	for _, e := range all {
		a.log.Error("configuration is not valid and not in force", "source", "file", "error", e)
	}
}

// takeFile puts a new text of the file in force.
func (a *Agent) takeFile(ctx context.Context, u source.Update) {
	u.Services = keep(a.inbox.file.Services, u.Services)
	a.mu.Lock()
	a.invalid, a.loaded = nil, time.Now()
	a.inbox.file = u
	a.inbox.setCluster(u.Config.Source.Kubernetes != nil)
	a.mu.Unlock()
	a.publish()
	a.states.prune(a.known.services, a.mayComeBack)
	a.watch.tidy = true
	a.cluster.follow(ctx, u.Config.Source.Kubernetes)
}

// takeCluster puts what the cluster wants in force.
func (a *Agent) takeCluster(u source.Update) {
	a.mu.Lock()
	first := a.inbox.count == 0
	a.inbox.takeCluster(u, a.log)
	a.mu.Unlock()
	a.publish()
	a.states.prune(a.known.services, a.mayComeBack)
	if first {
		a.watch.tidy, a.watch.first = true, true
	}
}

// mayComeBack reports whether a service of that name may be one of a source that has
// not spoken yet.
func (a *Agent) mayComeBack(name string) bool {
	if a.known.silent == 0 {
		return false
	}
	for _, s := range a.recalled {
		if s.Name == name {
			return a.known.silent.Has(s.Source)
		}
	}
	return false
}

// keep returns the services of next, those that have not changed as the pointers
// that are in use already: one configuration is kept in memory, not two.
func keep(last, next []*service.Service) []*service.Service {
	known := make(map[string]*service.Service, len(last))
	for _, s := range last {
		known[s.Name] = s
	}
	for i, s := range next {
		if old := known[s.Name]; old != nil && old.Equal(s) {
			next[i] = old
		}
	}
	return next
}

// onHealth takes what the probes found out.
func (a *Agent) onHealth(changes []health.Change) {
	for _, c := range changes {
		s := a.states[c.Key]
		s.down = !c.Up
		a.states.set(c.Key, s)
		if c.Up {
			a.log.Info("backend is up", "service", c.Service, "backend", c.Address)
		} else {
			a.log.Warn("backend is down", "service", c.Service, "backend", c.Address, "error", c.Err)
		}
	}
	a.publish()
}

// drain is somebody who asks to drain a backend, or to end that, and waits.
type drain struct {
	api.DrainRequest
	done chan error
}

// pendingDrain is a drain that the kernel does not have yet.
type pendingDrain struct {
	drain
	key         health.Key
	before, set state
	number      uint64
}

// onDrain sets or ends the draining of a backend. Who asks is answered when the kernel
// has it.
func (a *Agent) onDrain(d drain) {
	k := health.Key{Service: d.Service, Address: d.Address}
	s := a.known.services.Find(d.Service)
	if s == nil {
		d.done <- fmt.Errorf("service %s: %w; `pentad service list` shows them", d.Service, api.ErrNotFound)
		return
	}
	if !hasBackend(s, d.Address) {
		d.done <- fmt.Errorf("service %s: backend %s: %w; `pentad service show %s` shows them",
			d.Service, d.Address, api.ErrNotFound, d.Service)
		return
	}
	before := a.states[k]
	after, err := drained(before, d.DrainRequest, time.Now())
	if err != nil {
		d.done <- err
		return
	}
	a.states.set(k, after)
	a.publish()
	a.pending = append(a.pending, pendingDrain{d, k, before, after, a.known.number})
	a.answerDrains()
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
		switch {
		case !done:
			left = append(left, p)
			continue
		case err == nil:
			a.log.Info("backend drain", "service", p.Service, "backend", p.Address, "drained", p.Drained)
		case a.states[p.key] == p.set:
			a.states.set(p.key, p.before)
			undone = true
		}
		p.done <- err
	}
	a.pending = left
	if undone {
		a.publish()
	}
}

// outcomeOf tells whether every role on which services depend has what was known then,
// or one has failed to.
func (a *Agent) outcomeOf(number uint64) (done bool, err error) {
	done = true
	for _, r := range a.roles() {
		o, tried := a.reached[r.name]
		switch {
		case r.minor:
		case !tried || o.number < number:
			done = false
		case o.err != nil && !isPartial(o.err):
			return true, o.err
		}
	}
	return done, nil
}

// publication is what is to be said and done once the roles have what was published.
type publication struct {
	began       time.Time
	services    *service.Snapshot
	said        bool // that it is applied
	tidy, first bool // memory is to be given back; it is the first of the cluster
}

// publish makes what is known now the aim of every role.
func (a *Agent) publish() {
	last := a.known
	a.mu.Lock()
	services := a.inbox.merge()
	names := a.rename(services)
	now := &known{
		number: last.number + 1, config: a.inbox.file.Config, silent: a.inbox.silent, node: a.inbox.kubernetes.Node,
		services: last.services.Next(a.states.over(services, time.Now())),
	}
	a.known = now
	a.mu.Unlock()
	if now.silent == 0 {
		a.recalled = nil
	}
	if now.services != last.services {
		a.watch.began, a.watch.said = time.Now(), false
	}
	for _, d := range a.drivers {
		d.set(now)
	}
	a.probes.follow(now.services, names)
}

// rename takes what is known of backends along when their service changes its name. It
// returns the services that have another name, new to old.
func (a *Agent) rename(services []*service.Service) map[string]string {
	last := a.known.services.Services
	if a.known.number == 0 {
		last = a.recalled
	}
	names := service.Renamed(last, services)
	if len(names) > 0 {
		a.states = a.states.renamed(names)
	}
	return names
}

// onOutcome takes what a role says of itself.
func (a *Agent) onOutcome(o outcome) {
	a.reached[o.role] = o
	a.answerDrains()
	if o.verified {
		a.giveBack()
	}
	if a.settled() {
		a.onSettled()
	}
}

// isMinor reports whether services do not depend on a role.
func (a *Agent) isMinor(name string) bool {
	for _, r := range a.roles() {
		if r.name == name {
			return r.minor
		}
	}
	return false
}

// settled reports whether every role on which services depend has what is known.
func (a *Agent) settled() bool {
	done, err := a.outcomeOf(a.known.number)
	return done && err == nil
}

// onSettled says that what was published is in the kernel, and does what had to wait
// for it.
func (a *Agent) onSettled() {
	w := &a.watch
	snap := a.known.services
	if !w.said && snap.Revision > 0 {
		level := slog.LevelInfo
		if a.inbox.count > 0 {
			level = slog.LevelDebug // a cluster changes all the time
		}
		a.log.Log(context.Background(), level, "applied", "revision", snap.Revision, "services", len(snap.Services),
			"took", time.Since(w.began).Round(10*time.Microsecond))
	}
	if w.first {
		a.log.Info("the services of the cluster are in the kernel", "source", "kubernetes", "services", len(a.inbox.kubernetes.Services),
			"took", time.Since(a.started).Round(time.Millisecond))
	}
	if w.tidy {
		a.giveBack()
	}
	w.said, w.first, w.tidy = true, false, false
}
