package socket

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// ErrNothingInstalled says that there is no pentad in this kernel.
var ErrNothingInstalled = errors.New("pentad has nothing in this kernel")

// ErrNewer says that a newer pentad made the pins.
var ErrNewer = errors.New("pins of a newer pentad")

// View is what the kernel does now, read from its maps. It needs no agent.
type View struct {
	Version  string // of the pentad that wrote the maps
	Services []*service.Service
	Since    map[string]map[netip.AddrPort]time.Time // last change of state, by service
	Loads    map[string]map[netip.AddrPort]Load      // by service
	Refusals map[string]uint64                       // connections and datagrams that no backend was there for, by service
	Leaving  int                                     // connections to backends that were removed
	Usage
}

// Choose returns what becomes of connections of a family to a service. Whom one client
// has ejected counts as ejected: for others it may serve.
func (v *View) Choose(s *service.Service, f service.Family) service.Choice {
	loads := v.Loads[s.Name]
	return s.Choose(f, func(b service.Backend) service.Load {
		l := loads[b.Address]
		return service.Load{InFlight: l.InFlight, Ejected: l.Ejected}
	})
}

// Load is what the programs know of one backend.
type Load struct {
	InFlight    uint32        // TCP connections from their SYN to their end, and connected UDP sockets
	RTT         time.Duration // smoothed, of handshakes; 0: unknown
	Response    time.Duration // from a request to its first byte, as measured last; 0: unknown
	Measured    time.Duration // how long ago one of them was measured
	Failures    uint32        // failed connects in a row, of the client that had most
	FailedAgo   time.Duration // how long ago one of a client that does not use it failed; 0: there is none
	Connections uint64        // all that were ever begun
	Failed      uint64        // of these, how many failed
	Ejections   uint64        // how often a client ejected it

	Ejected bool          // some clients do not use it, or are trying it
	Clients int           // how many; see struct blame in bpf/layout.h
	Shunned bool          // others avoid it, too, because several clients found it dead
	Trial   bool          // one connection is trying it
	For     time.Duration // how much longer it is ejected; 0: the next connection tries it
}

// Hook is one place in the kernel where pentad is attached, or should be.
type Hook struct {
	Name     string
	Attached bool
	CgroupID uint64
}

// Counters count since the maps were made. They only grow.
type Counters struct {
	Translated uint64 `json:"translated"` // connections and first datagrams that got a backend
	Refused    uint64 `json:"refused"`    // refused because no backend was usable
	Untracked  uint64 `json:"untracked"`  // translated, but getpeername shows the backend
	Panics     uint64 `json:"panics"`     // went to an ejected backend because too many are ejected
	Reset      uint64 `json:"reset"`      // closed because their backend was down or gone
	Held       uint64 `json:"held"`       // sockets of the host that wanted a port held for a service
}

// Read returns what is installed under the pin directory. The error is
// ErrNothingInstalled or ErrNewer, or says what could not be read.
func Read(dir string) (*View, error) {
	dir = filepath.Join(dir, planeDir)
	set, info, err := openAndTell(dir, true)
	if err != nil {
		return nil, err
	}
	defer set.close()
	in, err := inspect(set)
	if err != nil {
		return nil, fmt.Errorf("pins under %s: %w", dir, err)
	}
	v := &View{
		Version: text(info.Version[:]), Usage: Usage{Memory: set.memory(), Hooks: readHooks(dir)},
		Since: make(map[string]map[netip.AddrPort]time.Time, len(in.services)),
		Loads: make(map[string]map[netip.AddrPort]Load, len(in.services)), Refusals: make(map[string]uint64, len(in.services)),
	}
	if err := v.readLoads(set, in); err != nil {
		return nil, fmt.Errorf("pins under %s: %w", dir, err)
	}
	if v.Counters, err = readCounters(set); err != nil {
		return nil, err
	}
	refusals, err := set.readRefusals()
	if err != nil {
		return nil, err
	}
	for id, i := range in.services {
		v.Services = append(v.Services, i.desired())
		v.Since[i.name] = i.since()
		v.Refusals[i.name] = refusals[id]
	}
	slices.SortFunc(v.Services, func(a, b *service.Service) int { return strings.Compare(a.Name, b.Name) })
	return v, nil
}

