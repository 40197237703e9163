package socket

import (
	"encoding/binary"
	"hash/maphash"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/pentad/pentad/service"
)

// ledger is what user space knows of the maps: who has which index, what stands
// there. It is pure: it turns a wish into writes and makes none itself.
type ledger struct {
	capacity capacity

	services indexes
	backends indexes
	slots    extents

	generation []uint32 // of every backend index

	byName map[string]*entry
	owner  map[service.Listener]*entry
	v4, v6 int // listeners installed

	shared map[uint32]uint32 // listeners by their bit of the filter
	filter map[uint32]uint64 // words of the filter that are not 0

	// Backends whose connections are to be closed, also those that are gone, and
	// which connections (enum reset_scope).
	resets map[uint32]uint8
	// Backends that are gone from their services, but not from the objects that
	// these were made from.
	orphans map[uint32]orphan

	// What the programs may still be reading: free after a grace period.
	retired struct {
		services, backends []uint32
		slots              []extent
	}
}

// capacity is the size of the maps that follow the configuration.
type capacity struct {
	Services, Backends, Slots, Listeners4, Listeners6 uint32
}

// entry is one service in the kernel.
type entry struct {
	id       uint32
	name     string
	of       *service.Origin
	info     kernelServiceInfo
	places   []place
	tables   [2]table // by family
	shown    shown
	complete bool // false: the kernel's copy is not known to be right, write all of it
}

// place is one backend in the kernel. A host may have a hundred thousand.
type place struct {
	hot   hot
	index uint32
	info  info
}

// hot is kernelBackend without its padding.
type hot struct {
	addr       [4]uint32
	port       uint16
	state      uint8
	reset      uint8
	generation uint32
	service    uint32
	weight     uint32
	cost       uint32
	started    uint64
	leave      uint64
}

func (h hot) backend() kernelBackend {
	return kernelBackend{
		Addr: h.addr, Port: h.port, State: h.state, Reset: h.reset, Generation: h.generation,
		Service: h.service, Weight: h.weight, Cost: h.cost, Started: h.started, Leave: h.leave,
	}
}

func newHot(b *kernelBackend) hot {
	return hot{
		addr: b.Addr, port: b.Port, state: b.State, reset: b.Reset, generation: b.Generation,
		service: b.Service, weight: b.Weight, cost: b.Cost, started: b.Started, leave: b.Leave,
	}
}

// info is kernelBackendDetail without the room that C needs for a text.
type info struct {
	group         uint32
	drained, down bool
	since         uint32
	drainUntil    uint32
	zone          string
}

func (p *place) address() netip.AddrPort {
	return netip.AddrPortFrom(address(p.hot.addr), bigEndian(p.hot.port))
}

func (i info) detail() kernelBackendDetail {
	d := kernelBackendDetail{
		Group: i.group, Drained: flag(i.drained), Down: flag(i.down), Since: uint64(i.since), DrainUntil: uint64(i.drainUntil),
	}
	setText(d.Zone[:], i.zone)
	return d
}

func newInfo(d *kernelBackendDetail) info {
	return info{
		group: d.Group, drained: d.Drained != 0, down: d.Down != 0, since: uint32(d.Since), drainUntil: uint32(d.DrainUntil),
		zone: text(d.Zone[:]),
	}
}

// byAddress finds the places of an entry, which may be nil.
func (e *entry) byAddress() map[netip.AddrPort]place {
	if e == nil {
		return nil
	}
	m := make(map[netip.AddrPort]place, len(e.places))
	for _, p := range e.places {
		m[p.address()] = p
	}
	return m
}

// table is one selection table in the kernel.
type table struct {
	extent extent
	sum    uint64 // of its contents
}

// batch is writes to one map, in order.
type batch[K, V any] struct {
	keys   []K
	values []V
}

func (b *batch[K, V]) add(k K, v V) {
	b.keys = append(b.keys, k)
	b.values = append(b.values, v)
}

