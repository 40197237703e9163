// Package race has many hosts claim blocks in one store at the same time, be killed and
// come back: for tests of stores.
package race

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pentad/pentad/claim"
	"github.com/pentad/pentad/ipam"
)

// Race is one race.
type Race struct {
	Hosts  int
	Claims int           // how many are to succeed, at least
	Frees  int           // how many blocks are to be given back, at least
	Wanted int           // how many blocks a host fills
	Life   time.Duration // of an agent, at most
	Pool   ipam.BlockPool
	Store  func() (claim.Store, error) // a connection of its own for each host

	claimed, refused, freed atomic.Int64

	mu    sync.Mutex
	users map[netip.Prefix]string // hosts that use blocks
	fault error
}

// Result says how it went.
type Result struct {
	Claimed, Refused, Freed int64
}

// Run runs it until both have happened, or ctx is done. The error is a block that two hosts
// used, or what failed.
func (r *Race) Run(ctx context.Context) (Result, error) {
	r.users = make(map[netip.Prefix]string)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var hosts sync.WaitGroup
	for i := range r.Hosts {
		hosts.Go(func() {
			if err := r.host(ctx, fmt.Sprint("host-", i)); err != nil && ctx.Err() == nil {
				r.fail(err)
				stop()
			}
		})
	}
	for ctx.Err() == nil && (r.claimed.Load() < int64(r.Claims) || r.freed.Load() < int64(r.Frees)) {
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	hosts.Wait()
	return Result{r.claimed.Load(), r.refused.Load(), r.freed.Load()}, r.fault
}

func (r *Race) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = errors.Join(r.fault, err)
}

// host is a host whose agent dies and is started again. Its pods come and go: its room is
// drawn.
func (r *Race) host(ctx context.Context, name string) error {
	store, err := r.Store()
	if err != nil {
		return err
	}
	h := &racer{race: r, name: name, closed: make(map[netip.Prefix]string)}
	counted := counting{store, r}
	for ctx.Err() == nil {
		life, kill := context.WithTimeout(ctx, r.Life/20+rand.N(r.Life))
		run := &claim.Run{
			Store: counted, Room: h.room, Emit: func(_ context.Context, v claim.View) { h.use(v) }, Log: slog.New(slog.DiscardHandler),
			Addresses: func() []netip.Addr { return nil }, Every: 2 * time.Millisecond,
			Holder: claim.Holder{Self: claim.Owner{Name: name}, Pools: []ipam.BlockPool{r.Pool}},
		}
		if rand.IntN(3) == 0 {
			run.Holder.Pools = nil // its file has no range any more: all is given back
		}
		run.Do(life)
		kill()
	}
	return nil
}

// racer is what a host knows besides its agent: it outlives it.
type racer struct {
	race *Race
	name string

	mu     sync.Mutex
	closed map[netip.Prefix]string // draining, as plugins were told
}

// use notes which blocks a host gives addresses of, as plugins would be told.
func (h *racer) use(v claim.View) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.race
	r.mu.Lock()
	defer r.mu.Unlock()
	for p, user := range r.users {
		if user == h.name {
			delete(r.users, p)
		}
	}
	clear(h.closed)
	for _, b := range v.Blocks {
		if b.Owner != v.Self {
			continue
		}
		if b.Draining {
			h.closed[b.Name()] = mark(b)
			continue
		}
		if user, used := r.users[b.Name()]; used {
			r.fault = errors.Join(r.fault, fmt.Errorf("%s is used by %s and %s", b.Name(), user, h.name))
		}
		r.users[b.Name()] = h.name
	}
}

func mark(b claim.Block) string { return fmt.Sprint(b.ID, "/", b.Epoch) }

func (h *racer) room(own []claim.Block) (map[netip.Prefix]claim.Room, []netip.Addr, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	rooms := make(map[netip.Prefix]claim.Room)
	for i, b := range own {
		r := claim.Room{Closed: b.Draining && h.closed[b.Name()] == mark(b)}
		if i < h.race.Wanted {
			r.Used = 1 << 20 // full: it wants another one
		}
		rooms[b.Name()] = r
	}
	return rooms, nil, nil
}

// counting counts what a store does.
type counting struct {
	claim.Store
	race *Race
}

// Create counts.
func (c counting) Create(ctx context.Context, b claim.Block) error {
	err := c.Store.Create(ctx, b)
	switch {
	case err == nil:
		c.race.claimed.Add(1)
	case errors.Is(err, claim.ErrTaken):
		c.race.refused.Add(1)
	}
	return err
}

// Delete counts.
func (c counting) Delete(ctx context.Context, b claim.Block) error {
	err := c.Store.Delete(ctx, b)
	if err == nil {
		c.race.freed.Add(1)
	}
	return err
}
