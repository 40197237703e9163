package claim

import (
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"time"

	"github.com/pentad/pentad/ipam"
)

// Holder decides what a host does with its blocks. It is pure: the same table, room and
// moment make the same decision.
type Holder struct {
	Self      Owner
	Pools     []ipam.BlockPool
	Addresses []netip.Addr   // by which other hosts reach this one
	Preferred []netip.Prefix // names of blocks that are claimed before others
	// Incarnation tells this start of this host from others.
	Incarnation string
	// Only says that nothing but this host's start is written, as long as it is not known
	// whether a copy of this host lives.
	Only bool
	// Strays are addresses of this host's pods that are in none of its blocks: objects are
	// gone that should be there.
	Strays []netip.Addr
	// Confirm holds blocks, by ID, with their epochs when this host had been without its
	// store for so long that others might think it gone. They are written once more, so
	// that whoever is about to free one has to look again.
	Confirm map[string]uint64
	empty   map[string]time.Time // since when a block has had no pod, by ID
}

// Room is what this host does with one of its blocks.
type Room struct {
	Used   int  // addresses that pods have
	Closed bool // no plugin gives addresses of it, and none can be about to
}

// The rest of a host's room.
const (
	// spare is how many free addresses a host has ahead: a pod does not wait for a
	// store.
	spare = 16
	// emptyFor is how long a block is without pods before it is given back.
	emptyFor = 10 * time.Minute
)

// Verb is what is done with an object.
type Verb uint8

// The verbs.
const (
	Nothing Verb = iota
	Create
	Update
	Delete
)

// Write is one write to the store.
type Write struct {
	Verb  Verb
	Block Block
	Why   string
}

// ExhaustedError says that no block is free.
type ExhaustedError struct {
	Pools []ipam.BlockPool
	Held  map[string]int // hosts with how many blocks
}

// Error implements error.
func (e *ExhaustedError) Error() string {
	total, most, who := 0, 0, ""
	for _, p := range e.Pools {
		total += p.Blocks()
	}
	for name, n := range e.Held {
		if n > most || n == most && name < who {
			most, who = n, name
		}
	}
	return fmt.Sprintf("no block of addresses is free: all %d of pods.ranges are given to %d hosts, of which %s has the most, %d; add a range to pods.ranges on all hosts, or free what hosts have that are gone (pentad pod blocks)", total, len(e.Held), who, most)
}

// Next decides what this host writes next. The error is one that people have to mend; it
// comes with a write that helps, if there is one.
func (h *Holder) Next(t Table, room func(Block) Room, now time.Time) (Write, error) {
	mine := t.Of(h.Self)
	if h.Only {
		return h.begin(mine), nil
	}
	h.noteEmpty(mine, room, now)
	for _, b := range mine {
		if b.Draining && room(b).Closed {
			return Write{Delete, b, "it is empty"}, nil
		}
	}
	for _, b := range mine {
		if w, ok := h.refresh(t, b); ok {
			return w, nil
		}
	}
	w, strayed := h.reclaim(t)
	if w.Verb != Nothing {
		return w, strayed
	}
	if w, err := h.part(t, mine, room); w.Verb != Nothing || err != nil {
		return w, errors.Join(strayed, err)
	}
	free := 0
	for _, b := range mine {
		if h.usable(b) {
			free += slots(b) - room(b).Used
		}
	}
	w, err := h.grow(t, mine, free)
	if w.Verb == Nothing {
		w = h.shrink(mine, room, free, now)
	}
	return w, errors.Join(strayed, err)
}

// reclaim makes the objects again that pods of this host need: somebody has deleted them.
func (h *Holder) reclaim(t Table) (Write, error) {
	var errs []error
	for _, a := range h.Strays {
		b, ok := h.around(a)
		if !ok {
			continue // of a range that is gone: nobody else gets it
		}
		if h.isFree(t, b) {
			return Write{Create, Block{Block: b, Owner: h.Self, Addresses: h.Addresses, Epoch: 1, Incarnation: h.Incarnation}, "a pod of this host has the address " + a.String()}, nil
		}
		errs = append(errs, fmt.Errorf("a pod of this host has the address %s, which is in a block of %s: packets to it go there; delete the pod", a, t.ownerOf(a)))
	}
	return Write{}, errors.Join(errs...)
}

// around returns the block of the pools that has an address.
func (h *Holder) around(a netip.Addr) (ipam.Block, bool) {
	for _, p := range h.Pools {
		of := p.V4
		if a.Is6() {
			of = p.V6
		}
		if !of.IsValid() || !of.Contains(a) {
			continue
		}
		if a.Is6() && p.V4.IsValid() {
			return p.FindV6(a)
		}
		name, err := a.Prefix(a.BitLen() - p.HostBits)
		if err != nil {
			return ipam.Block{}, false
		}
		return p.Find(name)
	}
	return ipam.Block{}, false
}