// writes is what has to be written, in the order of its fields: everything that
// a listener leads to before the listener, what nobody leads to any more after.
type writes struct {
	added    []uint32 // indexes of services that were not there
	services batch[uint32, kernelServiceInfo]
	backends batch[uint32, kernelBackend]
	details  batch[uint32, kernelBackendDetail]
	slots    batch[uint32, kernelSlot]
	setBits  batch[uint32, uint64]

	set4    batch[kernelListener4Key, kernelListener]
	set6    batch[kernelListener6Key, kernelListener]
	remove4 []kernelListener4Key
	remove6 []kernelListener6Key

	clearedBits     batch[uint32, uint64]
	retiredBackends batch[uint32, kernelBackend]
	retiredDetails  batch[uint32, kernelBackendDetail]
	retiredServices batch[uint32, kernelServiceInfo]
}

// count returns the number of elements that would be written or removed.
func (w *writes) count() int {
	return len(w.services.keys) + len(w.backends.keys) + len(w.details.keys) + len(w.slots.keys) +
		len(w.set4.keys) + len(w.set6.keys) + len(w.remove4) + len(w.remove6) +
		len(w.retiredBackends.keys) + len(w.retiredDetails.keys) + len(w.retiredServices.keys)
}

// settle puts right what depends on the whole: a removed listener that another
// service took over stays, and a word of the filter is written with the bits of
// both what comes and what goes first, and as it will be last.
func (w *writes) settle(l *ledger) {
	w.remove4 = without(w.remove4, w.set4.keys)
	w.remove6 = without(w.remove6, w.set6.keys)
	for i, word := range w.setBits.keys {
		w.setBits.values[i] |= l.filter[word]
	}
	for i, word := range w.clearedBits.keys {
		w.clearedBits.values[i] = l.filter[word]
	}
}

func without[K comparable](keys, taken []K) []K {
	if len(keys) == 0 || len(taken) == 0 {
		return keys
	}
	set := make(map[K]bool, len(taken))
	for _, k := range taken {
		set[k] = true
	}
	return slices.DeleteFunc(keys, func(k K) bool { return set[k] })
}

// newLedger describes empty maps. first is the generation from which backends
// count; it must be one that no reference in the kernel can have.
func newLedger(c capacity, first uint32) *ledger {
	l := &ledger{
		capacity:   c,
		services:   newIndexes(c.Services),
		backends:   newIndexes(c.Backends),
		slots:      newExtents(c.Slots),
		generation: make([]uint32, c.Backends),
		byName:     make(map[string]*entry),
		owner:      make(map[service.Listener]*entry),
		shared:     make(map[uint32]uint32),
		filter:     make(map[uint32]uint64),
		resets:     make(map[uint32]uint8),
		orphans:    make(map[uint32]orphan),
	}
	for i := range l.generation {
		l.generation[i] = first
	}
	return l
}

// fits reports whether a service can be installed in what is free now.
func (l *ledger) fits(s *service.Service, t *tables) bool {
	e := l.byName[s.Name]
	newBackends, new4, new6 := 0, 0, 0
	if e == nil && l.services.room() < 1 {
		return false
	}
	places := e.byAddress()
	for _, b := range s.Backends {
		if !has(places, b.Address) {
			newBackends++
		}
	}
	for x := range shownListeners(s) {
		switch {
		case has(l.owner, x):
		case x.Address.Addr().Is4():
			new4++
		default:
			new6++
		}
	}
	if l.backends.room() < newBackends ||
		int(l.capacity.Listeners4)-l.v4 < new4 || int(l.capacity.Listeners6)-l.v6 < new6 {
		return false
	}
	// Both tables in one hole: a little stricter than needed, and simple.
	return l.slots.fits(t[0].length() + t[1].length())
}

// tables are the selection tables of a service by family, and within it by the
// order in which they are tried.
type tables [2]family

type family [][]service.Slot

func tablesOf(s *service.Service) *tables { return &tables{s.Tables(service.V4), s.Tables(service.V6)} }

// length returns how many slots the tables and the heads after them take.
func (f family) length() uint32 {
	n := uint32(0)
	for _, t := range f {
		n += uint32(len(t)) + 1
	}
	return n
}

// first returns how many slots the first table has.
func (f family) first() uint32 {
	if len(f) == 0 {
		return 0
	}
	return uint32(len(f[0]))
}

// moment is when writes are made: for people, and for the programs.
type moment struct {
	time    time.Time
	jiffies uint64
	leave   uint64 // jiffies: when who sends without a connection has left a backend that is drained now
}

// leaveWithin is how long who sends datagrams without a connection may stay with a
// backend that takes no new connections: nothing of theirs ever ends.
const leaveWithin = 30 * time.Second

