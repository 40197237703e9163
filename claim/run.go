package claim

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// View is what a host knows of all blocks. It is immutable.
type View struct {
	Self    Owner
	Blocks  []Block  // of all hosts, by their names
	Odd     []string // objects that make no sense
	Problem string   // of this host, that people have to mend
}

// Equal reports whether both say the same.
func (v View) Equal(o View) bool {
	return v.Self == o.Self && slices.EqualFunc(v.Blocks, o.Blocks, Block.Equal) && slices.Equal(v.Odd, o.Odd) && v.Problem == o.Problem
}

// Run follows a store and keeps this host's blocks there.
type Run struct {
	Store  Store
	Holder Holder
	// Room tells of each block of this host what it does with it, and which addresses pods
	// have that are in none.
	Room func([]Block) (map[netip.Prefix]Room, []netip.Addr, error)
	// Addresses returns those by which other hosts reach this one; it is called now and
	// then. None: they stay as they were.
	Addresses func() []netip.Addr
	// Emit is called with what is known each time that it changes.
	Emit func(context.Context, View)
	Log  *slog.Logger
	// Every is how often the room is looked at; zero: each second.
	Every time.Duration

	mu    sync.Mutex
	since time.Time // the store has not answered since; zero: it does
	why   error
	shown Table // the last one, for Free

	copied error // a copy of this host lives

	// Owned by the loop.
	table  *Table // nil: not known, or the store does not answer
	expect expectation
	said   string
	view   *View
	looked time.Time // at the addresses

	updated map[netip.Prefix]time.Time // when blocks were written last
	start   start
}

// Periods.
const (
	lookEvery      = time.Second      // at the room that there is
	addressesEvery = 10 * time.Second // at this host's own
	writePatience  = 5 * time.Second  // for one write
	showPatience   = 10 * time.Second // until a write is seen
	retryFirst     = 100 * time.Millisecond
	retryMost      = 5 * time.Second
	// updateEvery bounds how often one block is written: whoever writes it back, or drops
	// what is written, has no storm of writes.
	updateEvery = time.Second
	// confirmAfter is half of what a host is away before it may be thought gone.
	confirmAfter = 5 * time.Minute
)

// expectation is what the next table has to show before anything else is decided: what
// was written last.
type expectation struct {
	met   func(Table) bool // nil: nothing
	until time.Time
}

// Away tells since when the store has not answered, and why; zero and nil: it does. With
// zero and an error blocks cannot be claimed for another reason.
func (r *Run) Away() (time.Time, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.copied != nil {
		return time.Time{}, r.copied
	}
	return r.since, r.why
}

func (r *Run) noteAway(err error) (since time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	since = r.since
	switch {
	case err == nil:
		r.since, r.why = time.Time{}, nil
	case r.since.IsZero():
		r.since, r.why = time.Now(), err
		r.Log.Warn("the store of blocks does not answer; what this host has goes on", "error", err)
	default:
		r.why = err
	}
	return since
}

// Do runs until the context ends.
func (r *Run) Do(ctx context.Context) {
	tables := make(chan *Table)
	var following sync.WaitGroup
	following.Go(func() { r.follow(ctx, tables) })
	defer following.Wait()
	if r.Every == 0 {
		r.Every = lookEvery
	}
	look := time.NewTicker(r.Every)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case t := <-tables:
			r.take(ctx, t)
		case <-look.C:
		}
		if r.table != nil {
			r.act(ctx)
		}
	}
}

// follow hands over tables, and nil when the store does not answer.
func (r *Run) follow(ctx context.Context, to chan<- *Table) {
	send := func(t *Table) {
		select {
		case to <- t:
		case <-ctx.Done():
		}
	}
	backoff := retryFirst
	for ctx.Err() == nil {
		began := time.Now()
		err := r.Store.Follow(ctx, func(t Table) { send(&t) })
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > retryMost {
			backoff = retryFirst
		}
		r.noteAway(err)
		send(nil)
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, retryMost)
	}
}

// take takes a table, and tells the host.
func (r *Run) take(ctx context.Context, t *Table) {
	r.table = t
	if t == nil {
		return
	}
	if since := r.noteAway(nil); !since.IsZero() {
		r.Log.Info("the store of blocks answers again", "away", time.Since(since).Round(time.Second))
		if time.Since(since) > confirmAfter {
			r.confirm(*t)
		}
	}
	if r.expect.met != nil && (t.Fresh || r.expect.met(*t)) {
		r.expect = expectation{}
	}
	r.mu.Lock()
	r.shown = *t
	r.mu.Unlock()
	r.begin(*t)
	r.tell(ctx, *t)
}

