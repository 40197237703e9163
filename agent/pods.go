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
	w.Config.Hosts = hostsOf(k.blocks.Blocks, k.blocks.Self, w.Config.Overlay)
	for _, b := range k.blocks.Blocks {
		if b.Owner != k.blocks.Self || !b.Draining {
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

// hostName tells a host from all others, also from another machine of the same name.
func hostName(o claim.Owner) string {
	if o.Machine == "" {
		return o.Name
	}
	return o.Name + "/" + o.Machine
}

// markOf tells one decision to drain a block from others.
func markOf(b claim.Block) string { return fmt.Sprintf("%s/%d", b.ID, b.Epoch) }

// hostsOf returns the hosts that have blocks, sorted by name. Of addresses those come
// first that are of the family of this host's first one: tunnels go between them. A host
// that does not say where it is cannot be reached, and is left out where that matters.
func hostsOf(blocks []claim.Block, self claim.Owner, overlay config.Overlay) (hosts []config.PodHost) {
	for _, b := range blocks {
		if b.Owner.Name == "" {
			continue
		}
		name := hostName(b.Owner)
		i := slices.IndexFunc(hosts, func(h config.PodHost) bool { return h.Name == name })
		if i < 0 {
			hosts = append(hosts, config.PodHost{Name: name})
			i = len(hosts) - 1
		}
		h := &hosts[i]
		h.Blocks = append(h.Blocks, b.Prefixes()...)
		if len(h.Addresses) == 0 {
			h.Addresses = slices.Clone(b.Addresses)
		}
	}
	slices.SortFunc(hosts, func(a, b config.PodHost) int { return strings.Compare(a.Name, b.Name) })
	own := slices.IndexFunc(hosts, func(h config.PodHost) bool { return h.Name == hostName(self) })
	if overlay != config.OverlayVXLAN || own < 0 || len(hosts[own].Addresses) == 0 {
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

// room tells what this host does with its blocks.
func room(runDir string, own []claim.Block) (map[netip.Prefix]claim.Room, error) {
	all, err := attach.List()
	if err != nil {
		return nil, err
	}
	rooms := make(map[netip.Prefix]claim.Room, len(own))
	var errs []error
	for _, b := range own {
		var r claim.Room
		for _, a := range all {
			if b.Contains(a.V4) || b.Contains(a.V6) {
				r.Used++
			}
		}
		if b.Draining && r.Used == 0 {
			r.Closed, err = attach.IsClosed(filepath.Join(runDir, pod.NetworkFile), b.Block, markOf(b))
			if !errors.Is(err, attach.ErrNoNetwork) {
				errs = append(errs, err)
			}
		}
		rooms[b.Name()] = r
	}
	return rooms, errors.Join(errs...)
}
