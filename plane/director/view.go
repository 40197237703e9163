package director

import (
	"errors"
	"io/fs"
	"maps"
	"math/bits"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/pentad/pentad/pins"
	"github.com/pentad/pentad/service"
)

// View is what the program does, as the kernel has it. Its zero value is that of no
// program.
type View struct {
	Interfaces []string // that have the program
	VIPs       []VIP    // sorted by listener
	Drops      Drops
}

// VIP is a listener whose packets are sent on.
type VIP struct {
	Service    string
	Listener   service.Listener
	SourceHash bool   // the client's address alone chooses
	Changing   bool   // the table of before is there, too, for connections that are
	Reals      []Real // sorted by address; those that have places, or had them before
	Counters

	table []uint16
}

// Real is a real server of a VIP.
type Real struct {
	Address   netip.Addr
	Slots     int    // places in the table, of Slots
	Interface string // where it is reached; empty: nowhere, or it is this host
	Local     bool
	Drains    bool
	Down      bool
	Counters  // of all VIPs together

	place uint16 // one more than its index
}

// Counters count what passed. They only grow.
type Counters struct {
	Packets uint64
	Bytes   uint64 // with all headers
	Opened  uint64 // SYN of TCP
}

// Drops counts packets that were dropped, by why.
type Drops struct {
	NoReal    uint64 // no real server is usable
	NoWay     uint64 // it is not on a segment of this host
	TTL       uint64 // it has passed too many hosts: directors send it to each other
	Malformed uint64 // it is shorter than its headers
}

// Read returns what is installed under the directory of all pins. It needs no agent.
func Read(pinDir string) (*View, error) {
	dir := filepath.Join(pinDir, planeDir)
	v := &View{}
	opened := make(map[string]*ebpf.Map)
	defer func() {
		for _, m := range opened {
			m.Close()
		}
	}()
	for _, name := range mapNames {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, mapsDir, name), &ebpf.LoadPinOptions{ReadOnly: true})
		if errors.Is(err, fs.ErrNotExist) {
			return v, nil // not, or not yet
		}
		if err != nil {
			return nil, err
		}
		opened[name] = m
	}
	v.Interfaces = pins.Interfaces(filepath.Join(dir, linksDir))
	k := &kernel{dir: dir, maps: opened, shared: make(map[uint32]*sharedTable)}
	if err := k.read(); err != nil {
		return nil, err
	}
	for l, s := range k.vips {
		x, err := k.view(l, s)
		if err != nil {
			return nil, err
		}
		v.VIPs = append(v.VIPs, x)
	}
	slices.SortFunc(v.VIPs, func(a, b VIP) int { return a.Listener.Compare(b.Listener) })
	return v, k.readDrops(&v.Drops)
}

func (k *kernel) view(l service.Listener, s *vipState) (VIP, error) {
	x := VIP{Service: s.name, Listener: l, SourceHash: s.table&stateSourceHash != 0, Changing: s.previous != 0}
	if t := k.shared[numberOf(s.table)]; t != nil {
		x.table = t.places
	}
	var err error
	for _, index := range k.indexesOf(s) {
		n := 0
		if t := k.shared[numberOf(s.table)]; t != nil {
			n = t.slots[index]
		}
		r := k.inside[index]
		shown := Real{place: uint16(index + 1), Address: addressOf(r.Addr), Slots: n, Local: r.Traits&realLocal != 0, Drains: s.leaving[index+1] == leavesDrains, Down: s.leaving[index+1] == leavesDown}
		if r.Ifindex != 0 {
			shown.Interface = pins.InterfaceName(int(r.Ifindex))
		}
		if shown.Counters, err = k.counters(kernelMapRealCounters, index); err != nil {
			return x, err
		}
		x.Reals = append(x.Reals, shown)
	}
	slices.SortFunc(x.Reals, func(a, b Real) int { return a.Address.Compare(b.Address) })
	x.Counters, err = k.counters(kernelMapVipCounters, s.index)
	return x, err
}

