// Package nat serves what arrives at this host from elsewhere, and what pods
// without sockets of their own here send: it translates the destination of the
// first packet of a connection with one nftables table, and the kernel's
// connection tracking does the rest. It has one verb: Apply makes the kernel look
// like a Want.
//
// Services are elements of maps. Rules are the same for all services with as many
// backends, so that a change of a service is a change of elements, in one
// transaction. Whatever is in the kernel is found by the name of the table, and
// nothing that packets need is in this process.
//
// Facts come from the kernel's net/netfilter/nf_tables_api.c and nft_*.c, and from
// nft(8).
package nat

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// Want is what the plane is to make of the kernel.
type Want struct {
	Services *service.Snapshot
	Ranges
}

// Ranges are the addresses that mean something to a host besides those of services.
// All are sorted.
type Ranges struct {
	// Pods are the addresses of what runs on this host with an address of its
	// own: what they are sent passes here.
	Pods []netip.Prefix

	// Reserved are ranges whose addresses only services have: what is sent there
	// and finds no listener is nobody's.
	Reserved []netip.Prefix

	// Untracked are ranges between whose addresses the kernel need not track
	// connections, unless it translates their packets.
	Untracked []netip.Prefix
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool {
	return w.Services == o.Services && slices.Equal(w.Pods, o.Pods) &&
		slices.Equal(w.Reserved, o.Reserved) && slices.Equal(w.Untracked, o.Untracked)
}

// Plane is the nat plane of one host, which is the network namespace of this
// process. Its methods may be called from several goroutines.
type Plane struct {
	log *slog.Logger

	mu         sync.Mutex
	applied    *Want                      // what is in the kernel; nil: not known
	holders    holders                    // of the listeners of applied
	refused    map[service.Listener]error // listeners that the kernel would not have
	chains     map[string]bool            // of backends
	local      users                      // backends on this host
	taken      users                      // addresses of listeners in reserved ranges
	vips       users                      // addresses of listeners in untracked ranges
	generation uint32                     // of the rule set when Intact saw it last; 0: changed since

	saidMu sync.Mutex
	said   []string                  // of refused, for people
	passed map[service.Family]string // a service whose packets this host has to pass on, by family

	staleMu   sync.Mutex
	stale     stale // flows that conntrack has to forget
	later     stale // flows to forget a moment later: some may be handshakes under way, which it has not entered yet
	staleWake chan struct{}
}

// New returns a plane that has not touched the kernel yet.
func New(log *slog.Logger) *Plane {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Plane{log: log, stale: make(stale), later: make(stale), staleWake: make(chan struct{}, 1)}
}

// Apply makes the kernel look like the want. It may be called again after any error.
func (p *Plane) Apply(ctx context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	err := p.apply(want)
	p.say()
	if err != nil {
		p.applied = nil
		return fmt.Errorf("table inet %s: %w", TableName, err)
	}
	p.applied = &want
	p.notePassed(want.Services)
	return nil
}

func (p *Plane) apply(want Want) error {
	k, err := dial()
	if err != nil {
		return err
	}
	defer k.close()
	if p.applied == nil || !slices.Equal(p.applied.Reserved, want.Reserved) || !slices.Equal(p.applied.Untracked, want.Untracked) {
		return p.reconcile(k, want)
	}
	if p.applied.Equal(want) {
		return nil
	}
	w := newWork()
	changed, removed := service.Diff(p.applied.Services, want.Services)
	for _, s := range removed {
		p.replace(w, s, nil, &want.Ranges)
	}
	for _, s := range changed {
		p.replace(w, p.applied.Services.Find(s.Name), s, &want.Ranges)
	}
	w.common.differ(rangeElements(setPods, p.applied.Pods), rangeElements(setPods, want.Pods))
	w.common.settle()
	c, ended := p.finish(w)
	err = p.commit(k, &c, w.needed)
	if isRefusal(err) {
		p.log.Warn("the kernel refuses a change of the table, which is read and made right", "table", TableName, "error", err)
		return p.reconcile(k, want)
	}
	if err != nil {
		return err
	}
	p.forget(ended)
	return nil
}

// work is a change of the table while it is put together.
type work struct {
	common change                                  // of addresses, which services have in common
	before map[service.Listener][]*service.Service // holders of the listeners that change, as they were
	needed map[string]chain                        // chains to which anything leads
}

func newWork() *work {
	return &work{before: make(map[service.Listener][]*service.Service), needed: make(map[string]chain)}
}

// replace puts one service in the place of the other; either may be nil.
func (p *Plane) replace(w *work, before, after *service.Service, ranges *Ranges) {
	for _, s := range []*service.Service{before, after} {
		if s == nil {
			continue
		}
		for _, at := range places(s) {
			if _, noted := w.before[at]; !noted {
				w.before[at] = p.holders[at]
			}
		}
	}
	if before != nil {
		p.holders.remove(before)
		p.count(w, before, -1, ranges)
	}
	if after != nil {
		p.holders.add(after)
		p.count(w, after, 1, ranges)
	}
}

// count adds to the change what addresses of a service come or go with it.
func (p *Plane) count(w *work, s *service.Service, n int, ranges *Ranges) {
	for _, x := range []struct {
		counted users
		of      []netip.Addr
		as      func(netip.Addr) []element
	}{
		{p.local, localAddresses(s), onHost},
		{p.taken, listenersIn(s, ranges.Reserved), plainIn(setTaken)},
		{p.vips, listenersIn(s, ranges.Untracked), plainIn(setVIPs)},
	} {
		all := x.counted.change(x.of, n, x.as)
		if n < 0 {
			w.common.remove = append(w.common.remove, all...)
		} else {
			w.common.add = append(w.common.add, all...)
		}
	}
}

// finish returns the whole change, and the flows that it ends.
func (p *Plane) finish(w *work) (change, stale) {
	c := w.common
	ended, slots := make(stale), make(slotTable)
	for _, at := range slices.SortedFunc(maps.Keys(w.before), service.Listener.Compare) {
		before := w.before[at]
		if p.refused[at] != nil {
			delete(p.refused, at)
			before = nil
		}
		c.differ(elementsAt(at, before, slots, make(map[string]chain)), elementsAt(at, p.holders[at], slots, w.needed))
		ended.at(at, before, p.holders[at], slots)
	}
	return c, ended
}

// users are addresses by how many services have them.
type users map[netip.Addr]int

// change counts the addresses of a service, and returns the elements of those that
// came or went thereby.
func (u users) change(of []netip.Addr, n int, as func(netip.Addr) []element) []element {
	var all []element
	for _, a := range of {
		before := u[a]
		u[a] += n
		if u[a] == 0 {
			delete(u, a)
		}
		if min(before, u[a]) == 0 {
			all = append(all, as(a)...)
		}
	}
	return all
}

// localAddresses returns where the backends on this host are, each address once.
func localAddresses(s *service.Service) []netip.Addr {
	var all []netip.Addr
	for _, b := range s.Backends {
		if b.Local {
			all = append(all, b.Address.Addr())
		}
	}
	return distinct(all)
}

// listenersIn returns the addresses of listeners that lie in ranges, each once.
func listenersIn(s *service.Service, ranges []netip.Prefix) []netip.Addr {
	var all []netip.Addr
	for _, l := range s.Listeners {
		a := l.Address.Addr()
		if slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(a) }) {
			all = append(all, a)
		}
	}
	return distinct(all)
}

