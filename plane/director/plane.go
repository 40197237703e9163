// Package director sends packets to VIPs on to real servers, unchanged but for their
// link-layer addresses and time to live (direct routing, LVS-DR). The servers have the VIP, too, and
// answer clients by themselves, so that answers do not pass here.
//
// An eBPF program sees what arrives at an interface; all that it needs is in its maps,
// which are pinned: it goes on while no agent lives. It never sends a packet anywhere but
// to a real server on a segment of this host. Which of them has a connection follows from
// the connection's addresses and from who the servers are, on every director alike.
//
// Facts come from D. Eisenbud et al., Maglev (NSDI 2016), and from the kernel's
// net/core/filter.c (bpf_redirect_neigh).
package director

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/pins"
	"github.com/pentad/pentad/service"
)

// Want is which services are directed, and where their packets arrive.
type Want struct {
	Interfaces []string
	Services   *service.Snapshot // those of service.ForwardDirect among them
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool {
	return w.Services == o.Services && slices.Equal(w.Interfaces, o.Interfaces)
}

// planeDir is this plane's part of the pin directory.
const planeDir = "director"

// Plane is the director of one host.
type Plane struct {
	log *slog.Logger
	dir string

	mu       sync.Mutex
	want     *Want                     // what is in the kernel; nil: not known
	kernel   *kernel                   // its maps; nil: not open
	attached map[string]pins.Interface // that have the program
	ways     map[netip.Addr]way        // to all real servers, and perhaps some of before
	own      map[netip.Addr]bool       // addresses of this host
}

// New returns a plane that has not touched the kernel yet. pins is the directory of all
// pins, on bpffs.
func New(pinDir string, log *slog.Logger) *Plane {
	return &Plane{log: log, dir: filepath.Join(pinDir, planeDir)}
}

// vip is a listener and who serves it now, by what is wanted.
type vip struct {
	listener   service.Listener
	name       string
	sourceHash bool
	members    []Member
	servers    map[netip.Addr]uint8 // all of the service, with how they leave it; 0: they do not
}

// vipsOf returns what is to be directed of services, and their real servers. It is pure.
func vipsOf(services []*service.Service) (vips []vip, reals map[netip.Addr]bool) {
	reals = make(map[netip.Addr]bool)
	for _, x := range services {
		if x.Forward != service.ForwardDirect {
			continue
		}
		servers := make(map[netip.Addr]uint8, len(x.Backends))
		for _, b := range x.Backends {
			reals[b.Address.Addr()] = true
			switch {
			case b.Down:
				servers[b.Address.Addr()] = leavesDown
			case b.Drained || b.Weight == 0:
				servers[b.Address.Addr()] = leavesDrains
			default:
				servers[b.Address.Addr()] = 0
			}
		}
		for _, l := range x.Listeners {
			vips = append(vips, vip{
				listener: service.Listener{Address: l.Address, Protocol: l.Protocol}, name: x.Name, sourceHash: x.Balance == service.SourceHash,
				members: membersOf(x, service.FamilyOf(l.Address.Addr())), servers: servers,
			})
		}
	}
	return vips, reals
}

// membersOf returns who takes the next connections of a family.
func membersOf(s *service.Service, f service.Family) []Member {
	group, ok := s.ServingGroup(f)
	if !ok {
		return nil
	}
	var all []Member
	for _, b := range s.Backends {
		if b.Group == group && b.Usable() && service.FamilyOf(b.Address.Addr()) == f {
			all = append(all, Member{b.Address.Addr(), b.Weight})
		}
	}
	return all
}

// Apply makes the kernel direct what is wanted, whatever it did before.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := p.want
	p.want = nil
	if p.kernel == nil {
		k, err := openKernel(p.dir)
		if err != nil {
			return err
		}
		p.kernel, p.attached, last = k, nil, nil
	}
	own, err := host.Addresses()
	if err != nil {
		return err
	}
	setting := p.set(last, want, own) // what is right of it is in force
	p.own = own
	// The program is the same until there is another agent.
	if p.attached == nil || !p.kernel.areAttached(want.Interfaces, p.attached) {
		attached, err := p.kernel.attach(want.Interfaces)
		if err != nil {
			return err
		}
		p.attached = attached
	}
	if setting != nil {
		return setting
	}
	p.want = &want
	return nil
}