// openAndTell opens the maps of this plane and what they say of themselves.
func openAndTell(dir string, readOnly bool) (*mapSet, kernelAboutInfo, error) {
	opts := &ebpf.LoadPinOptions{ReadOnly: readOnly}
	number, info, err := openAbout(dir, opts)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, info, ErrNothingInstalled
	}
	if err != nil {
		return nil, info, fmt.Errorf("pins under %s: %w", dir, err)
	}
	if info.Layout != layoutVersion {
		return nil, info, foreignLayout(dir, info)
	}
	set, err := openSet(dir, number, opts)
	if err != nil {
		return nil, info, fmt.Errorf("pins under %s: %w", dir, err)
	}
	return set, info, nil
}

// readLoads puts the loads to the backends.
func (v *View) readLoads(set *mapSet, in *inspection) error {
	loads, err := set.readLoads()
	if err != nil {
		return err
	}
	c, err := host.NewClock()
	if err != nil {
		return err
	}
	defer c.Close()
	blames, err := set.readBlames(c)
	if err != nil {
		return err
	}
	for i := range loads {
		v.Leaving += int(loads[i].Inflight + loads[i].Datagrams)
	}
	for _, i := range in.services {
		of := make(map[netip.AddrPort]Load, len(i.places))
		for addr, p := range i.places {
			if int(p.index) < len(loads) {
				of[addr] = blames.load(&loads[p.index], &i.info, p.reference())
				v.Leaving -= int(of[addr].InFlight)
			}
		}
		v.Loads[i.name] = of
	}
	return nil
}

func foreignLayout(dir string, info kernelAboutInfo) error {
	if info.Layout > layoutVersion {
		return fmt.Errorf("%w: %s were made by pentad %s (layout %d, this one knows %d); use that version, or remove them with `pentad down`",
			ErrNewer, dir, text(info.Version[:]), info.Layout, layoutVersion)
	}
	return fmt.Errorf("%s were made by pentad %s (layout %d, this one knows %d); start this version's agent, which takes them over",
		dir, text(info.Version[:]), info.Layout, layoutVersion)
}

// parseAbout reads the map about of any version: the layout never moves.
func parseAbout(raw []byte) kernelAboutInfo {
	var info kernelAboutInfo
	if len(raw) >= 4 {
		info.Layout = binary.NativeEndian.Uint32(raw)
	}
	for i := 8; i < len(raw) && i-8 < len(info.Version); i++ {
		info.Version[i-8] = int8(raw[i])
	}
	return info
}

// readRefusals returns how many connections each service has refused, by its index.
func (s *mapSet) readRefusals() (map[uint32]uint64, error) {
	all, err := dump[uint32, uint64](s.maps[kernelMapRefusals])
	if err != nil {
		return nil, fmt.Errorf("map refusals: %w", err)
	}
	counts := make(map[uint32]uint64, len(all.keys))
	for i, id := range all.keys {
		counts[id] = all.values[i]
	}
	return counts, nil
}

func readCounters(s *mapSet) (Counters, error) {
	sum := func(c kernelCounter) (n uint64, err error) {
		var perCPU []uint64
		if err := s.maps[kernelMapCounters].Lookup(uint32(c), &perCPU); err != nil {
			return 0, fmt.Errorf("map counters: %w", err)
		}
		for _, v := range perCPU {
			n += v
		}
		return n, nil
	}
	translated, err1 := sum(kernelCounterCOUNTER_TRANSLATED)
	refused, err2 := sum(kernelCounterCOUNTER_REFUSED)
	untracked, err3 := sum(kernelCounterCOUNTER_UNTRACKED)
	panics, err4 := sum(kernelCounterCOUNTER_PANICS)
	reset, err5 := sum(kernelCounterCOUNTER_RESET)
	held, err6 := sum(kernelCounterCOUNTER_HELD)
	return Counters{translated, refused, untracked, panics, reset, held}, errors.Join(err1, err2, err3, err4, err5, err6)
}

// inspection is the contents of the maps, put together.
type inspection struct {
	services map[uint32]*installed
	backends []kernelBackend // by index
	strays4  []kernelListener4Key
	strays6  []kernelListener6Key
}

