// Package agent runs one host: it takes services from the sources, puts the state of
// backends over them, and has every role make of it what is its business. Reload and
// recovery are decided here and nowhere else.
//
// roles.go says what an agent can be; loop.go is where things change, one after the
// other; drive.go keeps a role to what is known.
//
// The agent may die at any moment. What it has installed goes on working, and
// the next agent takes it over; so nothing that clients depend on may live in
// this process alone.
package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/claim"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
	"github.com/pentad/pentad/source/file"
)

// Options say what an agent runs on.
type Options struct {
	ConfigFile string
	Pins       string // directory on bpffs
	RunDir     string // for the agent's socket
	StateDir   string // for what outlives a restart of the host; empty: nothing does
	Version    string
	Log        *slog.Logger

	// Reload has the file read again each time something comes from it; nil: never.
	Reload <-chan os.Signal

	MaxBackends int // see socket.Options
}

// Agent is one running agent.
type Agent struct {
	opts    Options
	log     *slog.Logger
	monitor *health.Monitor
	cluster *cluster
	fleet   *fleet
	claims  *claims
	drivers []driver
	started time.Time
	tasks   sync.WaitGroup // all that runs beside the loop

	updates  chan source.Update
	blocks   chan claim.View
	changes  chan []health.Change
	drains   chan drain
	reloads  chan reload
	pings    chan struct{} // is the loop alive?
	pongs    chan struct{}
	outcomes chan outcome

	// Owned by the loop.
	states   states
	probes   probes
	recalled []*service.Service // what an earlier agent left, until it was compared
	pending  []pendingDrain
	asked    []pendingReload
	reached  map[string]outcome // what each driver said last
	watch    publication

	savedDrains string    // as they stand in their file
	published   time.Time // when something was last
	goodParts   map[string]config.Part
	texts       chan *config.Text
	unsaved     unsaved

	mu      sync.Mutex // guards what follows, which the API reads
	known   *known
	inbox   inbox
	loaded  time.Time
	invalid error  // why the newest file is not in force
	inForce string // the digest of what the fleet has said that is in the kernel
}

// Run runs an agent until the context ends. What it installed stays.
func Run(ctx context.Context, opts Options) error {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if err := socket.CheckHost(); err != nil {
		return err
	}
	from, err := file.New(opts.ConfigFile)
	if err != nil {
		return err
	}
	defer from.Close()
	first, err := from.Load()
	if err != nil && !mayWait(opts) {
		return firstErrors(err)
	}
	lock, err := host.LockWithin(ctx, opts.Pins, downPatience)
	if err != nil {
		return err
	}
	defer lock.Close()
	return newAgent(opts, roles).run(ctx, from, first)
}

// mayWait reports whether an agent waits for a file that is valid: what was in force
// goes on meanwhile, and a service manager need not start it again and again. A person at
// a terminal is better served by an end with the reason.
func mayWait(opts Options) bool {
	_, err := socket.Read(opts.Pins)
	return isManaged() || err == nil || loadText(opts) != nil
}

func newAgent(opts Options, roles []role) *Agent {
	a := &Agent{
		opts: opts, log: opts.Log, started: time.Now(), states: make(states), reached: make(map[string]outcome),
		updates: make(chan source.Update), blocks: make(chan claim.View), changes: make(chan []health.Change), drains: make(chan drain), reloads: make(chan reload), pings: make(chan struct{}), pongs: make(chan struct{}), texts: make(chan *config.Text, 1), outcomes: make(chan outcome),
		known: &known{services: &service.Snapshot{}},
	}
	a.cluster = &cluster{log: a.log, emit: func(ctx context.Context, u source.Update) { send(ctx, a.updates, u) }}
	a.fleet = &fleet{log: a.log, say: a.report, emit: func(ctx context.Context, u source.Update) { send(ctx, a.updates, u) }}
	a.claims = &claims{log: a.log, runDir: opts.RunDir, emit: func(ctx context.Context, v claim.View) { send(ctx, a.blocks, v) }}
	for _, r := range roles {
		a.drivers = append(a.drivers, r.drive(a))
	}
	return a
}