func has[K comparable, V any](m map[K]V, k K) bool {
	_, ok := m[k]
	return ok
}

// install stages what makes the kernel show the service; the caller has asked
// whether it fits.
func (l *ledger) install(s *service.Service, t *tables, now moment, w *writes) {
	e := l.byName[s.Name]
	if e == nil {
		e = &entry{
			id: l.services.take(), name: s.Name,
			shown: make(shown, 0, len(s.Listeners)),
		}
		l.byName[s.Name] = e
		w.added = append(w.added, e.id)
	}
	gone := l.placeBackends(e, s, now, w)
	if info := e.serviceInfo(s); !e.complete || info != e.info {
		e.info = info
		w.services.add(e.id, info)
	}
	l.placeTables(e, t, w)
	l.showListeners(e, s, t, w)
	e.of = s.Of
	l.retireBackends(gone, e.fate(s.Of), now, w)
	e.complete = true
}

// placeBackends writes the backends that are new or changed, so that the entry
// has those of the service in their order. It returns those that it had besides.
func (l *ledger) placeBackends(e *entry, s *service.Service, now moment, w *writes) (gone map[netip.AddrPort]place) {
	gone = e.byAddress()
	fresh := len(gone) == 0
	places := make([]place, len(s.Backends))
	costs := s.Costs()
	for i, state := range s.States() {
		b := s.Backends[i]
		p, known := gone[b.Address]
		delete(gone, b.Address)
		if !known {
			p.index = l.backends.take()
		}
		hot := hotBackend(b, state, e.id, l.generation[p.index])
		hot.cost, hot.reset = costs[i], resetOf(s, b)
		if hot.started = p.hot.started; !fresh && b.Usable() && !takesConnections(p.hot.state) {
			// It joins others, or comes back: little by little.
			hot.started = max(1, now.jiffies)
		}
		hot.leave = leaveOf(s, b, state, p.hot.leave, now)
		in := info{b.Group, b.Drained, b.Down, p.info.since, b.DrainUntil, b.Zone}
		if !known || hot.state != p.hot.state {
			in.since = uint32(now.time.Unix())
		}
		if !known || !e.complete || hot != p.hot {
			w.backends.add(p.index, hot.backend())
			l.markReset(p.index, hot.reset)
		}
		if !known || !e.complete || in != p.info {
			w.details.add(p.index, in.detail())
		}
		places[i] = place{hot, p.index, in}
	}
	e.places = places
	return gone
}

// hasUDP reports whether any listener is one of UDP.
func (l *ledger) hasUDP() bool {
	if l == nil {
		return false
	}
	for x := range l.owner {
		if x.Protocol == service.UDP {
			return true
		}
	}
	return false
}

// resetOf says which connections of a backend are to be closed.
func resetOf(s *service.Service, b service.Backend) uint8 {
	switch {
	case s.Closes(b):
		return uint8(kernelResetScopeRESET_ALL)
	case b.Unserving && s.OnDown == service.Reset && slices.ContainsFunc(s.Listeners, func(l service.Listener) bool { return l.Protocol == service.UDP }):
		return uint8(kernelResetScopeRESET_UDP)
	}
	return 0
}

// leaveOf says when who sends datagrams without a connection leaves a backend: given
// time, because nothing of theirs ever ends, but not where the source says that it
// still serves them, or that it does not.
func leaveOf(s *service.Service, b service.Backend, state service.State, before uint64, now moment) uint64 {
	switch {
	case state != service.Drained || b.DrainUntil != 0:
		return 0
	case b.Unserving:
		return max(1, now.jiffies)
	case s.Of != nil && !b.Drained:
		return 0
	case before != 0:
		return before
	}
	return now.leave
}

func (l *ledger) markReset(index uint32, reset uint8) {
	if reset != 0 {
		l.resets[index] = reset
	} else {
		delete(l.resets, index)
	}
}

// takesConnections reports whether a backend in this state may get one.
func takesConnections(state uint8) bool {
	return state == uint8(kernelBackendStateBACKEND_SERVING) || state == uint8(kernelBackendStateBACKEND_STANDBY)
}

