package nat

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/pentad/pentad/ipam"
	"github.com/pentad/pentad/service"
)

// set names one set or map of the table, for one family.
type set struct {
	name   setName
	family service.Family
}

type setName uint8

// The sets and maps. Keys and data are concatenations of fields of four bytes or
// sixteen; a listener is address, protocol and port.
const (
	setServices  setName = iota // listener -> verdict, for packets from elsewhere
	setPodsTo                   // listener -> verdict, for packets of pods
	setSlots                    // listener and slot -> backend
	setChoices                  // listener and slot -> number of a backend, of services with affinity
	setMembers                  // listener and number -> backend, of the same
	setSources                  // listener and ranges of addresses: who may come
	setLocal                    // addresses of backends on this host
	setHairpin                  // the same address twice, of backends on this host
	setPods                     // ranges of addresses of pods
	setTaken                    // addresses of listeners that lie in reserved ranges
	setReserved                 // ranges of addresses that only services have
	setUntracked                // ranges between whose addresses nothing is tracked
	setVIPs                     // addresses of listeners that lie in these ranges
	setTracked                  // addresses in these ranges whose packets were translated, written by the kernel
	setWaning                   // clients that may have no translated connection any more, and are forgotten after a while; by this plane
	setAffinity                 // client and home of a service -> number of a backend, written by the kernel
	setNameEnd
)

// element is one element of a set or map, as the kernel holds it.
type element struct {
	in   set
	key  string
	data string // of maps; the name of a chain where the map is of verdicts
	note string // with verdicts: the name of the service, for people
}

// podSlots is added to slots that pods choose from where they have other
// backends than the world.
const podSlots = 1 << 16

// maxSlots bounds the slots of a service whose backends have unequal weights.
const maxSlots = 256

// chain describes a chain that leads to a backend: what its name says.
type chain struct {
	family   service.Family
	pods     bool // slots from podSlots on
	slots    int  // 0: the second half of a chain with affinity
	hashed   bool // the slot is a hash of the client's address
	affinity time.Duration
	guarded  bool

	// home is what a service with affinity is called where its clients are remembered.
	home string

	// untracked ranges make it one that leads to no backend, but keeps packets
	// between them from being tracked.
	untracked []netip.Prefix
}

// sticks returns the chain to which one with affinity leads: it remembers the
// backend whose number is known.
func (c chain) sticks() chain { return chain{family: c.family, affinity: c.affinity, home: c.home} }

// homeOf is made of a service's name, so that a client is known at all its listeners,
// whatever these become. It has the form of a listener's key, which nft(8) can list, and
// is none's: no protocol has the number that follows the address.
func homeOf(name string, family service.Family) string {
	h := fnv.New128a()
	h.Write([]byte(name))
	sum := h.Sum(nil)
	n := family.Length()
	return string(sum[:n]) + string([]byte{homeProtocol, 0, 0, 0}) + string(sum[n%16:n%16+2]) + "\x00\x00"
}

// homeProtocol is a number that IANA has given to no protocol, for use by nobody but
// ourselves (RFC 3692: 253 is for experiments).
const homeProtocol = 253

// name is unique for what the chain does.
func (c chain) name() string {
	if c.untracked != nil {
		h := fnv.New32a()
		for _, p := range c.untracked {
			h.Write([]byte(p.String()))
		}
		return fmt.Sprintf("%s%d-%08x", rawMark, len(pairsOf(c.untracked)), h.Sum32())
	}
	if c.slots == 0 {
		return fmt.Sprintf("stick%d-%d", c.family, c.affinity/time.Second) + c.homeName()
	}
	name := fmt.Sprintf("backend%d-%d", c.family, c.slots)
	if c.pods {
		name += "-pods"
	}
	if c.hashed {
		name += hashedMark
	}
	if c.affinity > 0 {
		name += fmt.Sprint(affinityMark, int(c.affinity/time.Second)) + c.homeName()
	}
	if c.guarded {
		name += guardedMark
	}
	return name
}