func (a *Agent) run(ctx context.Context, from *file.Source, first source.Update) error {
	if err := a.recall(); err != nil {
		return err
	}
	_ = a.loadDrains() // it says itself what is wrong
	ctx, stop := context.WithCancel(ctx)
	defer a.tasks.Wait()
	defer stop()
	a.monitor = health.New(a.log, func(c []health.Change) { send(ctx, a.changes, c) })
	a.probes.monitor = a.monitor
	defer a.cluster.close()
	defer a.fleet.close()
	defer a.claims.close()
	for _, d := range a.drivers {
		a.tasks.Go(func() { d.run(ctx) })
	}
	first, broken := a.firstFile(first)
	if first.Config != nil {
		a.takeFile(ctx, first)
		if err := a.awaitFirst(ctx); err != nil || ctx.Err() != nil {
			return err
		}
		a.log.Info("services are in the kernel", "revision", a.known.services.Revision,
			"services", len(a.known.services.Services), "took", time.Since(a.started).Round(time.Millisecond))
	}
	if broken != nil {
		a.rejectFile(broken)
	}
	if err := a.serveSocket(ctx); err != nil {
		return err
	}
	a.tasks.Go(a.saveTexts)
	defer func() {
		a.queueText()
		close(a.texts)
	}()
	tellManager(daemon.SdNotifyReady)
	a.tasks.Go(func() { a.watchdog(ctx) })
	a.tasks.Go(func() { a.monitor.Run(ctx) })
	failed := make(chan error, 1)
	a.tasks.Go(func() {
		if err := from.Run(ctx, func(u source.Update) { send(ctx, a.updates, u) }); err != nil {
			failed <- err
		}
	})
	return a.loop(ctx, failed)
}

// awaitFirst waits until every role on which services depend was tried once. An agent
// that cannot do its work at all does not stay.
func (a *Agent) awaitFirst(ctx context.Context) error {
	for !a.settled() {
		select {
		case <-ctx.Done():
			return nil
		case o := <-a.outcomes:
			a.onOutcome(o)
			if o.err != nil && !isPartial(o.err) && !a.isMinor(o.role) {
				return o.err
			}
		}
	}
	return nil
}

func send[T any](ctx context.Context, to chan<- T, v T) {
	select {
	case to <- v:
	case <-ctx.Done():
	}
}

// poke wakes whoever waits for something to happen; once is enough.
func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// recall takes the state of backends from the kernel, where an earlier agent left it.
func (a *Agent) recall() error {
	v, err := socket.Read(a.opts.Pins)
	if errors.Is(err, socket.ErrNothingInstalled) {
		return nil
	}
	if errors.Is(err, socket.ErrNewer) {
		return err
	}
	if err != nil {
		// An older layout, or pins that somebody damaged: start afresh.
		a.log.Warn("the state of backends could not be read from the kernel", "error", err)
		return nil
	}
	a.recallStates(v.Services)
	return nil
}

// recallStates takes the states of backends that the kernel shows.
func (a *Agent) recallStates(services []*service.Service) {
	a.recalled = services
	a.probes.known = make(map[health.Key]bool)
	for _, s := range services {
		for _, b := range s.Backends {
			k := health.Key{Service: s.Name, Address: b.Address}
			a.probes.known[k] = true
			a.states.set(k, state{
				down: b.Down, drained: b.Drained, drainUntil: b.DrainUntil, lasting: b.Drained && s.Source != service.SourceKubernetes,
			})
		}
	}
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

// Drain implements api.Agent.
func (a *Agent) Drain(ctx context.Context, r api.DrainRequest) (api.DrainAnswer, error) {
	d := drain{r, make(chan drainOutcome, 1)}
	o, err := ask(ctx, a.drains, d, d.done)
	if err != nil {
		return api.DrainAnswer{}, err
	}
	return o.answer, o.err
}

// Reload implements api.Agent.
func (a *Agent) Reload(ctx context.Context, r api.ReloadRequest) (api.ReloadAnswer, error) {
	q := reload{r, make(chan reloadOutcome, 1)}
	o, err := ask(ctx, a.reloads, q, q.done)
	if err != nil {
		return api.ReloadAnswer{}, err
	}
	return o.answer, o.err
}

// ask hands a question to the loop and waits for what it says.
func ask[Q, A any](ctx context.Context, to chan<- Q, question Q, answer <-chan A) (A, error) {
	var none A
	select {
	case to <- question:
	case <-ctx.Done():
		return none, ctx.Err()
	}
	select {
	case a := <-answer:
		return a, nil
	case <-ctx.Done():
		return none, ctx.Err()
	}
}
