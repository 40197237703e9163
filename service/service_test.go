package service

import (
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

func backendAt(i int) Backend {
	a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
	return Backend{Address: netip.AddrPortFrom(a, 80), Weight: DefaultWeight}
}

func TestStates(t *testing.T) {
	v6 := netip.MustParseAddrPort("[2001:db8::1]:80")
	for _, c := range []struct {
		name   string
		change func([]Backend)
		want   []State
	}{
		{"all well", func([]Backend) {}, []State{Serving, Serving, Standby, Serving}},
		{"one down", func(b []Backend) { b[0].Down = true }, []State{Down, Serving, Standby, Serving}},
		{"group down", func(b []Backend) { b[0].Down, b[1].Down = true, true }, []State{Down, Down, Serving, Serving}},
		{"one down, one drained", func(b []Backend) { b[0].Down, b[1].Drained = true, true }, []State{Down, Drained, Serving, Serving}},
		{"weight 0", func(b []Backend) { b[0].Weight = 0 }, []State{Drained, Serving, Standby, Serving}},
		{"down and drained", func(b []Backend) { b[0].Down, b[0].Drained = true, true }, []State{Down, Serving, Standby, Serving}},
		{"nothing left", func(b []Backend) {
			for i := range b {
				b[i].Down = true
			}
		}, []State{Down, Down, Down, Down}},
		{"families fail over apart", func(b []Backend) { b[3].Down, b[2].Group = true, 0 }, []State{Serving, Serving, Serving, Down}},
	} {
		s := &Service{Backends: []Backend{backendAt(1), backendAt(2), backendAt(3), {Address: v6, Weight: 1}}}
		s.Backends[2].Group = 1
		c.change(s.Backends)
		if have := s.States(); !reflect.DeepEqual(have, c.want) {
			t.Errorf("%s: states %v, want %v", c.name, have, c.want)
		}
	}
}

// shares returns the part of all numbers that leads to each backend.
func shares(table []Slot, backends int) []float64 {
	s := make([]float64, backends)
	for _, x := range table {
		first := float64(x.Threshold) / math.MaxUint32
		s[x.First] += first / float64(len(table))
		s[x.Second] += (1 - first) / float64(len(table))
	}
	return s
}

// firstTable returns the table of the group that serves, or nil.
func firstTable(s *Service) []Slot {
	if tables := s.Tables(V4); len(tables) > 0 {
		return tables[0]
	}
	return nil
}

// checkTables fails when the tables are not those of the usable groups, a slot is
// not valid or a weight is not met.
func checkTables(t *testing.T, s *Service) {
	t.Helper()
	groups := make(map[uint32]bool)
	for _, b := range s.Backends {
		if b.Usable() {
			groups[b.Group] = true
		}
	}
	order := slices.Sorted(maps.Keys(groups))
	tables := s.Tables(V4)
	if s.Balance == SourceHash && len(order) > 0 {
		// 256 slots a backend and more: within one percent.
		checkTable(t, s, tables[0], order[0], 0.01)
		tables = tables[1:]
	}
	if len(tables) != len(order) {
		t.Fatalf("%d tables for groups %v", len(tables), order)
	}
	for i, group := range order {
		checkTable(t, s, tables[i], group, 1e-6)
		// The programs find every member as the first of one slot.
		seen := make(map[int]bool)
		for _, x := range tables[i] {
			seen[x.First] = true
		}
		if len(seen) != len(tables[i]) {
			t.Fatalf("%d of %d members are first in a slot", len(seen), len(tables[i]))
		}
	}
}

func checkTable(t *testing.T, s *Service, table []Slot, group uint32, within float64) {
	t.Helper()
	total := 0.0
	for _, b := range s.Backends {
		if b.Usable() && b.Group == group {
			total += float64(b.Weight)
		}
	}
	for i, x := range table {
		for _, b := range []int{x.First, x.Second} {
			if b < 0 || b >= len(s.Backends) || !s.Backends[b].Usable() || s.Backends[b].Group != group {
				t.Fatalf("slot %d leads to backend %d, which is not usable in group %d", i, b, group)
			}
		}
	}
	for i, share := range shares(table, len(s.Backends)) {
		b := s.Backends[i]
		want := 0.0
		if b.Usable() && b.Group == group {
			want = float64(b.Weight) / total
		}
		if math.Abs(share-want) > within {
			t.Errorf("%s: backend %d has a share of %.9f, want %.9f", s.Balance, i, share, want)
		}
	}
}

// A connection to a backend with twice the mean weight counts half.
func TestCosts(t *testing.T) {
	s := &Service{Backends: []Backend{backendAt(1), backendAt(2), backendAt(3), backendAt(4), backendAt(5)}}
	s.Backends[0].Weight, s.Backends[1].Weight, s.Backends[2].Weight = 100, 300, 200
	s.Backends[3].Group, s.Backends[3].Weight = 1, 7
	s.Backends[4].Weight = 0
	if have, want := s.Costs(), []uint32{512, 170, 256, 256, 0}; !slices.Equal(have, want) {
		t.Errorf("costs %v, want %v", have, want)
	}
}

func randomService(r *rand.Rand, balance Balance, n int) *Service {
	s := &Service{Name: "s", Balance: balance}
	for _, i := range r.Perm(400)[:n] {
		b := backendAt(i)
		switch r.IntN(4) {
		case 0:
			b.Weight = uint32(r.IntN(1000))
		case 1:
			b.Group = uint32(r.IntN(2))
		}
		b.Down = r.IntN(6) == 0
		b.Drained = r.IntN(8) == 0
		s.Backends = append(s.Backends, b)
	}
	return s
}

func TestTables(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		for _, balance := range []Balance{Random, SourceHash} {
			checkTables(t, randomService(r, balance, r.IntN(30)))
		}
	}
	checkTables(t, randomService(r, SourceHash, 300))
	checkTables(t, randomService(r, Random, 300))
}

