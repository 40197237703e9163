// Package ipam gives addresses out of pools. It is pure: the addresses in use are
// told to it, and it returns who shall have which. Nothing is remembered between
// two calls, so that nothing can leak.
package ipam

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/pentad/pentad/service"
)

// Range is a range of addresses of one family, both ends included.
type Range struct {
	First, Last netip.Addr
}

// ErrRange says that a text is no range of addresses.
var ErrRange = errors.New("want a prefix such as 192.0.2.0/24 or a range such as 192.0.2.10-192.0.2.20")

// ParseRange reads a prefix (all its addresses) or a range FIRST-LAST.
func ParseRange(text string) (Range, error) {
	if p, err := netip.ParsePrefix(strings.TrimSpace(text)); err == nil && !p.Addr().Is4In6() {
		return RangeOf(p), nil
	}
	first, last, ok := strings.Cut(text, "-")
	a, err1 := netip.ParseAddr(strings.TrimSpace(first))
	b, err2 := netip.ParseAddr(strings.TrimSpace(last))
	if !ok || err1 != nil || err2 != nil || a.Zone() != "" || b.Zone() != "" || a.Is4In6() || b.Is4In6() {
		return Range{}, fmt.Errorf("%q: %w", text, ErrRange)
	}
	if a.Is4() != b.Is4() || b.Less(a) {
		return Range{}, fmt.Errorf("%q: the first address must not come after the last, in the same family", text)
	}
	return Range{a, b}, nil
}

// RangeOf returns the addresses of a prefix.
func RangeOf(p netip.Prefix) Range {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	end, _ := netip.AddrFromSlice(last)
	return Range{p.Addr(), end}
}

// Contains reports whether an address lies in the range.
func (r Range) Contains(a netip.Addr) bool {
	return a.Is4() == r.First.Is4() && !a.Less(r.First) && !r.Last.Less(a)
}

// Find returns the first of several ranges that contains an address, and false when
// none does.
func Find(ranges []Range, a netip.Addr) (Range, bool) {
	i := slices.IndexFunc(ranges, func(r Range) bool { return r.Contains(a) })
	if i < 0 {
		return Range{}, false
	}
	return ranges[i], true
}

// Compare orders ranges by their first addresses.
func (r Range) Compare(o Range) int { return r.First.Compare(o.First) }

// Overlaps reports whether two ranges share an address.
func (r Range) Overlaps(o Range) bool {
	return r.First.Is4() == o.First.Is4() && !r.Last.Less(o.First) && !o.Last.Less(r.First)
}

// String writes the range as ParseRange reads it: as a prefix if it is one, else by its
// ends.
func (r Range) String() string {
	if !r.First.IsValid() || !r.Last.IsValid() {
		return "no range"
	}
	for bits := range r.First.BitLen() + 1 {
		if p := netip.PrefixFrom(r.First, bits); RangeOf(p) == r {
			return p.String()
		}
	}
	return r.First.String() + "-" + r.Last.String()
}

// Pool is addresses for those that it is meant for.
type Pool struct {
	Name     string
	Ranges   []Range
	Priority int  // lower ones are used first; equal ones by name
	Auto     bool // also for those that do not ask for the pool or an address of it
	// AvoidEnds leaves out IPv4 addresses that end in .0 and .255, which some
	// equipment takes for networks and broadcasts.
	AvoidEnds bool
	// Admits says whether an owner may have addresses of the pool; nil: all.
	Admits func(owner string) bool
}

// has reports whether the pool gives out an address.
func (p *Pool) has(a netip.Addr) bool {
	return !p.avoids(a) && slices.ContainsFunc(p.Ranges, func(r Range) bool { return r.Contains(a) })
}

func (p *Pool) avoids(a netip.Addr) bool {
	if !p.AvoidEnds || !a.Is4() {
		return false
	}
	last := a.As4()[3]
	return last == 0 || last == 255
}

func (p *Pool) admits(owner string) bool { return p.Admits == nil || p.Admits(owner) }

