// Package socket translates destinations when a socket connects. It owns the
// programs in bpf/socket.bpf.c, their maps and their pins, and has one verb:
// Apply makes the kernel look like a Want.
//
// The kernel is the truth: what is installed is read back from the maps, never
// remembered across processes. Nothing here may leave the maps, at any moment,
// in a state in which a connect() finds half a mapping, and nothing may depend
// on this process being alive.
//
// Facts about the hooks come from the kernel's net/ipv4/af_inet.c,
// net/ipv4/udp.c, net/ipv6/udp.c and kernel/bpf/cgroup.c.
package socket

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// Options say where a plane lives.
type Options struct {
	Pins        string // directory on bpffs, DefaultPins if empty
	Version     string // of this pentad, written into the pins
	Log         *slog.Logger
	MaxBackends int // never make room for more backends; 0: as many as memory holds

	// Lost is called when what Apply made may be gone, as it is when the cgroup of the
	// scope is made again; nil: it is noticed when Intact is asked.
	Lost func()

	// Diag closes connections through sock_diag(7), as is done without asking on
	// a kernel without bpf_sock_destroy.
	Diag bool
}

// Want is what the plane is to make of the kernel.
type Want struct {
	Cgroup   string // the cgroup (v2) whose processes see the services, "/" for all
	Services *service.Snapshot
	// Silent are sources that have not told yet what they have: what the kernel has
	// of them beyond Services stays.
	Silent service.Sources
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool { return w == o }

// Plane is the socket plane of one host. Its methods may be called from several
// goroutines.
type Plane struct {
	opts   Options
	dir    string
	chores chores
	scoped chan struct{} // another cgroup is wanted

	mu      sync.Mutex
	clock   *host.Clock
	sweeper *sweeper
	set     *mapSet
	ledger  *ledger
	orphans map[uint32]orphan // of the ledger; they outlive it
	loaded  *loaded           // nil: no programs are
	loading <-chan *loaded    // those that are being loaded; nil: none are
	links   attacher
	applied *service.Snapshot // what the ledger knows to be in the kernel
	scope   string            // the cgroup that is wanted
	partial bool              // the kernel may show services that applied does not name
	cgroup  string            // where the current programs are attached; empty: they are not
}

// FullError says that services did not fit into the kernel. All others are
// installed; these keep what they had before.
type FullError struct {
	Services []string // sorted
	Cause    error    // why there is no more room
}

// Error names the services.
func (e *FullError) Error() string {
	return fmt.Sprintf("no room in the kernel for %d services (%s): %v", len(e.Services), shorten(e.Services, 5), cmp.Or(e.Cause, errMap))
}

// Unwrap returns the cause.
func (e *FullError) Unwrap() error { return e.Cause }

func shorten(names []string, n int) string {
	if len(names) > n {
		return strings.Join(names[:n], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}

var (
	errLimit = errors.New("the limit on backends is reached")
	errMap   = errors.New("they need more than one map may hold")
)

// New returns a plane that has not touched the kernel yet. The caller holds the
// lock on the pins.
func New(opts Options) *Plane {
	if opts.Pins == "" {
		opts.Pins = host.DefaultPins
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	dir := filepath.Join(opts.Pins, planeDir)
	if opts.Lost == nil {
		opts.Lost = func() {}
	}
	return &Plane{
		opts: opts, dir: dir, chores: chores{wake: make(chan struct{}, 1)}, scoped: make(chan struct{}, 1), links: attacher{dir: dir},
	}
}

// Close lets go of the kernel. What is installed stays and goes on working.
func (p *Plane) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.links.close()
	p.set.close()
	p.clock.Close()
	p.sweeper.close()
	p.loaded.close()
	p.set, p.clock, p.sweeper, p.loaded, p.ledger = nil, nil, nil, nil, nil
}

// Apply makes the kernel look like the want. It may be called again after
// any error. A *FullError means that everything else is in place.
func (p *Plane) Apply(ctx context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	p.setScope(want.Cgroup)
	path, err := host.CgroupPath(want.Cgroup)
	if err != nil {
		return err
	}
	if err := p.open(want.Services); err != nil {
		return err
	}
	if err := p.loadAhead(); err != nil {
		return err
	}
	full, err := p.install(want)
	p.takeLoaded()
	if err != nil {
		p.forgetKernel()
		return err
	}
	if p.cgroup != path {
		if err := p.attach(path); err != nil {
			return err
		}
	}
	p.chores.wakeUp()
	if full != nil {
		return full
	}
	return nil
}

// Usage is what the installed plane uses and has done.
type Usage struct {
	Hooks    []Hook
	Memory   map[string]uint64 // bytes by map
	Counters Counters
}

// Usage reads the kernel. The error is ErrNothingInstalled before the first Apply.
func (p *Plane) Usage() (Usage, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.set == nil {
		return Usage{}, ErrNothingInstalled
	}
	c, err := readCounters(p.set)
	return Usage{Hooks: readHooks(p.dir), Memory: p.set.memory(), Counters: c}, err
}

// BackendLoad is the load of one backend of one service.
type BackendLoad struct {
	Service string
	Address netip.AddrPort
	Load
}

// ErrMany says that there are more backends than were asked for at most.
var ErrMany = errors.New("more backends than wanted")

// Loads reads the load of every backend. The error is ErrMany when there are more
// than most.
func (p *Plane) Loads(most int) ([]BackendLoad, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ledger == nil {
		return nil, ErrNothingInstalled
	}
	n := 0
	for _, e := range p.ledger.byName {
		n += len(e.places)
	}
	if n > most {
		return nil, ErrMany
	}
	loads, err := p.set.readLoads()
	if err != nil {
		return nil, err
	}
	blames, err := p.set.readBlames(p.clock)
	if err != nil {
		return nil, err
	}
	all := make([]BackendLoad, 0, n)
	for _, e := range p.ledger.byName {
		for i := range e.places {
			at := &e.places[i]
			all = append(all, BackendLoad{e.name, at.address(), blames.load(&loads[at.index], &e.info, at.reference())})
		}
	}
	return all, nil
}

// Refusals reads how many connections and datagrams each service has refused because no
// backend of it was usable.
func (p *Plane) Refusals() (map[string]uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ledger == nil {
		return nil, ErrNothingInstalled
	}
	counts, err := p.set.readRefusals()
	if err != nil {
		return nil, err
	}
	named := make(map[string]uint64, len(p.ledger.byName))
	for name, e := range p.ledger.byName {
		named[name] = counts[e.id]
	}
	return named, nil
}

// Distrust makes the next Apply read the kernel again instead of trusting what
// this process knows of it.
func (p *Plane) Distrust() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgetKernel()
}

// Intact reports whether everything that Apply attached and pinned still is. If not,
// the next Apply puts it back. It is cheap.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cgroup == "" || p.set == nil {
		return false
	}
	id, err := host.CgroupID(p.cgroup)
	lost := err != nil || !p.set.pinned()
	for _, h := range readHooks(p.dir) {
		lost = lost || h.CgroupID != id
	}
	if lost {
		p.cgroup = ""
	}
	return !lost
}

