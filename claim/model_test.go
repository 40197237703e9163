package claim

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/pentad/pentad/ipam"
)

// The model: hosts whose agents read old tables, whose networks are published later still,
// whose plugins give addresses without asking anybody, and who die after each write; and a
// store that does every write whole or not at all, and may lose the answer. What a host
// writes is what Holder says. No two hosts may ever use one block.
const (
	modelHosts  = 3
	modelBlocks = 2
	modelPast   = 4 // tables that a host may be behind
)

var modelPool = ipam.BlockPool{V4: netip.MustParsePrefix("10.0.0.0/25"), HostBits: 6}

// object is one block in the store; the zero value is none.
type object struct {
	owner    int8 // from 1
	id       int8
	epoch    int8
	draining bool
}

type modelTable [modelBlocks]object

// modelHost is a host. Positions are in the past of the store; -1: nothing was read yet.
type modelHost struct {
	reads   int8 // by the part that claims
	applied int8 // by the part that tells plugins
	open    [modelBlocks]bool
	closed  [modelBlocks]object // draining, as plugins were told
	used    [modelBlocks]bool
}

type modelState struct {
	past  [modelPast]modelTable
	n     int8 // of past; the last is now
	made  int8
	hosts [modelHosts]modelHost

	mostMade, mostWrites int8 // objects, and writes of each
}

func (s *modelState) now() *modelTable { return &s.past[s.n-1] }

// push makes a table the newest. It reports false when somebody would fall too far behind.
func (s *modelState) push(t modelTable) bool {
	s.forget()
	if s.n == modelPast {
		return false
	}
	s.past[s.n] = t
	s.n++
	return true
}

// forget drops tables that nobody can read any more.
func (s *modelState) forget() {
	oldest := s.n - 1
	for _, h := range s.hosts {
		if h.reads >= 0 {
			oldest = min(oldest, h.reads, h.applied)
		}
	}
	if oldest == 0 {
		return
	}
	var past [modelPast]modelTable
	copy(past[:], s.past[oldest:s.n])
	s.past, s.n = past, s.n-oldest
	for i := range s.hosts {
		if h := &s.hosts[i]; h.reads >= 0 {
			h.reads, h.applied = h.reads-oldest, h.applied-oldest
		}
	}
}

func modelOwner(i int) Owner { return Owner{Name: fmt.Sprint("host", i)} }

func (t modelTable) table() Table {
	all := Table{Blocks: make(map[netip.Prefix]Block)}
	for i, o := range t {
		if o.owner > 0 {
			b := modelPool.Block(i)
			all.Blocks[b.Name()] = Block{Block: b, Owner: modelOwner(int(o.owner)), Draining: o.draining, Epoch: uint64(o.epoch), ID: strconv.Itoa(int(o.id)), Revision: strconv.Itoa(int(o.epoch))}
		}
	}
	return all
}

// modelRoom is what a host does with a block, as the kernel and the file for plugins say.
func (h modelHost) room(t modelTable) func(Block) Room {
	return func(b Block) Room {
		for i := range modelBlocks {
			if modelPool.Block(i) == b.Block {
				r := Room{Closed: !h.open[i] && !h.used[i] && h.closed[i] == t[i]}
				if h.used[i] {
					r.Used = 1
				}
				return r
			}
		}
		return Room{}
	}
}

// apply tells plugins what the table says that this host was shown last.
func (h *modelHost) apply(self int, t modelTable) {
	h.open, h.closed = [modelBlocks]bool{}, [modelBlocks]object{}
	for i, o := range t {
		if int(o.owner) != self {
			continue
		}
		h.open[i] = !o.draining
		if o.draining {
			h.closed[i] = o
		}
	}
}

// The actions of a host.
const (
	actRestart = iota // the agent dies and reads the store anew
	actReboot         // so does the host
	actRead           // the next table
	actApply
	actAdd
	actDel
	actWrite    // what Holder says
	actWithdraw // what Holder says when the pools are gone from its file
	actions
)