// installed is one service as it stands in the maps.
type installed struct {
	id        uint32
	name      string
	info      kernelServiceInfo
	listeners map[service.Listener]kernelListener
	places    map[netip.AddrPort]place
	broken    bool // something does not fit together: write all of it again
}

// inspect reads the maps. Listeners of services that do not exist are strays.
func inspect(s *mapSet) (*inspection, error) {
	infos, err := dump[uint32, kernelServiceInfo](s.maps[kernelMapServices])
	if err != nil {
		return nil, fmt.Errorf("map services: %w", err)
	}
	in := &inspection{services: make(map[uint32]*installed)}
	names := make(map[string]bool)
	for i, id := range infos.keys {
		info := infos.values[i]
		name := text(info.Name[:])
		if id == 0 || name == "" || names[name] {
			continue
		}
		names[name] = true
		in.services[id] = &installed{
			id: id, name: name, info: info,
			listeners: make(map[service.Listener]kernelListener), places: make(map[netip.AddrPort]place),
		}
	}
	if err := in.readBackends(s); err != nil {
		return nil, err
	}
	return in, in.readListeners(s)
}

func (in *inspection) readBackends(s *mapSet) error {
	hot, err := dump[uint32, kernelBackend](s.maps[kernelMapBackends])
	if err != nil {
		return fmt.Errorf("map backends: %w", err)
	}
	details, err := dump[uint32, kernelBackendDetail](s.maps[kernelMapBackendInfo])
	if err != nil {
		return fmt.Errorf("map backend_info: %w", err)
	}
	in.backends = hot.values
	for i, b := range hot.values {
		owner := in.services[b.Service]
		if i == 0 || b.Service == 0 || owner == nil {
			continue
		}
		addr := netip.AddrPortFrom(address(b.Addr), bigEndian(b.Port))
		if has(owner.places, addr) {
			owner.broken = true
			continue
		}
		owner.places[addr] = place{index: uint32(i), hot: newHot(&b), info: newInfo(&details.values[i])}
	}
	return nil
}

func (in *inspection) readListeners(s *mapSet) error {
	l4, err := dump[kernelListener4Key, kernelListener](s.maps[kernelMapListeners4])
	if err != nil {
		return fmt.Errorf("map listeners4: %w", err)
	}
	for i, k := range l4.keys {
		if owner := in.services[l4.values[i].Service]; owner != nil {
			owner.listeners[listener4(k)] = l4.values[i]
		} else {
			in.strays4 = append(in.strays4, k)
		}
	}
	l6, err := dump[kernelListener6Key, kernelListener](s.maps[kernelMapListeners6])
	if err != nil {
		return fmt.Errorf("map listeners6: %w", err)
	}
	for i, k := range l6.keys {
		if owner := in.services[l6.values[i].Service]; owner != nil {
			owner.listeners[listener6(k)] = l6.values[i]
		} else {
			in.strays6 = append(in.strays6, k)
		}
	}
	return nil
}

// desired is the service that the maps show.
func (i *installed) desired() *service.Service {
	ms := func(n uint32) time.Duration { return time.Duration(n) * time.Millisecond }
	s := &service.Service{
		Name: i.name, Source: service.Source(i.info.Source), Balance: service.Balance(i.info.Balance),
		Affinity: time.Duration(i.info.Affinity) * time.Second,
		Keepalive: service.Keepalive{
			Idle:     time.Duration(i.info.Keepalive.Idle) * time.Second,
			Interval: time.Duration(i.info.Keepalive.Interval) * time.Second,
			Probes:   int(i.info.Keepalive.Probes),
		},
		Breaker: service.Breaker{
			MaxConnections: int(i.info.MaxConnections), Failures: int(i.info.Failures),
			Ejection: ms(i.info.Ejection), MaxEjected: int(i.info.MaxEjected),
		},
		ConnectTimeout: ms(i.info.ConnectTimeout), SlowStart: ms(i.info.SlowStart), Silent: i.info.Silent != 0,
	}
	if i.info.Keep != 0 {
		s.OnDown = service.Keep
	}
	for x, l := range i.listeners {
		if l.Traits&uint8(kernelTraitTRAIT_HOST) != 0 {
			x.From = service.FromHost
		}
		x.Held = l.Traits&uint8(kernelTraitTRAIT_HELD) != 0
		s.Listeners = append(s.Listeners, x)
	}
	slices.SortFunc(s.Listeners, service.Listener.Compare)
	for addr, p := range i.places {
		s.Backends = append(s.Backends, service.Backend{
			Address: addr, Weight: p.hot.weight, Group: p.info.group, Zone: p.info.zone,
			Drained: p.info.drained, Down: p.info.down, DrainUntil: p.info.drainUntil,
		})
	}
	slices.SortFunc(s.Backends, func(a, b service.Backend) int { return a.Address.Compare(b.Address) })
	return s
}