// homeName tells chains of services with affinity from each other.
func (c chain) homeName() string { return fmt.Sprintf("-%x", c.home) }

// What is in the names of chains that lead clients by their addresses, that remember
// them for so many seconds, and that ask who they are.
const (
	hashedMark   = "-hashed"
	affinityMark = "-affinity-"
	guardedMark  = "-guarded"
)

// rawMark begins the name of the chain that is there when nothing is tracked between
// some ranges; how many rules it has follows, and which ranges these are.
const rawMark = "raw-"

// pair is two ranges of a family, or one twice: packets go from the one to the other.
type pair struct{ from, to netip.Prefix }

func pairsOf(ranges []netip.Prefix) []pair {
	var all []pair
	for _, from := range ranges {
		for _, to := range ranges {
			if from.Addr().Is4() == to.Addr().Is4() {
				all = append(all, pair{from, to})
			}
		}
	}
	return all
}

// The chains for services without a backend.
const (
	chainRefuse = "refuse"
	chainDrop   = "drop"
)

// appendSlots adds what leads from the slots of a listener to backends.
func appendSlots(all []element, c chain, key string, at []netip.AddrPort) []element {
	first := uint32(0)
	if c.pods {
		first = podSlots
	}
	if c.affinity == 0 {
		for i, b := range at {
			all = append(all, element{set{setSlots, c.family}, key + native(first+uint32(i)), target(b), ""})
		}
		return all
	}
	numbers := numbersOf(at)
	for i, b := range at {
		all = append(all, element{set{setChoices, c.family}, key + native(first+uint32(i)), native(numbers[b]), ""})
	}
	for _, b := range slices.SortedFunc(maps.Keys(numbers), netip.AddrPort.Compare) {
		all = append(all, element{set{setMembers, c.family}, key + native(numbers[b]), target(b), ""})
	}
	return all
}

// numbersOf gives backends numbers that depend on their addresses, so that a
// client that is remembered with one finds its backend also when others have come
// and gone. Of two with the same number the later one has the next.
func numbersOf(at []netip.AddrPort) map[netip.AddrPort]uint32 {
	numbers := make(map[netip.AddrPort]uint32)
	taken := make(map[uint32]bool)
	sorted := slices.Clone(at)
	slices.SortFunc(sorted, netip.AddrPort.Compare)
	for _, b := range slices.Compact(sorted) {
		h := fnv.New32a()
		h.Write([]byte(target(b)))
		n := h.Sum32()
		for taken[n] {
			n++
		}
		taken[n], numbers[b] = true, n
	}
	return numbers
}

func appendSources(all []element, key string, sources []netip.Prefix, family service.Family) []element {
	for _, p := range merged(sources, family) {
		first, last := bounds(p)
		all = append(all, element{set{setSources, family}, key + first + key + last, "", ""})
	}
	return all
}

// merged returns the prefixes of a family without those that lie in others: an
// interval set holds no two that overlap.
func merged(sources []netip.Prefix, family service.Family) []netip.Prefix {
	var all []netip.Prefix
	for _, p := range sources {
		if service.FamilyOf(p.Addr()) == family && !slices.ContainsFunc(all, func(o netip.Prefix) bool { return o.Contains(p.Addr()) }) {
			all = append(all, p) // sorted: a wider one that begins here comes first
		}
	}
	return all
}

// bounds returns the first and the last address of a prefix.
func bounds(p netip.Prefix) (first, last string) {
	r := ipam.RangeOf(p)
	return string(r.First.AsSlice()), string(r.Last.AsSlice())
}