// ownerOf returns the name of the host that has an address.
func (t Table) ownerOf(a netip.Addr) string {
	for _, b := range t.Blocks {
		if b.Contains(a) {
			return cmp.Or(b.Owner.Name, "nobody")
		}
	}
	return "somebody"
}

// part gives up a block of which another host has a part: ranges were cut otherwise, and
// hosts claimed at the same moment. While pods have addresses of it people have to decide.
func (h *Holder) part(t Table, mine []Block, room func(Block) Room) (Write, error) {
	odd := h.odd(t)
	for _, b := range mine {
		i := slices.IndexFunc(odd, func(o Block) bool { return o.Owner != h.Self && o.Overlaps(b.Block) })
		others := ""
		if i >= 0 {
			others = odd[i].Owner.Name
		} else if now, ok := h.find(b.Name()); !ok || now != b.Block {
			others = t.overlapping(b)
		}
		switch {
		case others == "" || b.Draining:
		case room(b).Used > 0:
			return Write{}, fmt.Errorf("the block %s is this host's and in part that of %s; pods have addresses of it here: delete them, or those there", b.Name(), others)
		default:
			b.Draining, b.Epoch = true, b.Epoch+1
			return Write{Update, b, "it is in part that of " + others}, nil
		}
	}
	return Write{}, nil
}

// overlapping returns the name of another owner who has a part of a block.
func (t Table) overlapping(b Block) string {
	for _, o := range t.Blocks {
		if o.Owner != b.Owner && o.Overlaps(b.Block) {
			return cmp.Or(o.Owner.Name, "nobody")
		}
	}
	return ""
}

// begin writes this start of the host into its blocks, one after the other.
func (h *Holder) begin(mine []Block) Write {
	for _, b := range mine {
		if b.Incarnation != h.Incarnation {
			b.Incarnation, b.Epoch = h.Incarnation, b.Epoch+1
			return Write{Update, b, "this host has been started"}
		}
	}
	return Write{}
}

// usable reports whether addresses of a block of this host are given.
func (h *Holder) usable(b Block) bool { return !b.Draining && h.pooled(b) }

// pooled reports whether a block is one of the pools as they are now.
func (h *Holder) pooled(b Block) bool {
	now, ok := h.find(b.Name())
	return ok && (b.Block == now || !b.V6.IsValid())
}

func (h *Holder) find(name netip.Prefix) (ipam.Block, bool) {
	for _, p := range h.Pools {
		if b, ok := p.Find(name); ok {
			return b, true
		}
	}
	return ipam.Block{}, false
}

// slots is how many pods find an address in a block: the first stays free.
func slots(b Block) int {
	n := 1 << 30
	for _, p := range b.Prefixes() {
		n = min(n, 1<<min(30, p.Addr().BitLen()-p.Bits())-1)
	}
	return n
}

// refresh writes what others have to know of a block.
func (h *Holder) refresh(t Table, b Block) (Write, bool) {
	next := b
	next.Incarnation = h.Incarnation
	if len(h.Addresses) > 0 {
		next.Addresses = h.Addresses
	}
	// The pool may have another family only now. What pods may have already stays.
	if now, ok := h.find(b.Name()); ok && !b.V6.IsValid() && !slices.ContainsFunc(t.others(b), now.Overlaps) {
		next.Block = now
	}
	epoch, confirm := h.Confirm[b.ID]
	if confirm = confirm && b.Epoch <= epoch; next.Equal(b) && !confirm {
		return Write{}, false
	}
	why := "this host has another address, or there is another range"
	if next.Equal(b) {
		why = "this host has not heard of the store for long"
	}
	next.Epoch++
	return Write{Update, next, why}, true
}

// grow sees to it that there are addresses ahead.
func (h *Holder) grow(t Table, mine []Block, free int) (Write, error) {
	wanted := spare
	if len(h.Pools) > 0 {
		wanted = min(spare, max(1, slots(Block{Block: h.Pools[0].Block(0)})/2))
	}
	if free >= wanted {
		return Write{}, nil
	}
	for _, b := range mine {
		if b.Draining && h.pooled(b) {
			b.Draining, b.Epoch = false, b.Epoch+1
			return Write{Update, b, "it is needed again"}, nil
		}
	}
	next, ok := h.choose(t)
	if !ok {
		return Write{}, h.exhausted(t)
	}
	return Write{Create, Block{Block: next, Owner: h.Self, Addresses: h.Addresses, Epoch: 1, Incarnation: h.Incarnation}, "it is needed"}, nil
}

func (h *Holder) exhausted(t Table) error {
	e := &ExhaustedError{Pools: h.Pools, Held: make(map[string]int)}
	for _, b := range t.Blocks {
		e.Held[b.Owner.Name]++
	}
	return e
}

