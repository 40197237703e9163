package socket

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
)

// layoutVersion numbers the meaning of the maps that follow the configuration.
// Raise it when one of them changes; maps of another number are rebuilt beside
// the old ones. The maps that hold the state of sockets and backends (stateMaps)
// must never change their layout: what they know cannot be found out again. New
// knowledge gets a map beside them.
const layoutVersion = 6

// mapSet is one complete set of maps, pinned under one directory, "set-N". A set
// counts only once its map about is pinned, which happens last.
type mapSet struct {
	dir    string
	number int
	maps   map[string]*ebpf.Map
	loads  []*ebpf.Map // the arrays in the map loads
}

// stateMaps hold what sockets, backends and followers did; they move on from set
// to set. An older layout may lack some.
var stateMaps = []string{
	kernelMapSockets, kernelMapSocketsMore, kernelMapUdpNames, kernelMapUdpMore, kernelMapUdpShares, kernelMapCounters, kernelMapRefusals,
	kernelMapLoads, kernelMapBlames, kernelMapHeartbeat,
	kernelMapFlows, kernelMapFollowers, kernelMapFollowed, kernelMapLost,
}

// mapNames are the maps of a set in the order of pinning; about is last.
var mapNames = []string{
	kernelMapSockets, kernelMapSocketsMore, kernelMapUdpNames, kernelMapUdpMore, kernelMapUdpShares, kernelMapCounters, kernelMapRefusals,
	kernelMapLoads, kernelMapBlames, kernelMapHeartbeat,
	kernelMapFlows, kernelMapFollowers, kernelMapFollowed, kernelMapLost,
	kernelMapAffinity, kernelMapServices, kernelMapBackends, kernelMapBackendInfo, kernelMapSlots,
	kernelMapFilter, kernelMapListeners4, kernelMapListeners6, kernelMapAbout,
}

func (s *mapSet) close() {
	if s == nil {
		return
	}
	for _, m := range s.maps {
		m.Close()
	}
	for _, m := range s.loads {
		m.Close()
	}
}

// capacity reads the sizes of the maps.
func (s *mapSet) capacity() capacity {
	return capacity{
		Services:   s.maps[kernelMapServices].MaxEntries(),
		Backends:   s.maps[kernelMapBackends].MaxEntries(),
		Slots:      s.maps[kernelMapSlots].MaxEntries(),
		Listeners4: s.maps[kernelMapListeners4].MaxEntries(),
		Listeners6: s.maps[kernelMapListeners6].MaxEntries(),
	}
}

// resize sets the sizes of the maps to be created.
func resize(spec *ebpf.CollectionSpec, c capacity) {
	spec.Maps[kernelMapServices].MaxEntries = c.Services
	spec.Maps[kernelMapBackends].MaxEntries = c.Backends
	spec.Maps[kernelMapBackendInfo].MaxEntries = c.Backends
	spec.Maps[kernelMapSlots].MaxEntries = c.Slots
	spec.Maps[kernelMapListeners4].MaxEntries = c.Listeners4
	spec.Maps[kernelMapListeners6].MaxEntries = c.Listeners6
}

