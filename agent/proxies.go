package agent

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/proxy"
)

func hasProxies(c *config.Config) bool { return len(c.Proxies)+len(c.Forwards) > 0 }

func wantProxies(k *known) (proxy.Want, bool) {
	return proxy.Want{Proxies: k.config.Proxies, Upstreams: k.config.Upstreams, Forwards: k.config.Forwards}, true
}

func openProxies(a *Agent, _ func()) *proxy.Plane { return proxy.New(a.log) }

func measureProxies(p *proxy.Plane, m meter) {
	totals, open := p.Totals()
	for name, t := range totals {
		m.gauge("pentad_proxy_connections_open", float64(open[name]), name)
		m.counter("pentad_proxy_connections_total", t.Connections, name)
		m.counter("pentad_proxy_connections_failed_total", t.Failed, name)
		m.counter("pentad_proxy_bytes_total", t.Sent, name, "sent")
		m.counter("pentad_proxy_bytes_total", t.Received, name, "received")
	}
}

// proxies returns the plane of proxies; nil: there are none.
func (a *Agent) proxies() *proxy.Plane {
	p, _ := openedPlane[*proxy.Plane](a)
	return p
}

// Proxies implements api.Agent.
func (a *Agent) Proxies() []api.Proxy {
	all := []api.Proxy{}
	p := a.proxies()
	if p == nil {
		return all
	}
	a.mu.Lock()
	configured := a.known.config.Proxies
	a.mu.Unlock()
	totals, open := p.Totals()
	for _, c := range configured {
		t := totals[c.Name]
		out := api.Proxy{Name: c.Name, Open: open[c.Name], Connections: t.Connections, Failed: t.Failed, Sent: t.Sent, Received: t.Received}
		for _, protocol := range c.Protocols {
			out.Protocols = append(out.Protocols, protocol.String())
		}
		listening := p.Listening(c.Name)
		for _, at := range c.Listen {
			out.Listen = append(out.Listen, at.String())
			if !slices.Contains(listening, at) {
				out.Missing = append(out.Missing, at.String())
			}
		}
		all = append(all, out)
	}
	slices.SortFunc(all, func(x, y api.Proxy) int { return strings.Compare(x.Name, y.Name) })
	return all
}

// Forwards implements api.Agent.
func (a *Agent) Forwards() []api.Forward {
	all := []api.Forward{}
	p := a.proxies()
	if p == nil {
		return all
	}
	_, open := p.Totals()
	for _, f := range p.Forwards() {
		out := api.Forward{Name: f.Name, Remote: f.Remote, To: f.To, Via: f.Via, Up: f.Up, Since: f.Since, Open: open[f.Name]}
		if f.Listen.IsValid() {
			out.Listen = f.Listen.String()
			out.Missing = len(p.Listening(f.Name)) == 0
		}
		if f.Err != nil {
			out.Why = proxy.Describe(f.Err)
		}
		all = append(all, out)
	}
	slices.SortFunc(all, func(x, y api.Forward) int { return strings.Compare(x.Name, y.Name) })
	return all
}

// ProxyFlows implements api.Agent.
func (a *Agent) ProxyFlows() []api.ProxyFlow {
	all := []api.ProxyFlow{}
	if p := a.proxies(); p != nil {
		for _, f := range p.Flows() {
			all = append(all, newProxyFlow(f))
		}
	}
	return all
}

// lookForProxies is how often it is looked whether there are other proxies to follow.
const lookForProxies = 200 * time.Millisecond

// FollowProxies implements api.Agent.
func (a *Agent) FollowProxies(ctx context.Context, started func(), each func(api.ProxyFlow) error) error {
	look := time.NewTicker(lookForProxies)
	defer look.Stop()
	var followed *proxy.Plane
	var flows <-chan proxy.Flow
	stop := func() {}
	defer func() { stop() }()
	for {
		// Proxies that the file begins and ends are others.
		if p := a.proxies(); p != followed {
			stop()
			followed, flows, stop = p, nil, func() {}
			if p != nil {
				flows, stop = p.Follow()
			}
		}
		if started != nil {
			started()
			started = nil
		}
		select {
		case f := <-flows:
			if err := each(newProxyFlow(f)); err != nil {
				return err
			}
		case <-look.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func newProxyFlow(f proxy.Flow) api.ProxyFlow {
	return api.ProxyFlow{
		ID: f.ID, Proxy: f.Proxy, Protocol: f.Protocol, Command: f.Command, Client: f.Client, User: f.User, Target: f.Target, Via: f.Via,
		Began: f.Began, Ended: f.Ended, Sent: f.Sent, Received: f.Received, Outcome: f.Outcome,
	}
}
