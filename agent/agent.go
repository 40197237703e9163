// Package agent runs one host: it takes services from the source, puts the
// state of backends over them, and has the planes install the result. Apply,
// retry, reload and recovery are decided here and nowhere else.
//
// The agent may die at any moment. What it has installed goes on working, and
// the next agent takes it over; so nothing that clients depend on may live in
// this process alone.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/api/guard"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source/file"
	"github.com/pentad/pentad/source/kube"
)

// Options say what an agent runs on.
type Options struct {
	ConfigFile string
	Pins       string // directory on bpffs
	RunDir     string // for the agent's socket
	Version    string
	Log        *slog.Logger

	MaxBackends int // see socket.Options
}

// How often the agent looks whether the kernel still has what it should, and
// how long it waits before it repeats what failed.
const (
	hooksEvery  = time.Second      // are the programs attached? This is cheap.
	verifyEvery = 10 * time.Minute // are the maps right? This reads them all.
	retryFirst  = 100 * time.Millisecond
	retryMost   = 10 * time.Second
	retryFull   = 30 * time.Second // something did not fit; memory may have been freed
)

// Agent is one running agent.
type Agent struct {
	opts    Options
	log     *slog.Logger
	plane   plane
	socket  *socket.Plane
	monitor *health.Monitor
	cluster *cluster // nil: no node of a cluster
	started time.Time
	tasks   sync.WaitGroup // all that runs beside the loop

	updates chan file.Update
	changes chan []health.Change
	drains  chan drain

	// Owned by the loop.
	drainOver *time.Timer // when what a drained backend has left is to be closed
	config    *config.Config
	state     map[health.Key]state
	vips      map[netip.AddrPort]bool // of TCP: probes must not be translated there
	monitored *service.Snapshot       // what the monitor was told of last
	remark    map[netip.AddrPort]bool // addresses that became a VIP, or are one no more, since then
	recalled  []*service.Service      // what an earlier agent left, until it was compared
	renamed   map[string]string       // services that have another name since then, new to old

	mu       sync.Mutex // guards what follows, which the API reads
	snapshot *service.Snapshot
	loaded   time.Time
	invalid  error // why the newest file is not in force
	failed   error // why the newest snapshot is not, or not all, in the kernel
	inKernel bool  // every plane is there, as far as is known
	applied  time.Time
}

// state is what is known of a backend beyond its configuration.
type state struct {
	down, drained bool
	drainUntil    uint32 // Unix seconds: when to close what a drained backend has left; 0: never
}

type drain struct {
	api.DrainRequest
	done chan error
}

// Run runs an agent until the context ends. What it installed stays.
func Run(ctx context.Context, opts Options) error {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if err := socket.CheckHost(); err != nil {
		return err
	}
	lock, err := host.LockWithin(ctx, opts.Pins, downPatience)
	if err != nil {
		return err
	}
	defer lock.Close()
	source, err := file.New(opts.ConfigFile)
	if err != nil {
		return err
	}
	defer source.Close()
	first, err := source.Load()
	if err != nil {
		return err
	}
	p := socket.New(socket.Options{
		Pins: opts.Pins, Version: opts.Version, Log: opts.Log, MaxBackends: opts.MaxBackends,
	})
	defer p.Close()
	a := &Agent{
		opts: opts, log: opts.Log, plane: p, socket: p, started: time.Now(),
		updates: make(chan file.Update), changes: make(chan []health.Change), drains: make(chan drain),
		drainOver: time.NewTimer(time.Hour), state: make(map[health.Key]state), monitored: &service.Snapshot{}, snapshot: &service.Snapshot{},
	}
	if a.cluster, err = newCluster(first.Source.Kubernetes, opts.Log, a.nodeState); err != nil {
		return err
	}
	return a.run(ctx, source, first)
}

