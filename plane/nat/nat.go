// Package nat serves what arrives at this host from elsewhere, and what guests
// without sockets of their own here send: it translates the destination of the
// first packet of a connection with one nftables table, and the kernel's
// connection tracking does the rest. It has one verb: Apply makes the kernel look
// like a snapshot.
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
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/pentad/pentad/service"
)

// Plane is the nat plane of one host, which is the network namespace of this
// process. Its methods may be called from several goroutines.
type Plane struct {
	log *slog.Logger

	mu         sync.Mutex
	applied    *service.Snapshot // what is in the kernel; nil: not known
	chains     map[string]bool   // of backends
	local      users             // backends on this host
	taken      users             // addresses of listeners in reserved ranges
	vips       users             // addresses of listeners in untracked ranges
	generation uint32            // of the rule set when Check saw it last; 0: changed since

	staleMu   sync.Mutex
	stale     stale // what conntrack has to forget
	later     stale // of this, what may be a handshake that is under way
	staleWake chan struct{}
}

// New returns a plane that has not touched the kernel yet.
func New(log *slog.Logger) *Plane {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Plane{log: log, stale: make(stale), later: make(stale), staleWake: make(chan struct{}, 1)}
}

// Apply makes the kernel look like the snapshot. It may be called again after any
// error. While a snapshot is partial it leaves the kernel alone.
func (p *Plane) Apply(ctx context.Context, snap *service.Snapshot) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := ctx.Err(); err != nil || snap.Partial {
		return err
	}
	err := p.apply(snap)
	if err != nil {
		p.applied = nil
		return fmt.Errorf("table inet %s: %w", TableName, err)
	}
	p.applied = snap
	return nil
}

func (p *Plane) apply(snap *service.Snapshot) error {
	k, err := dial()
	if err != nil {
		return err
	}
	defer k.close()
	if p.applied == nil || !slices.Equal(p.applied.Reserved, snap.Reserved) || !slices.Equal(p.applied.Untracked, snap.Untracked) {
		return p.reconcile(k, snap)
	}
	if p.applied == snap {
		return nil
	}
	var c change
	needed := make(map[string]chain)
	ended := make(stale)
	changed, removed := service.Diff(p.applied, snap)
	for _, s := range removed {
		ended.between(s, &service.Service{})
		p.stage(&c, s, &service.Service{}, &snap.Ranges, needed)
	}
	for _, s := range changed {
		before := p.applied.Find(s.Name)
		if before == nil {
			before = &service.Service{}
		}
		ended.between(before, s)
		p.stage(&c, before, s, &snap.Ranges, needed)
	}
	c.differ(rangeElements(setGuests, p.applied.Guests), rangeElements(setGuests, snap.Guests))
	c.settle()
	if err := p.commit(k, &c, needed); err != nil {
		return err
	}
	p.forget(ended)
	return nil
}

// stage adds what makes one service the other.
func (p *Plane) stage(c *change, before, after *service.Service, ranges *service.Ranges, needed map[string]chain) {
	c.differ(elementsOf(before, make(map[string]chain)), elementsOf(after, needed))
	for _, x := range []struct {
		counted users
		of      func(*service.Service) []netip.Addr
		as      func(netip.Addr) []element
	}{
		{p.local, localAddresses, onHost},
		{p.taken, func(s *service.Service) []netip.Addr { return listenersIn(s, ranges.Reserved) }, plainIn(setTaken)},
		{p.vips, func(s *service.Service) []netip.Addr { return listenersIn(s, ranges.Untracked) }, plainIn(setVIPs)},
	} {
		c.remove = append(c.remove, x.counted.change(x.of(before), -1, x.as)...)
		c.add = append(c.add, x.counted.change(x.of(after), 1, x.as)...)
	}
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
	return []element{{in: set{setLocal, a.Is4()}, key: raw}, {in: set{setHairpin, a.Is4()}, key: raw + raw}}
}