// shownListeners are the listeners of a service that sockets can find, as the
// maps are keyed, each with its traits. A service may have none.
func shownListeners(s *service.Service) iter.Seq2[service.Listener, uint8] {
	return func(yield func(service.Listener, uint8) bool) {
		for _, x := range s.Listeners {
			traits := uint8(0)
			switch {
			case x.From.Has(service.FromSockets):
			case x.From.Has(service.FromHost):
				traits |= uint8(kernelTraitTRAIT_HOST)
			default:
				continue
			}
			if x.Held {
				traits |= uint8(kernelTraitTRAIT_HELD)
			}
			if !yield(x.At(), traits) {
				return
			}
		}
	}
}

// placeTables writes the selection tables that changed into new ranges.
func (l *ledger) placeTables(e *entry, t *tables, w *writes) {
	for f := range t {
		slots := e.layOut(t[f])
		sum := sumSlots(slots)
		old := e.tables[f]
		if e.complete && old.extent.length == uint32(len(slots)) && old.sum == sum {
			continue
		}
		fresh, _ := l.slots.take(uint32(len(slots)))
		for i, s := range slots {
			w.slots.add(fresh.start+uint32(i), s)
		}
		if old.extent.length > 0 {
			l.retired.slots = append(l.retired.slots, old.extent)
		}
		e.tables[f] = table{fresh, sum}
	}
}

// layOut puts tables behind each other as struct slot in bpf/layout.h has it.
func (e *entry) layOut(f family) []kernelSlot {
	slots := make([]kernelSlot, 0, f.length())
	for i, t := range f {
		for _, s := range t {
			slots = append(slots, kernelSlot{
				First: e.places[s.First].index, Second: e.places[s.Second].index, Threshold: s.Threshold,
			})
		}
		next := kernelSlot{}
		if i+1 < len(f) {
			next.First = uint32(len(f[i+1]))
		}
		slots = append(slots, next)
	}
	return slots
}

// showListeners switches the listeners of the service to its tables.
func (l *ledger) showListeners(e *entry, s *service.Service, t *tables, w *writes) {
	wanted := make(map[service.Listener]bool, len(s.Listeners))
	for x, traits := range shownListeners(s) {
		wanted[x] = true
		f := service.FamilyOf(x.Address.Addr()).Index()
		at := e.tables[f].extent
		value := kernelListener{
			Service: e.id, Slots: at.start, Count: t[f].first(), Length: at.length, Traits: e.traits() | traits,
			Affinity: uint32(s.Affinity / time.Second), Balance: uint8(s.Balance), Keepalive: keepalive(s.Keepalive),
		}
		value.Sum = listenerSum(&value, x)
		holder := l.owner[x]
		if holder == e && e.complete && e.shown.get(x) == value {
			continue
		}
		if holder == nil {
			l.countListener(x, 1, w)
		} else if holder != e {
			holder.shown.remove(x)
		}
		l.owner[x] = e
		e.shown.set(x, value)
		if service.FamilyOf(x.Address.Addr()) == service.V4 {
			w.set4.add(key4(x), value)
		} else {
			w.set6.add(key6(x), value)
		}
	}
	for _, x := range e.shown.listeners() {
		if !wanted[x] {
			l.hideListener(e, x, w)
		}
	}
}

func (l *ledger) hideListener(e *entry, x service.Listener, w *writes) {
	e.shown.remove(x)
	delete(l.owner, x)
	l.countListener(x, -1, w)
	if x.Address.Addr().Is4() {
		w.remove4 = append(w.remove4, key4(x))
	} else {
		w.remove6 = append(w.remove6, key6(x))
	}
}

// countListener notes that a listener comes (1) or goes (-1) and stages its bit
// of the filter.
func (l *ledger) countListener(x service.Listener, n int, w *writes) {
	if x.Address.Addr().Is4() {
		l.v4 += n
	} else {
		l.v6 += n
	}
	bit := filterBit(x)
	word, mask := bit/64, uint64(1)<<(bit%64)
	if n > 0 {
		l.shared[bit]++
		if l.shared[bit] == 1 {
			l.filter[word] |= mask
			w.setBits.add(word, l.filter[word])
		}
		return
	}
	l.shared[bit]--
	if l.shared[bit] == 0 {
		delete(l.shared, bit)
		l.filter[word] &^= mask
		w.clearedBits.add(word, 0)
	}
}

const filterBits = uint32(kernelFilterSizeFILTER_BITS)

