package director

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/pins"
	"github.com/pentad/pentad/service"
)

// layoutVersion numbers the meaning of the maps. Those of another number are made anew
// beside the old ones.
const layoutVersion = 1

// The directories of pins: the maps of a layout, and the links, by the number of their
// interface.
var mapsDir = fmt.Sprintf("maps-%d", layoutVersion)

const linksDir = "links"

// The bits of traits, as in bpf/director.bpf.c.
const (
	realLocal = 1

	leavesDrains = 1 // it keeps what it has
	leavesDown   = 2

	addressOwn    = 1 // this host has it
	addressEchoes = 2

	stateSourceHash = 0x8000 // the client's address alone is hashed for a table
)

// The sizes of tables in the kernel, and how many there may be.
const (
	chunkSlots = 2048
	maxVIPs    = 16384
	maxTables  = 16384
	maxReals   = 65535
)

// ErrNoRoom says that more is wanted than the maps take.
var ErrNoRoom = errors.New("no room")

// kernel is the maps, and what is in them.
type kernel struct {
	dir  string
	spec *ebpf.CollectionSpec
	maps map[string]*ebpf.Map

	vips   map[service.Listener]*vipState
	taken  map[uint32]bool       // indexes of vips
	kinds  map[netip.Addr]uint8  // what was written to addresses
	reals  map[netip.Addr]uint32 // their places
	inside map[uint32]kernelReal // what each place has
	tables map[uint32]*tableState
	found  map[[sha256.Size]byte]uint32 // tables by what they say
	sums   map[string][sha256.Size]byte // of tables, by their members
	shared map[uint32]*sharedTable      // tables to be shown; nil: they are not

	spares   []spare         // tables that are there and say nothing yet
	reserved map[uint32]bool // numbers of these, and of those that are being made
}

// spare is a table that no VIP has. To put one into the map of tables takes the kernel as
// long as all its processors need to be done with what they do (a grace period of RCU, some
// 10 ms); to write into one that is there takes no time.
type spare struct {
	number uint32
	table  *ebpf.Map
}

// wantSpares is how many there should be: 132 KiB each.
const wantSpares = 2

// vipState is what the kernel has of a VIP. Tables are numbered from 1.
type vipState struct {
	index           uint32
	name            string
	table, previous uint32           // with stateSourceHash
	had             map[uint32]bool  // places that its tables name, or have named
	leaving         map[uint32]uint8 // of these, those that are not fully its real servers
	changed         time.Time        // when the table was changed last, for all that is known
	since           uint32           // the same in seconds since boot, as the kernel has it
}

type tableState struct {
	sum    [sha256.Size]byte
	places []uint32
	uses   int
}

var mapNames = []string{
	kernelMapAddresses, kernelMapVips, kernelMapStates, kernelMapVipInfos, kernelMapTables, kernelMapReals,
	kernelMapFlows, kernelMapLeaving, kernelMapFragments, kernelMapVipCounters, kernelMapRealCounters, kernelMapDrops, kernelMapAllowances,
}