func distinct(all []netip.Addr) []netip.Addr {
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

func onHost(a netip.Addr) []element {
	raw := string(a.AsSlice())
	return []element{{in: set{setLocal, service.FamilyOf(a)}, key: raw}, {in: set{setHairpin, service.FamilyOf(a)}, key: raw + raw}}
}

func plainIn(name setName) func(netip.Addr) []element {
	return func(a netip.Addr) []element {
		return []element{{in: set{name, service.FamilyOf(a)}, key: string(a.AsSlice())}}
	}
}

// rangeElements are ranges in a set of intervals.
func rangeElements(name setName, ranges []netip.Prefix) []element {
	var all []element
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, netip.Prefix.Compare)
	for _, family := range service.EachFamily {
		for _, p := range merged(sorted, family) {
			first, last := bounds(p)
			all = append(all, element{in: set{name, family}, key: first + last})
		}
	}
	return all
}

// reconcile reads the kernel and makes it right, whoever made it what it is.
func (p *Plane) reconcile(k *kernel, wanted Want) error {
	p.local, p.taken, p.vips, p.holders = make(users), make(users), make(users), make(holders)
	p.chains, p.refused = make(map[string]bool), make(map[service.Listener]error)
	found, err := k.inspect()
	if err != nil {
		return err
	}
	w := newWork()
	for _, s := range wanted.Services.Services {
		p.replace(w, nil, s, &wanted.Ranges)
	}
	want, _ := p.finish(w)
	needed := w.needed
	want.add = append(want.add, rangeElements(setPods, wanted.Pods)...)
	want.add = append(want.add, rangeElements(setReserved, wanted.Reserved)...)
	want.add = append(want.add, rangeElements(setUntracked, wanted.Untracked)...)
	if len(wanted.Untracked) > 0 {
		raw := chain{untracked: wanted.Untracked}
		needed[raw.name()] = raw
	}
	var have []element
	switch {
	case found == nil:
		err = k.create()
	case !found.sound:
		p.log.Warn("the table of the nat plane is not what it should be, and is made anew", "table", TableName)
		return p.remake(k, &want, needed)
	default:
		for _, name := range found.chains {
			p.chains[name] = true
		}
		have, err = k.elements()
	}
	if err != nil {
		return err
	}
	var c change
	c.differ(have, want.add)
	if err := p.noting(k, &c, func() error { return p.commitSafely(k, &c, needed) }); err != nil {
		return err
	}
	p.forgetFound(&c)
	return p.removeChains(k, needed)
}

