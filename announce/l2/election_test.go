package l2

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var secret = []byte("of all announcers")

// segment is some announcers that hear each other, in a time of their own.
type segment struct {
	t       *testing.T
	now     time.Time
	random  *rand.Rand
	members []*node
}

type node struct {
	*election
	nonce   uint64
	heard   map[id]uint64
	seq     uint64
	beat    time.Time
	dead    bool
	cut     map[int]bool // who does not hear it
	loss    float64
	foreign map[key]bool // that somebody has who is no announcer
	asked   map[key]time.Time
	began   map[key]time.Time // when it took what it has
}

func newSegment(t *testing.T, seed uint64) *segment {
	return &segment{t: t, now: time.Unix(1000, 0), random: rand.New(rand.NewPCG(seed, 3))}
}

func (s *segment) join(priority uint8, keys ...key) *node {
	var i id
	for j := range i {
		i[j] = byte(s.random.Uint32())
	}
	n := &node{election: newElection(i, priority, s.now), nonce: s.random.Uint64(), heard: make(map[id]uint64), cut: make(map[int]bool),
		foreign: make(map[key]bool), asked: make(map[key]time.Time), began: make(map[key]time.Time)}
	n.setKeys(keys...)
	s.members = append(s.members, n)
	return n
}

func (n *node) setKeys(keys ...key) {
	all := make(map[key]bool)
	for _, k := range keys {
		all[k] = true
	}
	n.setCapable(all)
}

func (s *segment) run(d time.Duration) {
	for end := s.now.Add(d); s.now.Before(end); s.now = s.now.Add(10 * time.Millisecond) {
		for i, n := range s.members {
			if n.dead {
				continue
			}
			gained, lost, _, ask := n.tick(s.now)
			for _, k := range gained {
				n.began[k] = s.now
			}
			for _, k := range lost {
				delete(n.began, k)
			}
			for _, k := range ask {
				if n.foreign[k] {
					n.answered(k, s.now)
				}
			}
			if len(gained)+len(lost) > 0 || s.now.Sub(n.beat) >= beatEvery {
				n.beat = s.now
				s.speak(i, false)
			}
		}
	}
}

// speak has everybody hear all parts of what one says.
func (s *segment) speak(i int, leaving bool) {
	n := s.members[i]
	all := n.claims()
	const most = 3 // so that there are several parts
	parts := max(1, (len(all)+most-1)/most)
	for p := range parts {
		n.seq++
		m := message{sender: n.id, nonce: n.nonce, sequence: n.seq, priority: n.priority, leaving: leaving, name: fmt.Sprint("host", i), version: n.version,
			part: uint16(p), parts: uint16(parts), claims: all[p*most : min(len(all), (p+1)*most)]}
		for _, nonce := range n.heard {
			m.heard = append(m.heard, nonce)
		}
		b := m.append(nil, secret)
		for j, x := range s.members {
			if j == i || x.dead || n.cut[j] || s.random.Float64() < n.loss {
				continue
			}
			got, err := parse(append(b, make([]byte, 20)...), secret)
			if err != nil {
				s.t.Fatal(err)
			}
			x.heard[got.sender] = got.nonce
			x.receive(got, slices.Contains(got.heard, x.nonce), s.now)
		}
	}
}

// owners returns who has each VIP, and fails the test if two have the same.
func (s *segment) owners() map[key]int {
	all := make(map[key]int)
	for i, n := range s.members {
		if n.dead {
			continue
		}
		for k := range n.owned {
			if j, ok := all[k]; ok {
				s.t.Fatalf("at %v both %d and %d have %d", s.now, i, j, k)
			}
			all[k] = i
		}
	}
	return all
}

func keysTo(n int) (all []key) {
	for k := range n {
		all = append(all, key(k*7919))
	}
	return all
}

func TestOneAlone(t *testing.T) {
	s := newSegment(t, 1)
	s.join(100, keysTo(10)...)
	s.run(hush)
	if got := s.owners(); len(got) != 0 {
		t.Errorf("before others could be heard it has %v", got)
	}
	s.run(probeTime + 50*time.Millisecond)
	if got := s.owners(); len(got) != 10 {
		t.Errorf("it has %v", got)
	}
}

