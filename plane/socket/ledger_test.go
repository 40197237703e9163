package socket

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/pentad/pentad/service"
)

func TestIndexes(t *testing.T) {
	x := newIndexes(4)
	if x.room() != 3 || x.take() != 1 || x.take() != 2 || x.take() != 3 || x.room() != 0 {
		t.Errorf("a fresh allocator: %+v", x)
	}
	x.give(2)
	if x.take() != 2 {
		t.Errorf("what was given back is not taken again: %+v", x)
	}
	used := map[uint32]bool{2: true, 5: true}
	x = restoreIndexes(10, func(i uint32) bool { return used[i] })
	var got []uint32
	for x.room() > 0 {
		got = append(got, x.take())
	}
	slices.Sort(got)
	if !slices.Equal(got, []uint32{1, 3, 4, 6, 7, 8, 9}) {
		t.Errorf("free beside 2 and 5: %v", got)
	}
}

// Whatever is taken and given back, ranges never overlap, and when all is back
// there is one hole.
func TestExtents(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const capacity = 1000
	x := newExtents(capacity)
	var held []extent
	for range 5000 {
		if r.IntN(2) == 0 && len(held) > 0 {
			i := r.IntN(len(held))
			x.give(held[i])
			held = slices.Delete(held, i, i+1)
		} else if e, ok := x.take(uint32(1 + r.IntN(40))); ok {
			held = append(held, e)
		}
		checkExtents(t, held, x, capacity)
		restored := restoreExtents(capacity, slices.Clone(held))
		if !slices.Equal(restored.holes, x.holes) {
			t.Fatalf("restored %v, want %v", restored.holes, x.holes)
		}
	}
	for _, e := range held {
		x.give(e)
	}
	if !slices.Equal(x.holes, []extent{{0, capacity}}) {
		t.Errorf("holes at the end: %v", x.holes)
	}
}

func checkExtents(t *testing.T, held []extent, x extents, capacity uint32) {
	t.Helper()
	all := slices.Concat(held, x.holes)
	slices.SortFunc(all, func(a, b extent) int { return int(a.start) - int(b.start) })
	at := uint32(0)
	for _, e := range all {
		if e.start != at {
			t.Fatalf("ranges and holes do not cover %d: %v", at, all)
		}
		at = e.end()
	}
	if at != capacity {
		t.Fatalf("ranges and holes end at %d", at)
	}
}

// kernelModel is the maps as the programs read them.
type kernelModel struct {
	services map[uint32]kernelServiceInfo
	backends map[uint32]kernelBackend
	slots    map[uint32]kernelSlot
	filter   map[uint32]uint64
	l4       map[kernelListener4Key]kernelListener
	l6       map[kernelListener6Key]kernelListener
}

func newModel() *kernelModel {
	return &kernelModel{
		make(map[uint32]kernelServiceInfo), make(map[uint32]kernelBackend), make(map[uint32]kernelSlot), make(map[uint32]uint64),
		make(map[kernelListener4Key]kernelListener), make(map[kernelListener6Key]kernelListener),
	}
}

// write makes one write after the other and has the model checked after each:
// that is what a connect() at any moment would see.
func (m *kernelModel) write(w *writes, check func()) {
	each(w.services, m.services, check)
	each(w.backends, m.backends, check)
	// Tables are long: looking once in a while is enough.
	n := 0
	each(w.slots, m.slots, func() {
		if n++; n%1000 == 1 {
			check()
		}
	})
	each(w.setBits, m.filter, check)
	each(w.set4, m.l4, check)
	each(w.set6, m.l6, check)
	for _, k := range w.remove4 {
		delete(m.l4, k)
		check()
	}
	for _, k := range w.remove6 {
		delete(m.l6, k)
		check()
	}
	each(w.clearedBits, m.filter, check)
	each(w.retiredBackends, m.backends, check)
	each(w.retiredServices, m.services, check)
}

