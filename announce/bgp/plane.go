// Package bgp tells routers by BGP (RFC 4271) which VIPs are here. It only announces: no
// route of a router is taken, and nobody can connect to it.
//
// Each peer has a speaker of its own (gobgp's server, with routes of its own), so that one
// that refuses, or is configured anew, is nobody else's business. A peer that BFD gives up
// has its session reset.
package bgp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/pentad/pentad/announce"
	"github.com/pentad/pentad/announce/bfd"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
)

// Want is who is to be told of what.
type Want struct {
	Config config.BGP
	VIPs   []announce.VIP
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool {
	return reflect.DeepEqual(w, o)
}

// Plane is the speakers of this host.
type Plane struct {
	log *slog.Logger

	mu       sync.Mutex
	want     Want
	speakers map[netip.Addr]*speaker
	watch    *bfd.Speaker // nil: no peer is watched
	wake     chan struct{}
	unseen   error // why peers are not watched
	over     bool  // everything was taken back, for good
}

// New returns a plane that tells nobody anything yet.
func New(log *slog.Logger) *Plane {
	return &Plane{log: log, speakers: make(map[netip.Addr]*speaker), wake: make(chan struct{}, 1)}
}

// refresh is how often addresses and routes of this host are looked at, by which peers
// are told where to send packets.
const refresh = 5 * time.Second

// Apply tells the peers that are wanted what is wanted, and no one else. The error names
// those that cannot be told.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want = want
	if p.over {
		return nil
	}
	return p.apply()
}

func (p *Plane) apply() error {
	c := p.want.Config
	id, err := routerID(c)
	if err != nil {
		return err
	}
	var errs []error
	wanted := make(map[netip.Addr]bool)
	for _, peer := range c.Peers {
		wanted[peer.Address] = true
		errs = append(errs, p.tell(id, peer))
	}
	for a, s := range p.speakers {
		if !wanted[a] {
			s.close(false)
			delete(p.speakers, a)
		}
	}
	errs = append(errs, p.watchPeers())
	return errors.Join(errs...)
}

// mostPassword is TCP_MD5SIG_MAXKEYLEN of the kernel.
const mostPassword = 80

// tell has a peer know what it is to know.
func (p *Plane) tell(id netip.Addr, peer config.Peer) error {
	c := p.want.Config
	s := settings{id: id, as: c.AS, peer: peer, keep: c.Keep, restart: c.RestartTime}
	if peer.PasswordFile != "" {
		password, err := host.ReadPassword(peer.PasswordFile)
		if err != nil {
			return fmt.Errorf("peer %s: %w", peer.Address, err)
		}
		if len(password) > mostPassword {
			return fmt.Errorf("peer %s: its password has %d bytes; TCP MD5 takes %d", peer.Address, len(password), mostPassword)
		}
		s.password = password
	}
	hops, err := nextHops(peer)
	if err != nil && len(hops) == 0 {
		// What there is stays: the way to it may come back.
		return fmt.Errorf("peer %s: %w", peer.Address, err)
	}
	attributes := peer.Attributes.Over(c.Attributes)
	attributes.Communities, attributes.LargeCommunities = slices.Clone(attributes.Communities), slices.Clone(attributes.LargeCommunities)
	routes := make(map[netip.Prefix]route)
	for _, prefix := range announce.Prefixes(announce.Told(p.want.VIPs, peer.Services), c.Aggregates) {
		if hop, ok := hops[prefix.Addr().Is4()]; ok {
			routes[prefix] = route{hop, attributes}
		}
	}
	there := p.speakers[peer.Address]
	if there != nil && !there.isFor(s) {
		there.close(false)
		delete(p.speakers, peer.Address)
		there = nil
	}
	if there == nil {
		if there, err = newSpeaker(s, p.log, routes); err != nil {
			return fmt.Errorf("peer %s: %w", peer.Address, err)
		}
		p.speakers[peer.Address] = there
		return nil
	}
	if err := there.setRoutes(routes); err != nil {
		return fmt.Errorf("peer %s: %w", peer.Address, err)
	}
	return nil
}

