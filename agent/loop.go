package agent

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

// loop is the one place where things change.
func (a *Agent) loop(ctx context.Context, failed <-chan error) error {
	drainOver := time.NewTimer(time.Hour)
	defer drainOver.Stop()
	hear := time.NewTicker(hearEvery)
	defer hear.Stop()
	for {
		setDrainOver(drainOver, a.states.nextDrainOver(a.published))
		select {
		case <-ctx.Done():
			tellManager(daemon.SdNotifyStopping)
			a.log.Info("agent stops; what it has put into the kernel stays there until `pentad down`", "reason", context.Cause(ctx))
			return nil
		case err := <-failed:
			return err
		case u := <-a.updates:
			a.onUpdate(ctx, u)
		case v := <-a.blocks:
			a.onBlocks(v)
		case c := <-a.changes:
			a.onHealth(c)
		case d := <-a.drains:
			a.onDrain(d)
		case r := <-a.reloads:
			a.onReload(ctx, r)
		case <-a.opts.Reload:
			a.log.Info("the configuration is read again, as a signal asks")
			a.onReload(ctx, reload{})
		case <-a.pings:
			send(ctx, a.pongs, struct{}{})
		case o := <-a.outcomes:
			a.onOutcome(o)
		case <-hear.C:
			a.hearProbes()
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
		t.Reset(max(0, time.Until(time.Unix(int64(next), 0))))
	}
}

func (a *Agent) onUpdate(ctx context.Context, u source.Update) {
	switch {
	case u.Err != nil:
		a.rejectFile(u.Err)
	case u.From == service.SourceFile:
		a.keepSkipped(&u)
		if err := a.guarded(u); err != nil {
			a.rejectFile(err)
			return
		}
		a.takeFile(ctx, u)
	default:
		a.takeOther(u)
	}
}

// takeFile puts a new text of the file in force.
func (a *Agent) takeFile(ctx context.Context, u source.Update) {
	u.Services = keep(a.inbox.file.Services, u.Services)
	u.Config.Services = u.Services
	for name, some := range u.Config.Files {
		u.Config.Files[name] = keep(a.inbox.file.Services, some)
	}
	if a.invalid != nil {
		a.log.Info("the configuration is valid again, and in force", "source", "file")
	}
	a.mu.Lock()
	a.invalid, a.loaded = nil, time.Now()
	a.inbox.file = u
	if a.claims.differs(u.Config) {
		now := *a.known
		now.blocks = nil
		a.known = &now
	}
	a.inbox.follow(service.SourceKubernetes, u.Config.Source.Kubernetes != nil)
	a.inbox.follow(service.SourceEtcd, u.Config.Source.Etcd != nil)
	a.mu.Unlock()
	a.publish()
	a.saveText(u)
	a.states.prune(a.known.services, a.mayComeBack)
	a.saveDrains() // a service may have another name
	a.watch.tidy = true
	a.cluster.follow(ctx, u.Config.Source.Kubernetes)
	a.fleet.follow(ctx, u.Config)
	a.claims.follow(ctx, u.Config)
}

// takeOther puts in force what a cluster or a fleet wants.
func (a *Agent) takeOther(u source.Update) {
	a.mu.Lock()
	first := a.inbox.take(u, a.log)
	a.mu.Unlock()
	a.publish()
	a.states.prune(a.known.services, a.mayComeBack)
	if first {
		a.watch.tidy, a.watch.first = true, a.watch.first.With(u.From)
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
		if s := a.known.services.Find(c.Service); s == nil || !hasBackend(s, c.Address) {
			continue // it has gone meanwhile
		}
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
	began time.Time
	said  bool            // that it is applied
	tidy  bool            // memory is to be given back
	first service.Sources // whose first word it is
}

// publish makes what is known now the aim of every role.
func (a *Agent) publish() {
	if a.inbox.file.Config == nil {
		return // nothing is in force yet: what is in the kernel stays as it is
	}
	last := a.known
	a.published = time.Now()
	a.mu.Lock()
	services := a.inbox.merge()
	names := a.rename(services)
	now := &known{
		number: last.number + 1, config: a.inbox.file.Config, silent: a.inbox.silent, node: a.inbox.kubernetes.Node, standing: last.standing, blocks: last.blocks,
		services: last.services.Next(a.states.over(services, a.published)),
	}
	a.probes.follow(now.services, names)
	now.unheard = a.unheard(now)
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
}

// rename takes what is known of backends along when their service changes its name. It
// returns the services that have another name, new to old.
func (a *Agent) rename(services []*service.Service) map[string]string {
	last := a.known.services
	if a.known.number == 0 {
		last = last.Next(a.recalled)
	}
	names := last.Renamed(services)
	if len(names) > 0 {
		a.states = a.states.renamed(names)
	}
	return names
}

// onOutcome takes what a role says of itself.
func (a *Agent) onOutcome(o outcome) {
	a.reached[o.role] = o
	a.noteStanding(o)
	a.answerDrains()
	a.answerReloads()
	a.queueTried()
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
	a.mu.Lock()
	a.inForce = a.inbox.etcd.Digest
	a.mu.Unlock()
	if !w.said && snap.Revision > 1 {
		a.log.Debug("applied", "revision", snap.Revision, "services", len(snap.Services), "took", time.Since(w.began).Round(10*time.Microsecond))
	}
	for s, what := range map[service.Source]string{service.SourceKubernetes: "cluster", service.SourceEtcd: "fleet"} {
		if w.first.Has(s) {
			a.log.Info("the services of the "+what+" are in the kernel", "source", s.String(), "services", len(a.inbox.of(s).Services),
				"took", time.Since(a.started).Round(time.Millisecond))
		}
	}
	if w.tidy {
		a.giveBack()
	}
	w.said, w.first, w.tidy = true, 0, false
}