func (p *Plane) forgetKernel() {
	p.ledger, p.applied, p.cgroup = nil, nil, ""
}

// open finds or makes the maps and learns what is in them.
func (p *Plane) open(snap *service.Snapshot) error {
	if p.ledger != nil {
		return nil
	}
	// Kernels before 5.11 count maps against RLIMIT_MEMLOCK.
	if err := rlimit.RemoveMemlock(); err != nil {
		return err
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	if p.clock == nil {
		c, err := host.NewClock()
		if err != nil {
			return err
		}
		p.clock = c
	}
	p.set.close()
	p.set = nil
	number, info, err := openAbout(p.dir, nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return p.create(snap, number+1, nil, nil)
	case err != nil:
		return fmt.Errorf("pins under %s: %w", p.dir, err)
	case info.Layout > layoutVersion:
		return foreignLayout(p.dir, info)
	}
	spec, err := loadKernel()
	if err != nil {
		return err
	}
	set, err := openOlderSet(p.dir, number)
	if err != nil {
		return fmt.Errorf("pins under %s: %w", p.dir, err)
	}
	if info.Layout != layoutVersion || !set.compatible(spec) {
		defer set.close()
		return p.rebuild(snap, set, spec)
	}
	p.set = set
	return p.adopt()
}

// adopt takes over the maps of p.set with all that is in them.
func (p *Plane) adopt() error {
	l, w, err := adopt(p.set)
	if err != nil {
		return err
	}
	// An agent that died may have retired what a program still reads.
	host.WaitForReaders()
	if err := p.set.write(w); err != nil {
		return err
	}
	if err := p.sortLoads(l); err != nil {
		return err
	}
	l.takeOrphans(p.orphans)
	p.orphans = l.orphans
	p.ledger, p.applied, p.partial = l, &service.Snapshot{}, true
	return nil
}

// sortLoads keeps the places of backends that are gone but have connections from
// being used, and wipes those that are free.
func (p *Plane) sortLoads(l *ledger) error {
	loads, err := p.set.readLoads()
	if err != nil {
		return err
	}
	busy := l.backends.takeIf(func(i uint32) bool { return int(i) < len(loads) && isBusy(&loads[i]) })
	l.retired.backends = append(l.retired.backends, busy...)
	used := l.usedBackends()
	var stale []uint32
	for i := range loads {
		if loads[i] != (kernelLoad{}) && !used[uint32(i)] {
			stale = append(stale, uint32(i))
		}
	}
	return p.set.clearLoads(stale)
}

// create makes empty maps; those of from that are named in keep live on in them.
func (p *Plane) create(snap *service.Snapshot, number int, from *mapSet, keep []string) error {
	spec, err := loadKernel()
	if err != nil {
		return err
	}
	c := p.limit(roomFor(snap))
	resize(spec, c)
	set, err := createSet(p.dir, number, spec, from, keep)
	if err != nil {
		return fmt.Errorf("pins under %s: %w", p.dir, err)
	}
	// References of sockets and clients may come from an earlier set: a
	// generation drawn by lot keeps them from meeting a new backend.
	l := newLedger(c, rand.Uint32N(1<<31))
	p.set = set
	if from != nil {
		if err := p.sortLoads(l); err != nil {
			return err
		}
	}
	p.ledger, p.applied = l, &service.Snapshot{}
	return nil
}

// rebuild makes maps of this version beside those of an older one. What sockets
// did moves over; the configuration is written anew.
func (p *Plane) rebuild(snap *service.Snapshot, old *mapSet, spec *ebpf.CollectionSpec) error {
	var keep []string
	for _, name := range stateMaps {
		have := old.maps[name]
		switch {
		case have == nil:
		case name == kernelMapCounters && have.MaxEntries() != spec.Maps[name].MaxEntries:
			// There is more to count now. It begins anew.
		case !sameShape(spec.Maps[name], have):
			return fmt.Errorf("pins under %s: the state of sockets in map %s has a form that this pentad cannot read; remove it with `pentad down`",
				p.dir, name)
		default:
			keep = append(keep, name)
		}
	}
	p.opts.Log.Info("rebuilding the maps of an older layout", "from", old.dir)
	return p.create(snap, old.number+1, old, keep)
}

// roomFor returns map sizes with half as much again as the snapshot needs.
func roomFor(snap *service.Snapshot) capacity {
	var c capacity
	for _, s := range snap.Services {
		c.Services++
		c.Backends += uint32(len(s.Backends))
		c.Slots += tableRoom(s)
		for _, l := range s.Listeners {
			if l.Address.Addr().Is4() {
				c.Listeners4++
			} else {
				c.Listeners6++
			}
		}
	}
	more := func(n uint32) uint32 { return n + n/2 + 1024 }
	return capacity{
		Services: more(c.Services), Backends: min(more(c.Backends), maxBackends), Slots: more(c.Slots),
		Listeners4: more(c.Listeners4), Listeners6: more(c.Listeners6),
	}
}

// tableRoom returns how many slots the tables of a service have at most.
func tableRoom(s *service.Service) uint32 {
	if s.Balance != service.SourceHash {
		// A head after each table, and each has one backend at least.
		return 2 * uint32(len(s.Backends))
	}
	t := tablesOf(s)
	return t[0].length() + t[1].length()
}

func (p *Plane) limit(c capacity) capacity {
	if p.opts.MaxBackends > 0 {
		c.Backends = min(c.Backends, uint32(p.opts.MaxBackends)+1) // index 0 is nobody
	}
	return c
}

// install writes what differs between the kernel and the snapshot. When
// something does not fit it first frees what is no longer read, then makes room,
// then does without.
func (p *Plane) install(want Want) (*FullError, error) {
	makeRoom := []func(*service.Snapshot) error{
		func(*service.Snapshot) error { return p.adopt() },
		p.grow,
	}
	var cause error
	for {
		if err := p.reclaimSome(); err != nil {
			return nil, err
		}
		jiffies, err := p.clock.Now()
		if err != nil {
			return nil, err
		}
		var w writes
		done, unfit := p.stage(want, moment{time.Now(), jiffies, jiffies + p.clock.Jiffies(leaveWithin)}, &w)
		if len(unfit) > 0 && len(makeRoom) > 0 {
			// Nothing was written yet: read the kernel again and start over.
			cause = makeRoom[0](want.Services)
			makeRoom = makeRoom[1:]
			if p.ledger == nil {
				return nil, cause
			}
			continue
		}
		w.settle(p.ledger)
		if err := p.set.write(&w); err != nil {
			return nil, err
		}
		// What is left alone is looked at the next time.
		p.applied, p.partial = done, len(unfit) > 0 || p.partial && want.Silent != 0
		if len(unfit) > 0 {
			return &FullError{Services: unfit, Cause: cause}, nil
		}
		return nil, nil
	}
}

// stage turns the difference into writes. It returns the snapshot that the
// kernel will show then, and the names of services that did not fit.
func (p *Plane) stage(want Want, now moment, w *writes) (*service.Snapshot, []string) {
	snap := want.Services
	changed, removed := service.Diff(p.applied, snap)
	p.ledger.rename(p.applied.Renamed(snap.Services))
	for _, s := range removed {
		p.ledger.remove(s.Name, snap, now, w)
	}
	if p.partial {
		for name, e := range p.ledger.byName {
			if snap.Find(name) == nil && !want.Silent.Has(service.Source(e.info.Source)) {
				p.ledger.remove(name, snap, now, w)
			}
		}
	}
	var unfit []string
	for _, s := range changed {
		if !isShown(s) {
			p.ledger.remove(s.Name, snap, now, w)
			continue
		}
		tables := tablesOf(s)
		if !p.ledger.fits(s, tables) {
			unfit = append(unfit, s.Name)
			continue
		}
		p.ledger.install(s, tables, now, w)
	}
	p.ledger.closeOrphans(snap, w)
	if len(unfit) == 0 {
		return snap, nil
	}
	done := *snap
	done.Services = slices.DeleteFunc(slices.Clone(snap.Services), func(s *service.Service) bool {
		_, found := slices.BinarySearch(unfit, s.Name)
		return found
	})
	return &done, unfit
}

// isShown reports whether any socket can find the service.
func isShown(s *service.Service) bool {
	for range shownListeners(s) {
		return true
	}
	return false
}

// reclaimSome frees retired places once they are a part of the whole that
// matters, so that a change need not wait for a grace period each time.
func (p *Plane) reclaimSome() error {
	if !p.ledger.manyRetired() {
		return nil
	}
	host.WaitForReaders()
	free := p.ledger.reclaim(func(index uint32) bool {
		l, err := p.set.readLoad(index)
		return err != nil || isBusy(&l)
	})
	return p.set.clearLoads(free)
}

// grow moves to larger maps: filled beside the old ones, then switched to. When
// that fails everything stays as it was, and the error says why.
func (p *Plane) grow(snap *service.Snapshot) error {
	now, need := p.set.capacity(), roomFor(snap)
	// What is there stays until the last listener is switched.
	larger := func(now, need uint32) uint32 { return now + need }
	next := p.limit(capacity{
		Services:   larger(now.Services, need.Services),
		Backends:   min(larger(now.Backends, need.Backends), maxBackends),
		Slots:      larger(now.Slots, need.Slots),
		Listeners4: larger(now.Listeners4, need.Listeners4),
		Listeners6: larger(now.Listeners6, need.Listeners6),
	})
	if p.opts.MaxBackends > 0 && now.Backends > uint32(p.opts.MaxBackends) {
		return errors.Join(errLimit, p.adopt())
	}
	p.takeLoaded() // the maps that it knows are closed here
	set, err := p.larger(next)
	if err != nil {
		return errors.Join(err, p.adopt())
	}
	old := p.set
	defer old.close()
	p.set = set
	if p.cgroup != "" {
		if err := p.attach(p.cgroup); err != nil {
			p.forgetKernel()
			return err
		}
	}
	p.opts.Log.Info("moved to larger maps", "backends", next.Backends, "slots", next.Slots,
		"listeners4", next.Listeners4, "listeners6", next.Listeners6)
	return p.adopt()
}

// larger makes a copy of the maps in another size.
func (p *Plane) larger(c capacity) (*mapSet, error) {
	spec, err := loadKernel()
	if err != nil {
		return nil, err
	}
	resize(spec, c)
	set, err := createSet(p.dir, p.set.number+1, spec, p.set, append([]string{kernelMapAffinity}, stateMaps...))
	if err != nil {
		return nil, err
	}
	if err := p.set.copyTo(set); err != nil {
		set.close()
		return nil, errors.Join(err, removeSet(set.dir))
	}
	return set, nil
}

// loaded are programs that the kernel has verified, over the maps of one set. That
// takes it the better part of a second, which a cgroup that was made again has not.
type loaded struct {
	set      *mapSet
	programs map[string]*ebpf.Program
	walk     *ebpf.Variable
}

func (l *loaded) close() {
	if l == nil {
		return
	}
	for _, p := range l.programs {
		p.Close()
	}
}

// loadAhead begins to load the programs over the current maps, unless they are: the
// kernel verifies them on another processor while services are written.
func (p *Plane) loadAhead() error {
	if p.isLoaded() {
		return nil
	}
	cookie, err := host.NamespaceCookie() // of this thread
	if err != nil {
		return err
	}
	set, done := p.set, make(chan *loaded, 1)
	p.loading = done
	go func() {
		l, _ := p.load(set, cookie) // what fails is tried again, and said, by attach
		done <- l
	}()
	return nil
}

// takeLoaded waits for what loadAhead has begun.
func (p *Plane) takeLoaded() {
	if p.loading == nil {
		return
	}
	if l := <-p.loading; l != nil {
		p.loaded.close()
		p.loaded = l
	}
	p.loading = nil
}

func (p *Plane) isLoaded() bool { return p.loaded != nil && p.loaded.set == p.set }

// attach loads the programs of this pentad over the current maps, unless they are,
// switches the hooks to them, and declares the maps to be the ones that count.
func (p *Plane) attach(cgroup string) error {
	if !p.isLoaded() {
		cookie, err := host.NamespaceCookie()
		if err != nil {
			return err
		}
		l, err := p.load(p.set, cookie)
		if err != nil {
			return err
		}
		p.loaded.close()
		p.loaded = l
	}
	p.sweeper.close()
	p.sweeper = nil
	if err := p.links.attach(p.loaded.programs, cgroup); err != nil {
		return err
	}
	sweeper, err := newSweeper(p.loaded.programs, p.loaded.walk, p.clock)
	if err != nil {
		return err
	}
	p.sweeper = sweeper
	p.cgroup = cgroup
	p.chores.recount.Store(true) // sockets may have been closed without the hooks
	if err := p.set.commit(p.opts.Version); err != nil {
		return fmt.Errorf("pins under %s: %w", p.dir, err)
	}
	return removeOtherSets(p.dir, p.set.number)
}

// load verifies the programs against the maps of a set, for a host whose network
// namespace has that cookie.
func (p *Plane) load(set *mapSet, cookie uint64) (*loaded, error) {
	spec, err := loadKernel()
	if err != nil {
		return nil, err
	}
	resize(spec, set.capacity())
	if err := spec.Variables[kernelVarProbeMark].Set(uint32(host.ProbeMark)); err != nil {
		return nil, err
	}
	if err := spec.Variables[kernelVarHz].Set(p.clock.Hz); err != nil {
		return nil, err
	}
	if err := spec.Variables[kernelVarHostNetns].Set(cookie); err != nil {
		return nil, err
	}
	if err := spec.Variables[kernelVarByDiag].Set(p.opts.Diag); err != nil {
		return nil, err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: set.maps})
	if err != nil {
		return nil, fmt.Errorf("programs: %w", err)
	}
	defer coll.Close()
	programs := make(map[string]*ebpf.Program, len(hooks))
	for _, h := range hooks {
		programs[h.name] = coll.DetachProgram(h.name)
	}
	for _, name := range sweepPrograms {
		programs[name] = coll.DetachProgram(name)
	}
	return &loaded{set, programs, coll.Variables[kernelVarWalk]}, nil
}