// Port is what owners that share an address must not both have.
type Port struct {
	Protocol string
	Port     uint16
}

// Claim is what one owner wants and has.
type Claim struct {
	Owner   string // unique, such as "shop/web"
	Created time.Time
	V4, V6  bool // an address of each of these families
	// Optional families are done without where no pool has any.
	Optional  bool
	Addresses []netip.Addr // asked for by address: these, or none
	Pool      string       // asked for by name: from this pool, or none
	Share     string       // owners with the same, not empty, may have the same address
	Ports     []Port
	Current   []netip.Addr // what it has
	// Changed says that it asks for something else than when it got what it
	// has: of those that cannot share an address any more this one yields.
	Changed bool
	// Foreign says that nobody knows that what it has was allocated: it keeps
	// what lies in a pool.
	Foreign bool
}

// Reason says what became of a claim.
type Reason string

// The reasons.
const (
	Allocated   Reason = "Allocated"   // it has what it wants
	Exhausted   Reason = "Exhausted"   // no pool has an address left
	NoPool      Reason = "NoPool"      // no pool is meant for it
	InUse       Reason = "InUse"       // the address that it asks for is another's
	NotInPool   Reason = "NotInPool"   // the address that it asks for, or has, lies in no pool
	Invalid     Reason = "Invalid"     // what it asks for cannot be had by anybody
	UnknownPool Reason = "UnknownPool" // it asks for a pool that does not exist or is not meant for it
)

// Result is what an owner shall have from now on.
type Result struct {
	Owner     string
	Addresses []netip.Addr // IPv4 first
	Reason    Reason
	Message   string // what is wrong and what to do; empty with Allocated
}

// Allocate decides who has which address. Who has one keeps it for as long as he
// does not ask for another that he can have. Of two that have the same and may not,
// the one keeps it that has not changed, and else the older. Claims and pools may
// come in any order; results are sorted by owner.
func Allocate(pools []Pool, claims []Claim) []Result {
	t := table{pools: slices.Clone(pools), holders: make(map[netip.Addr][]*Claim), next: make(map[place]netip.Addr)}
	slices.SortFunc(t.pools, func(a, b Pool) int { return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Name, b.Name)) })
	order := make([]*Claim, len(claims))
	for i := range claims {
		order[i] = &claims[i]
	}
	slices.SortFunc(order, func(a, b *Claim) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Owner, b.Owner)) })
	kept := make(map[*Claim][]netip.Addr, len(order))
	for _, changed := range []bool{false, true} {
		for _, c := range order {
			if c.Changed == changed {
				kept[c] = t.keep(c)
			}
		}
	}
	// First those who may leave what they have: others may want it.
	results := make([]Result, 0, len(order))
	for _, moves := range []bool{true, false} {
		for _, c := range order {
			if slices.ContainsFunc(kept[c], func(a netip.Addr) bool { return !c.asksFor(a, &t) }) == moves {
				results = append(results, t.complete(c, kept[c]))
			}
		}
	}
	slices.SortFunc(results, func(a, b Result) int { return cmp.Compare(a.Owner, b.Owner) })
	return results
}

// table is who has what while it is decided.
type table struct {
	pools   []Pool
	holders map[netip.Addr][]*Claim
	next    map[place]netip.Addr // addresses of a range before this one are taken
}

// place is a range of a pool.
type place struct {
	pool string
	r    Range
}

func (c *Claim) wants(f service.Family) bool {
	return f == service.V4 && c.V4 || f == service.V6 && c.V6
}

// keep returns what the claim has and may keep: of each family what it asks for, or
// else what it has until it can have that.
func (t *table) keep(c *Claim) []netip.Addr {
	var kept []netip.Addr
	for _, f := range service.EachFamily {
		if a, ok := t.best(c, f); ok {
			t.take(a, c)
			kept = append(kept, a)
		}
	}
	return kept
}

func (t *table) best(c *Claim, f service.Family) (best netip.Addr, ok bool) {
	for _, a := range c.Current {
		if service.FamilyOf(a) != f || !c.wants(f) || !t.free(a, c) || c.Foreign && !t.pooled(a) {
			continue
		}
		if c.asksFor(a, t) {
			return a, true
		}
		if !ok {
			best, ok = a, true
		}
	}
	return best, ok
}

