package ipam

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// BlockPool is the addresses of the pods of all hosts, cut into blocks of one size. In a
// pool of both families the n-th blocks of each go together.
type BlockPool struct {
	V4, V6   netip.Prefix // one of them may be missing
	HostBits int          // a block has two to the power of it addresses, in each family
}

// Block is a block of a pool: of both families, where the pool has both.
type Block struct {
	V4, V6 netip.Prefix
}

// Name is the prefix by which everybody knows a block: that of IPv4, if it has one.
func (b Block) Name() netip.Prefix {
	if b.V4.IsValid() {
		return b.V4
	}
	return b.V6
}

// Prefixes returns those of the block.
func (b Block) Prefixes() (all []netip.Prefix) {
	for _, p := range []netip.Prefix{b.V4, b.V6} {
		if p.IsValid() {
			all = append(all, p)
		}
	}
	return all
}

// Contains reports whether an address is one of the block.
func (b Block) Contains(a netip.Addr) bool {
	return b.V4.IsValid() && b.V4.Contains(a) || b.V6.IsValid() && b.V6.Contains(a)
}

// Overlaps reports whether two blocks have an address in common.
func (b Block) Overlaps(o Block) bool {
	return b.V4.IsValid() && o.V4.IsValid() && b.V4.Overlaps(o.V4) || b.V6.IsValid() && o.V6.IsValid() && b.V6.Overlaps(o.V6)
}

// maxBlocks bounds what is looked for of a pool: more hosts than this there are not.
const maxBlocks = 1 << 24

// Blocks returns how many there are, at most 16,777,216.
func (p BlockPool) Blocks() int {
	n := maxBlocks
	for _, x := range []netip.Prefix{p.V4, p.V6} {
		if x.IsValid() {
			n = min(n, 1<<min(24, max(0, x.Addr().BitLen()-x.Bits()-p.HostBits)))
		}
	}
	return n
}

// Block returns the i-th.
func (p BlockPool) Block(i int) (b Block) {
	if p.V4.IsValid() {
		b.V4 = p.part(p.V4, i)
	}
	if p.V6.IsValid() {
		b.V6 = p.part(p.V6, i)
	}
	return b
}

func (p BlockPool) part(of netip.Prefix, i int) netip.Prefix {
	size := of.Addr().BitLen() - p.HostBits
	if of.Addr().Is4() {
		a := of.Masked().Addr().As4()
		binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(a[:])+uint32(i)<<p.HostBits)
		return netip.PrefixFrom(netip.AddrFrom4(a), size)
	}
	a := of.Masked().Addr().As16()
	// The index has 24 bits: it may reach into the upper half of the address.
	low, carry := bits.Add64(binary.BigEndian.Uint64(a[8:]), uint64(i)<<p.HostBits, 0)
	high := binary.BigEndian.Uint64(a[:8]) + uint64(i)>>(64-p.HostBits) + carry
	binary.BigEndian.PutUint64(a[8:], low)
	binary.BigEndian.PutUint64(a[:8], high)
	return netip.PrefixFrom(netip.AddrFrom16(a), size)
}

// Find returns the block that has a name. A prefix of another size, or of another pool,
// is none.
func (p BlockPool) Find(name netip.Prefix) (b Block, ok bool) {
	i, ok := p.index(name)
	if !ok {
		return Block{}, false
	}
	return p.Block(i), true
}

// index returns which block has a name.
func (p BlockPool) index(name netip.Prefix) (int, bool) {
	of := p.V6
	if p.V4.IsValid() {
		of = p.V4
	}
	if !name.IsValid() || name != name.Masked() || name.Addr().Is4() != of.Addr().Is4() || !of.Contains(name.Addr()) || name.Bits() != name.Addr().BitLen()-p.HostBits {
		return 0, false
	}
	at, from := name.Addr().As16(), of.Masked().Addr().As16()
	low, borrow := bits.Sub64(binary.BigEndian.Uint64(at[8:]), binary.BigEndian.Uint64(from[8:]), 0)
	high, _ := bits.Sub64(binary.BigEndian.Uint64(at[:8]), binary.BigEndian.Uint64(from[:8]), borrow)
	i := low>>p.HostBits | high<<(64-p.HostBits)
	return int(i), high>>p.HostBits == 0 && i < uint64(p.Blocks())
}

// FindV6 returns the block that has an IPv6 address, in a pool of both families.
func (p BlockPool) FindV6(a netip.Addr) (b Block, ok bool) {
	six := BlockPool{V6: p.V6, HostBits: p.HostBits}
	name, err := a.Prefix(a.BitLen() - p.HostBits)
	if err != nil || !p.V6.IsValid() || !p.V6.Contains(a) {
		return Block{}, false
	}
	i, ok := six.index(name)
	if !ok || i >= p.Blocks() {
		return Block{}, false
	}
	return p.Block(i), true
}
