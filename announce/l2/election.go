package l2

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"time"
)

// The times of an election. An announcer that says nothing for deadAfter is gone; what it
// has ends before: leaseTime after it has last said that it is there.
const (
	beatEvery = 150 * time.Millisecond
	leaseTime = 500 * time.Millisecond
	deadAfter = 600 * time.Millisecond
	hush      = time.Second            // at the beginning others are listened to
	rankStep  = 300 * time.Millisecond // for each announcer before, that could take a VIP and does not
	probeTime = 200 * time.Millisecond // for somebody to answer that he has a VIP
	probeLate = time.Second            // until one who has answered is asked again
)

// election decides which VIPs this host has, among announcers that hear each other. It
// reads no clock and sends nothing.
//
// Who has a VIP keeps it while it can: somebody who comes takes nothing. What nobody has
// goes to the one with the highest priority, of these to one drawn by its hash, so that
// VIPs are spread. Of two who have the same one the same order decides.
type election struct {
	id       id
	priority uint8
	began    time.Time
	members  map[id]*member
	capable  map[key]bool
	owned    map[key]bool
	waiting  map[key]*vacancy // that nobody has
	past     map[id]uint64    // the last sequence of members that are gone
	version  uint32           // of what is claimed; it grows
}

// member is another announcer.
type member struct {
	name     string
	nonce    uint64
	sequence uint64
	priority uint8
	heard    time.Time
	leaving  bool
	claims   map[key]claim

	version uint32 // of what comes in parts
	parts   map[uint16][]claimed
}

// vacancy is a VIP that nobody has.
type vacancy struct {
	since time.Time
	left  bool      // somebody had it and is gone: nobody can still have it
	asked time.Time // who has it; zero: not yet
	taken time.Time // when somebody answered who is no announcer
}

func newElection(self id, priority uint8, now time.Time) *election {
	return &election{
		id: self, priority: priority, began: now, version: 1,
		members: make(map[id]*member), capable: make(map[key]bool), owned: make(map[key]bool), waiting: make(map[key]*vacancy), past: make(map[id]uint64),
	}
}

// setCapable says which VIPs this host could have.
func (e *election) setCapable(keys map[key]bool) {
	if !maps.Equal(e.capable, keys) {
		e.capable = keys
		e.version++
	}
	for k := range e.waiting {
		if !keys[k] {
			delete(e.waiting, k)
		}
	}
}

// receive takes what another announcer says. answers tells whether it has heard this run
// of this one: what an older run heard may be said again by anybody. It returns whether
// the message is news.
func (e *election) receive(m message, answers bool, now time.Time) bool {
	if m.sender == e.id || !answers {
		return false
	}
	x := e.members[m.sender]
	if x == nil {
		// Who is gone and comes back goes on where he was: what he said before may be
		// said again by anybody.
		if len(e.members) >= maxMembers || m.sequence <= e.past[m.sender] {
			return false
		}
		x = &member{}
		e.members[m.sender] = x
	} else if m.sequence <= x.sequence {
		return false
	}
	x.name, x.nonce, x.sequence, x.priority, x.leaving, x.heard = m.name, m.nonce, m.sequence, m.priority, m.leaving, now
	if x.parts == nil || x.version != m.version {
		x.version, x.parts = m.version, make(map[uint16][]claimed)
	}
	x.parts[m.part] = m.claims
	if len(x.parts) < int(m.parts) {
		return true
	}
	had := x.claims
	x.claims = make(map[key]claim)
	for _, some := range x.parts {
		for _, c := range some {
			x.claims[c.key] = c.claim
		}
	}
	for k, c := range had {
		if c&owner != 0 && x.claims[k]&owner == 0 {
			e.vacate(k, now)
		}
	}
	return true
}

// alone reports whether there is nobody who could take over.
func (e *election) alone() bool { return len(e.members) == 0 }

// hasListened reports whether others, if there are any, would have been heard by now.
func (e *election) hasListened(now time.Time) bool { return now.Sub(e.began) >= hush }

// tick decides. gained are VIPs that this host has from now on, lost those that it has no
// more, kept those that somebody else had, too, and gave up, or will; ask are those whose
// owners have to be asked for.
func (e *election) tick(now time.Time) (gained, lost, kept, ask []key) {
	for i, m := range e.members {
		if now.Sub(m.heard) > deadAfter || m.leaving {
			e.bury(m, now)
			delete(e.members, i)
			e.remember(i, m.sequence)
		}
	}
	for k := range e.owned {
		switch rival, stronger := e.rival(k); {
		case !e.capable[k], rival && stronger:
			delete(e.owned, k)
			lost = append(lost, k)
		case rival:
			kept = append(kept, k)
		}
	}
	for k := range e.capable {
		if e.owned[k] {
			continue
		}
		if rival, _ := e.rival(k); rival {
			delete(e.waiting, k)
			continue
		}
		switch e.vacant(k, now, len(ask) < maxAsks) {
		case takeIt:
			e.owned[k] = true
			delete(e.waiting, k)
			gained = append(gained, k)
		case askFirst:
			ask = append(ask, k)
		}
	}
	if len(gained)+len(lost) > 0 {
		e.version++
	}
	slices.Sort(gained)
	slices.Sort(lost)
	return gained, lost, kept, ask
}