// act does an action of host i on block b, where it has one. It reports false if there is
// nothing to do.
func (s *modelState) act(i, action, b int) bool {
	h := &s.hosts[i]
	switch action {
	case actRestart, actReboot:
		if action == actReboot {
			*h = modelHost{}
		}
		h.reads, h.applied = s.n-1, -1
		// Nothing is applied until something is: but what comes is as new as this.
		h.applied = s.n - 1
		s.forget()
		return true
	case actRead:
		if h.reads < 0 || h.reads == s.n-1 {
			return false
		}
		h.reads++
		s.forget()
		return true
	case actApply:
		if h.reads < 0 {
			return false
		}
		if h.applied < h.reads {
			h.applied++
		}
		h.apply(i+1, s.past[h.applied])
		s.forget()
		return true
	case actAdd:
		was := h.used[b]
		h.used[b] = was || h.open[b]
		return h.used[b] != was
	case actDel:
		was := h.used[b]
		h.used[b] = false
		return was
	}
	if h.reads < 0 {
		return false
	}
	holder := Holder{Self: modelOwner(i + 1), Pools: []ipam.BlockPool{modelPool}}
	if action == actWithdraw {
		holder.Pools = nil
	}
	seen := s.past[h.reads]
	// A pod is counted as one that leaves no room, so that hosts want more blocks.
	room := h.room(seen)
	w, _ := holder.Next(seen.table(), func(x Block) Room {
		r := room(x)
		r.Used *= slots(x)
		return r
	}, time.Time{})
	return s.write(i, w)
}

// write does a write whole, if the object is as the writer has read it.
func (s *modelState) write(i int, w Write) bool {
	if w.Verb == Nothing {
		return false
	}
	at := 0
	for modelPool.Block(at) != w.Block.Block {
		at++
	}
	next := *s.now()
	o := &next[at]
	if w.Verb == Create {
		if o.owner != 0 || s.made == s.mostMade {
			return false
		}
		s.made++
		*o = object{owner: int8(i + 1), id: s.made, epoch: 1}
		return s.push(next)
	}
	if strconv.Itoa(int(o.id)) != w.Block.ID || strconv.Itoa(int(o.epoch)) != w.Block.Revision || o.owner == 0 {
		return false
	}
	switch w.Verb {
	case Delete:
		*o = object{}
	case Update:
		if o.epoch == s.mostWrites {
			return false
		}
		*o = object{owner: o.owner, id: o.id, epoch: o.epoch + 1, draining: w.Block.Draining}
	}
	return s.push(next)
}

// fault returns what must never be.
func (s *modelState) fault() string {
	for b := range modelBlocks {
		for i := range s.hosts {
			if uses := s.hosts[i].open[b] || s.hosts[i].used[b]; uses && int(s.now()[b].owner) != i+1 {
				return fmt.Sprintf("host %d uses block %d, which is that of %d", i+1, b, s.now()[b].owner)
			}
		}
	}
	return ""
}

func firstState(mostMade, mostWrites int8) modelState {
	s := modelState{n: 1, mostMade: mostMade, mostWrites: mostWrites}
	for i := range s.hosts {
		s.hosts[i].reads, s.hosts[i].applied = -1, -1
	}
	return s
}

// successors calls f with every state that may come next.
func (s modelState) successors(f func(modelState, int, int, int)) {
	for i := range modelHosts {
		for a := range actions {
			blocks := 1
			if a == actAdd || a == actDel {
				blocks = modelBlocks
			}
			for b := range blocks {
				next := s
				if next.act(i, a, b) {
					f(next, i, a, b)
				}
			}
		}
	}
}

// All interleavings, from the first state on, until there are no others or the time is over.
func TestNoBlockIsTwoHosts(t *testing.T) {
	seen := map[modelState]bool{firstState(4, 4): true}
	level := []modelState{firstState(4, 4)}
	depth, until := 0, time.Now().Add(3*time.Second)
	for len(level) > 0 && time.Now().Before(until) {
		var next []modelState
		for _, s := range level {
			s.successors(func(n modelState, i, a, b int) {
				if seen[n] {
					return
				}
				seen[n] = true
				if f := n.fault(); f != "" {
					t.Fatalf("%s, after action %d of host %d on block %d in %+v", f, a, i+1, b, s)
				}
				next = append(next, n)
			})
		}
		level = next
		depth++
	}
	t.Logf("%d states, all interleavings of %d actions", len(seen), depth)
	if depth < 6 {
		t.Errorf("only %d actions deep", depth)
	}
}

// Long ways, at random.
func TestNoBlockIsTwoHostsLater(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	freed := 0
	for range 300 {
		s := firstState(100, 4)
		for range 400 {
			i, a := random.IntN(modelHosts), random.IntN(actions)
			before := s
			if !s.act(i, a, random.IntN(modelBlocks)) {
				s = before
				continue
			}
			if f := s.fault(); f != "" {
				t.Fatalf("%s, after action %d of host %d in %+v", f, a, i+1, before)
			}
			for b, o := range before.now() {
				if o.owner > 0 && s.now()[b].owner == 0 {
					freed++
				}
			}
		}
	}
	t.Logf("blocks were given back %d times", freed)
	if freed < 100 {
		t.Error("hardly any block was given back: the ways are too short")
	}
}