// begin finds out whether a copy of this host lives.
func (r *Run) begin(t Table) {
	r.start.look(t.Of(r.Holder.Self), r.Holder.Incarnation, time.Now())
	r.Holder.Only = !r.start.settled
	if !r.start.copied {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.copied == nil {
		r.copied = ErrCopied
		r.Log.Error(ErrCopied.Error())
	}
}

// ErrNone says that nobody has a block.
var ErrNone = errors.New("nobody has this block")

// ErrOwn says that a block is this host's own, which gives it back by itself.
var ErrOwn = errors.New("the block is this host's own: it gives it back when no pod has an address of it and it has others, or when it is in none of pods.ranges")

// Free frees a block of a host that is gone for good, and returns what it was. Whoever
// calls it answers for that: a host that comes back would use addresses that are
// another's.
func (r *Run) Free(ctx context.Context, name netip.Prefix) (Block, error) {
	r.mu.Lock()
	b, ok := r.shown.Blocks[name]
	r.mu.Unlock()
	switch {
	case !ok:
		return b, ErrNone
	case b.Owner == r.Holder.Self:
		return b, ErrOwn
	}
	r.Log.Warn("a block of another host is freed, as it was asked for", "block", name, "host", b.Owner.Name)
	return b, r.Store.Delete(ctx, b)
}

// confirm has all blocks of this host written once more.
func (r *Run) confirm(t Table) {
	r.Holder.Confirm = make(map[string]uint64)
	for _, b := range t.Of(r.Holder.Self) {
		r.Holder.Confirm[b.ID] = b.Epoch
	}
}

func (r *Run) tell(ctx context.Context, t Table) {
	if !r.start.settled {
		return // another machine may have what looks like this one's
	}
	v := View{Self: r.Holder.Self, Blocks: slices.SortedFunc(maps.Values(t.Blocks), byName), Odd: t.Problems, Problem: r.said}
	if r.view == nil || !r.view.Equal(v) {
		r.view = &v
		r.Emit(ctx, v)
	}
}

// act does what is to be done next, if anything is.
func (r *Run) act(ctx context.Context) {
	if r.expect.met != nil {
		if time.Now().Before(r.expect.until) {
			return
		}
		r.expect = expectation{}
	}
	if now := time.Now(); now.Sub(r.looked) >= addressesEvery {
		r.looked = now
		if all := r.Addresses(); len(all) > 0 {
			r.Holder.Addresses = all
		}
	}
	was := r.start.settled
	if r.begin(*r.table); r.start.copied {
		return
	}
	if !was && r.start.settled {
		r.tell(ctx, *r.table)
	}
	rooms, strays, err := r.Room(r.table.Of(r.Holder.Self))
	if err != nil {
		r.say(ctx, err)
		return
	}
	r.Holder.Strays = strays
	now := time.Now()
	w, err := r.Holder.Next(*r.table, func(b Block) Room { return rooms[b.Name()] }, now)
	r.say(ctx, err)
	if w.Verb == Nothing || w.Verb == Update && now.Sub(r.updated[w.Block.Name()]) < updateEvery {
		return
	}
	r.write(ctx, w)
	if w.Verb == Update {
		if r.updated == nil {
			r.updated = make(map[netip.Prefix]time.Time)
		}
		r.updated[w.Block.Name()] = now
	}
}

// say tells people what they have to mend, once.
func (r *Run) say(ctx context.Context, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text == r.said {
		return
	}
	if r.said = text; text != "" {
		r.Log.Warn(text)
	}
	r.tell(ctx, *r.table)
}

// write writes, and waits for it to be seen before anything else is decided.
func (r *Run) write(ctx context.Context, w Write) {
	within, stop := context.WithTimeout(ctx, writePatience)
	defer stop()
	b := w.Block
	var err error
	switch w.Verb {
	case Create:
		err = r.Store.Create(within, b)
	case Update:
		err = r.Store.Update(within, b)
	case Delete:
		err = r.Store.Delete(within, b)
	}
	seen := func(t Table) bool {
		now, ok := t.Blocks[b.Name()]
		switch w.Verb {
		case Create:
			return ok
		case Update:
			return !ok || now.ID != b.ID || now.Revision != b.Revision
		default:
			return !ok || now.ID != b.ID
		}
	}
	switch {
	case err == nil, errors.Is(err, ErrTaken), errors.Is(err, ErrChanged):
		if err == nil {
			r.Log.Info([]string{Create: "a block of addresses is this host's", Update: "a block of addresses is written anew", Delete: "a block of addresses is given back"}[w.Verb],
				"block", b.Name(), "why", w.Why, "draining", b.Draining)
		}
		r.expect = expectation{seen, time.Now().Add(showPatience)}
		if seen(*r.table) {
			r.expect = expectation{}
		}
	case ctx.Err() == nil:
		r.Log.Warn("a block of addresses could not be written; it is tried again", "block", b.Name(), "error", err)
		// Whether it was done is seen by the next table.
		r.expect = expectation{seen, time.Now().Add(writePatience)}
	}
}