// filterBit is filter_bit of bpf/layout.h.
func filterBit(x service.Listener) uint32 {
	return (address4(x)*0x9e3779b1 ^ portProtocol(x)*0x85ebca77) >> (32 - filterBits)
}

// address4 is an IPv4 address, or the words of an IPv6 address folded.
func address4(x service.Listener) uint32 {
	w := words(x.Address.Addr())
	if x.Address.Addr().Is4() {
		return w[3]
	}
	return w[0] ^ w[1] ^ w[2] ^ w[3]
}

// listenerSum is listener_sum of bpf/layout.h.
func listenerSum(v *kernelListener, x service.Listener) uint32 {
	const factor = 0x9e3779b97f4a7c15
	sum := (uint64(address4(x))<<32 | uint64(portProtocol(x))) * factor
	sum = (sum ^ (uint64(v.Service)<<32 | uint64(v.Slots))) * factor
	sum = (sum ^ sum>>29 ^ (uint64(v.Count)<<32 | uint64(v.Affinity))) * factor
	sum = (sum ^ sum>>29 ^ uint64(v.Length)) * factor
	k := v.Keepalive
	sum = (sum ^ sum>>29 ^ (uint64(k.Idle)<<48 | uint64(k.Interval)<<32 | uint64(k.Probes)<<16 | uint64(v.Balance)<<8 | uint64(v.Traits))) * factor
	return uint32(sum >> 32)
}

// fate is what becomes of the connections of backends that are gone.
type fate struct {
	reset bool            // they are closed
	of    *service.Origin // unless this has an endpoint there
	owner string          // its name; "": it is none of an object's
}

// fate of what a service had, given what is left of the object that it was made from.
func (e *entry) fate(left *service.Origin) fate {
	f := fate{reset: e.info.Keep == 0, of: left}
	if e.of != nil {
		f.owner = e.of.Name
	}
	return f
}

func (f fate) closes(a netip.Addr) bool {
	return f.reset && (f.owner == "" || f.of != nil && !f.of.Unsettled && !f.of.Has(a))
}

// orphan is a retired backend whose connections go on, because the object that it
// belonged to has it still, or is gone itself.
type orphan struct {
	owner string
	addr  netip.Addr
	hot   hot
}

// originOf names the object that a service of this name is made from; nil: none. The
// names of services of the file have no slash.
func originOf(name string) *service.Origin {
	object, _, _ := strings.Cut(name, ":")
	if !strings.Contains(object, "/") {
		return nil
	}
	return &service.Origin{Name: object}
}

// takeOrphans takes over those of an earlier ledger whose places are still theirs.
func (l *ledger) takeOrphans(of map[uint32]orphan) {
	for index, o := range of {
		if slices.Contains(l.retired.backends, index) && l.generation[index] == o.hot.generation {
			l.orphans[index] = o
		}
	}
}

// closeOrphans closes the connections to backends that their objects have no more.
func (l *ledger) closeOrphans(snap *service.Snapshot, w *writes) {
	for index, o := range l.orphans {
		of := snap.Origin(o.owner)
		if of == nil || of.Unsettled || of.Has(o.addr) {
			continue
		}
		o.hot.reset = uint8(kernelResetScopeRESET_ALL)
		l.markReset(index, o.hot.reset)
		w.retiredBackends.add(index, o.hot.backend())
		delete(l.orphans, index)
	}
}

// retireBackends takes back the places of backends that are gone.
func (l *ledger) retireBackends(gone map[netip.AddrPort]place, f fate, now moment, w *writes) {
	for _, addr := range slices.SortedFunc(maps.Keys(gone), netip.AddrPort.Compare) {
		p := gone[addr]
		l.generation[p.index]++
		// The address stays until the place has a new occupant: a
		// program that is looking at it now must not see half of it.
		hot := p.hot
		hot.state, hot.service, hot.weight = 0, 0, 0
		hot.started = max(1, now.jiffies)
		hot.generation = l.generation[p.index]
		switch {
		case hot.reset == uint8(kernelResetScopeRESET_ALL):
		case f.closes(addr.Addr()):
			hot.reset = uint8(kernelResetScopeRESET_ALL)
		case f.reset:
			l.orphans[p.index] = orphan{f.owner, addr.Addr(), hot}
		}
		l.markReset(p.index, hot.reset)
		w.retiredBackends.add(p.index, hot.backend())
		w.retiredDetails.add(p.index, kernelBackendDetail{})
		l.retired.backends = append(l.retired.backends, p.index)
	}
}