func (t *table) pooled(a netip.Addr) bool {
	return slices.ContainsFunc(t.pools, func(p Pool) bool { return p.has(a) })
}

// asksFor reports whether an address is still one that the claim wants. An address
// that has left its pool is kept: connections go to it.
func (c *Claim) asksFor(a netip.Addr, t *table) bool {
	if len(c.Addresses) > 0 {
		return slices.Contains(c.Addresses, a)
	}
	if c.Pool == "" {
		return true
	}
	// Pools may overlap: what is in the one that it asks for is right.
	return slices.ContainsFunc(t.pools, func(p Pool) bool { return p.Name == c.Pool && p.has(a) }) || !t.pooled(a)
}

// free reports whether a claim may have an address beside those that have it.
func (t *table) free(a netip.Addr, c *Claim) bool {
	for _, h := range t.holders[a] {
		if h == c {
			continue
		}
		if c.Share == "" || h.Share != c.Share || slices.ContainsFunc(c.Ports, func(p Port) bool { return slices.Contains(h.Ports, p) }) {
			return false
		}
	}
	return true
}

func (t *table) take(a netip.Addr, c *Claim) { t.holders[a] = append(t.holders[a], c) }

func (t *table) give(a netip.Addr, c *Claim) {
	t.holders[a] = slices.DeleteFunc(t.holders[a], func(h *Claim) bool { return h == c })
	clear(t.next)
}

// complete gives a claim what it lacks.
func (t *table) complete(c *Claim, kept []netip.Addr) Result {
	r := Result{Owner: c.Owner, Reason: Allocated}
	var without []Result // families that are done without
	for _, f := range service.EachFamily {
		if !c.wants(f) {
			continue
		}
		i := slices.IndexFunc(kept, func(a netip.Addr) bool { return service.FamilyOf(a) == f })
		if i >= 0 && c.asksFor(kept[i], t) {
			r.Addresses = append(r.Addresses, kept[i])
			r.note(t.stillPooled(kept[i]))
			continue
		}
		a, reason, message := t.find(c, f)
		switch {
		case reason == Allocated:
			if i >= 0 {
				t.give(kept[i], c)
			}
			t.take(a, c)
			r.Addresses = append(r.Addresses, a)
		case i >= 0:
			r.Addresses = append(r.Addresses, kept[i])
			r.note(reason, fmt.Sprintf("%s; it keeps %s until then", message, kept[i]))
		case c.Optional && c.wants(f.Other()) && (reason == NoPool || reason == Invalid || reason == UnknownPool):
			without = append(without, Result{Reason: reason, Message: message})
		default:
			r.note(reason, message)
		}
	}
	if len(r.Addresses) == 0 && r.Reason == Allocated {
		for _, w := range without {
			r.note(w.Reason, w.Message)
		}
		r.note(NoPool, "no pool has addresses of any family that it wants; create an AddressPool")
	}
	return r
}

// note keeps the first thing that is wrong.
func (r *Result) note(reason Reason, message string) {
	if r.Reason == Allocated {
		r.Reason, r.Message = reason, message
	}
}

func (t *table) stillPooled(a netip.Addr) (Reason, string) {
	if t.pooled(a) {
		return Allocated, ""
	}
	return NotInPool, fmt.Sprintf("%s is in no pool any more; it is kept for as long as this lives: put it back into a pool, or ask for another address", a)
}

