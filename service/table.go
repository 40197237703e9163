package service

import (
	"cmp"
	"hash/fnv"
	"maps"
	"math"
	"math/bits"
	"net/netip"
	"slices"
)

// Slot is one element of a selection table. A number in [0, 2^32) is scaled to
// the table's length: its integer part names the slot, its fraction, in units
// of 2^-32, is compared with Threshold. Below it the connection goes to First,
// else to Second. Both are indices into Service.Backends.
type Slot struct {
	First, Second int
	Threshold     uint32
}

// Tables returns the selection tables of the service's backends of one family,
// one for every failover group that has a usable backend, in the order of the
// groups: none when no backend is usable. With SourceHash the first is a
// consistent-hash table, and the second the alias table of the same group.
func (s *Service) Tables(family Family) [][]Slot {
	groups := make(map[uint32][]int)
	configured := 0
	for i, b := range s.Backends {
		if FamilyOf(b.Address.Addr()) != family {
			continue
		}
		configured++
		if b.Usable() {
			groups[b.Group] = append(groups[b.Group], i)
		}
	}
	var tables [][]Slot
	for _, g := range slices.Sorted(maps.Keys(groups)) {
		if s.Balance == SourceHash && len(tables) == 0 {
			tables = append(tables, maglevTable(s.Backends, groups[g], maglevSize(maglevSizes, configured)))
		}
		tables = append(tables, aliasTable(s.Backends, groups[g]))
	}
	return tables
}

// CostUnit is the cost of a connection at a backend with the mean weight of its
// group.
const CostUnit = 256

// Costs returns for every backend what one connection to it counts: CostUnit
// times the mean weight of its group and family divided by its own weight.
func (s *Service) Costs() []uint32 {
	type peers struct {
		group  uint32
		family Family
	}
	total, members := make(map[peers]uint64), make(map[peers]uint64)
	for _, b := range s.Backends {
		if b.Weight > 0 {
			p := peers{b.Group, FamilyOf(b.Address.Addr())}
			total[p] += uint64(b.Weight)
			members[p]++
		}
	}
	costs := make([]uint32, len(s.Backends))
	for i, b := range s.Backends {
		if b.Weight > 0 {
			p := peers{b.Group, FamilyOf(b.Address.Addr())}
			costs[i] = uint32(max(1, CostUnit*total[p]/(members[p]*uint64(b.Weight))))
		}
	}
	return costs
}

// aliasTable builds Vose's version of Walker's alias table (M. D. Vose, "A
// linear algorithm for generating random numbers with a given distribution",
// IEEE TSE 17(9), 1991): one slot a member, shares exact to 2^-32. It works in
// integers, so that it is the same everywhere.
func aliasTable(backends []Backend, members []int) []Slot {
	n := uint64(len(members))
	var total uint64
	for _, m := range members {
		total += uint64(backends[m].Weight)
	}
	// Scaled so that the average is total: a member with more gives to one with less.
	have := make([]uint64, n)
	var small, large []int
	for i, m := range members {
		have[i] = uint64(backends[m].Weight) * n
		if have[i] < total {
			small = append(small, i)
		} else {
			large = append(large, i)
		}
	}
	table := make([]Slot, n)
	for len(small) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		// have[s] < total, so that the quotient is below 2^32.
		threshold, _ := bits.Div64(have[s]>>32, have[s]<<32, total)
		table[s] = Slot{First: members[s], Second: members[l], Threshold: uint32(threshold)}
		have[l] -= total - have[s]
		if have[l] < total {
			large = large[:len(large)-1]
			small = append(small, l)
		}
	}
	for _, l := range large {
		table[l] = Slot{First: members[l], Second: members[l], Threshold: math.MaxUint32}
	}
	return table
}

// Sizes of consistent-hash tables: primes, with at least 256 slots for every
// backend up to the bound. A service that grows past a bound is distributed
// anew.
var maglevSizes = []maglevBound{{16, 4093}, {256, 65521}, {math.MaxInt, 1048573}}

// coarseSizes have at least 15 slots for every backend instead.
var coarseSizes = []maglevBound{{16, 251}, {256, 4093}, {math.MaxInt, 65521}}

type maglevBound struct{ backends, slots int }

// maglevSize depends on the configured number of backends, not on how many are
// usable: health must not change the size.
func maglevSize(sizes []maglevBound, configured int) int {
	for _, s := range sizes {
		if configured <= s.backends {
			return s.slots
		}
	}
	return sizes[len(sizes)-1].slots
}