// rename gives services new names, new to old. Their installation writes them.
func (l *ledger) rename(names map[string]string) {
	moved := make(map[string]*entry, len(names))
	for name, old := range names {
		if e := l.byName[old]; e != nil {
			moved[name] = e
			delete(l.byName, old)
		}
	}
	for name, e := range moved {
		// Nobody else may have that name: of two the younger one yields.
		if l.byName[name] == nil {
			e.name = name
			l.byName[name] = e
		} else {
			l.byName[e.name] = e
		}
	}
}

// remove stages the removal of a service. What is left of the object that it was made
// from is in snap.
func (l *ledger) remove(name string, snap *service.Snapshot, now moment, w *writes) {
	e := l.byName[name]
	if e == nil {
		return
	}
	for _, x := range e.shown.listeners() {
		l.hideListener(e, x, w)
	}
	var left *service.Origin
	if e.of != nil {
		left = snap.Origin(e.of.Name)
	}
	l.retireBackends(e.byAddress(), e.fate(left), now, w)
	for f := range e.tables {
		if e.tables[f].extent.length > 0 {
			l.retired.slots = append(l.retired.slots, e.tables[f].extent)
		}
	}
	w.retiredServices.add(e.id, kernelServiceInfo{})
	l.retired.services = append(l.retired.services, e.id)
	delete(l.byName, name)
}

// usedBackends returns the places that services have, and those that are retired.
func (l *ledger) usedBackends() map[uint32]bool {
	used := make(map[uint32]bool)
	for _, e := range l.byName {
		for _, p := range e.places {
			used[p.index] = true
		}
	}
	for _, i := range l.retired.backends {
		used[i] = true
	}
	return used
}

// manyRetired reports whether a grace period would free an eighth of anything.
func (l *ledger) manyRetired() bool {
	slots := uint32(0)
	for _, e := range l.retired.slots {
		slots += e.length
	}
	return uint32(len(l.retired.services)) > l.capacity.Services/8 ||
		uint32(len(l.retired.backends)) > l.capacity.Backends/8 ||
		slots > l.capacity.Slots/8
}

// reclaim frees what was retired; the caller has waited for a grace period.
// Backends that are busy, which still have connections, stay retired. It returns
// the indexes of backends that are free now.
func (l *ledger) reclaim(busy func(uint32) bool) []uint32 {
	for _, i := range l.retired.services {
		l.services.give(i)
	}
	var freed, kept []uint32
	for _, i := range l.retired.backends {
		if busy(i) {
			kept = append(kept, i)
			continue
		}
		l.backends.give(i)
		delete(l.resets, i)
		delete(l.orphans, i)
		freed = append(freed, i)
	}
	for _, e := range l.retired.slots {
		l.slots.give(e)
	}
	l.retired.services, l.retired.backends, l.retired.slots = nil, kept, nil
	return freed
}

// serviceInfo is the service as the programs obey it; the backends have their
// places already.
func (e *entry) serviceInfo(s *service.Service) kernelServiceInfo {
	info := kernelServiceInfo{
		Joined:         e.lastJoined(),
		MaxConnections: uint32(s.Breaker.MaxConnections), Failures: uint32(s.Breaker.Failures),
		Ejection: milliseconds(s.Breaker.Ejection), MaxEjected: uint32(s.Breaker.MaxEjected),
		ConnectTimeout: milliseconds(s.ConnectTimeout), SlowStart: milliseconds(s.SlowStart),
		Silent: flag(s.Silent), Keep: flag(s.OnDown == service.Keep),
		Balance: uint8(s.Balance), Source: uint8(s.Source), Affinity: uint32(s.Affinity / time.Second), Keepalive: keepalive(s.Keepalive),
	}
	if s.Health.Probe != service.ProbeNone {
		info.Verdict = milliseconds(s.Health.Verdict())
	}
	setText(info.Name[:], s.Name)
	return info
}