func plainIn(name setName) func(netip.Addr) []element {
	return func(a netip.Addr) []element { return []element{{in: set{name, a.Is4()}, key: string(a.AsSlice())}} }
}

// rangeElements are ranges in a set of intervals.
func rangeElements(name setName, ranges []netip.Prefix) []element {
	var all []element
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, netip.Prefix.Compare)
	for _, v4 := range []bool{true, false} {
		for _, p := range merged(sorted, v4) {
			first, last := bounds(p)
			all = append(all, element{in: set{name, v4}, key: first + last})
		}
	}
	return all
}

// reconcile reads the kernel and makes it right, whoever made it what it is.
func (p *Plane) reconcile(k *kernel, snap *service.Snapshot) error {
	p.local, p.taken, p.vips = make(users), make(users), make(users)
	p.chains = make(map[string]bool)
	found, err := k.inspect()
	if err != nil {
		return err
	}
	needed := make(map[string]chain)
	var want change
	for _, s := range snap.Services {
		p.stage(&want, &service.Service{}, s, &snap.Ranges, needed)
	}
	want.add = append(want.add, rangeElements(setGuests, snap.Guests)...)
	want.add = append(want.add, rangeElements(setReserved, snap.Reserved)...)
	want.add = append(want.add, rangeElements(setUntracked, snap.Untracked)...)
	if len(snap.Untracked) > 0 {
		raw := chain{untracked: snap.Untracked}
		needed[raw.name()] = raw
	}
	if found == nil {
		if err := k.create(); err != nil {
			return err
		}
		return p.noting(k, &want, func() error { return p.commit(k, &want, needed) })
	}
	if !found.sound {
		p.log.Warn("the table of the nat plane is not what it should be, and is made anew", "table", TableName)
		return p.noting(k, &want, func() error {
			k.replace()
			return p.commitAtOnce(k, &want, needed)
		})
	}
	have, err := k.elements()
	if err != nil {
		return err
	}
	for _, name := range found.chains {
		p.chains[name] = true
	}
	var c change
	c.differ(have, want.add)
	if err := p.noting(k, &c, func() error { return p.commit(k, &c, needed) }); err != nil {
		return err
	}
	ended := make(stale)
	ended.found(&c)
	p.forget(ended)
	return p.removeChains(k, needed)
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
	p.addChains(k, needed)
	slices.SortStableFunc(c.add, func(a, b element) int { return order(a) - order(b) })
	for part := range slices.Chunk(c.add, perTransaction) {
		k.add(part)
		if err := p.flush(k); err != nil {
			return err
		}
	}
	return nil
}

// order puts verdicts behind what they lead to, and what says that an address has
// no other listeners behind these.
func order(e element) int {
	switch e.in.name {
	case setServices, setGuestsTo:
		return 1
	case setTaken, setReserved, setUntracked:
		return 2
	}
	return 0
}

func (p *Plane) commitAtOnce(k *kernel, c *change, needed map[string]chain) error {
	p.addChains(k, needed)
	k.remove(c.remove)
	k.add(c.add)
	return p.flush(k)
}

func (p *Plane) addChains(k *kernel, needed map[string]chain) {
	// Chains lead to those that stick.
	for _, sticks := range []bool{true, false} {
		for name, c := range needed {
			if !p.chains[name] && (c.slots == 0 && c.untracked == nil) == sticks {
				k.addChain(c)
				p.chains[name] = true
			}
		}
	}
}

func (p *Plane) flush(k *kernel) error {
	// To ask for the new number would wait until the kernel has freed what was
	// removed; the next Check looks at the table instead.
	p.generation = 0
	return k.conn.Flush()
}

// Check reports whether the table is still there and whole. If not, the next Apply
// makes it so. It is cheap while nobody changes the rule set.
func (p *Plane) Check() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.applied == nil {
		return false
	}
	now, err := generation()
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

// Verify makes the next Apply read the kernel again instead of trusting what this
// process knows of it.
func (p *Plane) Verify() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied = nil
}

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