func FuzzTables(f *testing.F) {
	f.Add(uint64(1), uint64(2), 5, false)
	f.Fuzz(func(t *testing.T, a, b uint64, n int, hash bool) {
		balance := Random
		if hash {
			balance = SourceHash
		}
		checkTables(t, randomService(rand.New(rand.NewPCG(a, b)), balance, max(0, n%40)))
	})
}

// The extremes of weights: the heaviest beside the lightest.
func TestExtremeWeights(t *testing.T) {
	for _, balance := range []Balance{Random, SourceHash} {
		s := &Service{Balance: balance, Backends: []Backend{backendAt(1), backendAt(2)}}
		s.Backends[0].Weight, s.Backends[1].Weight = MaxWeight, 1
		checkTables(t, s)
		if shares(firstTable(s), 2)[1] == 0 {
			t.Errorf("%s: a backend of weight 1 is never used", balance)
		}
	}
}

// A consistent-hash table depends on which backends there are, not on their order.
func TestMaglevOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	s := randomService(r, SourceHash, 20)
	before := firstTable(s)
	shuffled := *s
	shuffled.Backends = nil
	position := r.Perm(len(s.Backends))
	for _, i := range position {
		shuffled.Backends = append(shuffled.Backends, s.Backends[i])
	}
	for i, x := range firstTable(&shuffled) {
		if position[x.First] != before[i].First {
			t.Fatalf("slot %d changed its backend with the order", i)
		}
	}
}

// When a backend goes, those of others keep nearly all of their slots.
func TestMaglevDisruption(t *testing.T) {
	for _, n := range []int{3, 10, 16, 100} {
		s := &Service{Balance: SourceHash}
		for i := range n {
			s.Backends = append(s.Backends, backendAt(i))
		}
		before := firstTable(s)
		s.Backends[n/2].Down = true
		moved := 0
		for i, x := range firstTable(s) {
			if before[i].First != n/2 && before[i].First != x.First {
				moved++
			}
		}
		if part := float64(moved) / float64(len(before)); part > 0.025 {
			t.Errorf("%d backends: %.1f %% of the slots moved without need", n, 100*part)
		} else {
			t.Logf("%d backends: %.2f %% moved without need", n, 100*part)
		}
	}
}

func TestSnapshots(t *testing.T) {
	a, b, c := &Service{Name: "a"}, &Service{Name: "b"}, &Service{Name: "c"}
	first := (&Snapshot{}).Next([]*Service{c, a, b})
	if first.Revision != 1 || first.Services[0] != a || first.Services[2] != c {
		t.Fatalf("first snapshot %+v", first)
	}
	if same := first.Next([]*Service{{Name: "a"}, {Name: "b"}, {Name: "c"}}); same != first {
		t.Errorf("equal services made another snapshot")
	}
	other := &Service{Name: "b", Affinity: 1}
	second := first.Next([]*Service{{Name: "a"}, other})
	if second.Services[0] != a || second.Services[1] != other {
		t.Errorf("an unchanged service is not the same pointer")
	}
	changed, removed := Diff(first, second)
	if !reflect.DeepEqual(changed, []*Service{other}) || !reflect.DeepEqual(removed, []*Service{c}) {
		t.Errorf("diff: changed %v, removed %v", changed, removed)
	}
}

// Any sequence of changes ends like a fresh start: the same differences follow.
func TestDiffProperty(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	draw := func() []*Service {
		var all []*Service
		for i := range 12 {
			if r.IntN(3) > 0 {
				all = append(all, &Service{Name: string(rune('a' + i)), Balance: Balance(r.IntN(4))})
			}
		}
		return all
	}
	snap := &Snapshot{}
	have := make(map[string]*Service)
	for range 500 {
		next := snap.Next(draw())
		changed, removed := Diff(snap, next)
		for _, s := range removed {
			delete(have, s.Name)
		}
		for _, s := range changed {
			have[s.Name] = s
		}
		snap = next
		if len(have) != len(snap.Services) {
			t.Fatalf("the differences lead to %d services, the snapshot has %d", len(have), len(snap.Services))
		}
		for _, s := range snap.Services {
			if have[s.Name] != s {
				t.Fatalf("service %s is not what the differences led to", s.Name)
			}
		}
	}
}