// openKernel opens the pinned maps, or makes them, and reads what is in them.
func openKernel(dir string) (*kernel, error) {
	spec, err := loadKernel()
	if err != nil {
		return nil, err
	}
	k := &kernel{dir: dir, spec: spec, maps: make(map[string]*ebpf.Map)}
	for _, d := range []string{mapsDir, linksDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	for _, name := range mapNames {
		if k.maps[name], err = pins.OpenOrMake(filepath.Join(dir, mapsDir, name), spec.Maps[name]); err != nil {
			k.close()
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
	}
	if err := k.read(); err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

func (k *kernel) close() {
	for _, m := range k.maps {
		m.Close()
	}
	for _, s := range k.spares {
		s.table.Close()
	}
	k.spares = nil
}

// read finds out what the maps have.
func (k *kernel) read() error {
	k.taken, k.kinds = make(map[uint32]bool), make(map[netip.Addr]uint8)
	k.vips, k.reals, k.inside = make(map[service.Listener]*vipState), make(map[netip.Addr]uint32), make(map[uint32]kernelReal)
	k.tables, k.found, k.reserved = make(map[uint32]*tableState), make(map[[sha256.Size]byte]uint32), make(map[uint32]bool)
	var key kernelVipKey
	var index uint32
	byIndex := make(map[uint32]*vipState)
	all := k.maps[kernelMapVips].Iterate()
	for all.Next(&key, &index) {
		s, err := k.readVIP(index)
		if err != nil {
			return err
		}
		k.vips[listenerOf(key)], byIndex[index], k.taken[index] = s, s, true
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapVips, err)
	}
	return errors.Join(k.readLeaving(byIndex), k.readReals(), k.readKinds())
}

func (k *kernel) readVIP(index uint32) (*vipState, error) {
	var s kernelState
	if err := k.maps[kernelMapStates].Lookup(index, &s); err != nil {
		return nil, fmt.Errorf("map %s: %w", kernelMapStates, err)
	}
	name, err := k.nameOf(index)
	if err != nil {
		return nil, err
	}
	v := &vipState{index: index, name: name, table: uint32(s.Table), previous: uint32(s.Previous), changed: time.Now(), since: s.Changed,
		had: make(map[uint32]bool), leaving: make(map[uint32]uint8)}
	for _, t := range []uint32{v.table, v.previous} {
		if err := k.adopt(t); err != nil {
			return nil, err
		}
		for _, place := range k.placesOf(t) {
			v.had[place] = true
		}
	}
	return v, nil
}

func (k *kernel) readLeaving(byIndex map[uint32]*vipState) error {
	var key kernelLeavingKey
	var how uint8
	all := k.maps[kernelMapLeaving].Iterate()
	for all.Next(&key, &how) {
		if v := byIndex[key.Vip]; v != nil {
			v.had[key.Real], v.leaving[key.Real] = true, how
		}
	}
	return all.Err()
}

func (k *kernel) readKinds() error {
	var a kernelAddress
	var kind uint8
	all := k.maps[kernelMapAddresses].Iterate()
	for all.Next(&a, &kind) {
		k.kinds[addressOf(a)] = kind
	}
	return all.Err()
}

// placesOf returns the places that a table names.
func (k *kernel) placesOf(table uint32) []uint32 {
	if t := k.tables[numberOf(table)]; t != nil {
		return t.places
	}
	return nil
}

// numberOf is the number of a table without what is hashed for it.
func numberOf(table uint32) uint32 { return table &^ stateSourceHash }

func (k *kernel) nameOf(index uint32) (string, error) {
	var i kernelVipInfo
	if err := k.maps[kernelMapVipInfos].Lookup(index, &i); err != nil {
		return "", fmt.Errorf("map %s: %w", kernelMapVipInfos, err)
	}
	var b []byte
	for _, c := range i.Name {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b), nil
}

// adopt counts one more use of a table, and reads it if it is the first.
func (k *kernel) adopt(table uint32) error {
	number := numberOf(table)
	if number == 0 {
		return nil
	}
	if t := k.tables[number]; t != nil {
		t.uses++
		return nil
	}
	places, err := readTable(k.maps[kernelMapTables], number)
	if err != nil {
		return err
	}
	if k.shared != nil {
		k.shared[number] = newSharedTable(places)
	}
	sum := sha256.Sum256(places)
	k.tables[number] = &tableState{sum: sum, places: named(places), uses: 1}
	k.found[sum] = number
	return nil
}

// named returns the places that a table names, as the kernel has it.
func named(table []byte) []uint32 {
	seen := make(map[uint32]bool)
	for _, p := range placesOf(table) {
		if p > 0 {
			seen[uint32(p)] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// readTable returns what a table says, as the kernel has it.
func readTable(tables *ebpf.Map, number uint32) ([]byte, error) {
	var id ebpf.MapID
	if err := tables.Lookup(number-1, &id); err != nil {
		return nil, fmt.Errorf("map %s: %w", kernelMapTables, err)
	}
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil, fmt.Errorf("table %d: %w", number, err)
	}
	defer m.Close()
	var all []byte
	for i := range m.MaxEntries() {
		b, err := m.LookupBytes(i)
		if err != nil {
			return nil, fmt.Errorf("table %d: %w", number, err)
		}
		all = append(all, b...)
	}
	return all, nil
}

func (k *kernel) readReals() error {
	var index uint32
	var r kernelReal
	all := k.maps[kernelMapReals].Iterate()
	for all.Next(&index, &r) {
		if r.Generation == 0 {
			continue // nobody has had the place
		}
		k.inside[index] = r
		k.reals[addressOf(r.Addr)] = index
	}
	return all.Err()
}

// set makes the maps say what is wanted. What a packet reads is complete before it can
// find it.
func (k *kernel) set(vips []vip, reals map[netip.Addr]bool, ways map[netip.Addr]way, own map[netip.Addr]bool) error {
	if err := k.setReals(reals, ways); err != nil {
		return err
	}
	wanted := make(map[service.Listener]bool, len(vips))
	for _, v := range vips {
		wanted[v.listener] = true
	}
	var errs []error
	for l := range maps.Clone(k.vips) {
		if !wanted[l] {
			errs = append(errs, k.removeVIP(l)) // they make room
		}
	}
	errs = append(errs, k.removeAddresses())
	sums := make(map[string][sha256.Size]byte)
	errs = append(errs, k.setVIPs(vips, sums))
	k.sums = sums
	// Packets find a VIP by its address, when all else is there.
	return errors.Join(append(errs, k.setAddresses(vips, own))...)
}

// revise makes the maps say what is wanted where only some of it has changed: the VIPs of
// some services are others than before. Places of real servers have to be free.
func (k *kernel) revise(before, vips []vip, reals map[netip.Addr]bool, ways map[netip.Addr]way, own map[netip.Addr]bool) error {
	if err := k.setReals(reals, ways); err != nil {
		return err
	}
	wanted := make(map[service.Listener]bool, len(vips))
	for _, v := range vips {
		wanted[v.listener] = true
	}
	var errs []error
	removed := false
	for _, v := range before {
		if !wanted[v.listener] {
			removed = true
			errs = append(errs, k.removeVIP(v.listener))
		}
	}
	if removed {
		errs = append(errs, k.removeAddresses())
	}
	if k.sums == nil {
		k.sums = make(map[string][sha256.Size]byte)
	}
	return errors.Join(append(errs, k.setVIPs(vips, k.sums), k.setAddresses(vips, own))...)
}

func (k *kernel) setVIPs(vips []vip, sums map[string][sha256.Size]byte) error {
	var errs []error
	for _, v := range vips {
		number, err := k.tableFor(v.members, sums)
		if err == nil {
			err = k.setVIP(v, number)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("service %s: %s: %w", v.name, v.listener, err))
		}
	}
	return errors.Join(errs...)
}

// hasRoomFor reports whether there are places that nobody has had for all who are new.
func (k *kernel) hasRoomFor(reals map[netip.Addr]bool) bool {
	fresh := 0
	for a := range reals {
		if _, known := k.reals[a]; !known {
			fresh++
		}
	}
	return len(k.inside)+fresh <= maxReals
}

// setReals gives each real server a place. Who is not wanted any more keeps his until
// another needs it: tables of before may name it.
func (k *kernel) setReals(wanted map[netip.Addr]bool, ways map[netip.Addr]way) error {
	for _, a := range slices.SortedFunc(maps.Keys(wanted), netip.Addr.Compare) {
		r := kernelReal{Addr: kernelAddressOf(a), Ifindex: uint32(ways[a].ifindex)}
		if ways[a].local {
			r.Traits |= realLocal
		}
		index, known := k.reals[a]
		if !known {
			var err error
			if index, err = k.freePlace(wanted); err != nil {
				return err
			}
		}
		before := k.inside[index]
		if r.Generation = before.Generation; !known {
			r.Generation++
			delete(k.reals, addressOf(before.Addr))
		}
		if err := k.putReal(index, r); err != nil {
			return err
		}
		k.reals[a] = index
	}
	return nil
}

// freePlace returns a place that nobody has who is wanted: one that nobody has had, if
// there is one.
func (k *kernel) freePlace(wanted map[netip.Addr]bool) (uint32, error) {
	if n := uint32(len(k.inside)); n < maxReals {
		return n, nil
	}
	for a, index := range k.reals {
		if _, is := wanted[a]; !is {
			return index, nil
		}
	}
	return 0, fmt.Errorf("%w: there may be %d real servers", ErrNoRoom, maxReals)
}

func (k *kernel) putReal(index uint32, r kernelReal) error {
	if k.inside[index] == r {
		return nil
	}
	if err := k.maps[kernelMapReals].Put(index, &r); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapReals, err)
	}
	k.inside[index] = r
	return nil
}

// tableFor returns the number of the table of some members, which is made if there is
// none; 0 without members. sums gets what the table says.
func (k *kernel) tableFor(members []Member, sums map[string][sha256.Size]byte) (uint32, error) {
	if len(members) == 0 {
		return 0, nil
	}
	members = sorted(members)
	key := k.keyOf(members)
	for _, known := range []map[string][sha256.Size]byte{sums, k.sums} {
		sum, ok := known[key]
		if number, there := k.found[sum]; ok && there {
			sums[key] = sum
			return number, nil
		}
	}
	places := make([]byte, 2*chunkSlots*((Slots+chunkSlots-1)/chunkSlots))
	for slot, i := range Table(members) {
		binary.LittleEndian.PutUint16(places[2*slot:], uint16(k.reals[members[i].Address]+1))
	}
	sum := sha256.Sum256(places)
	number, ok := k.found[sum]
	if !ok {
		var err error
		if number, err = k.addTable(places); err != nil {
			return 0, err
		}
		k.tables[number] = &tableState{sum: sum, places: named(places)}
		k.found[sum] = number
	}
	sums[key] = sum
	return number, nil
}

// keyOf is all that a table follows from.
func (k *kernel) keyOf(members []Member) string {
	b := make([]byte, 0, 24*len(members))
	for _, m := range members {
		a := m.Address.As16()
		b = append(b, a[:]...)
		b = binary.LittleEndian.AppendUint32(b, m.Weight)
		b = binary.LittleEndian.AppendUint32(b, k.reals[m.Address])
	}
	return string(b)
}

func (k *kernel) addTable(places []byte) (uint32, error) {
	if n := len(k.spares); n > 0 {
		s := k.spares[n-1]
		k.spares = k.spares[:n-1]
		delete(k.reserved, s.number)
		defer s.table.Close()
		return s.number, fill(s.table, places)
	}
	number, err := k.freeNumber()
	if err != nil {
		return 0, err
	}
	m, err := k.newTable()
	if err != nil {
		return 0, err
	}
	defer m.Close()
	if err := fill(m, places); err != nil {
		return 0, err
	}
	if err := k.maps[kernelMapTables].Put(number-1, m); err != nil {
		return 0, fmt.Errorf("map %s: %w", kernelMapTables, err)
	}
	return number, nil
}

// freeNumber returns the first number that no table has.
func (k *kernel) freeNumber() (uint32, error) {
	number := uint32(1)
	for k.tables[number] != nil || k.reserved[number] {
		number++
	}
	if number > maxTables {
		return 0, fmt.Errorf("%w: there may be %d different tables", ErrNoRoom, maxTables)
	}
	return number, nil
}

func (k *kernel) newTable() (*ebpf.Map, error) {
	m, err := ebpf.NewMap(k.spec.Maps[kernelMapTables].InnerMap)
	if err != nil {
		return nil, fmt.Errorf("a table: %w", err)
	}
	return m, nil
}

// fill writes what a table says.
func fill(m *ebpf.Map, places []byte) error {
	for i := range m.MaxEntries() {
		if err := m.Put(i, places[2*chunkSlots*i:2*chunkSlots*(i+1)]); err != nil {
			return fmt.Errorf("a table: %w", err)
		}
	}
	return nil
}

// addSpare makes one more table that says nothing yet. The lock is not held while the
// kernel takes its time.
func (k *kernel) addSpare(lock sync.Locker, isOpen func() bool) error {
	lock.Lock()
	number, err := k.freeNumber()
	if !isOpen() || len(k.spares) >= wantSpares || err != nil {
		lock.Unlock()
		return nil // without room there is none to spare
	}
	k.reserved[number] = true
	m, err := k.newTable()
	lock.Unlock()
	if err == nil {
		err = k.maps[kernelMapTables].Put(number-1, m)
	}
	lock.Lock()
	defer lock.Unlock()
	if err != nil || !isOpen() {
		delete(k.reserved, number)
		if m != nil {
			m.Close()
		}
		return err
	}
	k.spares = append(k.spares, spare{number, m})
	return nil
}

// setVIP has a VIP use a table. The one that it had stays beside it: connections that are
// there go by that.
func (k *kernel) setVIP(v vip, table uint32) error {
	if table != 0 && v.sourceHash {
		table |= stateSourceHash
	}
	s := k.vips[v.listener]
	if s == nil {
		return k.addVIP(v, table)
	}
	for _, place := range k.placesOf(table) {
		s.had[place] = true
	}
	next := *s
	next.name = v.name
	if table != s.table {
		now, err := sinceBoot()
		if err != nil {
			return err
		}
		next.table, next.changed, next.since = table, time.Now(), now
		// The oldest stays, also if it is the new one: what began since, and does not go by
		// it, is remembered by itself.
		if s.previous == 0 {
			next.previous = s.table
		}
	}
	// Who is a real server of a table of before, and is none any more, is known before that
	// is one of before.
	if err := k.setLeaving(s, v.servers); err != nil {
		return err
	}
	if next.table == s.table && next.name == s.name {
		return nil
	}
	if err := k.putVIP(v.listener, next, next.name != s.name); err != nil {
		return err
	}
	k.use(next.table, 1)
	k.use(next.previous, 1)
	k.vips[v.listener] = &next
	return errors.Join(k.unuse(s.table), k.unuse(s.previous))
}

// setLeaving says of all real servers that a VIP has had what they are to it now.
func (k *kernel) setLeaving(s *vipState, servers map[netip.Addr]uint8) error {
	for place := range s.had {
		how, is := servers[addressOf(k.inside[place-1].Addr)]
		if !is {
			how = leavesDown
		}
		if err := k.putLeaving(s, place, how); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) putLeaving(s *vipState, place uint32, how uint8) error {
	if s.leaving[place] == how {
		return nil
	}
	key := kernelLeavingKey{Vip: s.index, Real: place}
	if how == 0 {
		delete(s.leaving, place)
		return drop(k.maps[kernelMapLeaving], &key)
	}
	if err := k.maps[kernelMapLeaving].Put(&key, how); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapLeaving, err)
	}
	s.leaving[place] = how
	return nil
}

