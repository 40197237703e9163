package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"time"

	"github.com/pentad/pentad/announce"
	"github.com/pentad/pentad/announce/bfd"
	"github.com/pentad/pentad/announce/bgp"
	"github.com/pentad/pentad/announce/l2"
	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
)

func speaksBGP(c *config.Config) bool { return len(c.Announce.BGP.Peers) > 0 }

func speaksARP(c *config.Config) bool { return len(c.Announce.L2.Interfaces) > 0 }

func announces(c *config.Config) bool { return speaksBGP(c) || speaksARP(c) }

func vipsOf(k *known) []announce.VIP {
	return announce.VIPs(k.services, directs(k.config), k.standing, k.unheard)
}

// maySay reports whether it is known what can be announced: all sources have spoken, and
// each role that forwards has tried what there is. What an earlier agent has announced
// stays until then.
func maySay(k *known) bool {
	_, nat := k.standing[service.ForwardNAT]
	_, direct := k.standing[service.ForwardDirect]
	return k.silent == 0 && (nat || !forwards(k.config)) && (direct || !directs(k.config))
}

func wantBGP(k *known) (bgp.Want, bool) {
	return bgp.Want{Config: k.config.Announce.BGP, VIPs: vipsOf(k)}, maySay(k)
}

func wantL2(k *known) (l2.Want, bool) {
	return l2.Want{Config: k.config.Announce.L2, VIPs: vipsOf(k)}, maySay(k)
}

func openL2(a *Agent, _ func()) *l2.Plane { return l2.New(a.opts.Pins, a.log) }

func removeL2(opts Options) error { return l2.Remove(opts.Pins) }

func measureL2(p *l2.Plane, m meter) {
	var here, problems int
	for _, r := range p.Reports() {
		if r.Here {
			here++
		}
		if r.Problem != "" {
			problems++
		}
	}
	m.gauge("pentad_l2_vips_owned", float64(here))
	m.gauge("pentad_l2_vips_contested", float64(problems))
	m.gauge("pentad_l2_announcers", float64(1+len(p.Members())))
	counts, err := p.Answers()
	if err != nil {
		m.failed("pentad_l2_answers_total", err)
		return
	}
	m.counter("pentad_l2_answers_total", counts[0], "arp")
	m.counter("pentad_l2_answers_total", counts[1], "ndp")
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
	if !ok || o.mode == waiting {
		return // what there was before is there still
	}
	has := o.services
	switch failed := o.err != nil && !isPartial(o.err); {
	case o.mode == off, failed && o.broken:
		has = nil
	case failed:
		has = a.known.standing[f] // what there was before
	}
	if was, known := a.known.standing[f]; known && was == has {
		return
	}
	a.tell(announcers, func(k *known) {
		k.standing = maps.Clone(k.standing)
		if k.standing == nil {
			k.standing = make(announce.Standing)
		}
		k.standing[f] = has
	})
}

// tell changes what some roles know besides services.
func (a *Agent) tell(whom map[string]bool, change func(*known)) {
	now := *a.known
	change(&now)
	a.mu.Lock()
	a.known = &now
	a.mu.Unlock()
	if now.config == nil {
		return
	}
	for _, d := range a.drivers {
		if whom[d.state().name] {
			d.set(&now)
		}
	}
}

// hearEvery is how often it is looked whether first probes have told something.
const hearEvery = 200 * time.Millisecond

// hearProbes takes services out of those of which nothing is known.
func (a *Agent) hearProbes() {
	if len(a.known.unheard) == 0 {
		return
	}
	if now := a.unheard(a.known); len(now) != len(a.known.unheard) {
		a.tell(announcers, func(k *known) { k.unheard = now })
	}
}

// unheard returns the services that are probed and of which nothing is known yet, where
// that matters to anybody.
func (a *Agent) unheard(k *known) map[string]bool {
	if !announces(k.config) {
		return nil
	}
	heard, all := a.monitor.Heard(), make(map[string]bool)
	for _, s := range k.services.Services {
		if isProbed(s) && s.Forward != service.ForwardNone && !heard[s.Name] && s.Source != service.SourceKubernetes {
			all[s.Name] = true
		}
	}
	return all
}

// announcers are the roles that tell the network of VIPs.
var announcers = map[string]bool{"bgp": true, "l2": true}

func upness(r bgp.Report) float64 {
	if r.BFD.State == bfd.Up {
		return 1
	}
	return 0
}

// openedPlane returns the plane of a kind that is open; false: none is.
func openedPlane[P any](a *Agent) (p P, ok bool) {
	for _, d := range a.drivers {
		if p, ok = d.opened().(P); ok {
			return p, true
		}
	}
	return p, false
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
	if p, ok := openedPlane[*bgp.Plane](a); ok {
		peers = p.Reports()
	}
	var owners map[netip.Addr]l2.Report
	if p, ok := openedPlane[*l2.Plane](a); ok {
		owners, out.Announcers = p.Reports(), p.Members()
	}
	for _, r := range peers {
		out.Peers = append(out.Peers, peerOf(r))
	}
	for _, v := range vipsOf(k) {
		x := api.AnnouncedVIP{Address: v.Address, Services: v.Services, Missing: v.Missing, To: []string{}}
		for _, r := range peers {
			if v.Missing != "" {
				// An aggregate covers it, or it is about to be taken back.
				if r.State == bgp.Established && r.Tells(v.Address) {
					x.To = append(x.To, r.Address.String())
				}
				continue
			}
			if problem := r.Problem(v); problem == "" {
				x.To = append(x.To, r.Address.String())
			} else {
				x.NotTo = append(x.NotTo, fmt.Sprintf("peer %s: %s", r.Address, problem))
			}
		}
		if r, ok := owners[v.Address]; ok {
			addOwner(&x, r)
		}
		out.VIPs = append(out.VIPs, x)
	}
	return out
}

// addOwner says who has a VIP on its segment.
func addOwner(x *api.AnnouncedVIP, r l2.Report) {
	x.L2 = &api.L2{Owner: r.Owner, Here: r.Here, Problem: r.Problem}
	switch {
	case r.Here:
		x.To = append(x.To, "segment")
	case x.Missing != "":
	case r.Owner != "":
		x.NotTo = append(x.NotTo, fmt.Sprintf("segment: %s has it", r.Owner))
	case r.Problem != "":
		x.NotTo = append(x.NotTo, "segment: "+r.Problem)
	default:
		x.NotTo = append(x.NotTo, "segment: it is asked whether somebody has it")
	}
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