// find looks for an address of a family.
func (t *table) find(c *Claim, f service.Family) (netip.Addr, Reason, string) {
	if len(c.Addresses) > 0 {
		return t.findAsked(c, f)
	}
	var full []string
	for i := range t.pools {
		p := &t.pools[i]
		if c.Pool != "" && p.Name != c.Pool || c.Pool == "" && !p.Auto || !p.admits(c.Owner) ||
			!slices.ContainsFunc(p.Ranges, func(r Range) bool { return service.FamilyOf(r.First) == f }) {
			continue
		}
		if a, ok := t.firstFree(p, c, f); ok {
			return a, Allocated, ""
		}
		full = append(full, p.Name)
	}
	switch {
	case len(full) > 0:
		return netip.Addr{}, Exhausted, fmt.Sprintf("no %s address is left in the pool %s; extend it or delete what is not needed", f, strings.Join(full, ", "))
	case c.Pool != "":
		return netip.Addr{}, UnknownPool, fmt.Sprintf("there is no pool %s with %s addresses that is meant for this", c.Pool, f)
	}
	return netip.Addr{}, NoPool, fmt.Sprintf("no pool with %s addresses is meant for this; create an AddressPool, or ask for one by name", f)
}

func (t *table) findAsked(c *Claim, f service.Family) (netip.Addr, Reason, string) {
	i := slices.IndexFunc(c.Addresses, func(a netip.Addr) bool { return service.FamilyOf(a) == f })
	if i < 0 {
		return netip.Addr{}, Invalid, "addresses are asked for, but none of one of its families; ask for one of each"
	}
	a := c.Addresses[i]
	if !slices.ContainsFunc(t.pools, func(p Pool) bool {
		return p.has(a) && p.admits(c.Owner) && (c.Pool == "" || p.Name == c.Pool)
	}) {
		return a, NotInPool, fmt.Sprintf("%s is asked for and is in no pool that is meant for this; ask for another one or extend a pool", a)
	}
	if !t.free(a, c) {
		h := t.holders[a][0]
		return a, InUse, fmt.Sprintf("%s is asked for and belongs to %s; ask for another one, or have both share it with the same key and different ports", a, h.Owner)
	}
	return a, Allocated, ""
}

// firstFree looks for an address that nobody has, or that others share with the
// claim. Hardly anything becomes free while it is decided, so that each address of a
// range is looked at once.
func (t *table) firstFree(p *Pool, c *Claim, f service.Family) (netip.Addr, bool) {
	if c.Share != "" {
		if a, ok := t.shared(p, c, f); ok {
			return a, true
		}
	}
	for _, r := range p.Ranges {
		if service.FamilyOf(r.First) != f {
			continue
		}
		at := place{p.Name, r}
		a, begun := t.next[at]
		if !begun {
			a = r.First
		}
		for a.IsValid() && !r.Last.Less(a) && (len(t.holders[a]) > 0 || p.avoids(a)) {
			a = a.Next()
		}
		// After the last address of a family there is none: look at it again.
		if a.IsValid() {
			t.next[at] = a
		}
		if a.IsValid() && !r.Last.Less(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// shared returns the lowest address that others with the same key have and that
// has the ports of the claim free.
func (t *table) shared(p *Pool, c *Claim, f service.Family) (best netip.Addr, ok bool) {
	for a, holders := range t.holders {
		if service.FamilyOf(a) != f || len(holders) == 0 || !p.has(a) || holders[0].Share != c.Share || !t.free(a, c) || ok && best.Less(a) {
			continue
		}
		best, ok = a, true
	}
	return best, ok
}

// Overlap is two pools that have addresses in common.
type Overlap struct {
	A, B   string
	Common Range
}

// Overlaps returns which pools overlap, each pair once.
func Overlaps(pools []Pool) []Overlap {
	var found []Overlap
	for i := range pools {
		for j := i + 1; j < len(pools); j++ {
			for _, a := range pools[i].Ranges {
				for _, b := range pools[j].Ranges {
					if a.Overlaps(b) {
						common := Range{maxAddr(a.First, b.First), minAddr(a.Last, b.Last)}
						found = append(found, Overlap{pools[i].Name, pools[j].Name, common})
					}
				}
			}
		}
	}
	return found
}

func maxAddr(a, b netip.Addr) netip.Addr {
	if a.Less(b) {
		return b
	}
	return a
}

func minAddr(a, b netip.Addr) netip.Addr {
	if b.Less(a) {
		return b
	}
	return a
}
