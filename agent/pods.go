package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pentad/pentad/claim"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/ipam"
	"github.com/pentad/pentad/plane/pod"
	"github.com/pentad/pentad/plane/pod/attach"
	"github.com/pentad/pentad/service"
)

func hasPods(c *config.Config) bool { return c.Pods.Wanted() }

// wantPods makes hosts of the blocks that they have claimed.
func wantPods(k *known) (pod.Want, bool) {
	w := pod.Want{Config: k.config.Pods}
	if !w.Config.Claimed() {
		return w, true
	}
	if k.blocks == nil {
		return w, false
	}
	w.Claimed, w.Self = true, hostName(k.blocks.Self)
	w.Config.Hosts = hostsOf(k.blocks.Blocks, k.blocks.Self, w.Config)
	for _, b := range k.blocks.Blocks {
		if b.Owner != k.blocks.Self || !b.Draining && !isContested(b, k) {
			continue
		}
		if w.Closed == nil {
			w.Closed = make(map[netip.Prefix]string)
		}
		for _, p := range b.Prefixes() {
			w.Closed[p] = markOf(b)
		}
	}
	return w, true
}

// isContested reports whether another host has a part of a block of this one. Those that
// the ranges are cut into have no parts that are another's.
func isContested(b claim.Block, k *known) bool {
	return slices.ContainsFunc(k.blocks.Blocks, func(o claim.Block) bool { return o.Owner != b.Owner && o.Overlaps(b.Block) })
}

// hostName tells a host from all others, also from another machine of the same name.
func hostName(o claim.Owner) string {
	if o.Machine == "" {
		return o.Name
	}
	return o.Name + "/" + o.Machine
}

// markOf tells one decision to drain a block from others.
func markOf(b claim.Block) string { return fmt.Sprintf("%s/%d", b.ID, b.Epoch) }

// sound returns the blocks to whose owners packets may be led: those of this host, those
// that the ranges are cut into, and others of the ranges that are nobody's besides (ranges
// were cut otherwise once). Whoever writes objects cannot draw packets to other networks,
// nor those to a block that another host has as it should be.
func sound(blocks []claim.Block, self claim.Owner, c config.Pods) (all []claim.Block) {
	pools := c.Pools()
	isRegular := func(b claim.Block) bool {
		return slices.ContainsFunc(pools, func(p ipam.BlockPool) bool {
			is, ok := p.Find(b.Name())
			return ok && (b.V6 == is.V6 || !b.V6.IsValid())
		})
	}
	var odd []claim.Block
	for _, b := range blocks {
		switch {
		case b.Owner.Name == "":
		case b.Owner == self, isRegular(b):
			all = append(all, b)
		default:
			odd = append(odd, b)
		}
	}
	for _, b := range odd {
		outside := slices.ContainsFunc(b.Prefixes(), func(p netip.Prefix) bool {
			return !slices.ContainsFunc(c.Ranges, func(r netip.Prefix) bool { return r.Bits() <= p.Bits() && r.Contains(p.Addr()) })
		})
		if !outside && !slices.ContainsFunc(all, func(o claim.Block) bool { return o.Overlaps(b.Block) }) {
			all = append(all, b)
		}
	}
	return all
}

// hostsOf returns the hosts that have blocks, sorted by name. Of addresses those come
// first that are of the family of this host's first one: tunnels go between them. A host
// that does not say where it is cannot be reached, and is left out where that matters.
func hostsOf(blocks []claim.Block, self claim.Owner, c config.Pods) (hosts []config.PodHost) {
	index := make(map[string]int)
	for _, b := range sound(blocks, self, c) {
		name := hostName(b.Owner)
		i, ok := index[name]
		if !ok {
			i = len(hosts)
			index[name] = i
			hosts = append(hosts, config.PodHost{Name: name})
		}
		h := &hosts[i]
		h.Blocks = append(h.Blocks, b.Prefixes()...)
		if len(h.Addresses) == 0 {
			h.Addresses = slices.Clone(b.Addresses)
		}
	}
	slices.SortFunc(hosts, func(a, b config.PodHost) int { return strings.Compare(a.Name, b.Name) })
	own := slices.IndexFunc(hosts, func(h config.PodHost) bool { return h.Name == hostName(self) })
	if c.Overlay != config.OverlayVXLAN || own < 0 || len(hosts[own].Addresses) == 0 {
		return hosts
	}
	outer := service.FamilyOf(hosts[own].Addresses[0])
	isOuter := func(a netip.Addr) bool { return service.FamilyOf(a) == outer }
	for i := range hosts {
		some := hosts[i].Addresses
		if j := slices.IndexFunc(some, isOuter); j > 0 {
			some[0], some[j] = some[j], some[0]
		}
	}
	return slices.DeleteFunc(hosts, func(h config.PodHost) bool { return len(h.Addresses) == 0 || !isOuter(h.Addresses[0]) })
}

func openPods(a *Agent, _ func()) *pod.Plane { return pod.New(a.opts.RunDir, a.log) }

func measurePods(p *pod.Plane, m meter) {
	c, err := p.Count()
	if err != nil {
		m.failed("pentad_pods", err)
		return
	}
	m.gauge("pentad_pods", float64(c.Pods))
	m.gauge("pentad_pod_addresses_free", float64(c.Free))
	m.gauge("pentad_pod_blocks", float64(c.Open), "open")
	m.gauge("pentad_pod_blocks", float64(c.Closed), "draining")
	m.gauge("pentad_pod_hosts", float64(c.Hosts))
}

func removePods(opts Options) error { return pod.Remove(opts.RunDir) }

// onBlocks takes what is known of blocks.
func (a *Agent) onBlocks(v claim.View) {
	a.tell(map[string]bool{"pods": true}, func(k *known) { k.blocks = &v })
}

// room tells what this host does with its blocks, and which addresses of pods are in none.
func room(runDir string, own []claim.Block) (rooms map[netip.Prefix]claim.Room, strays []netip.Addr, err error) {
	all, err := attach.List()
	if err != nil {
		return nil, nil, err
	}
	used := make(map[netip.Prefix]int, len(own))
	for _, a := range all {
		for _, x := range []netip.Addr{a.V4, a.V6} {
			if !x.IsValid() {
				continue
			}
			i := slices.IndexFunc(own, func(b claim.Block) bool { return b.Contains(x) })
			switch {
			case i < 0:
				strays = append(strays, x)
			case x == a.V4 || !own[i].Contains(a.V4):
				used[own[i].Name()]++ // a pod counts once in a block
			}
		}
	}
	rooms = make(map[netip.Prefix]claim.Room, len(own))
	var errs []error
	for _, b := range own {
		r := claim.Room{Used: used[b.Name()]}
		if b.Draining && r.Used == 0 {
			r.Closed, err = attach.IsClosed(filepath.Join(runDir, pod.NetworkFile), b.Block, markOf(b))
			if !errors.Is(err, attach.ErrNoNetwork) {
				errs = append(errs, err)
			}
		}
		rooms[b.Name()] = r
	}
	return rooms, strays, errors.Join(errs...)
}