// watchPeers has BFD watch the peers that want it.
func (p *Plane) watchPeers() (err error) {
	wanted := make(map[bfd.Neighbor]bfd.Settings)
	for _, peer := range p.want.Config.Peers {
		if peer.BFD != (config.BFD{}) {
			wanted[bfd.Neighbor{Address: peer.Address, Source: peer.Source}] = bfd.Settings(peer.BFD)
		}
	}
	if len(wanted) == 0 && p.watch == nil {
		return nil
	}
	if p.watch == nil {
		if p.watch, err = bfd.NewSpeaker(p.log, p.onBFD); err != nil {
			return err
		}
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
	p.watch.Set(wanted)
	return nil
}

// onBFD is called by the thread of BFD.
func (p *Plane) onBFD(e bfd.Event) {
	// Who was taken down on purpose is not gone (RFC 5882, section 4.2).
	if e.Up || e.OnPurpose {
		return
	}
	// Not from the thread that has packets to send.
	go func() {
		p.mu.Lock()
		s := p.speakers[e.Neighbor.Address]
		p.mu.Unlock()
		if s != nil {
			s.reset(e.Why.String())
		}
	}()
}

// Intact reports whether there is nothing to put back: what a speaker loses it gets back
// by itself.
func (p *Plane) Intact() bool { return true }

// Distrust has nothing to read again.
func (p *Plane) Distrust() {}

// Run watches peers, and follows the addresses of this host.
func (p *Plane) Run(ctx context.Context) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	tick := time.NewTicker(refresh)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
			tasks.Go(func() { p.runBFD(ctx) })
		case <-tick.C:
			p.followAddresses()
			p.askWhy(ctx, &tasks)
		}
	}
}

func (p *Plane) followAddresses() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.speakers) > 0 && !p.over {
		// What fails is said by the next Apply, and what there is stays.
		_ = p.apply()
	}
}

// askWhy asks each peer without a session for the reason.
func (p *Plane) askWhy(ctx context.Context, tasks *sync.WaitGroup) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.speakers {
		tasks.Go(func() { s.askWhy(ctx) })
	}
}

// runBFD speaks BFD until the context ends, and tries again when it cannot.
func (p *Plane) runBFD(ctx context.Context) {
	p.mu.Lock()
	watch := p.watch
	p.mu.Unlock()
	for ctx.Err() == nil {
		err := watch.Run(ctx)
		p.mu.Lock()
		p.unseen = err
		p.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(refresh):
		}
	}
}

// Withdraw takes everything back from all peers for good, whatever the configuration says
// of the end of the agent.
func (p *Plane) Withdraw() { p.end(false) }

// Close ends the speakers, as the configuration says.
func (p *Plane) Close() {
	p.end(p.want.Config.Keep)
	if p.watch != nil {
		p.watch.Close()
	}
}

// farewell is how long routes carry the community GRACEFUL_SHUTDOWN before they go, so
// that routers that know it (RFC 8326) have another way by then.
const farewell = 500 * time.Millisecond

func (p *Plane) end(keep bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	if !keep {
		said := false
		for _, s := range p.speakers {
			said = s.sayFarewell() || said
		}
		if said {
			time.Sleep(farewell)
		}
	}
	var all sync.WaitGroup
	for _, s := range p.speakers {
		all.Go(func() { s.close(keep) })
	}
	all.Wait()
	clear(p.speakers)
}

// Warnings says which peers are not told, and why.
func (p *Plane) Warnings() (all []string) {
	for _, r := range p.Reports() {
		if r.State != Established && time.Since(r.Since) > r.Hold {
			all = append(all, fmt.Sprintf("peer %s is told nothing: %s", r.Address, r.Words()))
		}
		for _, f := range r.Untold {
			all = append(all, fmt.Sprintf("peer %s is not told of %s VIPs: this host has no %s address on its segment; give it one, or write nextHop", r.Address, f, f))
		}
		if r.BFD != nil && r.BFD.Err != nil {
			all = append(all, fmt.Sprintf("peer %s is not watched: %v", r.Address, r.BFD.Err))
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unseen != nil {
		all = append(all, "peers are not watched: "+p.unseen.Error())
	}
	return all
}

// Reports says how every peer is, in the order of the file.
func (p *Plane) Reports() (all []Report) {
	p.mu.Lock()
	defer p.mu.Unlock()
	watched := make(map[netip.Addr]bfd.Report)
	if p.watch != nil {
		for _, r := range p.watch.Reports() {
			watched[r.Neighbor.Address] = r
		}
	}
	for _, peer := range p.want.Config.Peers {
		s := p.speakers[peer.Address]
		if s == nil {
			all = append(all, Report{Address: peer.Address, AS: peer.AS, State: Idle})
			continue
		}
		r := s.report()
		r.Services = peer.Services
		if w, ok := watched[peer.Address]; ok {
			r.BFD = &w
		}
		hops, _ := nextHops(peer)
		for f, name := range map[bool]string{true: "IPv4", false: "IPv6"} {
			_, has := hops[f]
			if !has && slices.ContainsFunc(p.want.VIPs, func(v announce.VIP) bool { return v.Address.Is4() == f }) {
				r.Untold = append(r.Untold, name)
			}
		}
		all = append(all, r)
	}
	return all
}