// CoarseTable is the consistent-hash table of the group that serves a family, as
// indices into Backends, for places where slots are dear: weights are met to one
// of 251 slots (16 backends), 4,093 (256) or 65,521. It is nil when no backend is
// usable.
func (s *Service) CoarseTable(family Family) []int {
	group, ok := s.ServingGroup(family)
	if !ok {
		return nil
	}
	var members []int
	configured := 0
	for i, b := range s.Backends {
		if FamilyOf(b.Address.Addr()) != family {
			continue
		}
		configured++
		if b.Usable() && b.Group == group {
			members = append(members, i)
		}
	}
	slots := maglevTable(s.Backends, members, maglevSize(coarseSizes, configured))
	table := make([]int, len(slots))
	for i, slot := range slots {
		table[i] = slot.First
	}
	return table
}

// maglevTable builds a consistent-hash table (D. E. Eisenbud et al., "Maglev: A
// Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4).
// Unlike there, every member has a quota, its weight's share of the slots
// rounded by largest remainder, so that weights are met to one slot. The table
// depends on the set of members alone, not on their order or history.
func maglevTable(backends []Backend, members []int, size int) []Slot {
	order := make([]turn, len(members))
	for i, m := range members {
		order[i] = newTurn(backends[m].Address, m, size)
	}
	slices.SortFunc(order, func(a, b turn) int {
		return backends[a.member].Address.Compare(backends[b.member].Address)
	})
	setQuotas(order, backends, size)

	owner := make([]int, size)
	for i := range owner {
		owner[i] = -1
	}
	for left := size; left > 0; {
		for i := range order {
			t := &order[i]
			// A member with a larger quota has more turns a round.
			for k := 0; k < t.pace && t.quota > 0; k++ {
				for owner[t.next] >= 0 {
					t.next = (t.next + t.skip) % size
				}
				owner[t.next] = t.member
				t.quota--
				left--
			}
		}
	}
	table := make([]Slot, size)
	for i, m := range owner {
		table[i] = Slot{First: m, Second: m, Threshold: math.MaxUint32}
	}
	return table
}

// turn is the state of one member while a table is filled: its permutation of
// the slots is next, next+skip, next+2*skip, ...
type turn struct {
	member     int
	next, skip int
	quota      int
	pace       int
}

func newTurn(addr netip.AddrPort, member, size int) turn {
	h := fnv.New64a()
	b, _ := addr.MarshalBinary()
	h.Write(b)
	x := mix(h.Sum64())
	return turn{
		member: member,
		next:   int(x % uint64(size)),
		skip:   int(mix(x)%uint64(size-1)) + 1,
	}
}

// mix is the finalizer of MurmurHash3: FNV alone leaves addresses that differ
// in one digit close together.
func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// setQuotas shares size out by weight.
func setQuotas(order []turn, backends []Backend, size int) {
	weights := make([]uint32, len(order))
	lightest := uint32(math.MaxUint32)
	for i, t := range order {
		weights[i] = backends[t.member].Weight
		lightest = min(lightest, weights[i])
	}
	for i, quota := range Apportion(weights, size) {
		order[i].quota = quota
		order[i].pace = max(1, int(weights[i]/lightest))
	}
}

// Apportion divides places by weight with the method of largest remainders. A weight so
// small that its share is less than half a place gets one: a usable backend is used.
// Weights are above 0, and there are as many places at least.
func Apportion(weights []uint32, places int) []int {
	var total uint64
	for _, w := range weights {
		total += uint64(w)
	}
	given := 0
	shares := make([]int, len(weights))
	rest := make([]int, len(weights)) // in the order of their remainders
	for i, w := range weights {
		shares[i] = max(1, int(uint64(w)*uint64(places)/total))
		given += shares[i]
		rest[i] = i
	}
	remainder := func(i int) uint64 { return uint64(weights[i]) * uint64(places) % total }
	slices.SortStableFunc(rest, func(a, b int) int { return cmp.Compare(remainder(b), remainder(a)) })
	for i := 0; given < places; i = (i + 1) % len(rest) {
		shares[rest[i]]++
		given++
	}
	for i := len(rest) - 1; given > places; i = (i + len(rest) - 1) % len(rest) {
		if shares[rest[i]] > 1 {
			shares[rest[i]]--
			given--
		}
	}
	return shares
}