// slotsOf returns the backends of the group that serves, each as often as its
// weight says: a slot drawn by lot is a backend drawn by weight. With source-hash
// they are in an order that hardly changes when one comes or goes.
func slotsOf(s *service.Service, family service.Family) []netip.AddrPort {
	if s.Balance == service.SourceHash {
		var slots []netip.AddrPort
		for _, i := range s.CoarseTable(family) {
			slots = append(slots, s.Backends[i].Address)
		}
		return slots
	}
	group, ok := s.ServingGroup(family)
	if !ok {
		return nil
	}
	var serving []service.Backend
	even := true
	for _, b := range s.Backends {
		if service.FamilyOf(b.Address.Addr()) == family && b.Usable() && b.Group == group {
			even = even && (len(serving) == 0 || serving[0].Weight == b.Weight)
			serving = append(serving, b)
		}
	}
	counts := make([]int, len(serving))
	for i := range counts {
		counts[i] = 1
	}
	if !even {
		counts = apportion(serving)
	}
	var slots []netip.AddrPort
	for i, b := range serving {
		for range counts[i] {
			slots = append(slots, b.Address)
		}
	}
	return slots
}

// apportion divides slots by weight.
func apportion(serving []service.Backend) []int {
	total, divisor := 0, 0
	weights := make([]uint32, len(serving))
	for i, b := range serving {
		weights[i] = b.Weight
		total += int(b.Weight)
		divisor = gcd(divisor, int(b.Weight))
	}
	return service.Apportion(weights, max(min(total/divisor, maxSlots), len(serving)))
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// listenerKey is a listener as three fields.
func listenerKey(l service.Listener) string {
	return string(l.Address.Addr().AsSlice()) + string([]byte{byte(l.Protocol), 0, 0, 0}) + port(l.Address.Port())
}

// target is the address of a backend as two fields.
func target(b netip.AddrPort) string { return string(b.Addr().AsSlice()) + port(b.Port()) }

// port is in network byte order, padded to a field.
func port(p uint16) string { return string([]byte{byte(p >> 8), byte(p), 0, 0}) }

// native is a number as a register holds it.
func native(n uint32) string { return string(binary.NativeEndian.AppendUint32(nil, n)) }

func fromNative(field string) uint32 { return binary.NativeEndian.Uint32([]byte(field)) }

// splitListener and splitTarget are the way back.
func splitListener(key string, family service.Family) (l service.Listener, rest string) {
	n := family.Length()
	addr, _ := netip.AddrFromSlice([]byte(key[:n]))
	l.Protocol = service.Protocol(key[n])
	l.Address = netip.AddrPortFrom(addr, uint16(key[n+4])<<8|uint16(key[n+5]))
	return l, key[n+8:]
}

func splitTarget(data string, family service.Family) netip.AddrPort {
	n := family.Length()
	addr, _ := netip.AddrFromSlice([]byte(data[:n]))
	return netip.AddrPortFrom(addr, uint16(data[n])<<8|uint16(data[n+1]))
}

// change is what has to be removed from the kernel and what added, in this order.
type change struct {
	remove, add []element
}

// differ adds what makes one list of elements the other.
func (c *change) differ(have, want []element) {
	type place struct {
		in  set
		key string
	}
	old := make(map[place]element, len(have))
	for _, e := range have {
		old[place{e.in, e.key}] = e
	}
	for _, e := range want {
		at := place{e.in, e.key}
		was, there := old[at]
		delete(old, at)
		if there && was == e {
			continue
		}
		if there {
			c.remove = append(c.remove, was)
		}
		c.add = append(c.add, e)
	}
	for _, e := range have {
		if _, left := old[place{e.in, e.key}]; left {
			delete(old, place{e.in, e.key})
			c.remove = append(c.remove, e)
		}
	}
}

// settle drops what is both removed by one service and added by another.
func (c *change) settle() {
	if len(c.remove) == 0 || len(c.add) == 0 {
		return
	}
	added := make(map[element]bool, len(c.add))
	for _, e := range c.add {
		added[e] = true
	}
	both := make(map[element]bool)
	c.remove = slices.DeleteFunc(c.remove, func(e element) bool {
		both[e] = added[e]
		return added[e]
	})
	c.add = slices.DeleteFunc(c.add, func(e element) bool { return both[e] })
}