// remake replaces the whole table, in one transaction if the kernel takes it so.
func (p *Plane) remake(k *kernel, want *change, needed map[string]chain) error {
	err := p.noting(k, want, func() error {
		k.replace()
		return p.commitAtOnce(k, want, needed)
	})
	if isRefusal(err) {
		// Empty first, so that what is refused can be found.
		k.replace()
		if err := p.flush(k); err != nil {
			return err
		}
		err = p.noting(k, want, func() error { return p.divide(k, want, needed) })
	}
	if err != nil {
		return err
	}
	p.forgetFound(want)
	return nil
}

func (p *Plane) forgetFound(c *change) {
	ended, slots := make(stale), make(slotTable)
	ended.found(c)
	for f := range ended {
		of := p.holders[service.Listener{Address: f.listener, Protocol: f.protocol}]
		if slices.Contains(targetsAt(service.Listener{Address: f.listener, Protocol: f.protocol}, of, slots), f.backend) ||
			f.protocol == service.UDP && servesStill(f.backend, of) {
			delete(ended, f)
		}
	}
	p.forget(ended)
}

// removeChains removes the chains to which nothing leads any more.
func (p *Plane) removeChains(k *kernel, needed map[string]chain) error {
	unused := slices.DeleteFunc(slices.Collect(maps.Keys(p.chains)), func(name string) bool {
		_, used := needed[name]
		return used
	})
	// All are emptied before any is removed: some lead to others.
	for _, name := range unused {
		k.emptyChain(name)
	}
	for _, name := range unused {
		k.removeChain(name)
		delete(p.chains, name)
	}
	return p.flush(k)
}

// perTransaction bounds the elements of one transaction: a hundred thousand at
// once would take the memory of the agent several times over.
const perTransaction = 20_000

