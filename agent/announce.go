package agent

import (
	"fmt"
	"maps"

	"github.com/pentad/pentad/announce"
	"github.com/pentad/pentad/announce/bfd"
	"github.com/pentad/pentad/announce/bgp"
	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
)

func speaksBGP(c *config.Config) bool { return len(c.Announce.BGP.Peers) > 0 }

func announces(c *config.Config) bool { return speaksBGP(c) }

func vipsOf(k *known) []announce.VIP { return announce.VIPs(k.services, directs(k.config), k.standing) }

func wantBGP(k *known) (bgp.Want, bool) {
	return bgp.Want{Config: k.config.Announce.BGP, VIPs: vipsOf(k)}, k.silent == 0
}

func openBGP(a *Agent, _ func()) *bgp.Plane { return bgp.New(a.log) }

func measureBGP(p *bgp.Plane, m meter) {
	for _, r := range p.Reports() {
		peer := r.Address.String()
		up := 0.0
		if r.State == bgp.Established {
			up = 1
		}
		m.gauge("pentad_bgp_peer_up", up, peer)
		m.counter("pentad_bgp_sessions_total", r.Ups, peer)
		m.gauge("pentad_bgp_prefixes_announced", float64(len(r.Prefixes)), peer)
		if r.BFD != nil {
			m.gauge("pentad_bfd_peer_up", upness(r), peer)
			m.counter("pentad_bfd_sessions_total", r.BFD.Ups, peer)
		}
	}
}

// forwarders are the roles that have services in the kernel for packets from elsewhere.
var forwarders = map[string]service.Forward{"nat": service.ForwardNAT, "director": service.ForwardDirect}

// noteStanding notes what a role has in the kernel. A VIP is announced when it can be
// forwarded, and not before.
func (a *Agent) noteStanding(o outcome) {
	f, ok := forwarders[o.role]
	if !ok || o.mode == waiting || o.err != nil && !isPartial(o.err) {
		return // what there was before is there still
	}
	has := o.services
	if o.mode == off {
		has = nil
	}
	if a.known.standing[f] == has {
		return
	}
	now := *a.known
	now.standing = maps.Clone(now.standing)
	if now.standing == nil {
		now.standing = make(announce.Standing)
	}
	now.standing[f] = has
	a.mu.Lock()
	a.known = &now
	a.mu.Unlock()
	for _, d := range a.drivers {
		if announcers[d.state().name] {
			d.set(&now)
		}
	}
}

// announcers are the roles that tell the network of VIPs.
var announcers = map[string]bool{"bgp": true}

func upness(r bgp.Report) float64 {
	if r.BFD.State == bfd.Up {
		return 1
	}
	return 0
}

// bgp returns the plane that speaks to routers; nil: none does.
func (a *Agent) bgp() *bgp.Plane {
	for _, d := range a.drivers {
		if p, ok := d.opened().(*bgp.Plane); ok {
			return p
		}
	}
	return nil
}

// Withdraw implements api.Agent.
func (a *Agent) Withdraw() {
	for _, d := range a.drivers {
		if w, ok := d.opened().(withdrawer); ok {
			w.Withdraw()
		}
	}
}

// Announcements implements api.Agent.
func (a *Agent) Announcements() api.Announcements {
	out := api.Announcements{VIPs: []api.AnnouncedVIP{}, Peers: []api.BGPPeer{}}
	a.mu.Lock()
	k := a.known
	a.mu.Unlock()
	if k.config == nil || !announces(k.config) {
		return out
	}
	var peers []bgp.Report
	if p := a.bgp(); p != nil {
		peers = p.Reports()
	}
	for _, r := range peers {
		out.Peers = append(out.Peers, peerOf(r))
	}
	for _, v := range vipsOf(k) {
		x := api.AnnouncedVIP{Address: v.Address, Services: v.Services, Missing: v.Missing, To: []string{}}
		for _, r := range peers {
			if v.Missing != "" {
				break
			}
			if problem := r.Problem(v); problem == "" {
				x.To = append(x.To, r.Address.String())
			} else {
				x.NotTo = append(x.NotTo, fmt.Sprintf("peer %s: %s", r.Address, problem))
			}
		}
		out.VIPs = append(out.VIPs, x)
	}
	return out
}

func peerOf(r bgp.Report) api.BGPPeer {
	p := api.BGPPeer{
		Address: r.Address.String(), AS: r.AS, State: string(r.State), Established: r.State == bgp.Established, Since: r.Since, Why: r.Why, Prefixes: len(r.Prefixes),
	}
	if r.BFD != nil {
		p.BFD = &api.BFDPeer{State: r.BFD.State.String(), Since: r.BFD.Since, DetectionSeconds: r.BFD.Detection.Seconds()}
		if r.BFD.State != bfd.Up && r.BFD.Why != bfd.NoDiagnostic {
			p.BFD.Why = r.BFD.Why.String()
		}
	}
	return p
}
