package agent

import (
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/plane/director"
	"github.com/pentad/pentad/plane/realserver"
)

func directs(c *config.Config) bool { return len(c.Director.Interfaces) > 0 }

func wantDirector(k *known) (director.Want, bool) {
	return director.Want{Interfaces: k.config.Director.Interfaces, Services: k.services}, k.silent == 0
}

func openDirector(a *Agent, _ func()) *director.Plane { return director.New(a.opts.Pins, a.log) }

func removeDirector(opts Options) error { return director.Remove(opts.Pins) }

func isRealServer(c *config.Config) bool { return c.RealServer.Wanted() }

func wantRealServer(k *known) (realserver.Want, bool) {
	return realserver.Want{VIPs: k.config.RealServer.VIPs, Auto: k.config.RealServer.Auto, Services: k.services}, k.silent == 0
}

func openRealServer(a *Agent, _ func()) *realserver.Plane {
	return realserver.New(a.opts.RunDir, a.log)
}

func removeRealServer(opts Options) error { return realserver.Remove(opts.RunDir) }

func measureDirector(p *director.Plane, m meter) {
	services, drops, err := p.Counts()
	if err != nil {
		m.failed("pentad_director_packets_total", err)
		return
	}
	for name, c := range services {
		m.counter("pentad_director_packets_total", c.Packets, name)
		m.counter("pentad_director_bytes_total", c.Bytes, name)
		m.counter("pentad_director_opened_total", c.Opened, name)
	}
	for reason, n := range map[string]uint64{"no_real": drops.NoReal, "no_way": drops.NoWay, "ttl": drops.TTL, "malformed": drops.Malformed} {
		m.counter("pentad_director_dropped_total", n, reason)
	}
}