func (a *Agent) run(ctx context.Context, source *file.Source, first *config.Config) error {
	known, err := a.recall()
	if err != nil {
		return err
	}
	a.loaded = time.Now()
	a.use(first)
	if err := a.apply(ctx); err != nil && !isPartial(err) {
		return err
	}
	a.log.Info("services are in the kernel", "revision", a.snapshot.Revision,
		"services", len(a.snapshot.Services), "took", time.Since(a.started).Round(time.Millisecond))

	ctx, stop := context.WithCancel(ctx)
	defer a.tasks.Wait()
	defer stop()
	servers, err := a.serve(first.API)
	if err != nil {
		return err
	}
	for _, s := range servers {
		a.tasks.Go(func() { a.serveUntil(ctx, s) })
	}
	monitor := health.New(a.log, func(c []health.Change) { send(ctx, a.changes, c) })
	a.mu.Lock()
	a.monitor = monitor
	a.mu.Unlock()
	a.prune()
	a.follow(known)
	a.tasks.Go(func() { a.monitor.Run(ctx) })
	failed := make(chan error, 2)
	a.tasks.Go(func() {
		if err := source.Run(ctx, func(u file.Update) { send(ctx, a.updates, u) }); err != nil {
			failed <- err
		}
	})
	if a.cluster != nil {
		a.tasks.Go(func() {
			if err := a.cluster.run(ctx); err != nil {
				failed <- err
			}
		})
	}
	a.tasks.Go(func() { a.plane.Run(ctx) })
	a.giveBack()
	return a.loop(ctx, failed)
}

func send[T any](ctx context.Context, to chan<- T, v T) {
	select {
	case to <- v:
	case <-ctx.Done():
	}
}

// recall takes the state of backends from the kernel, where an earlier agent
// left it, and returns which backends it knew.
func (a *Agent) recall() (map[health.Key]bool, error) {
	v, err := socket.Read(a.opts.Pins)
	if errors.Is(err, socket.ErrNothingInstalled) {
		return nil, nil
	}
	if errors.Is(err, socket.ErrNewer) {
		return nil, err
	}
	if err != nil {
		// An older layout, or pins that somebody damaged: start afresh.
		a.log.Warn("the state of backends could not be read from the kernel", "error", err)
		return nil, nil
	}
	known := make(map[health.Key]bool)
	a.recalled = v.Services
	for _, s := range v.Services {
		for _, b := range s.Backends {
			k := health.Key{Service: s.Name, Address: b.Address}
			known[k] = true
			if b.Down || b.Drained {
				a.state[k] = state{down: b.Down, drained: b.Drained, drainUntil: b.DrainUntil}
			}
		}
	}
	return known, nil
}

// isPartial reports whether all that is wrong is that something did not fit: that can
// wait, what failed is tried again at once.
func isPartial(err error) bool {
	if several, ok := err.(interface{ Unwrap() []error }); ok {
		return !slices.ContainsFunc(several.Unwrap(), func(e error) bool { return !isPartial(e) })
	}
	var full *socket.FullError
	return errors.As(err, &full)
}