func each[K comparable, V any](b batch[K, V], to map[K]V, check func()) {
	for i, k := range b.keys {
		to[k] = b.values[i]
		check()
	}
}

// mapping is what each listener leads to.
func (m *kernelModel) mapping(t *testing.T, alsoFiltered map[service.Listener]bool) map[service.Listener][]netip.AddrPort {
	t.Helper()
	all := make(map[service.Listener]kernelListener)
	for k, v := range m.l4 {
		all[listener4(k)] = v
	}
	for k, v := range m.l6 {
		all[listener6(k)] = v
	}
	result := make(map[service.Listener][]netip.AddrPort)
	for x, v := range all {
		bit := filterBit(x)
		if m.filter[bit/64]>>(bit%64)&1 == 0 && alsoFiltered[x] {
			t.Fatalf("listener %s is there but its bit of the filter is not", x)
		}
		result[x] = []netip.AddrPort{}
		at, count := v.Slots, v.Count
		for count > 0 {
			if at+count >= v.Slots+v.Length {
				t.Fatalf("listener %s: a table ends beyond the range: %+v", x, v)
			}
			result[x] = append(result[x], m.table(t, x, at, count)...)
			at += count + 1
			count = m.slots[at-1].First
		}
	}
	return result
}

// table returns the backends of one selection table, sorted.
func (m *kernelModel) table(t *testing.T, x service.Listener, at, count uint32) []netip.AddrPort {
	t.Helper()
	found := make(map[netip.AddrPort]bool)
	for i := at; i < at+count; i++ {
		for _, index := range []uint32{m.slots[i].First, m.slots[i].Second} {
			b := m.backends[index]
			if b.Port == 0 || address(b.Addr).Is4() != x.Address.Addr().Is4() {
				t.Fatalf("listener %s leads to backend %d: %+v", x, index, b)
			}
			found[netip.AddrPortFrom(address(b.Addr), bigEndian(b.Port))] = true
		}
	}
	return slices.SortedFunc(maps.Keys(found), netip.AddrPort.Compare)
}

// wanted is what each listener of a snapshot must lead to: the usable backends of
// every group in turn, with source-hash those of the first group twice.
func wanted(snap *service.Snapshot) map[service.Listener][]netip.AddrPort {
	result := make(map[service.Listener][]netip.AddrPort)
	for _, s := range snap.Services {
		for _, x := range s.Listeners {
			result[x] = []netip.AddrPort{}
			for group := range uint32(2) {
				var members []netip.AddrPort
				for _, b := range s.Backends {
					if b.Usable() && b.Group == group && b.Address.Addr().Is4() == x.Address.Addr().Is4() {
						members = append(members, b.Address)
					}
				}
				slices.SortFunc(members, netip.AddrPort.Compare)
				if s.Balance == service.SourceHash && len(result[x]) == 0 {
					result[x] = append(result[x], members...)
				}
				result[x] = append(result[x], members...)
			}
		}
	}
	return result
}

// drawSnapshot draws services that share a few listeners and addresses, so that
// listeners move and places are used again.
func drawSnapshot(r *rand.Rand, last *service.Snapshot) *service.Snapshot {
	taken := make(map[service.Listener]bool)
	var all []*service.Service
	for i := range 6 {
		if r.IntN(4) == 0 {
			continue
		}
		s := &service.Service{Name: fmt.Sprintf("s%d", i), Balance: drawBalance(r), Affinity: time.Duration(r.IntN(2)) * time.Second}
		for range 1 + r.IntN(3) {
			a := netip.AddrFrom4([4]byte{192, 0, 2, byte(r.IntN(6))})
			if r.IntN(3) == 0 {
				a = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(r.IntN(6))})
			}
			l := service.Listener{Address: netip.AddrPortFrom(a, 80), Protocol: []service.Protocol{service.TCP, service.UDP}[r.IntN(2)]}
			if !taken[l] {
				taken[l] = true
				s.Listeners = append(s.Listeners, l)
			}
		}
		slices.SortFunc(s.Listeners, service.Listener.Compare)
		for _, k := range r.Perm(8)[:r.IntN(6)] {
			a := netip.AddrFrom4([4]byte{10, 0, byte(i), byte(k)})
			if k > 4 {
				a = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 1, 14: byte(i), 15: byte(k)})
			}
			s.Backends = append(s.Backends, service.Backend{
				Address: netip.AddrPortFrom(a, 8080), Weight: uint32(r.IntN(3)), Group: uint32(r.IntN(2)), Down: r.IntN(4) == 0, Drained: r.IntN(6) == 0,
			})
		}
		all = append(all, s)
	}
	return last.Next(all)
}