// setNumbers returns the numbers of the sets under dir, complete or not, ascending.
func setNumbers(dir string) ([]int, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var numbers []int
	for _, e := range entries {
		text, ok := strings.CutPrefix(e.Name(), "set-")
		if n, err := strconv.Atoi(text); ok && err == nil {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

func setDir(dir string, number int) string {
	return filepath.Join(dir, fmt.Sprintf("set-%d", number))
}

// openAbout reads what the newest complete set under dir says of itself. The
// error is fs.ErrNotExist when there is none.
func openAbout(dir string, opts *ebpf.LoadPinOptions) (number int, info kernelAboutInfo, err error) {
	numbers, err := setNumbers(dir)
	if err != nil {
		return 0, info, err
	}
	for _, n := range slices.Backward(numbers) {
		m, err := ebpf.LoadPinnedMap(filepath.Join(setDir(dir, n), kernelMapAbout), opts)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, info, err
		}
		defer m.Close()
		raw, err := m.LookupBytes(uint32(0))
		if err != nil {
			return 0, info, err
		}
		return n, parseAbout(raw), nil
	}
	return 0, info, os.ErrNotExist
}

// openSet opens the pinned maps of a set of this layout.
func openSet(dir string, number int, opts *ebpf.LoadPinOptions) (*mapSet, error) {
	return openMaps(dir, number, opts, func(string) bool { return true })
}

// openOlderSet opens the pinned maps of a set that may lack some.
func openOlderSet(dir string, number int) (*mapSet, error) {
	return openMaps(dir, number, nil, func(string) bool { return false })
}

func openMaps(dir string, number int, opts *ebpf.LoadPinOptions, needed func(string) bool) (*mapSet, error) {
	s := &mapSet{dir: setDir(dir, number), number: number, maps: make(map[string]*ebpf.Map)}
	for _, name := range mapNames {
		m, err := ebpf.LoadPinnedMap(filepath.Join(s.dir, name), opts)
		if errors.Is(err, os.ErrNotExist) && !needed(name) {
			continue
		}
		if err != nil {
			s.close()
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
		s.maps[name] = m
	}
	if err := s.openLoads(opts); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// createSet makes the maps of a set and pins all but about. The maps of from that
// are named in keep are taken over.
func createSet(dir string, number int, spec *ebpf.CollectionSpec, from *mapSet, keep []string) (*mapSet, error) {
	s := &mapSet{dir: setDir(dir, number), number: number, maps: make(map[string]*ebpf.Map)}
	if err := removeSet(s.dir); err != nil {
		return nil, err
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, err
	}
	if err := s.fill(spec, from, keep); err != nil {
		s.close()
		return nil, errors.Join(err, removeSet(s.dir))
	}
	return s, nil
}

func (s *mapSet) fill(spec *ebpf.CollectionSpec, from *mapSet, keep []string) error {
	for _, name := range mapNames {
		m, err := makeMap(spec.Maps[name], from, slices.Contains(keep, name))
		if err == nil {
			s.maps[name] = m
			if name != kernelMapAbout {
				err = pinAnew(m, filepath.Join(s.dir, name))
			}
		}
		if err != nil {
			return fmt.Errorf("map %s: %w", name, err)
		}
	}
	if from != nil {
		if err := s.keepLoads(from); err != nil {
			return err
		}
	}
	return s.addLoads(spec, spec.Maps[kernelMapBackends].MaxEntries)
}

func makeMap(spec *ebpf.MapSpec, from *mapSet, keep bool) (*ebpf.Map, error) {
	if keep && from.maps[spec.Name] != nil {
		return from.maps[spec.Name].Clone()
	}
	return ebpf.NewMap(spec)
}

// pinAnew pins a map at a path, also one that is pinned elsewhere already: a
// clone knows nothing of the other pin.
func pinAnew(m *ebpf.Map, path string) error {
	c, err := m.Clone()
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Pin(path)
}

// commit declares the set complete, and pins what somebody has unpinned.
func (s *mapSet) commit(version string) error {
	info := kernelAboutInfo{Layout: layoutVersion}
	setText(info.Version[:], version)
	if err := s.maps[kernelMapAbout].Put(uint32(0), &info); err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	for path, m := range s.pins() {
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if err := pinAnew(m, path); err != nil {
			return fmt.Errorf("pin %s: %w", path, err)
		}
	}
	return nil
}

// pins returns where each map of the set is pinned.
func (s *mapSet) pins() map[string]*ebpf.Map {
	pins := make(map[string]*ebpf.Map, len(s.maps)+len(s.loads))
	for name, m := range s.maps {
		pins[filepath.Join(s.dir, name)] = m
	}
	for i, m := range s.loads {
		pins[loadsPin(s.dir, i)] = m
	}
	return pins
}

// pinned reports whether every map of the set is pinned.
func (s *mapSet) pinned() bool {
	for path := range s.pins() {
		if _, err := os.Stat(path); err != nil {
			return false
		}
	}
	return true
}

// removeSet unpins a set, about first, so that it counts no more.
func removeSet(dir string) error {
	if err := os.Remove(filepath.Join(dir, kernelMapAbout)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.RemoveAll(dir)
}

// removeOtherSets unpins every set but one.
func removeOtherSets(dir string, number int) error {
	numbers, err := setNumbers(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range numbers {
		if n != number {
			errs = append(errs, removeSet(setDir(dir, n)))
		}
	}
	return errors.Join(errs...)
}

// compatible reports whether the programs of this pentad can use the set: same
// layout, and maps of the same shape, whatever their size.
func (s *mapSet) compatible(spec *ebpf.CollectionSpec) bool {
	for _, name := range mapNames {
		if s.maps[name] == nil || !sameShape(spec.Maps[name], s.maps[name]) {
			return false
		}
	}
	return s.maps[kernelMapCounters].MaxEntries() == spec.Maps[kernelMapCounters].MaxEntries
}

func sameShape(want *ebpf.MapSpec, have *ebpf.Map) bool {
	return want.Type == have.Type() && want.KeySize == have.KeySize() && want.ValueSize == have.ValueSize()
}

// dump reads every element of a map.
func dump[K, V any](m *ebpf.Map) (batch[K, V], error) {
	const chunk = 4096
	var all batch[K, V]
	var cursor ebpf.MapBatchCursor
	keys, values := make([]K, chunk), make([]V, chunk)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		all.keys = append(all.keys, keys[:n]...)
		all.values = append(all.values, values[:n]...)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
	}
}

// put writes a batch to a map.
func put[K, V any](s *mapSet, name string, b batch[K, V]) error {
	if len(b.keys) == 0 {
		return nil
	}
	if _, err := s.maps[name].BatchUpdate(b.keys, b.values, nil); err != nil {
		return fmt.Errorf("map %s: %w", name, err)
	}
	return nil
}

// drop removes keys from a map; those that are gone already do not matter.
func drop[K any](s *mapSet, name string, keys []K) error {
	for i := range keys {
		if err := s.maps[name].Delete(&keys[i]); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("map %s: %w", name, err)
		}
	}
	return nil
}

// write makes the writes, which are settled, in the order that keeps every reader
// on complete data.
func (s *mapSet) write(w *writes) error {
	return inOrder(
		func() error { return drop(s, kernelMapRefusals, w.added) },
		func() error { return put(s, kernelMapServices, w.services) },
		func() error { return put(s, kernelMapBackends, w.backends) },
		func() error { return put(s, kernelMapBackendInfo, w.details) },
		func() error { return put(s, kernelMapSlots, w.slots) },
		func() error { return put(s, kernelMapFilter, w.setBits) },
		func() error { return put(s, kernelMapListeners4, w.set4) },
		func() error { return put(s, kernelMapListeners6, w.set6) },
		func() error { return drop(s, kernelMapListeners4, w.remove4) },
		func() error { return drop(s, kernelMapListeners6, w.remove6) },
		func() error { return put(s, kernelMapFilter, w.clearedBits) },
		func() error { return put(s, kernelMapBackends, w.retiredBackends) },
		func() error { return put(s, kernelMapBackendInfo, w.retiredDetails) },
		func() error { return put(s, kernelMapServices, w.retiredServices) },
	)
}

// inOrder runs the steps until one fails.
func inOrder(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// copyTo copies what follows the configuration to a larger set.
func (s *mapSet) copyTo(to *mapSet) error {
	return inOrder(
		func() error { return copyMap[uint32, kernelServiceInfo](s, to, kernelMapServices) },
		func() error { return copyMap[uint32, kernelBackend](s, to, kernelMapBackends) },
		func() error { return copyMap[uint32, kernelBackendDetail](s, to, kernelMapBackendInfo) },
		func() error { return copyMap[uint32, kernelSlot](s, to, kernelMapSlots) },
		func() error { return copyMap[uint32, uint64](s, to, kernelMapFilter) },
		func() error { return copyMap[kernelListener4Key, kernelListener](s, to, kernelMapListeners4) },
		func() error { return copyMap[kernelListener6Key, kernelListener](s, to, kernelMapListeners6) },
	)
}

func copyMap[K, V any](from, to *mapSet, name string) error {
	all, err := dump[K, V](from.maps[name])
	if err != nil {
		return fmt.Errorf("map %s: %w", name, err)
	}
	return put(to, name, all)
}

// memory returns the bytes of kernel memory of every map.
func (s *mapSet) memory() map[string]uint64 {
	sizes := make(map[string]uint64, len(s.maps))
	for name, m := range s.maps {
		info, err := m.Info()
		if err != nil {
			continue
		}
		if n, ok := info.Memlock(); ok {
			sizes[name] = n
		}
	}
	for _, m := range s.loads {
		info, err := m.Info()
		if err != nil {
			continue
		}
		if n, ok := info.Memlock(); ok {
			sizes[kernelMapLoads] += n
		}
	}
	return sizes
}
