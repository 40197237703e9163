package nat

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pentad/pentad/ipam"
	"github.com/pentad/pentad/service"
)

// ErrNothingInstalled says that there is no table in the kernel.
var ErrNothingInstalled = errors.New("nothing is installed for packets from elsewhere")

// View is what the table does. Its zero value is that of no table.
type View struct {
	Mappings []Mapping    // sorted by service and listener
	Pods     []ipam.Range // addresses of pods, sorted
	Reserved []ipam.Range // addresses that only services have, sorted

	taken   map[netip.Addr]bool
	visits  map[string]string             // what is remembered: client and home of a service -> number
	members map[string]netip.AddrPort     // listener and number -> backend
	named   map[service.Listener][]string // the services that a listener leads to
}

// Mapping is what the kernel does with packets to one listener.
type Mapping struct {
	Service  string
	Listener service.Listener // From says whose packets
	Sources  []ipam.Range     // of guarded listeners: who may come
	Backends []Share          // in the order of their addresses
	Hashed   bool             // the client's address chooses the backend; else a lot
	Affinity time.Duration    // how long a client keeps its backend; 0: not at all
	Dropped  bool             // without backends: dropped; else refused
}

// Share is a backend and how many of the slots of its service it has.
type Share struct {
	Address netip.AddrPort
	Slots   int
	Local   bool // on this host
}

// Taken reports whether a service has an address in a reserved range.
func (v *View) Taken(a netip.Addr) bool { return v.taken[a] }

// Remembered returns the backend to which affinity leads a client, and false when
// it has not been at the listener lately.
func (v *View) Remembered(client netip.Addr, listener service.Listener) (netip.AddrPort, bool) {
	family := service.FamilyOf(listener.Address.Addr())
	key := listenerKey(listener)
	for _, name := range v.named[listener.At()] {
		number, known := v.visits[string(client.AsSlice())+homeOf(name, family)]
		if b, there := v.members[key+number]; known && there {
			return b, true
		}
	}
	return netip.AddrPort{}, false
}

// Read returns what the table in the network namespace of this process does. It
// needs no agent. The error is ErrNothingInstalled when there is none.
func Read() (*View, error) {
	k, err := dial()
	if err != nil {
		return nil, err
	}
	defer k.close()
	found, err := k.inspect()
	if err != nil {
		return nil, fmt.Errorf("table inet %s: %w", TableName, err)
	}
	if found == nil {
		return nil, ErrNothingInstalled
	}
	all, err := k.elements()
	if err != nil {
		return nil, fmt.Errorf("table inet %s: %w", TableName, err)
	}
	visits, err := k.of(setAffinity)
	if err != nil {
		return nil, fmt.Errorf("table inet %s: %w", TableName, err)
	}
	return newView(all, visits), nil
}

// Installed reports whether there is a table, and whether it is whole.
func Installed() (there, whole bool, err error) {
	k, err := dial()
	if err != nil {
		return false, false, err
	}
	defer k.close()
	found, err := k.inspect()
	if err != nil || found == nil {
		return false, false, err
	}
	return true, found.sound, nil
}

// newView puts elements together again.
func newView(all, visits []element) *View {
	v := &View{taken: make(map[netip.Addr]bool), visits: make(map[string]string), named: make(map[service.Listener][]string)}
	r := reading{
		members: make(map[string]netip.AddrPort), shares: make(map[string]map[netip.AddrPort]int),
		sources: make(map[string][]ipam.Range), local: make(map[netip.Addr]bool),
	}
	for _, e := range all {
		switch e.in.name {
		case setPods:
			v.Pods = append(v.Pods, rangeOf(e.key))
		case setReserved:
			v.Reserved = append(v.Reserved, rangeOf(e.key))
		case setTaken:
			v.taken[addressOf(e.key)] = true
		case setLocal:
			r.local[addressOf(e.key)] = true
		case setMembers:
			r.members[e.key] = splitTarget(e.data, e.in.family)
		case setSources:
			half := len(e.key) / 2
			n := half - e.in.family.Length()
			r.sources[e.key[:n]] = append(r.sources[e.key[:n]], rangeOf(e.key[n:half]+e.key[half+n:]))
		}
	}
	for _, e := range all {
		r.slot(e)
	}
	v.members = r.members
	for _, e := range visits {
		v.visits[e.key] = e.data
	}
	v.Mappings = r.mappings(all)
	for _, m := range v.Mappings {
		v.named[m.Listener.At()] = append(v.named[m.Listener.At()], m.Service)
	}
	for _, ranges := range [][]ipam.Range{v.Pods, v.Reserved} {
		slices.SortFunc(ranges, ipam.Range.Compare)
	}
	return v
}