// commit writes a change. A large one that only adds, such as the first, is divided:
// what a listener leads to is in the same transaction as the listener, or before. One
// that also removes is not, however large: between two parts services would be missing.
func (p *Plane) commit(k *kernel, c *change, needed map[string]chain) error {
	if len(c.remove) > 0 || len(c.add) <= perTransaction {
		return p.commitAtOnce(k, c, needed)
	}
	slices.SortStableFunc(c.add, func(a, b element) int { return order(a) - order(b) })
	for part := range slices.Chunk(c.add, perTransaction) {
		if err := p.commitAtOnce(k, &change{add: part}, needed); err != nil {
			return err
		}
	}
	return nil
}

// order puts verdicts behind what they lead to, and what says that an address has
// no other listeners behind these.
func order(e element) int {
	switch e.in.name {
	case setServices, setPodsTo:
		return 1
	case setTaken, setReserved, setUntracked:
		return 2
	}
	return 0
}

func (p *Plane) commitAtOnce(k *kernel, c *change, needed map[string]chain) error {
	added := p.addChains(k, chainsOf(c, needed))
	err := errors.Join(k.remove(c.remove), k.add(c.add))
	if err = errors.Join(err, p.flush(k)); err != nil {
		// Nothing of a transaction is there when it fails.
		for _, name := range added {
			delete(p.chains, name)
		}
	}
	return err
}

// chainsOf returns the chains that a change leads to, and those to which they lead.
// The one that keeps packets from being tracked is always needed.
func chainsOf(c *change, needed map[string]chain) map[string]chain {
	found := make(map[string]chain)
	for name, x := range needed {
		if x.untracked != nil {
			found[name] = x
		}
	}
	for _, e := range c.add {
		if x, ok := needed[e.data]; ok && (e.in.name == setServices || e.in.name == setPodsTo) {
			found[e.data] = x
			if x.affinity > 0 {
				found[x.sticks().name()] = x.sticks()
			}
		}
	}
	return found
}

// addChains adds the chains that are needed and not there, and returns their names.
func (p *Plane) addChains(k *kernel, needed map[string]chain) (added []string) {
	// Chains lead to those that stick.
	for _, sticks := range []bool{true, false} {
		for name, c := range needed {
			if !p.chains[name] && (c.slots == 0 && c.untracked == nil) == sticks {
				k.addChain(c)
				p.chains[name] = true
				added = append(added, name)
			}
		}
	}
	return added
}

func (p *Plane) flush(k *kernel) error {
	// To ask for the new number would wait until the kernel has freed what was
	// removed; the next Intact looks at the table instead.
	p.generation = 0
	return k.conn.Flush()
}

// Intact reports whether the table is still there and whole. If not, the next Apply
// makes it so. It is cheap while nobody changes the rule set.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.applied == nil {
		return false
	}
	now, err := nft.Generation()
	if err == nil && now == p.generation {
		return true
	}
	k, err := dial()
	if err != nil {
		return true // it is not known to be wrong
	}
	defer k.close()
	found, err := k.inspect()
	if err != nil || found != nil && found.sound && len(found.chains) == len(p.chains) {
		p.generation = now
		return true
	}
	p.applied = nil
	return false
}

// Distrust makes the next Apply read the kernel again instead of trusting what this
// process knows of it.
func (p *Plane) Distrust() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied = nil
}

// Close lets go of the kernel. What is installed stays and goes on working.
func (p *Plane) Close() {}

// Remove takes the table out of the kernel, if there is one.
func Remove() error {
	k, err := dial()
	if err != nil {
		return err
	}
	defer k.close()
	found, err := k.inspect()
	if err != nil || found == nil {
		return err
	}
	k.conn.DelTable(k.table)
	if err := k.conn.Flush(); err != nil {
		return fmt.Errorf("table inet %s: %w", TableName, err)
	}
	return nil
}
