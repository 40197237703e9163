package director

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"
)

// Slots is the size of a table: a prime, so that every real server has a permutation of
// all places (D. Eisenbud et al., Maglev, NSDI 2016, section 3.4).
const Slots = 65537

// Member is a real server with a share of a table.
type Member struct {
	Address netip.Addr
	Weight  uint32 // above 0
}

// Table returns which member has each place, by its number in the order of their
// addresses; nil without members. It depends on who they are and on nothing else: all
// directors have the same. It is pure.
func Table(members []Member) []uint16 {
	if len(members) == 0 {
		return nil
	}
	members = sorted(members)
	next := make([]permutation, len(members))
	most := uint32(0)
	for i, m := range members {
		next[i] = permutationOf(m.Address)
		most = max(most, m.Weight)
	}
	const free = 0xffff
	table := slices.Repeat([]uint16{free}, Slots)
	// Each takes a place in turn; who has half the weight of another, every other turn.
	credit := make([]uint64, len(members))
	for left := Slots; ; {
		for i, m := range members {
			if credit[i] += uint64(m.Weight); credit[i] < uint64(most) {
				continue
			}
			credit[i] -= uint64(most)
			at := next[i].take()
			for table[at] != free {
				at = next[i].take()
			}
			table[at] = uint16(i)
			if left--; left == 0 {
				return table
			}
		}
	}
}

func sorted(members []Member) []Member {
	members = slices.Clone(members)
	slices.SortFunc(members, func(a, b Member) int { return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Weight, b.Weight)) })
	return members
}

// permutation is the order in which a member takes places.
type permutation struct{ at, skip uint32 }

func permutationOf(a netip.Addr) permutation {
	return permutation{uint32(hashOf(a, 1) % Slots), uint32(hashOf(a, 2)%(Slots-1)) + 1}
}

func (p *permutation) take() uint32 {
	at := p.at
	p.at = (p.at + p.skip) % Slots
	return at
}

// hashOf is FNV-1a of an address, mixed further (the finalizer of splitmix64): addresses
// that follow each other have hashes that do not.
func hashOf(a netip.Addr, seed uint64) uint64 {
	h := fnv.New64a()
	_ = binary.Write(h, binary.BigEndian, seed)
	b := a.As16()
	_, _ = h.Write(b[:])
	z := h.Sum64()
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