// sharedTable is a table as several VIPs show it.
type sharedTable struct {
	places []uint16
	slots  map[uint32]int // by index of a real server, how many places it has
}

func newSharedTable(whole []byte) *sharedTable {
	t := &sharedTable{placesOf(whole), make(map[uint32]int)}
	for _, p := range t.places {
		if p > 0 {
			t.slots[uint32(p-1)]++
		}
	}
	return t
}

// indexesOf returns the real servers that the tables of a VIP name.
func (k *kernel) indexesOf(s *vipState) []uint32 {
	all := make(map[uint32]bool)
	for _, table := range []uint32{s.table, s.previous} {
		for _, place := range k.placesOf(table) {
			all[place-1] = true
		}
	}
	return slices.Collect(maps.Keys(all))
}

func placesOf(b []byte) []uint16 {
	places := make([]uint16, Slots)
	for i := range places {
		places[i] = uint16(b[2*i]) | uint16(b[2*i+1])<<8
	}
	return places
}

func (k *kernel) counters(name string, index uint32) (sum Counters, err error) {
	var each []kernelCounters
	if err := k.maps[name].Lookup(index, &each); err != nil {
		return sum, err
	}
	for _, c := range each {
		sum.Packets += c.Packets
		sum.Bytes += c.Bytes
		sum.Opened += c.Opened
	}
	return sum, nil
}

// Counts returns what has passed for each service, and what was dropped.
func (p *Plane) Counts() (services map[string]Counters, drops Drops, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	services = make(map[string]Counters)
	if p.kernel == nil {
		return services, drops, nil
	}
	for _, s := range p.kernel.vips {
		c, err := p.kernel.counters(kernelMapVipCounters, s.index)
		if err != nil {
			return nil, drops, err
		}
		sum := services[s.name]
		sum.Packets += c.Packets
		sum.Bytes += c.Bytes
		sum.Opened += c.Opened
		services[s.name] = sum
	}
	return services, drops, p.kernel.readDrops(&drops)
}

func (k *kernel) readDrops(to *Drops) error {
	for i, n := range []*uint64{&to.NoReal, &to.NoWay, &to.TTL, &to.Malformed} {
		var each []uint64
		if err := k.maps[kernelMapDrops].Lookup(uint32(i), &each); err != nil {
			return err
		}
		for _, x := range each {
			*n += x
		}
	}
	return nil
}

// Find returns the VIP of a listener.
func (v *View) Find(l service.Listener) (VIP, bool) {
	for _, x := range v.VIPs {
		if x.Listener == l {
			return x, true
		}
	}
	return VIP{}, false
}

// Chosen returns the real server that a client has, if its address alone chooses.
func (x VIP) Chosen(client netip.Addr) (netip.Addr, bool) {
	if !x.SourceHash || x.table == nil {
		return netip.Addr{}, false
	}
	place := x.table[sourceHash(client)%Slots]
	i := slices.IndexFunc(x.Reals, func(r Real) bool { return r.place == place })
	if i < 0 {
		return netip.Addr{}, false
	}
	return x.Reals[i].Address, true
}

// sourceHash is the hash of a client's address, as in bpf/director.bpf.c.
func sourceHash(client netip.Addr) uint32 {
	const seed = 0x7065
	h := uint32(seed)
	b := client.As16()
	words := []int{0, 4, 8, 12}
	if client.Unmap().Is4() {
		words = words[3:]
	}
	for _, i := range words {
		w := uint32(b[i])<<24 | uint32(b[i+1])<<16 | uint32(b[i+2])<<8 | uint32(b[i+3])
		w = bits.RotateLeft32(w*0xcc9e2d51, 15) * 0x1b873593
		h = bits.RotateLeft32(h^w, 13)*5 + 0xe6546b64
	}
	h = (h ^ h>>16) * 0x85ebca6b
	h = (h ^ h>>13) * 0xc2b2ae35
	return h ^ h>>16
}