func (k *kernel) addVIP(v vip, table uint32) error {
	index, free := k.freeIndex()
	if !free {
		return fmt.Errorf("%w: there may be %d listeners", ErrNoRoom, maxVIPs)
	}
	s := vipState{index: index, name: v.name, table: table, changed: time.Now(), had: make(map[uint32]bool), leaving: make(map[uint32]uint8)}
	for _, place := range k.placesOf(table) {
		s.had[place] = true
	}
	// What the place counted was of another one.
	zero := make([]kernelCounters, ebpf.MustPossibleCPU())
	if err := k.maps[kernelMapVipCounters].Put(index, zero); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapVipCounters, err)
	}
	if err := k.putVIP(v.listener, s, true); err != nil {
		return err
	}
	k.use(table, 1)
	k.taken[index] = true
	k.vips[v.listener] = &s
	return nil
}

// putVIP writes a VIP: its tables first.
func (k *kernel) putVIP(l service.Listener, s vipState, whole bool) error {
	if err := k.maps[kernelMapStates].Put(s.index, &kernelState{Table: uint16(s.table), Previous: uint16(s.previous), Changed: s.since}); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapStates, err)
	}
	if !whole {
		return nil
	}
	var info kernelVipInfo
	for i := range min(len(s.name), len(info.Name)-1) {
		info.Name[i] = int8(s.name[i])
	}
	if err := k.maps[kernelMapVipInfos].Put(s.index, &info); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapVipInfos, err)
	}
	if err := k.maps[kernelMapVips].Put(vipKeyOf(l), s.index); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapVips, err)
	}
	return nil
}