// VIPs are spread; who comes takes nothing; who dies loses all at once, and nobody has
// anything twice, nor before it is over for the one before.
func TestSpreadSticksAndTakesOver(t *testing.T) {
	s := newSegment(t, 2)
	all := keysTo(300)
	for range 3 {
		s.join(100, all...)
	}
	s.run(3 * time.Second)
	first := s.owners()
	count := make(map[int]int)
	for _, i := range first {
		count[i]++
	}
	if len(first) != 300 || count[0] < 60 || count[1] < 60 || count[2] < 60 {
		t.Fatalf("they have %v of 300", count)
	}
	s.join(100, all...)
	s.run(3 * time.Second)
	if got := s.owners(); !maps.Equal(got, first) {
		t.Error("somebody has come, and VIPs have moved")
	}
	s.members[1].dead = true
	died := s.members[1].beat
	s.run(1050 * time.Millisecond)
	after := s.owners()
	if len(after) != 300 {
		t.Fatalf("a second after one has died %d of 300 have an owner", len(after))
	}
	for k, i := range after {
		if first[k] != 1 && first[k] != i {
			t.Errorf("%d has moved from %d to %d though %d lives", k, first[k], i, first[k])
		}
		if first[k] == 1 && s.members[i].began[k].Sub(died) <= leaseTime {
			t.Errorf("%d was taken %v after its owner was heard last; its lease is %v", k, s.members[i].began[k].Sub(died), leaseTime)
		}
	}
}

func TestPriority(t *testing.T) {
	s := newSegment(t, 3)
	all := keysTo(50)
	s.join(10, all...)
	s.join(200, all...)
	s.run(3 * time.Second)
	for k, i := range s.owners() {
		if i != 1 {
			t.Errorf("%d is had by the one with less priority", k)
		}
	}
	// Of what the first could not have it takes what is left.
	s.members[1].setKeys(all[:20]...)
	s.run(2 * time.Second)
	count := make(map[int]int)
	for _, i := range s.owners() {
		count[i]++
	}
	if count[0] != 30 || count[1] != 20 {
		t.Errorf("they have %v, not 30 and 20", count)
	}
}

func TestLeaving(t *testing.T) {
	s := newSegment(t, 4)
	all := keysTo(20)
	s.join(200, all...)
	s.join(100, all...)
	s.run(3 * time.Second)
	s.speak(0, true)
	s.members[0].dead = true
	s.run(100 * time.Millisecond)
	if got := s.owners(); len(got) != 20 {
		t.Errorf("at once the other one has %d of 20", len(got))
	}
}

// Who stood still for longer than its lease takes nothing back.
func TestLapse(t *testing.T) {
	s := newSegment(t, 7)
	all := keysTo(20)
	s.join(100, all...)
	s.join(100, all...)
	s.run(3 * time.Second)
	still := s.members[0]
	had := len(still.owned)
	still.dead = true
	s.run(2 * time.Second)
	if lost := still.lapse(s.now); len(lost) != had || had == 0 {
		t.Errorf("of %d it has lost %d", had, len(lost))
	}
	still.dead = false
	s.run(3 * time.Second)
	if got := s.owners(); len(got) != 20 || len(still.owned) != 0 {
		t.Errorf("it has taken %d back", len(still.owned))
	}
}

// A network that was in two parts agrees again.
func TestTwoParts(t *testing.T) {
	s := newSegment(t, 5)
	all := keysTo(100)
	for range 4 {
		s.join(100, all...)
	}
	s.run(3 * time.Second)
	for i := range 4 {
		for j := range 4 {
			s.members[i].cut[j] = i%2 != j%2
		}
	}
	s.run(3 * time.Second)
	for part := range 2 {
		if n := len(s.members[part].owned) + len(s.members[part+2].owned); n != 100 {
			t.Errorf("part %d has %d of 100", part, n)
		}
	}
	for i := range 4 {
		clear(s.members[i].cut)
	}
	s.run(3 * time.Second)
	if got := s.owners(); len(got) != 100 {
		t.Errorf("together they have %d of 100", len(got))
	}
}

