package nat

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/service"
)

// ErrNothingInstalled says that there is no table in the kernel.
var ErrNothingInstalled = errors.New("nothing is installed for packets from elsewhere")

// Mapping is what the kernel does with packets to one listener.
type Mapping struct {
	Service  string
	Listener service.Listener // From says whose packets; guarded ones are for Sources only
	Backends []Share          // in the order of their addresses
	Dropped  bool             // without backends: dropped; else refused
}

// Share is a backend and how many of the slots of its service it has.
type Share struct {
	Address netip.AddrPort
	Slots   int
}

// Read returns what the table in the network namespace of this process does,
// sorted by service and listener. It needs no agent. The error is
// ErrNothingInstalled when there is none.
func Read() ([]Mapping, error) {
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
	return mappings(all), nil
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

// mappings puts elements together again.
func mappings(all []element) []Mapping {
	shares := make(map[string]map[netip.AddrPort]int) // by listener, and whether of guests
	type numbered struct{ key, number string }
	members := make(map[numbered]netip.AddrPort)
	for _, e := range all {
		if e.in.name == setMembers {
			n := len(e.key) - 4
			members[numbered{e.key[:n], e.key[n:]}] = splitTarget(e.data, e.in.v4)
		}
	}
	for _, e := range all {
		if e.in.name != setSlots && e.in.name != setChoices {
			continue
		}
		n := len(e.key) - 4
		key := e.key[:n]
		b, known := members[numbered{key, e.data}]
		if e.in.name == setSlots {
			b, known = splitTarget(e.data, e.in.v4), true
		}
		if !known {
			continue
		}
		if fromNative(e.key[n:]) >= guestSlots {
			key += guestMark
		}
		if shares[key] == nil {
			shares[key] = make(map[netip.AddrPort]int)
		}
		shares[key][b]++
	}
	type place struct {
		v4           bool
		key, verdict string
		name         string
	}
	from := make(map[place]service.From)
	for _, e := range all {
		switch e.in.name {
		case setServices:
			from[place{e.in.v4, e.key, e.data, e.note}] |= service.FromWorld
		case setGuestsTo:
			from[place{e.in.v4, e.key, e.data, e.note}] |= service.FromGuests
		}
	}
	var out []Mapping
	for p, f := range from {
		l, _ := splitListener(p.key, p.v4)
		l.From, l.Guarded = f, strings.HasSuffix(p.verdict, "-guarded")
		m := Mapping{Service: p.name, Listener: l, Dropped: p.verdict == chainDrop}
		key := p.key
		if f == service.FromGuests {
			key += guestMark
		}
		if p.verdict != chainDrop && p.verdict != chainRefuse {
			for b, n := range shares[key] {
				m.Backends = append(m.Backends, Share{b, n})
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

// guestMark tells the slots of guests from those of the world.
const guestMark = "guests"