// setAddresses says of each address that has listeners whether it is one of this host,
// which answers pings of those by itself.
func (k *kernel) setAddresses(vips []vip, own map[netip.Addr]bool) error {
	done := make(map[netip.Addr]bool)
	for _, v := range vips {
		a := v.listener.Address.Addr()
		if done[a] {
			continue
		}
		done[a] = true
		kind := uint8(addressEchoes)
		if own[a] {
			kind = addressOwn
		}
		if k.kinds[a] == kind {
			continue
		}
		if err := k.maps[kernelMapAddresses].Put(kernelAddressOf(a), kind); err != nil {
			return fmt.Errorf("map %s: %w", kernelMapAddresses, err)
		}
		k.kinds[a] = kind
	}
	return nil
}

// freeIndex returns an index that no VIP has: at first the next one.
func (k *kernel) freeIndex() (uint32, bool) {
	n := uint32(len(k.vips))
	for i := range uint32(maxVIPs) {
		if index := (n + i) % maxVIPs; !k.taken[index] {
			return index, true
		}
	}
	return 0, false
}

func (k *kernel) use(table uint32, n int) {
	if t := k.tables[numberOf(table)]; t != nil {
		t.uses += n
	}
}

// unuse takes a table away that nobody uses any more.
func (k *kernel) unuse(table uint32) error {
	number := numberOf(table)
	t := k.tables[number]
	if t == nil {
		return nil
	}
	if t.uses--; t.uses > 0 {
		return nil
	}
	delete(k.tables, number)
	delete(k.found, t.sum)
	if err := k.maps[kernelMapTables].Delete(number - 1); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("map %s: %w", kernelMapTables, err)
	}
	return nil
}