// What somebody has who is no announcer is not taken, until he has it no more.
func TestForeignOwner(t *testing.T) {
	s := newSegment(t, 6)
	n := s.join(100, keysTo(2)...)
	n.foreign[0] = true
	s.run(5 * time.Second)
	if n.owned[0] || !n.owned[7919] || !n.isTaken(0, s.now) {
		t.Errorf("it has %v; taken: %v", n.owned, n.isTaken(0, s.now))
	}
	n.foreign[0] = false
	s.run(2 * time.Second)
	if !n.owned[0] {
		t.Error("nobody has it, and it is not taken")
	}
}

// Whatever was said before, once all hear each other each VIP has one owner, who could
// have it.
func TestHistories(t *testing.T) {
	for seed := range uint64(40) {
		s := newSegment(t, seed)
		all := keysTo(15)
		for range 4 {
			s.join(uint8(s.random.IntN(3)), all...)
		}
		for range 12 {
			n := s.members[s.random.IntN(len(s.members))]
			switch s.random.IntN(5) {
			case 0:
				n.dead = true
			case 1:
				n.cut[s.random.IntN(4)] = true
			case 2:
				clear(n.cut)
			case 3:
				n.loss = s.random.Float64()
			case 4:
				n.setKeys(all[s.random.IntN(8):]...)
			}
			s.run(time.Duration(s.random.IntN(1500)) * time.Millisecond)
		}
		for _, n := range s.members {
			clear(n.cut)
			n.loss = 0
		}
		s.join(1, all...) // somebody who can
		s.run(6 * time.Second)
		got := s.owners()
		if len(got) != len(all) {
			t.Fatalf("seed %d: %d of %d have an owner", seed, len(got), len(all))
		}
		for k, i := range got {
			if !s.members[i].capable[k] {
				t.Errorf("seed %d: %d is had by one who cannot", seed, k)
			}
		}
	}
}

// What was said to an older run, or before, is nobody's word.
func TestReplay(t *testing.T) {
	now := time.Unix(1000, 0)
	e := newElection(id{1}, 100, now)
	m := message{sender: id{2}, sequence: 5, parts: 1}
	if e.receive(m, false, now) || len(e.members) != 0 {
		t.Error("who has not heard this run is taken for somebody who is there")
	}
	if !e.receive(m, true, now) || e.receive(m, true, now) {
		t.Error("a message counts not once")
	}
	m.sequence = 4
	if e.receive(m, true, now) {
		t.Error("an older message counts")
	}
	// Nor does it when its sender is dead.
	now = now.Add(2 * deadAfter)
	e.tick(now)
	for m.sequence = range uint64(6) {
		if e.receive(m, true, now) || len(e.members) != 0 {
			t.Fatal("a dead member is there again, by what it said before")
		}
	}
	m.sequence = 6
	if !e.receive(m, true, now) {
		t.Error("who comes back is not heard")
	}
}

func TestMessages(t *testing.T) {
	m := message{group: 7, sender: id{1, 2}, nonce: 8, sequence: 9, priority: 10, leaving: true, name: "host", heard: []uint64{1, 2}, version: 3, part: 1, parts: 2,
		claims: []claimed{{5, capable}, {6, capable | owner}}}
	b := m.append(nil, secret)
	got, err := parse(append(b, 0, 0, 0), secret)
	if err != nil || fmt.Sprint(got) != fmt.Sprint(m) {
		t.Errorf("%+v comes back as %+v, %v", m, got, err)
	}
	if _, err := parse(b, []byte("another")); !errors.Is(err, errMalformed) {
		t.Errorf("with another key: %v", err)
	}
	for i := range b {
		c := slices.Clone(b)
		c[i] ^= 1
		if _, err := parse(c, secret); err == nil {
			t.Errorf("byte %d can be changed", i)
		}
		if _, err := parse(b[:i], secret); err == nil {
			t.Errorf("%d bytes are enough", i)
		}
	}
	most := message{name: string(make([]byte, maxName)), heard: make([]uint64, maxMembers), claims: make([]claimed, maxClaims), parts: 1}
	if n := len(most.append(nil, secret)); n > 1500 {
		t.Errorf("the longest message has %d bytes", n)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(message{parts: 1, name: "x", heard: []uint64{1}, claims: []claimed{{1, owner}}}.append(nil, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parse(b, nil)
		if err != nil {
			return
		}
		if again, err := parse(m.append(nil, nil), nil); err != nil || fmt.Sprint(again) != fmt.Sprint(m) {
			t.Fatalf("%+v comes back as %+v, %v", m, again, err)
		}
	})
}