// loop is the one place where things change.
func (a *Agent) loop(ctx context.Context, failed <-chan error) error {
	verify := time.NewTicker(verifyEvery)
	defer verify.Stop()
	hooks := time.NewTicker(hooksEvery)
	defer hooks.Stop()
	a.awaitDrains()
	defer a.drainOver.Stop()
	scope, err := newScopeWatch()
	if err != nil {
		return fmt.Errorf("watching the scope: %w", err)
	}
	defer scope.close()
	retry := time.NewTimer(time.Hour)
	retry.Stop()
	wait := retryFirst
	var ofCluster <-chan kube.Update
	table := time.NewTicker(natEvery)
	defer table.Stop()
	if a.cluster != nil {
		ofCluster = a.cluster.updates
	} else {
		table.Stop()
	}
	for {
		var err error
		scope.follow(a.config.Scope.Cgroup)
		select {
		case <-ctx.Done():
			a.log.Info("agent stops; the services stay in the kernel")
			return nil
		case err := <-failed:
			return err
		case u := <-a.updates:
			err = a.take(ctx, u)
		case u := <-ofCluster:
			err = a.takeCluster(ctx, u)
		case c := <-a.changes:
			a.note(c)
			err = a.apply(ctx)
		case d := <-a.drains:
			err = a.drain(ctx, d)
		case e := <-scope.watcher.Events:
			if !scope.isMade(e) || a.plane.Intact() {
				continue
			}
			a.log.Info("the cgroup of the scope was made again", "cgroup", a.config.Scope.Cgroup)
			err = a.apply(ctx)
		case <-scope.watcher.Errors:
			// Events were lost: what they would have told is seen with the next tick.
			continue
		case <-hooks.C:
			// What failed is tried again anyway.
			if a.failed != nil && !isPartial(a.failed) || a.plane.Intact() {
				continue
			}
			a.log.Warn("somebody has removed hooks or pins; they are put back")
			a.setInKernel(false)
			err = a.apply(ctx)
		case <-table.C:
			if !a.cluster.known || a.failed != nil && !isPartial(a.failed) || a.cluster.nat.Intact() {
				continue
			}
			a.log.Warn("somebody has changed the table for packets from elsewhere; it is put back", "table", nat.TableName)
			a.setInKernel(false)
			err = a.apply(ctx)
		case <-a.drainOver.C:
			a.log.Info("the time to drain is over; the connections that are left are closed")
			a.awaitDrains()
			err = a.apply(ctx)
		case <-verify.C:
			a.plane.Distrust()
			if a.cluster != nil {
				a.cluster.nat.Distrust()
			}
			err = a.apply(ctx)
			a.giveBack()
		case <-retry.C:
			err = a.apply(ctx)
		}
		switch {
		case err == nil || ctx.Err() != nil:
			wait = retryFirst
			retry.Stop()
		case isPartial(err):
			retry.Reset(retryFull)
		default:
			a.log.Error("the kernel does not have the newest state yet", "error", err, "again", wait)
			retry.Reset(wait)
			wait = min(2*wait, retryMost)
		}
	}
}

// awaitDrains sets the timer for the next time to drain that will be over.
func (a *Agent) awaitDrains() {
	now := uint32(time.Now().Unix())
	next := uint32(0)
	for _, s := range a.state {
		if s.drainUntil > now && (next == 0 || s.drainUntil < next) {
			next = s.drainUntil
		}
	}
	a.drainOver.Stop()
	if next > 0 {
		a.drainOver.Reset(time.Until(time.Unix(int64(next), 0)))
	}
}

// take reacts to a new text of the file.
func (a *Agent) take(ctx context.Context, u file.Update) error {
	a.mu.Lock()
	a.invalid = u.Err
	a.mu.Unlock()
	if u.Err != nil {
		var all config.Errors
		if !errors.As(u.Err, &all) {
			a.log.Error("configuration is not in force", "source", "file", "error", u.Err)
			return nil
		}
		for _, e := range all {
			a.log.Error("configuration is not valid and not in force", "source", "file", "error", e)
		}
		return nil
	}
	if u.Config.API != a.config.API {
		a.log.Warn("api.listen changes when the agent restarts", "source", "file")
	}
	if !u.Config.Source.Kubernetes.Equal(a.config.Source.Kubernetes) {
		a.log.Warn("source.kubernetes changes when the agent restarts", "source", "file")
	}
	u.Config.Services = keep(a.config.Services, u.Config.Services)
	a.use(u.Config)
	a.mu.Lock()
	a.loaded = time.Now()
	a.mu.Unlock()
	err := a.apply(ctx)
	a.prune()
	a.giveBack()
	return err
}

// use makes a configuration the one to apply.
func (a *Agent) use(c *config.Config) {
	a.config = c
	if a.cluster != nil {
		a.mu.Lock()
		a.cluster.merge(c.Services)
		a.mu.Unlock()
	}
	a.noteVIPs()
}

