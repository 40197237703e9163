// Package pod keeps the network of this host's pods: what plugins have to know, routes,
// the rules that pods cannot get around, and whatever of their devices somebody took
// away. Devices are given and taken by the CNI plugin (attach), which needs no agent.
package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/pod/attach"
)

// Want is the network that pods are to have.
type Want struct {
	Config config.Pods // with its hosts, also where blocks were claimed
	// Self is the host of those that this one is; empty: the one that has an address
	// of this one.
	Self string
	// Closed are prefixes of blocks of this host of which no more addresses are given,
	// each with the mark of that decision (attach.Network).
	Closed map[netip.Prefix]string
	// Claimed says that this host claims more blocks as it needs them.
	Claimed bool
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool {
	return w.Config.Equal(o.Config) && w.Self == o.Self && maps.Equal(w.Closed, o.Closed) && w.Claimed == o.Claimed
}

// NetworkFile is, in the run directory, the network for plugins; beside it lies what
// settings were.
const (
	NetworkFile  = "pods.json"
	settingsFile = "pods-settings.json"
)

func settingsIn(runDir string) host.Settings {
	return host.Settings{Root: "/proc/sys", File: filepath.Join(runDir, settingsFile)}
}

// forwardingFor lets this host pass on what pods send, of the families that they have: a
// host that forwards IPv6 takes no routes from routers that advertise themselves.
func forwardingFor(w Want) []host.Setting {
	all := []host.Setting{{Name: "net/ipv4/ip_forward", Value: 1, Least: true}}
	pods := w.Config.All()
	if w.Claimed {
		pods = w.Config.Ranges // whatever others have
	}
	if slices.ContainsFunc(pods, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		all = append(all, host.Setting{Name: "net/ipv6/conf/all/forwarding", Value: 1, Least: true})
	}
	return all
}

// Plane is the pod network of one host.
type Plane struct {
	log    *slog.Logger
	runDir string

	mu      sync.Mutex
	want    *Want
	network attach.Network
	own     []netip.Prefix // blocks of this host
	reach   reach
}

// New returns a plane that has not touched the kernel yet.
func New(runDir string, log *slog.Logger) *Plane { return &Plane{log: log, runDir: runDir} }

// Apply makes the network what is wanted, whatever it was before.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want = nil
	for _, s := range forwardingFor(want) {
		was, changed, err := settingsIn(p.runDir).Set(s)
		if err != nil {
			return err
		}
		if changed {
			p.log.Info("a setting is made what pods need; pentad down puts it back", "setting", strings.ReplaceAll(s.Name, "/", "."), "was", was, "is", s.Value)
		}
	}
	n, r, own, err := resolve(want)
	if err != nil {
		return err
	}
	if err := errors.Join(setDiscards(discardsOf(want.Config, own)), setTable(want.Config, r)); err != nil {
		return err
	}
	// Another host that cannot be reached is no reason to add no pods.
	elsewhere := r.apply(n.MTU)
	// Plugins use it from now on.
	if err := n.Write(filepath.Join(p.runDir, NetworkFile)); err != nil {
		return errors.Join(elsewhere, err)
	}
	if err := errors.Join(elsewhere, repair()); err != nil {
		return err
	}
	p.want, p.network, p.reach, p.own = &want, n, r, own
	return nil
}

// resolve returns what plugins have to know, how other hosts are reached, and the blocks of
// this host.
func resolve(w Want) (n attach.Network, r reach, own []netip.Prefix, err error) {
	c, name := w.Config, w.Self
	own = c.Blocks
	if len(c.Hosts) > 0 || w.Claimed {
		self, err := selfOf(w)
		if err != nil {
			return n, r, nil, err
		}
		own, name = self.Blocks, self.Name
	}
	r = reachOf(c, name)
	if n.MTU = c.MTU; n.MTU == 0 {
		if n.MTU, err = lowestMTU(); err != nil {
			return n, r, nil, err
		}
		switch {
		case r.tunnel && r.own.outer.Is4():
			n.MTU -= tunnelOverhead4
		case r.tunnel:
			n.MTU -= tunnelOverhead6
		}
	}
	isClosed := func(p netip.Prefix) bool {
		_, closed := w.Closed[p]
		return closed
	}
	n.Blocks = pair(slices.DeleteFunc(slices.Clone(own), isClosed))
	n.Closed, n.Claimed = w.Closed, w.Claimed
	return n, r, own, nil
}

// selfOf returns the host that this one is. One that claims its blocks may have none yet.
func selfOf(w Want) (config.PodHost, error) {
	if w.Self == "" {
		addresses, err := host.Addresses()
		if err != nil {
			return config.PodHost{}, err
		}
		return selfIn(w.Config.Hosts, addresses)
	}
	i := slices.IndexFunc(w.Config.Hosts, func(h config.PodHost) bool { return h.Name == w.Self })
	if i < 0 {
		return config.PodHost{Name: w.Self}, nil
	}
	return w.Config.Hosts[i], nil
}

// pair puts the n-th blocks of both families together.
func pair(blocks []netip.Prefix) (all []attach.Block) {
	var v4, v6 []netip.Prefix
	for _, b := range blocks {
		if b.Addr().Is4() {
			v4 = append(v4, b.Masked())
		} else {
			v6 = append(v6, b.Masked())
		}
	}
	for i := range max(len(v4), len(v6)) {
		var b attach.Block
		if i < len(v4) {
			b.V4 = v4[i]
		}
		if i < len(v6) {
			b.V6 = v6[i]
		}
		all = append(all, b)
	}
	return all
}

// defaultMTU is that of Ethernet, for a host that leads nowhere.
const defaultMTU = 1500