// removeVIP takes a VIP away, and tables that nobody uses. It may be gone.
func (k *kernel) removeVIP(l service.Listener) error {
	s := k.vips[l]
	if s == nil {
		return nil
	}
	errs := []error{
		drop(k.maps[kernelMapVips], vipKeyOf(l)), k.maps[kernelMapStates].Put(s.index, &kernelState{}),
		k.unuse(s.table), k.unuse(s.previous), k.forgetFlows(s),
	}
	delete(k.vips, l)
	delete(k.taken, s.index)
	return errors.Join(errs...)
}

// removeAddresses takes those away at which no VIP is left.
func (k *kernel) removeAddresses() error {
	used := make(map[netip.Addr]bool, len(k.vips))
	for l := range k.vips {
		used[l.Address.Addr()] = true
	}
	var errs []error
	for a := range maps.Clone(k.kinds) {
		if !used[a] {
			errs = append(errs, drop(k.maps[kernelMapAddresses], kernelAddressOf(a)))
			delete(k.kinds, a)
		}
	}
	return errors.Join(errs...)
}

// forgetFlows forgets what is remembered of a VIP: another may have its place next.
func (k *kernel) forgetFlows(s *vipState) error {
	var errs []error
	for place := range maps.Clone(s.leaving) {
		errs = append(errs, k.putLeaving(s, place, 0))
	}
	if s.previous == 0 {
		return errors.Join(errs...) // none is
	}
	var gone []uint64
	var key uint64
	var f kernelFlow
	all := k.maps[kernelMapFlows].Iterate()
	for all.Next(&key, &f) {
		if f.Vip == s.index {
			gone = append(gone, key)
		}
	}
	for _, key := range gone {
		errs = append(errs, drop(k.maps[kernelMapFlows], key))
	}
	return errors.Join(errs...)
}

