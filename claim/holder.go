package claim

import (
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
	return w, err
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
	why := "this host has another address"
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
		wanted = min(spare, slots(Block{Block: h.Pools[0].Block(0)}))
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
	return Write{Create, Block{Block: next, Owner: h.Self, Addresses: h.Addresses, Epoch: 1}, "it is needed"}, nil
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

// choose returns a block that is nobody's. Each host tries them in an order of its own, so
// that hosts that look at the same moment hardly ever meet.
func (h *Holder) choose(t Table) (ipam.Block, bool) {
	odd := h.odd(t)
	free := func(b ipam.Block) bool {
		_, taken := t.Blocks[b.Name()]
		return !taken && !t.Bad[Key(b.Name())] && !slices.ContainsFunc(odd, b.Overlaps)
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
		for i := range n {
			if b := p.Block((start + i) % n); free(b) {
				return b, true
			}
		}
	}
	return ipam.Block{}, false
}

// odd returns the blocks of a table that are not as the pools cut them, because the pools
// were others once: what they overlap with is not known by name.
func (h *Holder) odd(t Table) (all []ipam.Block) {
	for name, b := range t.Blocks {
		if now, ok := h.find(name); !ok || now != b.Block {
			all = append(all, b.Block)
		}
	}
	return all
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
	for _, b := range mine {
		if !b.Draining && !h.pooled(b) {
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
