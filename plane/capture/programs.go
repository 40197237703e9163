package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/pins"
	"github.com/pentad/pentad/service"
)

// programs are those in connect(), see bpf/capture.bpf.c. They are loaded anew for
// every change but that of services: what one reads never changes under it.
//
// The directory of pins has the maps that programs of different times share, and the
// links, by the id of their cgroup:
//
//	wanted, origins, told, services
//	processes-ID/{sock_ops,getpeername4,getpeername6,connect4,connect6}
//	proxies-ID/{original_dst,accepted}
type programs struct {
	dir string

	entries  []entry // as the kernel has them
	services map[service.Listener]bool
	room     int  // how many of those there may be
	trusted  bool // the kernel has what this says
	pruned   bool // and nothing besides
}

// The directories of links, and the maps that are shared.
const (
	processesDir = "processes-"
	proxiesDir   = "proxies-"
	nextServices = "next-" + programsMapServices
)

// stateMaps are what programs have done, which those of later times go on from.
var stateMaps = []string{programsMapWanted, programsMapOrigins, programsMapTold}

type hook struct {
	name   string // of the program and of its pin
	attach ebpf.AttachType
}

// hooksOfProcesses are in the order of attaching: what remembers stands before anything
// is led away.
var hooksOfProcesses = []hook{
	{programsProgSockOps, ebpf.AttachCGroupSockOps},
	{programsProgGetpeername4, ebpf.AttachCgroupInet4GetPeername},
	{programsProgGetpeername6, ebpf.AttachCgroupInet6GetPeername},
	{programsProgConnect4, ebpf.AttachCGroupInet4Connect},
	{programsProgConnect6, ebpf.AttachCGroupInet6Connect},
}

var hooksOfProxies = []hook{
	{programsProgOriginalDst, ebpf.AttachCGroupGetsockopt},
	{programsProgAccepted, ebpf.AttachCGroupSockOps},
}

// The bits of traits, the kinds of prefixes and their heads, as in bpf/capture.bpf.c.
const (
	entryUser = 1 << iota
	entryGroup
	entryOwn
	entryDirect
	entryIPv4
	entryIPv6

	prefixExcept      = 1
	prefixDestination = 2
	prefixHead        = 64
)

// point is where programs attach, and the entries that are about it.
type point struct {
	dir     string
	at      place
	hooks   []hook
	entries []entry
}

// leads reports whether programs there lead connections away; others only tell.
func (p point) leads() bool { return strings.HasPrefix(p.dir, processesDir) }

// points returns where programs have to attach: where proxies ask first.
func points(entries []entry) []point {
	var proxies, processes []point
	for _, e := range entries {
		proxies = add(proxies, proxiesDir, e.asking, hooksOfProxies, e)
		processes = add(processes, processesDir, e.cgroup, hooksOfProcesses, e)
	}
	return append(proxies, processes...)
}

func add(to []point, prefix string, at place, hooks []hook, e entry) []point {
	i := slices.IndexFunc(to, func(p point) bool { return p.at.id == at.id })
	if i < 0 {
		i = len(to)
		to = append(to, point{dir: prefix + strconv.FormatUint(at.id, 10), at: at, hooks: hooks})
	}
	to[i].entries = append(to[i].entries, e)
	return to
}

// apply has the programs lead what is wanted. Without an entry there are none.
func (p *programs) apply(entries []entry, services map[service.Listener]bool) error {
	if p.intact(entries) && (len(entries) == 0 || len(services) <= p.room) {
		if err := p.update(services); err != nil {
			p.trusted = false
			return err
		}
		return nil
	}
	p.trusted = false
	if err := p.build(entries, services); err != nil {
		return err
	}
	p.entries, p.services, p.trusted = entries, services, true
	return nil
}