func addressOf(key string) netip.Addr {
	a, _ := netip.AddrFromSlice([]byte(key))
	return a
}

func rangeOf(key string) ipam.Range {
	half := len(key) / 2
	return ipam.Range{First: addressOf(key[:half]), Last: addressOf(key[half:])}
}

// reading is what is known while a view is put together, by the listener as elements
// have it.
type reading struct {
	members map[string]netip.AddrPort         // by listener and number
	shares  map[string]map[netip.AddrPort]int // also by whether it is for pods
	sources map[string][]ipam.Range
	local   map[netip.Addr]bool
}

// slot counts a slot for its backend.
func (r *reading) slot(e element) {
	if e.in.name != setSlots && e.in.name != setChoices {
		return
	}
	n := len(e.key) - 4
	key := e.key[:n]
	b, known := r.members[key+e.data]
	if e.in.name == setSlots {
		b, known = splitTarget(e.data, e.in.family), true
	}
	if !known {
		return
	}
	if fromNative(e.key[n:]) >= podSlots {
		key += podMark
	}
	if r.shares[key] == nil {
		r.shares[key] = make(map[netip.AddrPort]int)
	}
	r.shares[key][b]++
}

func (r *reading) mappings(all []element) []Mapping {
	type place struct {
		family       service.Family
		key, verdict string
		name         string
	}
	from := make(map[place]service.From)
	for _, e := range all {
		switch e.in.name {
		case setServices:
			from[place{e.in.family, e.key, e.data, e.note}] |= service.FromWorld
		case setPodsTo:
			from[place{e.in.family, e.key, e.data, e.note}] |= service.FromPods
		}
	}
	var out []Mapping
	for p, f := range from {
		l, _ := splitListener(p.key, p.family)
		l.From, l.Guarded = f, strings.HasSuffix(p.verdict, guardedMark)
		m := Mapping{
			Service: p.name, Listener: l, Dropped: p.verdict == chainDrop,
			Hashed: strings.Contains(p.verdict, hashedMark), Affinity: affinityIn(p.verdict),
		}
		if l.Guarded {
			m.Sources = r.sources[p.key]
			slices.SortFunc(m.Sources, ipam.Range.Compare)
		}
		key := p.key
		if f == service.FromPods {
			key += podMark
		}
		if p.verdict != chainDrop && p.verdict != chainRefuse {
			for b, n := range r.shares[key] {
				m.Backends = append(m.Backends, Share{b, n, r.local[b.Addr()]})
			}
		}
		slices.SortFunc(m.Backends, func(a, b Share) int { return a.Address.Compare(b.Address) })
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b Mapping) int {
		return cmp.Or(strings.Compare(a.Service, b.Service), a.Listener.Compare(b.Listener))
	})
	return out
}

// affinityIn reads what a chain of backends does by its name.
func affinityIn(chain string) time.Duration {
	_, rest, found := strings.Cut(chain, affinityMark)
	if !found {
		return 0
	}
	text, _, _ := strings.Cut(rest, "-")
	seconds, err := strconv.Atoi(text)
	if err != nil {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// podMark tells the slots of pods from those of the world.
const podMark = "pods"