// lapse gives up everything, after a time in which this host could say nothing: others
// have taken it. It returns what that was.
func (e *election) lapse(now time.Time) (lost []key) {
	lost = slices.Sorted(maps.Keys(e.owned))
	clear(e.owned)
	clear(e.waiting)
	e.began = now
	e.version++
	return lost
}

// bury notes what a member had that is gone.
func (e *election) bury(m *member, now time.Time) {
	for k, c := range m.claims {
		if c&owner != 0 {
			e.vacate(k, now)
		}
	}
}

// maxPast bounds what is remembered of members that are gone. Each is one run of an
// agent.
const maxPast = 4096

func (e *election) remember(i id, sequence uint64) {
	for old := range e.past {
		if len(e.past) < maxPast {
			break
		}
		delete(e.past, old)
	}
	e.past[i] = sequence
}

// vacate notes that nobody has a VIP any more that an announcer had.
func (e *election) vacate(k key, now time.Time) {
	if e.capable[k] && !e.owned[k] {
		e.waiting[k] = &vacancy{since: now, left: true}
	}
}

// rival reports whether another announcer has a VIP, and whether one that has it is
// before this one.
func (e *election) rival(k key) (there, stronger bool) {
	for i, m := range e.members {
		if m.claims[k]&owner == 0 {
			continue
		}
		there = true
		if before(k, m.priority, i, e.priority, e.id) {
			return true, true
		}
	}
	return there, false
}

type step uint8

const (
	wait step = iota
	askFirst
	takeIt
)

// maxAsks is for how many VIPs it is asked at once: others wait for the next tick.
const maxAsks = 200

// vacant decides what to do about a VIP that nobody has. Without mayAsk nobody is asked
// now.
func (e *election) vacant(k key, now time.Time, mayAsk bool) step {
	v := e.waiting[k]
	if v == nil {
		v = &vacancy{since: now}
		e.waiting[k] = v
	}
	// Others have first to be heard.
	if !e.hasListened(now) {
		v.since = now
		return wait
	}
	if now.Sub(v.since) < time.Duration(e.rank(k))*rankStep {
		return wait
	}
	switch {
	case v.left:
		return takeIt
	case !v.taken.IsZero() && now.Sub(v.taken) < probeLate:
		return wait
	case (v.asked.IsZero() || !v.taken.Before(v.asked)) && !mayAsk:
		return wait
	case v.asked.IsZero() || !v.taken.Before(v.asked):
		v.asked = now
		return askFirst
	case now.Sub(v.asked) < probeTime:
		return wait
	}
	return takeIt
}

// answered notes that somebody who is no announcer has a VIP.
func (e *election) answered(k key, now time.Time) {
	if v := e.waiting[k]; v != nil && !v.asked.IsZero() {
		v.taken = now
	}
}

// isTaken reports whether somebody who is no announcer has a VIP that this host would
// have.
func (e *election) isTaken(k key, now time.Time) bool {
	v := e.waiting[k]
	return v != nil && !v.taken.IsZero() && now.Sub(v.taken) < probeLate+probeTime
}

// rank counts those who could take a VIP before this host.
func (e *election) rank(k key) (n int) {
	for i, m := range e.members {
		if m.claims[k]&capable != 0 && before(k, m.priority, i, e.priority, e.id) {
			n++
		}
	}
	return n
}

// before reports whether a comes before b for a VIP.
func before(k key, priorityA uint8, a id, priorityB uint8, b id) bool {
	if c := cmp.Or(cmp.Compare(priorityA, priorityB), cmp.Compare(lot(k, a), lot(k, b))); c != 0 {
		return c > 0
	}
	return slices.Compare(a[:], b[:]) > 0
}

// lot is what an announcer has drawn for a VIP (rendezvous hashing).
func lot(k key, i id) uint64 {
	var b [24]byte
	binary.BigEndian.PutUint64(b[:], uint64(k))
	copy(b[8:], i[:])
	sum := sha256.Sum256(b[:])
	return binary.BigEndian.Uint64(sum[:])
}

// claims returns what this host claims, sorted.
func (e *election) claims() []claimed {
	all := make([]claimed, 0, len(e.capable))
	for k := range e.capable {
		c := capable
		if e.owned[k] {
			c |= owner
		}
		all = append(all, claimed{k, c})
	}
	slices.SortFunc(all, func(a, b claimed) int { return cmp.Compare(a.key, b.key) })
	return all
}

// ownerOf returns the name of the other announcer that has a VIP; empty: none has.
func (e *election) ownerOf(k key) string {
	for _, m := range e.members {
		if m.claims[k]&owner != 0 {
			return m.name
		}
	}
	return ""
}