func drawBalance(r *rand.Rand) service.Balance {
	if r.IntN(8) == 0 {
		return service.SourceHash // its tables are long, and so is checking them
	}
	return service.Random
}

// Any sequence of changes keeps every listener at every moment either where it
// was or where it shall be, and ends like a fresh start.
func TestLedger(t *testing.T) {
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(seed, 1))
		l := newLedger(capacity{Services: 40, Backends: 200, Slots: 200_000, Listeners4: 40, Listeners6: 40}, 7)
		m := newModel()
		last := &service.Snapshot{}
		generations := make(map[uint32]uint32)
		for range 60 {
			next := drawSnapshot(r, last)
			var w writes
			changed, removed := service.Diff(last, next)
			for _, s := range removed {
				l.remove(s.Name, &service.Snapshot{}, moment{time.Unix(0, 0), 1, 2}, &w)
			}
			for _, s := range changed {
				tables := tablesOf(s)
				if !l.fits(s, tables) {
					t.Fatal("it does not fit")
				}
				l.install(s, tables, moment{time.Unix(0, 0), 1, 2}, &w)
			}
			w.settle(l)
			before, after := wanted(last), wanted(next)
			both := make(map[service.Listener]bool)
			for x := range before {
				both[x] = has(after, x)
			}
			m.write(&w, func() {
				now := m.mapping(t, both)
				for x, stays := range both {
					to, there := now[x]
					if stays && !there {
						t.Fatalf("listener %s is not there for a moment", x)
					}
					if stays && !slices.Equal(to, before[x]) && !slices.Equal(to, after[x]) {
						t.Fatalf("listener %s leads to %v, neither %v nor %v", x, to, before[x], after[x])
					}
				}
			})
			every := make(map[service.Listener]bool)
			for x := range after {
				every[x] = true
			}
			if have := m.mapping(t, every); !reflect.DeepEqual(have, after) {
				t.Fatalf("the kernel has %v, want %v", have, after)
			}
			for i, b := range m.backends {
				if b.Generation < generations[i] {
					t.Fatalf("the generation of backend %d went back", i)
				}
				generations[i] = b.Generation
			}
			// The same again writes nothing.
			var again writes
			for _, s := range next.Services {
				l.install(s, tablesOf(s), moment{time.Unix(0, 0), 2, 3}, &again)
			}
			if n := again.count(); n != 0 {
				t.Fatalf("installing what is installed makes %d writes: %+v", n, again)
			}
			last = next
			l.reclaim(func(i uint32) bool { return i%5 == uint32(r.IntN(5)) })
		}
		for w, have := range m.filter {
			if have != l.filter[w] {
				t.Fatalf("word %d of the filter is %x, want %x", w, have, l.filter[w])
			}
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, text := range []string{"192.0.2.1:80", "[2001:db8::1]:65535", "255.255.255.254:1"} {
		l := service.Listener{Address: netip.MustParseAddrPort(text), Protocol: service.UDP}
		back := listener6(key6(l))
		if l.Address.Addr().Is4() {
			back = listener4(key4(l))
		}
		if back != l {
			t.Errorf("%s became %s", l, back)
		}
	}
}
