package agent

import (
	"net/netip"
	"slices"

	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// probes tells the monitor whom to probe.
type probes struct {
	monitor *health.Monitor
	told    *service.Snapshot       // what the monitor knows
	known   map[health.Key]bool     // backends whose state an earlier agent left; nil after the first time
	vips    map[netip.AddrPort]bool // of TCP: a probe of one must not be translated
}

// follow tells the monitor of a snapshot. renamed are services that have another name
// since the last one, new to old.
func (p *probes) follow(next *service.Snapshot, renamed map[string]string) {
	if p.told == next {
		return
	}
	last := p.told
	if p.told == nil {
		last = &service.Snapshot{}
	}
	changed, removed := service.Diff(last, next)
	if len(removed) > 0 || slices.ContainsFunc(changed, func(s *service.Service) bool { return listensAnew(last.Find(s.Name), s) }) {
		changed = append(changed, p.setVIPs(next)...)
	}
	p.monitor.Update(p.targets(last, changed, removed, renamed))
	p.told, p.known = next, nil
}

// listensAnew reports whether other addresses may be VIPs, or VIPs matter now.
func listensAnew(old, s *service.Service) bool {
	return old == nil || isProbed(old) != isProbed(s) || !slices.Equal(old.Listeners, s.Listeners)
}

// setVIPs finds out which addresses are VIPs now, and returns the services that have a
// backend whose address became one, or is one no more.
func (p *probes) setVIPs(next *service.Snapshot) []*service.Service {
	vips := make(map[netip.AddrPort]bool)
	if slices.ContainsFunc(next.Services, isProbed) {
		for _, s := range next.Services {
			for _, l := range s.Listeners {
				if l.Protocol == service.TCP {
					vips[l.Address] = true
				}
			}
		}
	}
	turned := make(map[netip.AddrPort]bool)
	for v := range vips {
		if !p.vips[v] {
			turned[v] = true
		}
	}
	for v := range p.vips {
		if !vips[v] {
			turned[v] = true
		}
	}
	p.vips = vips
	if len(turned) == 0 {
		return nil
	}
	var touched []*service.Service
	for _, s := range next.Services {
		if slices.ContainsFunc(s.Backends, func(b service.Backend) bool {
			return turned[health.Target{Key: health.Key{Address: b.Address}, Health: s.Health}.Probed()]
		}) {
			touched = append(touched, s)
		}
	}
	return touched
}

func isProbed(s *service.Service) bool { return s.Health.Probe != service.ProbeNone }

// targets returns what to probe from now on, and what no longer.
func (p *probes) targets(last *service.Snapshot, changed, removed []*service.Service, renamed map[string]string) (add []health.Target, remove []health.Key) {
	for _, s := range changed {
		if !isProbed(s) {
			removed = append(removed, s)
			continue
		}
		old := renamed[s.Name]
		for _, b := range s.Backends {
			k := health.Key{Service: s.Name, Address: b.Address}
			t := health.Target{Key: k, Health: s.Health, Down: b.Down}
			t.Known = p.known[k] || old != "" && (p.known[health.Key{Service: old, Address: b.Address}] || wasProbed(last.Find(old), b.Address))
			if p.vips[t.Probed()] {
				t.Mark = host.ProbeMark
			}
			add = append(add, t)
		}
		if old := last.Find(s.Name); old != nil {
			remove = append(remove, missing(old, s)...)
		}
	}
	for _, s := range removed {
		remove = append(remove, missing(s, &service.Service{})...)
	}
	return add, remove
}

func wasProbed(s *service.Service, a netip.AddrPort) bool {
	return s != nil && isProbed(s) && hasBackend(s, a)
}

// missing returns the backends of old that the other does not have.
func missing(old, other *service.Service) []health.Key {
	has := make(map[netip.AddrPort]bool, len(other.Backends))
	for _, b := range other.Backends {
		has[b.Address] = true
	}
	var keys []health.Key
	for _, b := range old.Backends {
		if !has[b.Address] {
			keys = append(keys, health.Key{Service: old.Name, Address: b.Address})
		}
	}
	return keys
}
