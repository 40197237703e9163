package socket

import (
	"cmp"
	"slices"
)

// indexes hands out the numbers 1 to capacity-1, lowest unused first, then
// those given back. 0 is nobody.
type indexes struct {
	capacity uint32
	next     uint32 // every number from here on was never used
	free     []uint32
}

func newIndexes(capacity uint32) indexes { return indexes{capacity: capacity, next: 1} }

// room returns how many more numbers there are.
func (x *indexes) room() int { return int(x.capacity-x.next) + len(x.free) }

// take returns a number; the caller has asked for room.
func (x *indexes) take() uint32 {
	if n := len(x.free); n > 0 {
		i := x.free[n-1]
		x.free = x.free[:n-1]
		return i
	}
	x.next++
	return x.next - 1
}

func (x *indexes) give(i uint32) { x.free = append(x.free, i) }

// takeIf takes every free number for which wanted is true and returns them. It
// looks at all numbers.
func (x *indexes) takeIf(wanted func(uint32) bool) []uint32 {
	var taken []uint32
	x.free = slices.DeleteFunc(x.free, func(i uint32) bool {
		if wanted(i) {
			taken = append(taken, i)
			return true
		}
		return false
	})
	last := x.capacity - 1
	for last >= x.next && !wanted(last) {
		last--
	}
	for ; x.next <= last; x.next++ {
		if wanted(x.next) {
			taken = append(taken, x.next)
		} else {
			x.free = append(x.free, x.next)
		}
	}
	return taken
}

// restoreIndexes rebuilds the allocator when the numbers for which used is true
// are taken.
func restoreIndexes(capacity uint32, used func(uint32) bool) indexes {
	x := newIndexes(capacity)
	for i := capacity - 1; i > 0; i-- {
		if used(i) {
			x.next = i + 1
			break
		}
	}
	for i := x.next; i > 1; i-- {
		if !used(i - 1) {
			x.free = append(x.free, i-1)
		}
	}
	return x
}

// extent is a range of slots.
type extent struct{ start, length uint32 }

func (e extent) end() uint32 { return e.start + e.length }

// extents hands out ranges of [0, capacity), first fit. Neighbours that are
// given back become one hole again.
type extents struct {
	holes []extent // sorted by start, never adjacent, never empty
}

func newExtents(capacity uint32) extents {
	return extents{holes: []extent{{0, capacity}}}
}

// fits reports whether a range of that length is free.
func (x *extents) fits(length uint32) bool {
	return slices.ContainsFunc(x.holes, func(h extent) bool { return h.length >= length })
}

// take returns a range, or false when no hole is large enough. Length 0 always
// succeeds and takes nothing.
func (x *extents) take(length uint32) (extent, bool) {
	if length == 0 {
		return extent{}, true
	}
	for i := range x.holes {
		h := &x.holes[i]
		if h.length < length {
			continue
		}
		e := extent{h.start, length}
		h.start += length
		h.length -= length
		if h.length == 0 {
			x.holes = slices.Delete(x.holes, i, i+1)
		}
		return e, true
	}
	return extent{}, false
}

// give returns a range that take handed out.
func (x *extents) give(e extent) {
	if e.length == 0 {
		return
	}
	i, _ := slices.BinarySearchFunc(x.holes, e, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
	joinsNext := i < len(x.holes) && e.end() == x.holes[i].start
	joinsLast := i > 0 && x.holes[i-1].end() == e.start
	switch {
	case joinsLast && joinsNext:
		x.holes[i-1].length += e.length + x.holes[i].length
		x.holes = slices.Delete(x.holes, i, i+1)
	case joinsLast:
		x.holes[i-1].length += e.length
	case joinsNext:
		x.holes[i].start = e.start
		x.holes[i].length += e.length
	default:
		x.holes = slices.Insert(x.holes, i, e)
	}
}

// restoreExtents rebuilds the allocator when the ranges given, which may repeat
// but not overlap otherwise, are taken.
func restoreExtents(capacity uint32, taken []extent) extents {
	slices.SortFunc(taken, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
	var x extents
	at := uint32(0)
	for _, e := range taken {
		if e.start > at {
			x.holes = append(x.holes, extent{at, e.start - at})
		}
		at = max(at, e.end())
	}
	if at < capacity {
		x.holes = append(x.holes, extent{at, capacity - at})
	}
	return x
}