// traits are what spares the programs a look at the service and its backends.
func (e *entry) traits() uint8 {
	traits := kernelTraitTRAIT_EVEN
	if e.info.MaxConnections == 0 && e.info.SlowStart == 0 {
		traits |= kernelTraitTRAIT_PLAIN
	}
	if e.info.ConnectTimeout > 0 {
		traits |= kernelTraitTRAIT_TIMED
	}
	for _, p := range e.places {
		if p.hot.cost != e.places[0].hot.cost {
			traits &^= kernelTraitTRAIT_EVEN
		}
	}
	return uint8(traits)
}

// lastJoined returns when the backend that joined last did so, in jiffies, or 0.
func (e *entry) lastJoined() uint64 {
	last := uint64(0)
	for _, p := range e.places {
		last = max(last, p.hot.started)
	}
	return last
}

func milliseconds(d time.Duration) uint32 { return uint32(d / time.Millisecond) }

func keepalive(k service.Keepalive) kernelKeepalive {
	return kernelKeepalive{
		Idle: uint16(k.Idle / time.Second), Interval: uint16(k.Interval / time.Second), Probes: uint16(k.Probes),
	}
}

func hotBackend(b service.Backend, state service.State, id, generation uint32) hot {
	return hot{
		addr: words(b.Address.Addr()), port: bigEndian(b.Address.Port()), state: kernelState(state),
		generation: generation, service: id, weight: b.Weight,
	}
}

func kernelState(s service.State) uint8 {
	switch s {
	case service.Serving:
		return uint8(kernelBackendStateBACKEND_SERVING)
	case service.Standby:
		return uint8(kernelBackendStateBACKEND_STANDBY)
	case service.Drained:
		return uint8(kernelBackendStateBACKEND_DRAINED)
	case service.Down:
		return uint8(kernelBackendStateBACKEND_DOWN)
	}
	return uint8(kernelBackendStateBACKEND_NONE)
}

func flag(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// key4 and key6 are a listener as a key of its map, listener4 and listener6 the
// way back.
func key4(x service.Listener) kernelListener4Key {
	return kernelListener4Key{Addr: words(x.Address.Addr())[3], PortProtocol: portProtocol(x)}
}

func key6(x service.Listener) kernelListener6Key {
	return kernelListener6Key{Addr: words(x.Address.Addr()), PortProtocol: portProtocol(x)}
}

func listener4(k kernelListener4Key) service.Listener {
	return newListener([4]uint32{0, 0, mapped, k.Addr}, k.PortProtocol)
}

func listener6(k kernelListener6Key) service.Listener {
	return newListener(k.Addr, k.PortProtocol)
}

func portProtocol(x service.Listener) uint32 {
	return uint32(bigEndian(x.Address.Port()))<<16 | uint32(x.Protocol)
}

func newListener(addr [4]uint32, portProtocol uint32) service.Listener {
	return service.Listener{
		Address:  netip.AddrPortFrom(address(addr), bigEndian(uint16(portProtocol>>16))),
		Protocol: service.Protocol(portProtocol),
	}
}

// mapped is the third word of an IPv4-mapped address, as it lies in memory.
var mapped = words(netip.AddrFrom4([4]byte{}))[2]

// words is an address in the form of the maps: network byte order, IPv4 mapped.
func words(a netip.Addr) [4]uint32 {
	b := a.As16()
	var w [4]uint32
	for i := range w {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

// address is the reverse of words.
func address(w [4]uint32) netip.Addr {
	var b [16]byte
	for i := range w {
		binary.NativeEndian.PutUint32(b[4*i:], w[i])
	}
	return netip.AddrFrom16(b).Unmap()
}

// bigEndian turns a port into network byte order and back.
func bigEndian(p uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], p)
	return binary.NativeEndian.Uint16(b[:])
}

// setText writes a string into a C array; what does not fit is cut.
func setText(to []int8, text string) {
	clear(to)
	for i := range min(len(text), len(to)-1) {
		to[i] = int8(text[i])
	}
}

// text reads a C array.
func text(from []int8) string {
	b := make([]byte, 0, len(from))
	for _, c := range from {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b)
}

var sumSeed = maphash.MakeSeed()

// sumSlots tells tables apart within one process.
func sumSlots(slots []kernelSlot) uint64 {
	if len(slots) == 0 {
		return 0
	}
	size := int(unsafe.Sizeof(slots[0])) * len(slots)
	return maphash.Bytes(sumSeed, unsafe.Slice((*byte)(unsafe.Pointer(&slots[0])), size))
}
