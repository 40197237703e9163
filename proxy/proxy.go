// Package proxy forwards connections in user space, for clients that ask for it (SOCKS5,
// HTTP) or whose connections a firewall has led here: directly, or through proxies of
// others.
//
// It ends with the agent: what has to work without one belongs into the kernel.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"

	"github.com/pentad/pentad/config"
)

// Want is which proxies there are to be.
type Want struct {
	Proxies   []config.Proxy
	Upstreams []config.Upstream
	Forwards  []config.Forward
}

// servers returns the proxies, those of forwards among them.
func (w Want) servers() []config.Proxy {
	all := slices.Clone(w.Proxies)
	for _, f := range w.Forwards {
		if f.Listen.IsValid() {
			all = append(all, proxyOf(f))
		}
	}
	return all
}

// chains returns the ways of all rules and forwards.
func (w Want) chains() []chain {
	upstreams := w.upstreams()
	var all []chain
	for _, p := range w.servers() {
		for _, r := range p.Rules {
			all = append(all, chainOf(r.Via, upstreams))
		}
	}
	for _, f := range w.Forwards {
		all = append(all, chainOf(f.Via, upstreams))
	}
	return all
}

func (w Want) upstreams() map[string]config.Upstream {
	all := make(map[string]config.Upstream, len(w.Upstreams))
	for _, u := range w.Upstreams {
		all[u.Name] = u
	}
	return all
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool { return reflect.DeepEqual(w, o) }

// Plane is the proxies of this host.
type Plane struct {
	log     *slog.Logger
	flows   *table
	resolve resolver

	// applying is held by who changes what there is, also while he waits for what ends;
	// mu only for a look. Sessions never wait for the first.
	applying sync.Mutex
	mu       sync.Mutex
	servers  map[string]*server
	forwards map[string]*forward

	outgoing sync.Map // ends of connections to targets
	local    localAddresses

	linksMu sync.Mutex
	links   map[string]*link // to SSH servers, by the names of the upstreams to there
}

// New returns a plane without a proxy.
func New(log *slog.Logger) *Plane {
	return &Plane{
		log: log, flows: newTable(), resolve: systemResolver,
		servers: make(map[string]*server), forwards: make(map[string]*forward), links: make(map[string]*link),
	}
}

// Apply has the proxies be those that are wanted. One that stays keeps its connections;
// what is new about it holds for the next ones.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.applying.Lock()
	defer p.applying.Unlock()
	servers, upstreams := want.servers(), want.upstreams()
	p.setForwards(want, upstreams, false)
	p.keep(func(name string) bool {
		return slices.ContainsFunc(servers, func(w config.Proxy) bool { return w.Name == name })
	})
	// An address may go from one to another: all let go of theirs before any takes one.
	p.setLinks(want.chains())
	for _, w := range servers {
		s := p.server(w.Name)
		if s == nil {
			s = newServer(p, w.Name)
		}
		s.set(w, upstreams)
		p.mu.Lock()
		p.servers[w.Name] = s
		p.mu.Unlock()
	}
	p.setForwards(want, upstreams, true)
	var errs []error
	for _, w := range servers {
		if err := p.server(w.Name).listen(); err != nil {
			errs = append(errs, fmt.Errorf("proxy %s: %w", w.Name, err))
		}
	}
	return errors.Join(errs...)
}

// drain lets nobody new in, and waits for those who are.
func (p *Plane) drain() {
	p.mu.Lock()
	all := slices.Collect(maps.Values(p.servers))
	p.mu.Unlock()
	var waits sync.WaitGroup
	for _, s := range all {
		waits.Go(s.drain)
	}
	waits.Wait()
}

// keep closes the servers that are not to stay.
func (p *Plane) keep(stays func(name string) bool) {
	var gone []*server
	p.mu.Lock()
	for name, s := range p.servers {
		if !stays(name) {
			gone = append(gone, s)
			delete(p.servers, name)
		}
	}
	p.mu.Unlock()
	for _, s := range gone {
		s.close()
	}
}

func (p *Plane) server(name string) *server {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.servers[name]
}

// setForwards ends forwards that are not wanted as they are, or begins those that are
// missing.
func (p *Plane) setForwards(want Want, upstreams map[string]config.Upstream, begin bool) {
	wanted := make(map[string]config.Forward, len(want.Forwards))
	p.mu.Lock()
	for _, f := range want.Forwards {
		wanted[f.Name] = f
		if begin && p.forwards[f.Name] == nil {
			p.forwards[f.Name] = p.startForward(f, chainOf(f.Via, upstreams))
		}
	}
	var gone []*forward
	for name, f := range p.forwards {
		if w, is := wanted[name]; !is || !reflect.DeepEqual(w, f.Forward) || !chainOf(w.Via, upstreams).equal(f.chain) {
			gone = append(gone, f)
			delete(p.forwards, name)
		}
	}
	p.mu.Unlock()
	for _, f := range gone {
		f.close()
	}
}

// Intact reports whether all listeners are still there.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.servers {
		if !s.intact() {
			return false
		}
	}
	return true
}

// Distrust has nothing to read again.
func (*Plane) Distrust() {}

// Run has no chores.
func (*Plane) Run(ctx context.Context) { <-ctx.Done() }

// Close ends all proxies. Connections have the time that their proxy gives them to end by
// themselves.
func (p *Plane) Close() {
	p.applying.Lock()
	defer p.applying.Unlock()
	p.drain()
	p.keep(func(string) bool { return false })
	p.setForwards(Want{}, nil, false)
	p.setLinks(nil)
}

// Listening returns where a proxy listens now.
func (p *Plane) Listening(name string) []netip.AddrPort {
	p.mu.Lock()
	s := p.servers[name]
	p.mu.Unlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.listeners))
}

// isOwn reports whether an address is one at which a proxy of this host listens; or one of
// those that do not ask, to which what they send would come back.
func (p *Plane) isOwn(to target, thatDoNotAsk bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.servers {
		if (!thatDoNotAsk || !s.asks()) && s.listensAt(to) {
			return true
		}
	}
	return false
}