// draws is how many blocks of a pool are tried, as they come for this host, before all
// are gone through in their order.
const draws = 16

// mostTried bounds that: more blocks beside each other that are all given there are not,
// unless somebody has one that is as large as all of them.
const mostTried = 1 << 16

// choose returns a block that is nobody's. Each host tries them in an order of its own, so
// that hosts that look at the same moment hardly ever meet.
func (h *Holder) choose(t Table) (ipam.Block, bool) {
	odd := h.odd(t)
	free := func(b ipam.Block) bool {
		return t.lacks(b) && !slices.ContainsFunc(odd, func(o Block) bool { return b.Overlaps(o.Block) })
	}
	for _, name := range h.Preferred {
		if b, ok := h.find(name); ok && free(b) {
			return b, true
		}
	}
	for _, p := range h.Pools {
		n := p.Blocks()
		start := 0
		for i := range draws {
			start = int(hash(h.Self.Name, i) % uint64(n))
			if b := p.Block(start); free(b) {
				return b, true
			}
		}
		for i := range min(n, mostTried) {
			if b := p.Block((start + i) % n); free(b) {
				return b, true
			}
		}
	}
	return ipam.Block{}, false
}

// lacks reports whether there is no object of the name of a block.
func (t Table) lacks(b ipam.Block) bool {
	_, taken := t.Blocks[b.Name()]
	return !taken && (len(t.Bad) == 0 || !t.Bad[Key(b.Name())])
}

// isFree reports whether nobody has a block or a part of it.
func (h *Holder) isFree(t Table, b ipam.Block) bool {
	return t.lacks(b) && !slices.ContainsFunc(h.odd(t), func(o Block) bool { return b.Overlaps(o.Block) })
}

// odd returns the blocks of a table that are not as the pools cut them, because the pools
// were others once: what they overlap with is not known by name. Of what reaches beyond the
// pools no pod of anybody has an address.
func (h *Holder) odd(t Table) (all []Block) {
	for name, b := range t.Blocks {
		if now, ok := h.find(name); (!ok || now != b.Block) && h.within(b) {
			all = append(all, b)
		}
	}
	slices.SortFunc(all, byName)
	return all
}

// within reports whether a block lies in the pools.
func (h *Holder) within(b Block) bool {
	return slices.ContainsFunc(b.Prefixes(), func(p netip.Prefix) bool {
		return slices.ContainsFunc(h.Pools, func(pool ipam.BlockPool) bool {
			for _, of := range []netip.Prefix{pool.V4, pool.V6} {
				if of.IsValid() && of.Bits() <= p.Bits() && of.Contains(p.Addr()) {
					return true
				}
			}
			return false
		})
	})
}

// others returns all blocks but one.
func (t Table) others(b Block) (all []ipam.Block) {
	for _, o := range t.Blocks {
		if o.Name() != b.Name() {
			all = append(all, o.Block)
		}
	}
	return all
}

// hash mixes well also in its low bits, of which a small pool uses no more.
func hash(name string, i int) uint64 {
	f := fnv.New64a()
	fmt.Fprintf(f, "%s/%d", name, i)
	x := f.Sum64()
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	return x ^ x>>33
}

// noteEmpty keeps since when blocks have had no pod.
func (h *Holder) noteEmpty(mine []Block, room func(Block) Room, now time.Time) {
	was := h.empty
	h.empty = make(map[string]time.Time, len(mine))
	for _, b := range mine {
		if room(b).Used > 0 {
			continue
		}
		since, ok := was[b.ID]
		if !ok {
			since = now
		}
		h.empty[b.ID] = since
	}
}

// shrink begins to give a block back that this host does not need, one at a time: one of
// no pool of now, or one that has been empty for long while there is room enough.
func (h *Holder) shrink(mine []Block, room func(Block) Room, free int, now time.Time) Write {
	if slices.ContainsFunc(mine, func(b Block) bool { return b.Draining && h.pooled(b) }) {
		return Write{}
	}
	hasAnother := len(h.Pools) == 0 || slices.ContainsFunc(mine, func(b Block) bool { return h.usable(b) && room(b).Used < slots(b) })
	for _, b := range mine {
		// Without another one its pods would find no place.
		if !b.Draining && !h.pooled(b) && hasAnother {
			b.Draining, b.Epoch = true, b.Epoch+1
			return Write{Update, b, "it is in none of pods.ranges"}
		}
	}
	for _, b := range slices.Backward(mine) {
		since, empty := h.empty[b.ID]
		if !b.Draining && empty && now.Sub(since) >= emptyFor && free-slots(b) >= 2*spare {
			b.Draining, b.Epoch = true, b.Epoch+1
			return Write{Update, b, fmt.Sprintf("it has been empty since %s", since.UTC().Format(time.RFC3339))}
		}
	}
	return Write{}
}