// drop removes an element that may be gone already.
func drop(m *ebpf.Map, key any) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// How long a table of before stays at least, how long a connection may be silent because of
// which it stays longer, and how long it is remembered at most.
const (
	previousFor   = 15 * time.Minute
	activeFor     = 15 * time.Minute
	rememberedFor = 2 * time.Hour
)

// settle forgets connections that have been silent, and takes tables of before away whose
// time is over and by which no connection is remembered. The lock is held for the second.
func (k *kernel) settle(now time.Time, lock sync.Locker) error {
	remembered, err := k.forgetSilent()
	if err != nil {
		return err
	}
	lock.Lock()
	defer lock.Unlock()
	var errs []error
	for l, s := range k.vips {
		if s.previous == 0 || remembered[s.index] || now.Sub(s.changed) < previousFor {
			continue
		}
		next := *s
		next.previous, next.had = 0, make(map[uint32]bool)
		for _, place := range k.placesOf(s.table) {
			next.had[place] = true
		}
		if err := k.putVIP(l, next, false); err != nil {
			errs = append(errs, err)
			continue
		}
		for place := range maps.Clone(next.leaving) {
			if !next.had[place] {
				errs = append(errs, k.putLeaving(&next, place, 0))
			}
		}
		k.vips[l] = &next
		errs = append(errs, k.unuse(s.previous))
	}
	return errors.Join(errs...)
}