// lowestMTU returns the lowest of the interfaces that lead elsewhere.
func lowestMTU() (int, error) {
	links, err := attach.Links()
	if err != nil {
		return 0, err
	}
	lowest := 0
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 || a.Flags&net.FlagUp == 0 || strings.HasPrefix(a.Name, attach.DevicePrefix) || a.Name == tunnelName || !leadsElsewhere(l) {
			continue
		}
		if lowest == 0 || a.MTU < lowest {
			lowest = a.MTU
		}
	}
	if lowest == 0 {
		lowest = defaultMTU
	}
	return lowest, nil
}

// leadsElsewhere reports whether an interface has an address of a segment.
func leadsElsewhere(l netlink.Link) bool {
	addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(addresses, func(a netlink.Addr) bool {
		ones, bits := a.Mask.Size()
		return ones < bits && a.IP.IsGlobalUnicast()
	})
}

// discardsOf returns the prefixes in which an address that nobody has is unreachable: of
// this host's own blocks, and of all ranges.
func discardsOf(c config.Pods, own []netip.Prefix) (all []netip.Prefix) {
	for _, p := range slices.Concat(own, c.Ranges) {
		if p.Bits() < p.Addr().BitLen() && !slices.Contains(all, p.Masked()) {
			all = append(all, p.Masked())
		}
	}
	return all
}

// lastMetric is the greatest there is: any other route to the same prefix, whoever made
// it, goes before a discard.
const lastMetric = 1<<32 - 1

// setDiscards makes the discard routes of this host just these. An address that nobody
// has answers at once, and not by a default route.
func setDiscards(wanted []netip.Prefix) error {
	there, err := discards()
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range wanted {
		if _, ok := there[p]; ok {
			delete(there, p)
			continue
		}
		if err := netlink.RouteReplace(discard(p)); err != nil {
			errs = append(errs, fmt.Errorf("the route to %s: %w", p, err))
		}
	}
	for _, r := range there {
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func discard(p netip.Prefix) *netlink.Route {
	return &netlink.Route{
		Dst:  &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		Type: unix.RTN_UNREACHABLE, Protocol: host.RouteProtocol, Priority: lastMetric, Table: unix.RT_TABLE_MAIN,
	}
}

func discards() (map[netip.Prefix]netlink.Route, error) {
	found := make(map[netip.Prefix]netlink.Route)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: host.RouteProtocol, Type: unix.RTN_UNREACHABLE}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE)
		if err != nil {
			return nil, fmt.Errorf("routes cannot be listed: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil || uint32(r.Priority) != lastMetric {
				continue
			}
			a, _ := netip.AddrFromSlice(r.Dst.IP)
			ones, _ := r.Dst.Mask.Size()
			found[netip.PrefixFrom(a.Unmap(), ones)] = r
		}
	}
	return found, nil
}

// repair puts back what is missing of pods' devices.
func repair() error {
	all, err := attach.List()
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range all {
		errs = append(errs, a.Repair())
	}
	return errors.Join(errs...)
}

// Intact reports whether all of it is there, down to the routes of each pod.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == nil {
		return true
	}
	if _, err := os.Stat(filepath.Join(p.runDir, NetworkFile)); errors.Is(err, fs.ErrNotExist) {
		return false
	}
	there, err := discards()
	if err != nil {
		return true // it cannot be seen now
	}
	wanted := discardsOf(p.want.Config, p.own)
	if len(there) != len(wanted) || !tableIsThere() {
		return false
	}
	for _, w := range wanted {
		if _, ok := there[w]; !ok {
			return false
		}
	}
	n, _, _, err := resolve(*p.want)
	return (err != nil || n.MTU == p.network.MTU) && allReachable() && p.reach.isApplied(p.network.MTU)
}

// allReachable reports whether there is a route to each pod.
func allReachable() bool {
	all, err := attach.List()
	if err != nil {
		return true
	}
	routes := make(map[netip.Addr]int)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: host.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return true
		}
		for _, r := range list {
			if r.Dst != nil && r.LinkIndex != 0 && r.Gw == nil {
				a, _ := netip.AddrFromSlice(r.Dst.IP)
				routes[a.Unmap()] = r.LinkIndex
			}
		}
	}
	for _, a := range all {
		for _, x := range []netip.Addr{a.V4, a.V6} {
			if x.IsValid() && routes[x] != a.Index {
				return false
			}
		}
	}
	return true
}

// Counts are how many there are.
type Counts struct {
	Pods, Free   int // devices, and pods that still find an address
	Open, Closed int // prefixes of this host's blocks
	Hosts        int // others, to whose pods there is a way
}

// Count counts what is there now.
func (p *Plane) Count() (c Counts, err error) {
	all, err := attach.List()
	if err != nil {
		return c, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.Pods, c.Free = len(all), p.network.Free(all)
	c.Closed = len(p.network.Closed)
	c.Open = len(p.own) - c.Closed
	c.Hosts = p.reach.hosts
	return c, nil
}

// Distrust has nothing to read again: everything is read each time.
func (*Plane) Distrust() {}

// Run has no chores.
func (*Plane) Run(ctx context.Context) { <-ctx.Done() }

// Close lets go. What is in the kernel stays.
func (*Plane) Close() {}

// Remove takes everything out of the kernel, the devices of pods as well.
func Remove(runDir string) error {
	errs := []error{attach.Forget(filepath.Join(runDir, NetworkFile))}
	errs = append(errs, attach.RemoveAll())
	return errors.Join(append(errs, setDiscards(nil), reach{}.setRoutes(0), removeTunnel(), removeTable(), settingsIn(runDir).Restore())...)
}
