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
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool { return reflect.DeepEqual(w, o) }

// Plane is the proxies of this host.
type Plane struct {
	log     *slog.Logger
	flows   *table
	resolve resolver

	mu      sync.Mutex
	servers map[string]*server
}

// New returns a plane without a proxy.
func New(log *slog.Logger) *Plane {
	return &Plane{log: log, flows: newTable(), resolve: systemResolver, servers: make(map[string]*server)}
}

// Apply has the proxies be those that are wanted. One that stays keeps its connections;
// what is new about it holds for the next ones.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, s := range p.servers {
		if !slices.ContainsFunc(want.Proxies, func(w config.Proxy) bool { return w.Name == name }) {
			s.close()
			delete(p.servers, name)
		}
	}
	// An address may go from one to another: all let go of theirs before any takes one.
	for _, w := range want.Proxies {
		s := p.servers[w.Name]
		if s == nil {
			s = newServer(p, w.Name)
			p.servers[w.Name] = s
		}
		s.set(w, want.Upstreams)
	}
	var errs []error
	for _, w := range want.Proxies {
		if err := p.servers[w.Name].listen(); err != nil {
			errs = append(errs, fmt.Errorf("proxy %s: %w", w.Name, err))
		}
	}
	return errors.Join(errs...)
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

// Close ends all proxies and their connections.
func (p *Plane) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, s := range p.servers {
		s.close()
		delete(p.servers, name)
	}
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

// isOwn reports whether an address is one at which a proxy of this host listens: what
// goes there would come back.
func (p *Plane) isOwn(to target) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.servers {
		if s.listensAt(to) {
			return true
		}
	}
	return false
}