func (i *installed) since() map[netip.AddrPort]time.Time {
	since := make(map[netip.AddrPort]time.Time, len(i.places))
	for addr, p := range i.places {
		since[addr] = time.Unix(int64(p.info.since), 0)
	}
	return since
}

// adopt rebuilds the ledger from the maps.
func adopt(s *mapSet) (*ledger, *writes, error) {
	in, err := inspect(s)
	if err != nil {
		return nil, nil, err
	}
	l := newLedger(s.capacity(), 0)
	var w writes
	w.remove4, w.remove6 = in.strays4, in.strays6

	for i, b := range in.backends {
		l.generation[i] = b.Generation
		l.markReset(uint32(i), b.Reset)
	}
	taken := make(map[uint32]bool)
	var ranges []extent
	for _, i := range in.services {
		e := &entry{id: i.id, name: i.name, of: originOf(i.name), info: i.info, shown: newShown(i.listeners), complete: !i.broken}
		l.byName[i.name] = e
		for _, p := range i.places {
			e.places = append(e.places, p)
			taken[p.index] = true
		}
		for x, value := range i.listeners {
			l.owner[x] = e
			l.countListener(x, 1, &w)
			t := &e.tables[service.FamilyOf(x.Address.Addr()).Index()]
			r := extent{value.Slots, value.Length}
			ranges = append(ranges, r)
			if t.extent.length > 0 && t.extent != r {
				// A switch was cut off between two listeners.
				e.complete = false
			}
			t.extent = r
		}
	}
	l.services = restoreIndexes(l.capacity.Services, func(i uint32) bool { return in.services[i] != nil })
	l.backends = restoreIndexes(l.capacity.Backends, func(i uint32) bool { return taken[i] })
	ranges = slices.DeleteFunc(ranges, func(e extent) bool { return e.length == 0 || e.end() > l.capacity.Slots })
	slices.SortFunc(ranges, func(a, b extent) int { return int(int64(a.start) - int64(b.start)) })
	l.slots = restoreExtents(l.capacity.Slots, ranges)
	if err := l.checkFilter(s, &w); err != nil {
		return nil, nil, err
	}
	return l, &w, l.sumTables(s, ranges)
}

// checkFilter stages the words of the filter that are not what they should be.
func (l *ledger) checkFilter(s *mapSet, w *writes) error {
	w.setBits = batch[uint32, uint64]{}
	words, err := dump[uint32, uint64](s.maps[kernelMapFilter])
	if err != nil {
		return fmt.Errorf("map filter: %w", err)
	}
	for i, have := range words.values {
		if have != l.filter[uint32(i)] {
			w.setBits.add(uint32(i), l.filter[uint32(i)])
		}
	}
	return nil
}

// sumTables reads the tables that listeners use, so that unchanged ones need
// not be written again.
func (l *ledger) sumTables(s *mapSet, ranges []extent) error {
	if len(ranges) == 0 {
		return nil
	}
	all, err := dump[uint32, kernelSlot](s.maps[kernelMapSlots])
	if err != nil {
		return fmt.Errorf("map slots: %w", err)
	}
	for _, e := range l.byName {
		for f := range e.tables {
			t := &e.tables[f]
			if t.extent.end() > uint32(len(all.values)) {
				e.complete, t.extent = false, extent{}
				continue
			}
			t.sum = sumSlots(all.values[t.extent.start:t.extent.end()])
		}
	}
	return nil
}