// set writes what is wanted: what has changed since the last want was in the kernel, if
// that is known and nothing else has changed, or else everything.
func (p *Plane) set(last *Want, want Want, own map[netip.Addr]bool) error {
	if last != nil && last.Services != want.Services && maps.Equal(own, p.own) {
		changed, removed := service.Diff(last.Services, want.Services)
		before := removed
		for _, s := range changed {
			if old := last.Services.Find(s.Name); old != nil {
				before = append(before, old)
			}
		}
		vips, reals := vipsOf(changed)
		gone, _ := vipsOf(before)
		for a := range reals {
			if _, known := p.ways[a]; !known {
				p.ways[a] = wayTo(a)
			}
		}
		if p.kernel.hasRoomFor(reals) {
			return p.kernel.revise(gone, vips, reals, p.ways, own)
		}
	}
	vips, reals := vipsOf(want.Services.Services)
	p.ways = waysTo(slices.Collect(maps.Keys(reals)))
	return p.kernel.set(vips, reals, p.ways, own)
}

// missingOf says what keeps packets from being directed.
func (p *Plane) missingOf(want Want, vips []vip) (all []string) {
	for _, name := range want.Interfaces {
		if _, ok := p.attached[name]; !ok {
			all = append(all, fmt.Sprintf("director: there is no interface %s of Ethernet; nothing that arrives there is directed", name))
		}
	}
	said := make(map[netip.Addr]bool)
	for _, v := range vips {
		for _, m := range v.members {
			if a := v.listener.Address.Addr(); p.ways[m.Address].local && !p.own[a] && !said[a] {
				said[a] = true
				all = append(all, fmt.Sprintf("service %s: real server %s is this host, which has not the address %s: add \"realServer: {vips: auto}\"", v.name, m.Address, a))
			}
			if w := p.ways[m.Address]; w.why != "" && !said[m.Address] {
				said[m.Address] = true
				all = append(all, fmt.Sprintf("service %s: real server %s: %s; what is directed there is dropped", v.name, m.Address, w.why))
			}
		}
	}
	return all
}

// Intact reports whether the program is attached, and the ways to real servers are the
// same.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == nil || p.kernel == nil {
		return true // it is about to be applied
	}
	if !maps.Equal(waysTo(slices.Collect(maps.Keys(p.ways))), p.ways) {
		return false
	}
	return p.kernel.areAttached(p.want.Interfaces, p.attached)
}

// Distrust has the next Apply read the kernel.
func (p *Plane) Distrust() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgetKernel()
}

func (p *Plane) forgetKernel() {
	if p.kernel != nil {
		p.kernel.close()
		p.kernel = nil
	}
}

// settleEvery is how often it is looked whether tables of before are still needed, and
// spareEvery whether there are tables for the next change.
const (
	settleEvery = 30 * time.Second
	spareEvery  = 100 * time.Millisecond
)

// Run takes tables away that no connection needs any more, and keeps some ready.
func (p *Plane) Run(ctx context.Context) {
	t, spares := time.NewTicker(settleEvery), time.NewTicker(spareEvery)
	defer t.Stop()
	defer spares.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-spares.C:
			p.mu.Lock()
			k := p.kernel
			p.mu.Unlock()
			if k == nil {
				continue
			}
			if err := k.addSpare(&p.mu, func() bool { return p.kernel == k }); err != nil {
				p.log.Debug("there is no table to spare", "error", err)
			}
		case <-t.C:
			p.mu.Lock()
			k := p.kernel
			p.mu.Unlock()
			if k == nil {
				continue
			}
			if err := k.settle(time.Now(), &p.mu); err != nil {
				p.log.Warn("tables of before stay longer than they are needed", "error", err)
			}
		}
	}
}

// Close lets go of the maps.
func (p *Plane) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgetKernel()
}

// Warnings say what keeps packets from being directed.
func (p *Plane) Warnings() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == nil {
		return nil
	}
	vips, _ := vipsOf(p.want.Services.Services)
	return p.missingOf(*p.want, vips)
}

// way is how packets get to a real server.
type way struct {
	ifindex int
	local   bool   // it is this host
	why     string // there is none
}