// noteVIPs finds out which addresses are VIPs now: a probe of one of them must not
// be translated.
func (a *Agent) noteVIPs() {
	services, _ := a.desired()
	vips := make(map[netip.AddrPort]bool)
	if slices.ContainsFunc(services, func(s *service.Service) bool { return s.Health.Probe != service.ProbeNone }) {
		for _, s := range services {
			for _, l := range s.Listeners {
				if l.Protocol == service.TCP {
					vips[l.Address] = true
				}
			}
		}
	}
	if a.remark == nil {
		a.remark = make(map[netip.AddrPort]bool)
	}
	for v := range vips {
		if !a.vips[v] {
			a.remark[v] = true
		}
	}
	for v := range a.vips {
		if !vips[v] {
			a.remark[v] = true
		}
	}
	a.vips = vips
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

// note takes what the probes found out.
func (a *Agent) note(changes []health.Change) {
	for _, c := range changes {
		s := a.state[c.Key]
		s.down = !c.Up
		a.setState(c.Key, s)
		if c.Up {
			a.log.Info("backend is up", "service", c.Service, "backend", c.Address)
		} else {
			a.log.Warn("backend is down", "service", c.Service, "backend", c.Address, "error", c.Err)
		}
	}
}

func (a *Agent) setState(k health.Key, s state) {
	if s == (state{}) {
		delete(a.state, k)
	} else {
		a.state[k] = s
	}
}

// drain sets or ends the draining of a backend.
func (a *Agent) drain(ctx context.Context, d drain) error {
	if d.Timeout < 0 {
		d.done <- fmt.Errorf("timeout %s: %w: it is negative", d.Timeout, api.ErrRefused)
		return nil
	}
	s := a.snapshot.Find(d.Service)
	if s == nil {
		d.done <- fmt.Errorf("service %s: %w; `pentad service list` shows them", d.Service, api.ErrNotFound)
		return nil
	}
	for _, b := range s.Backends {
		if b.Address != d.Address {
			continue
		}
		k := health.Key{Service: d.Service, Address: d.Address}
		before := a.state[k]
		st := before
		st.drained, st.drainUntil = d.Drained, 0
		if d.Drained && d.Timeout > 0 {
			// The next second, and not by time.Add, which overflows.
			now := time.Now()
			part := time.Duration(now.Nanosecond()) + d.Timeout%time.Second
			until := now.Unix() + int64(d.Timeout/time.Second) + int64((part+time.Second-1)/time.Second)
			if until > math.MaxUint32 {
				d.done <- fmt.Errorf("timeout %s: %w: it ends after the year 2106", d.Timeout, api.ErrRefused)
				return nil
			}
			st.drainUntil = uint32(until)
		}
		a.setState(k, st)
		a.awaitDrains()
		err := a.apply(ctx)
		if err != nil && !isPartial(err) {
			// Who asked was told that it failed: it must not happen later.
			a.setState(k, before)
			a.awaitDrains()
			d.done <- err
			return err
		}
		d.done <- nil
		a.log.Info("backend drain", "service", d.Service, "backend", d.Address, "drained", d.Drained)
		return err
	}
	d.done <- fmt.Errorf("service %s: backend %s: %w; `pentad service show %s` shows them",
		d.Service, d.Address, api.ErrNotFound, d.Service)
	return nil
}

// apply makes the next snapshot and has it installed.
func (a *Agent) apply(ctx context.Context) error {
	last := a.snapshot
	services, partial := a.desired()
	a.rename(services)
	next := last.Next(a.config.Scope.Cgroup, a.overlay(services))
	if a.cluster != nil {
		next = next.With(a.cluster.ranges(), partial)
	}
	began := time.Now()
	err := a.applyPlanes(ctx, next)
	fine := err == nil || isPartial(err)
	inKernel := fine && (!partial || tableIsWhole())
	a.mu.Lock()
	a.snapshot, a.failed, a.inKernel = next, err, inKernel
	if fine {
		a.applied = time.Now()
	}
	a.mu.Unlock()
	if err != nil && !isPartial(err) {
		return err
	}
	if next != last {
		level := slog.LevelInfo
		if a.cluster != nil && a.cluster.known {
			level = slog.LevelDebug // a cluster changes all the time
		}
		a.log.Log(ctx, level, "applied", "revision", next.Revision, "services", len(next.Services),
			"took", time.Since(began).Round(10*time.Microsecond))
	}
	if a.monitor != nil {
		a.follow(nil)
	}
	if err != nil {
		a.log.Error("some services did not fit", "error", err)
	}
	return err
}

// applyPlanes has every plane install a snapshot. Each is tried, whatever becomes
// of the others.
func (a *Agent) applyPlanes(ctx context.Context, snap *service.Snapshot) error {
	err := a.plane.Apply(ctx, snap)
	if a.cluster == nil {
		return err
	}
	return errors.Join(err, a.cluster.nat.Apply(ctx, snap))
}

func (a *Agent) setInKernel(is bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.inKernel = is
}

// overlay puts the state of backends over configured services. Services without
// state are the same pointers.
func (a *Agent) overlay(services []*service.Service) []*service.Service {
	if len(a.state) == 0 {
		return services
	}
	touched := make(map[string]bool, len(a.state))
	for k := range a.state {
		touched[k.Service] = true
	}
	out := make([]*service.Service, len(services))
	for i, s := range services {
		out[i] = s
		if touched[s.Name] {
			out[i] = a.withState(s)
		}
	}
	return out
}

func (a *Agent) withState(s *service.Service) *service.Service {
	c := *s
	c.Backends = make([]service.Backend, len(s.Backends))
	for i, b := range s.Backends {
		st := a.state[health.Key{Service: s.Name, Address: b.Address}]
		b.Down = st.down && s.Health.Probe != service.ProbeNone
		b.Drained, b.DrainUntil = st.drained, st.drainUntil
		b.DrainOver = st.drainUntil > 0 && uint32(time.Now().Unix()) >= st.drainUntil
		c.Backends[i] = b
	}
	return &c
}

// targets returns what to probe from now on, and what no longer. known are the
// backends whose state an earlier agent left.
func (a *Agent) targets(last, next *service.Snapshot, known map[health.Key]bool) (add []health.Target, remove []health.Key) {
	changed, removed := service.Diff(last, next)
	changed = append(changed, a.remarked(next)...)
	for _, s := range changed {
		if s.Health.Probe == service.ProbeNone {
			removed = append(removed, s)
			continue
		}
		for _, b := range s.Backends {
			k := health.Key{Service: s.Name, Address: b.Address}
			t := health.Target{Key: k, Health: s.Health, Down: b.Down, Known: known[k] || known[health.Key{Service: a.renamed[s.Name], Address: b.Address}] || a.knew(last, s.Name, b.Address)}
			if a.vips[b.Address] {
				t.Mark = host.ProbeMark
			}
			add = append(add, t)
		}
		if old := last.Find(s.Name); old != nil {
			remove = append(remove, missing(old, s)...)
		}
	}
	for _, s := range removed {
		remove = append(remove, missing(s, &service.Service{})...)
	}
	return add, remove
}

// knew reports whether a backend was probed under the name that its service had.
func (a *Agent) knew(last *service.Snapshot, name string, addr netip.AddrPort) bool {
	old := a.renamed[name]
	if old == "" {
		return false
	}
	s := last.Find(old)
	return s != nil && s.Health.Probe != service.ProbeNone &&
		slices.ContainsFunc(s.Backends, func(b service.Backend) bool { return b.Address == addr })
}

// remarked returns the services that have a backend whose address became a VIP,
// or is one no more.
func (a *Agent) remarked(snap *service.Snapshot) []*service.Service {
	var touched []*service.Service
	for _, s := range snap.Services {
		if len(a.remark) > 0 && slices.ContainsFunc(s.Backends, func(b service.Backend) bool { return a.remark[b.Address] }) {
			touched = append(touched, s)
		}
	}
	a.remark = nil
	return touched
}

// missing returns the backends of old that the other does not have.
func missing(old, other *service.Service) []health.Key {
	has := make(map[string]bool, len(other.Backends))
	for _, b := range other.Backends {
		has[b.Address.String()] = true
	}
	var keys []health.Key
	for _, b := range old.Backends {
		if !has[b.Address.String()] {
			keys = append(keys, health.Key{Service: old.Name, Address: b.Address})
		}
	}
	return keys
}

// rename takes what is known of backends along when their service changes its name.
func (a *Agent) rename(services []*service.Service) {
	last := a.snapshot.Services
	if a.recalled != nil {
		last, a.recalled = a.recalled, nil
	}
	names := service.Renamed(last, services)
	if len(names) == 0 {
		return
	}
	now := make(map[string]string, len(names))
	for name, old := range names {
		now[old] = name
	}
	state := make(map[health.Key]state, len(a.state))
	for k, st := range a.state {
		if name, ok := now[k.Service]; ok {
			k.Service = name
		}
		state[k] = st
	}
	a.state = state
	a.renamed = names
}

// prune forgets the state of backends that are not in the configuration.
func (a *Agent) prune() {
	if a.snapshot.Partial {
		return
	}
	for k := range a.state {
		s := a.snapshot.Find(k.Service)
		if s == nil || !slices.ContainsFunc(s.Backends, func(b service.Backend) bool { return b.Address == k.Address }) {
			delete(a.state, k)
		}
	}
}

// follow tells the monitor what is installed now.
func (a *Agent) follow(known map[health.Key]bool) {
	if a.monitored == a.snapshot {
		return
	}
	a.monitor.Update(a.targets(a.monitored, a.snapshot, known))
	a.monitored, a.renamed = a.snapshot, nil
}

// Drain implements api.Agent.
func (a *Agent) Drain(ctx context.Context, r api.DrainRequest) error {
	d := drain{r, make(chan error, 1)}
	select {
	case a.drains <- d:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-d.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Status implements api.Agent.
func (a *Agent) Status() api.Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := api.Status{
		MemoryLimit: memoryLimit(),
		Version:     a.opts.Version, PID: os.Getpid(), Started: a.started, Revision: a.snapshot.Revision,
		Config: api.Config{File: a.opts.ConfigFile, Loaded: a.loaded},
	}
	if a.monitor != nil {
		st := a.monitor.Stats()
		s.Probes = api.Probes{Targets: st.Targets, Done: st.Probes, Late: st.Late}
		s.Problems = append(s.Problems, probing(st)...)
	}
	if a.invalid != nil {
		s.Config.Error = a.invalid.Error()
		s.Problems = append(s.Problems, "the configuration file is not valid and not in force: "+a.invalid.Error())
	}
	a.cluster.addTo(&s)
	if a.failed != nil {
		s.Problems = append(s.Problems, "not everything is in the kernel: "+a.failed.Error())
	}
	return s
}

// probing says what is wrong with the probes.
func probing(st health.Stats) (problems []string) {
	if st.Late > time.Second {
		problems = append(problems, fmt.Sprintf(
			"probes of service %s start %s late: too many of its backends are silent, or this host cannot keep up; probe fewer backends, less often, or with a shorter timeout",
			st.Latest, st.Late.Round(time.Millisecond)))
	}
	if st.Unmade > 0 {
		problems = append(problems, fmt.Sprintf(
			"%d backends cannot be probed, by a fault of this host, and count as what they were: %v", st.Unmade, st.Fault))
	}
	return problems
}

// server is one address that the agent serves.
type server struct {
	*http.Server
	listener net.Listener
}

// maxStrangers is how many connections of whoever asks for metrics are open at
// once.
const maxStrangers = 64

func (a *Agent) serve(c config.API) ([]*server, error) {
	l, err := api.Listen(a.opts.RunDir)
	if err != nil {
		return nil, err
	}
	servers := []*server{{Server: &http.Server{Handler: api.Handler(a)}, listener: l}}
	// Metrics are worth less than services: without the port the agent runs on.
	l, err = net.Listen("tcp", c.Listen.String())
	if err != nil {
		a.log.Error("no metrics: the address of api.listen cannot be used", "error", err)
		return servers, nil
	}
	return append(servers, &server{
		Server:   guard.NewLimit(maxStrangers).Server(guard.Local(a.metricsHandler())),
		listener: l,
	}), nil
}

func (a *Agent) serveUntil(ctx context.Context, s *server) {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		<-ctx.Done()
		s.Close()
	}()
	if err := s.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		a.log.Error("agent API ended", "error", err)
	}
	<-closed
}