// build attaches new programs, beside those that may not be wanted any more.
func (p *programs) build(entries []entry, services map[service.Listener]bool) error {
	p.pruned = false
	if len(entries) == 0 {
		return nil
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	shared, err := p.openShared(services)
	if err != nil {
		return err
	}
	defer func() {
		for _, m := range shared {
			m.Close()
		}
	}()
	for _, at := range points(entries) {
		if err := p.attach(at, shared); err != nil {
			return fmt.Errorf("cgroup %s: %w", at.at.path, err)
		}
	}
	// From here on nobody reads the services of before.
	return p.pinServices(shared[programsMapServices])
}

// prune takes away the programs that are not wanted any more.
func (p *programs) prune() error {
	if p.pruned {
		return nil
	}
	wanted := make(map[string]bool)
	for _, at := range points(p.entries) {
		wanted[at.dir] = true
	}
	err := p.detach(func(dir string) bool { return !wanted[dir] })
	if err == nil && len(wanted) == 0 {
		err = removePrograms(p.dir)
	}
	p.pruned = err == nil
	return err
}

// openShared opens the maps that all programs share, or makes them. That of services is
// a new one.
func (p *programs) openShared(services map[service.Listener]bool) (map[string]*ebpf.Map, error) {
	spec, err := loadPrograms()
	if err != nil {
		return nil, err
	}
	shared := make(map[string]*ebpf.Map)
	for _, name := range stateMaps {
		if shared[name], err = pins.OpenOrMake(filepath.Join(p.dir, name), spec.Maps[name]); err != nil {
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
	}
	s := spec.Maps[programsMapServices]
	s.MaxEntries = sizeFor(len(services))
	p.room = int(s.MaxEntries)
	m, err := ebpf.NewMap(s)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", s.Name, err)
	}
	for a := range services {
		if a.Protocol != service.TCP {
			continue
		}
		if err := m.Put(endpointOf(a.Address), uint8(1)); err != nil {
			return nil, fmt.Errorf("map %s: %w", s.Name, err)
		}
	}
	shared[programsMapServices] = m
	return shared, nil
}

// sizeFor is room for twice as many.
func sizeFor(n int) uint32 { return max(4096, uint32(1)<<bits.Len(uint(2*n))) }

// pinServices makes a map of services the one that is followed.
func (p *programs) pinServices(m *ebpf.Map) error {
	next := filepath.Join(p.dir, nextServices)
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := m.Pin(next); err != nil {
		return err
	}
	return os.Rename(next, filepath.Join(p.dir, programsMapServices))
}

// attach loads the programs of a point, and has its cgroup run them.
func (p *programs) attach(at point, shared map[string]*ebpf.Map) error {
	spec, err := specFor(at)
	if err != nil {
		return err
	}
	spec.Maps[programsMapServices].MaxEntries = shared[programsMapServices].MaxEntries()
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return fmt.Errorf("the kernel does not take the programs; mode: redirect needs none: %w", err)
	}
	defer coll.Close()
	if at.leads() {
		if err := fill(coll, at.entries); err != nil {
			return err
		}
	}
	dir := filepath.Join(p.dir, at.dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, h := range at.hooks {
		l, err := pins.Attach(dir, h.name, h.attach, coll.Programs[h.name], at.at.path, at.at.id)
		if err != nil {
			return fmt.Errorf("hook %s: %w", h.name, err)
		}
		l.Close() // it is pinned
	}
	return nil
}

// specFor is what is loaded for a point: its programs, and the maps that they use.
func specFor(at point) (*ebpf.CollectionSpec, error) {
	spec, err := loadPrograms()
	if err != nil {
		return nil, err
	}
	for name := range spec.Programs {
		if !slices.ContainsFunc(at.hooks, func(h hook) bool { return h.name == name }) {
			delete(spec.Programs, name)
		}
	}
	netns, err := host.NamespaceCookie()
	if err != nil {
		return nil, err
	}
	for name, value := range map[string]any{
		"entries_count": uint32(len(at.entries)), "proxy_mark": uint32(host.ProxyMark), "probe_mark": uint32(host.ProbeMark), "host_netns": netns,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	spec.Maps[programsMapPrefixes].MaxEntries = uint32(max(1, len(prefixesOf(at.entries))))
	return spec, nil
}

// fill writes what the programs are about to read.
func fill(coll *ebpf.Collection, entries []entry) error {
	for i, e := range entries {
		v := entryFor(e)
		if err := coll.Maps[programsMapEntries].Put(uint32(i), &v); err != nil {
			return fmt.Errorf("map %s: %w", programsMapEntries, err)
		}
	}
	for _, k := range prefixesOf(entries) {
		if err := coll.Maps[programsMapPrefixes].Put(&k, uint8(1)); err != nil {
			return fmt.Errorf("map %s: %w", programsMapPrefixes, err)
		}
	}
	return nil
}

// entryFor is an entry as the programs have it.
func entryFor(e entry) (v programsEntry) {
	for i := range min(len(e.Name), len(v.Name)-1) {
		v.Name[i] = int8(e.Name[i])
	}
	set := func(when bool, bit uint32) {
		if when {
			v.Traits |= bit
		}
	}
	set(e.hasUser, entryUser)
	set(e.hasGroup, entryGroup)
	set(e.Proxy != "", entryOwn)
	set(e.Direct, entryDirect)
	v.User, v.Group = e.user, e.group
	v.PortsCount = uint32(len(e.Ports))
	for i, r := range e.Ports {
		v.Ports[i].First, v.Ports[i].Last = r.First, r.Last
	}
	if to, ok := e.Target(service.V4); ok {
		v.Traits |= entryIPv4
		v.Proxy4 = endpointOf(reachable(to))
	}
	if to, ok := e.Target(service.V6); ok {
		v.Traits |= entryIPv6
		v.Proxy6 = endpointOf(reachable(to))
	}
	return v
}

// reachable is an address at which one is reached that listens at all.
func reachable(at netip.AddrPort) netip.AddrPort {
	switch at.Addr() {
	case netip.IPv4Unspecified():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
	case netip.IPv6Unspecified():
		return netip.AddrPortFrom(netip.IPv6Loopback(), at.Port())
	}
	return at
}

// endpointOf is an address as the programs have it: of IPv4 as ::ffff:a.b.c.d, and all
// in network order.
func endpointOf(a netip.AddrPort) (e programsEndpoint) {
	e.Addr = words(a.Addr().As16())
	e.Port = bits.ReverseBytes16(a.Port())
	return e
}

func words(b [16]byte) (w [4]uint32) {
	for i := range w {
		w[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return w
}

func bytesOf(w [4]uint32) (b [16]byte) {
	for i := range w {
		binary.LittleEndian.PutUint32(b[4*i:], w[i])
	}
	return b
}

// prefixesOf is what entries are about.
func prefixesOf(entries []entry) (all []programsPrefix) {
	for i, e := range entries {
		destinations := e.Destinations
		if len(destinations) == 0 {
			destinations = everywhere
		}
		for _, p := range destinations {
			all = append(all, prefixFor(i, prefixDestination, p))
		}
		for _, p := range e.Except {
			all = append(all, prefixFor(i, prefixExcept, p))
		}
	}
	return all
}

func prefixFor(entry int, kind uint8, p netip.Prefix) programsPrefix {
	k := programsPrefix{Length: prefixHead + uint32(p.Bits()), Entry: uint32(entry), Kind: kind, Family: unix.AF_INET6}
	if p.Addr().Is4() {
		k.Family = unix.AF_INET
		a := p.Addr().As4()
		k.Addr[0] = binary.LittleEndian.Uint32(a[:])
		return k
	}
	k.Addr = words(p.Addr().As16())
	return k
}

// update makes the map of services what it should be.
func (p *programs) update(services map[service.Listener]bool) error {
	if len(p.entries) == 0 || reflect.DeepEqual(services, p.services) {
		return nil
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join(p.dir, programsMapServices), nil)
	if err != nil {
		return err
	}
	defer m.Close()
	for a := range services {
		if p.services[a] || a.Protocol != service.TCP {
			continue
		}
		if err := m.Put(endpointOf(a.Address), uint8(1)); err != nil {
			return fmt.Errorf("map %s: %w", programsMapServices, err)
		}
	}
	for a := range p.services {
		if services[a] || a.Protocol != service.TCP {
			continue
		}
		if err := m.Delete(endpointOf(a.Address)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("map %s: %w", programsMapServices, err)
		}
	}
	p.services = services
	return nil
}

// intact reports whether the programs are attached and lead these. What was found wrong
// stays so until it is made anew.
func (p *programs) intact(entries []entry) bool {
	p.trusted = p.trusted && reflect.DeepEqual(entries, p.entries) && p.areThere()
	return p.trusted
}

func (p *programs) areThere() bool {
	if len(p.entries) == 0 {
		return true
	}
	for _, name := range append([]string{programsMapServices}, stateMaps...) {
		if _, err := os.Stat(filepath.Join(p.dir, name)); err != nil {
			return false
		}
	}
	for _, at := range points(p.entries) {
		for _, h := range at.hooks {
			if pins.CgroupOf(filepath.Join(p.dir, at.dir), h.name) != at.at.id {
				return false
			}
		}
	}
	return true
}

// detach takes away the links of directories.
func (p *programs) detach(of func(dir string) bool) error {
	all, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// Nothing is led away any more before proxies are not told any more.
	slices.SortFunc(all, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	var errs []error
	for _, d := range all {
		hooks := hooksOf(d.Name())
		if hooks == nil || !of(d.Name()) {
			continue
		}
		dir := filepath.Join(p.dir, d.Name())
		for _, h := range slices.Backward(hooks) {
			errs = append(errs, pins.Detach(dir, h.name))
		}
		errs = append(errs, os.Remove(dir))
	}
	return errors.Join(errs...)
}

// hooksOf returns the hooks of a directory of links; nil: it is none.
func hooksOf(dir string) []hook {
	switch {
	case strings.HasPrefix(dir, processesDir):
		return hooksOfProcesses
	case strings.HasPrefix(dir, proxiesDir):
		return hooksOfProxies
	}
	return nil
}

// removePrograms takes all programs and maps out of the kernel, whoever put them there.
func removePrograms(dir string) error {
	p := programs{dir: dir}
	errs := []error{p.detach(func(string) bool { return true })}
	for _, name := range append([]string{programsMapServices, nextServices}, stateMaps...) {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