// sinceBoot is the kernel's clock as programs have it, in seconds.
func sinceBoot() (uint32, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return 0, err
	}
	return uint32(t.Sec), nil
}

// forgetSilent returns the VIPs of which connections are remembered.
func (k *kernel) forgetSilent() (map[uint32]bool, error) {
	now, err := sinceBoot()
	if err != nil {
		return nil, err
	}
	remembered := make(map[uint32]bool)
	var silent []uint64
	var key uint64
	var f kernelFlow
	all := k.maps[kernelMapFlows].Iterate()
	for all.Next(&key, &f) {
		quiet := time.Duration(int32(now-f.Seen)) * time.Second
		if quiet > rememberedFor {
			silent = append(silent, key)
		}
		if quiet <= activeFor {
			remembered[f.Vip] = true
		}
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, err
	}
	for _, key := range silent {
		if err := drop(k.maps[kernelMapFlows], key); err != nil {
			return nil, err
		}
	}
	return remembered, nil
}

// attach has interfaces run a new program, and others none. It returns those that have it.
func (k *kernel) attach(names []string) (map[string]pins.Interface, error) {
	there, err := pins.Ethernet(names)
	if err != nil {
		return nil, err
	}
	spec := k.spec.Copy()
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: k.maps})
	if err != nil {
		return nil, fmt.Errorf("the kernel does not take the program: %w", err)
	}
	defer coll.Close()
	var keep []uint32
	for name, i := range there {
		if err := pins.AttachInterface(filepath.Join(k.dir, linksDir), i.Index, coll.Programs[kernelProgDirect], false); err != nil {
			return nil, fmt.Errorf("interface %s: %w", name, err)
		}
		keep = append(keep, i.Index)
	}
	return there, pins.DetachOthers(filepath.Join(k.dir, linksDir), keep)
}

// areAttached reports whether interfaces that are there have the program, and whether all
// is pinned.
func (k *kernel) areAttached(names []string, attached map[string]pins.Interface) bool {
	there, err := pins.Ethernet(names)
	if err != nil {
		return true // it cannot be seen now
	}
	if len(there) != len(attached) {
		return false
	}
	for name, i := range there {
		if attached[name].Index != i.Index || !pins.IsAttached(filepath.Join(k.dir, linksDir), i.Index) {
			return false
		}
	}
	for _, name := range mapNames {
		if _, err := os.Stat(filepath.Join(k.dir, mapsDir, name)); err != nil {
			return false
		}
	}
	return true
}

// Remove takes everything out of the kernel, whoever put it there.
func Remove(pinDir string) error {
	dir := filepath.Join(pinDir, planeDir)
	if err := pins.DetachOthers(filepath.Join(dir, linksDir), nil); err != nil {
		return err
	}
	all, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range all {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, d.Name())))
	}
	return errors.Join(errs...)
}
