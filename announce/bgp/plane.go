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
	"strings"
	"sync"
	"time"

	"github.com/pentad/pentad/announce"
	"github.com/pentad/pentad/announce/bfd"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/vishvananda/netlink"
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
	id       netip.Addr   // the router ID: once it is chosen it stays
	watch    *bfd.Speaker // nil: no peer is watched
	endWatch func()
	unseen   error                              // why peers are not watched
	trouble  error                              // what has gone wrong since the last Apply
	withdrew time.Time                          // when everything was taken back
	hops     map[netip.Addr]map[bool]netip.Addr // of each peer, as it was told last

	tasks sync.WaitGroup
}

// New returns a plane that tells nobody anything yet.
func New(log *slog.Logger) *Plane {
	return &Plane{log: log, speakers: make(map[netip.Addr]*speaker), hops: make(map[netip.Addr]map[bool]netip.Addr)}
}

// refresh is how often addresses and routes of this host are looked at, by which peers
// are told where to send packets.
const refresh = 5 * time.Second

// Apply tells the peers that are wanted what is wanted, and no one else. The error names
// those that cannot be told.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want, p.trouble = want, nil
	if p.isWithdrawn() {
		return announce.ErrWithdrawn
	}
	p.withdrew = time.Time{}
	return p.apply()
}

func (p *Plane) isWithdrawn() bool { return time.Since(p.withdrew) < announce.WithdrawnFor }

func (p *Plane) apply() error {
	c := p.want.Config
	if c.RouterID.IsValid() || !p.id.IsValid() {
		id, err := routerID(c)
		if err != nil {
			return err
		}
		p.id = id
	}
	var errs []error
	wanted := make(map[netip.Addr]bool)
	for _, peer := range c.Peers {
		wanted[peer.Address] = true
		errs = append(errs, p.tell(peer))
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
func (p *Plane) tell(peer config.Peer) error {
	c := p.want.Config
	s := settings{
		id: p.id, as: c.AS, address: peer.Address, peerAS: peer.AS, port: peer.Port, source: peer.Source, hold: peer.Hold,
		multihop: peer.Multihop, ttlSecurity: peer.TTLSecurity, keep: c.Keep,
	}
	if c.Keep {
		s.restart = c.RestartTime
	}
	there := p.speakers[peer.Address]
	password, failed := passwordOf(peer)
	if failed != nil && there == nil {
		return failed
	}
	// A session that there is goes on without its file: what it says has to stay true.
	if s.password = password; failed != nil {
		s.password = there.settings.password
	}
	hops, err := nextHops(peer, p.hops[peer.Address], p.isVIP)
	p.hops[peer.Address] = hops
	if err != nil {
		failed = errors.Join(failed, fmt.Errorf("peer %s: %w", peer.Address, err))
	}
	routes := p.routesFor(peer, hops)
	if there != nil && !there.isFor(s, peer.Retry) {
		there.close(false)
		delete(p.speakers, peer.Address)
		there = nil
	}
	if there == nil {
		there, err = newSpeaker(s, peer.Retry, p.log, routes)
		if err == nil {
			p.speakers[peer.Address] = there
		}
	} else {
		err = there.setRoutes(routes)
	}
	if err != nil {
		failed = errors.Join(failed, fmt.Errorf("peer %s: %w", peer.Address, err))
	}
	return failed
}

func passwordOf(peer config.Peer) (string, error) {
	if peer.PasswordFile == "" {
		return "", nil
	}
	password, err := host.ReadPassword(peer.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("peer %s: %w", peer.Address, err)
	}
	if len(password) > mostPassword {
		return "", fmt.Errorf("peer %s: its password has %d bytes; TCP MD5 takes %d", peer.Address, len(password), mostPassword)
	}
	return password, nil
}

// routesFor returns what a peer is told, as far as it can be told where to send packets.
func (p *Plane) routesFor(peer config.Peer, hops map[bool]netip.Addr) map[netip.Prefix]route {
	c := p.want.Config
	attributes := peer.Attributes.Over(c.Attributes)
	routes := make(map[netip.Prefix]route)
	for _, prefix := range announce.Prefixes(announce.Told(p.want.VIPs, peer.Services), c.Aggregates) {
		if hop, ok := hops[prefix.Addr().Is4()]; ok {
			routes[prefix] = route{hop, attributes}
		}
	}
	return routes
}

// watchPeers has BFD watch the peers that want it.
func (p *Plane) watchPeers() (err error) {
	wanted := make(map[bfd.Neighbor]bfd.Settings)
	for _, peer := range p.want.Config.Peers {
		if peer.BFD != (config.BFD{}) {
			wanted[bfd.Neighbor{Address: peer.Address, Source: peer.Source}] = bfd.Settings(peer.BFD)
		}
	}
	if len(wanted) == 0 {
		p.stopWatching()
		return nil
	}
	if p.watch == nil {
		if p.watch, err = bfd.NewSpeaker(p.log, p.onBFD); err != nil {
			return err
		}
		ctx, stop := context.WithCancel(context.Background())
		p.endWatch = stop
		watch := p.watch
		p.tasks.Go(func() { p.runBFD(ctx, watch) })
	}
	p.watch.Set(wanted)
	return nil
}

// stopWatching ends BFD, and gives its port back.
func (p *Plane) stopWatching() {
	if p.watch != nil {
		p.endWatch()
		p.watch, p.unseen = nil, nil
	}
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
// by itself, but not what was withdrawn by a `pentad down` that did not come to its end.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.withdrew.IsZero() || p.isWithdrawn()
}

// Distrust has nothing to read again.
func (p *Plane) Distrust() {}

// Run follows the addresses of this host until the context ends. Then it takes leave:
// first of routers, as the configuration says, and then of their BFD, which would have them
// drop everything at once.
func (p *Plane) Run(ctx context.Context) {
	tick := time.NewTicker(refresh)
	defer tick.Stop()
	changes := make(chan netlink.AddrUpdate, 64)
	done := make(chan struct{})
	defer close(done)
	// Without news the ticker has to do.
	_ = netlink.AddrSubscribeWithOptions(changes, done, netlink.AddrSubscribeOptions{ErrorCallback: func(error) {}})
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case _, ok := <-changes:
			if !ok {
				changes = nil
				continue
			}
			for len(changes) > 0 {
				<-changes
			}
			p.followAddresses()
		case <-tick.C:
			p.followAddresses()
			p.askWhy(ctx)
		}
	}
	p.mu.Lock()
	keep := p.want.Config.Keep
	p.mu.Unlock()
	p.end(keep)
	p.mu.Lock()
	p.stopWatching()
	p.mu.Unlock()
	p.tasks.Wait()
}

func (p *Plane) followAddresses() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.speakers) > 0 && !p.isWithdrawn() {
		p.trouble = p.apply()
	}
}

// askWhy asks each peer without a session for the reason.
func (p *Plane) askWhy(ctx context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.speakers {
		p.tasks.Go(func() { s.askWhy(ctx) })
	}
}

// runBFD speaks BFD until the context ends, and tries again when it cannot.
func (p *Plane) runBFD(ctx context.Context, watch *bfd.Speaker) {
	defer watch.Close()
	for ctx.Err() == nil {
		p.mu.Lock()
		if p.watch == watch {
			p.unseen = nil // it is tried again
		}
		p.mu.Unlock()
		err := watch.Run(ctx)
		p.mu.Lock()
		if p.watch == watch {
			p.unseen = err
		}
		p.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(refresh):
		}
	}
}

// Withdraw takes everything back from all peers, whatever the configuration says of the
// end of the agent, which is near.
func (p *Plane) Withdraw() { p.end(false) }

// Close has nothing left to do: Run has taken leave.
func (p *Plane) Close() {}

// farewell is how long routes carry the community GRACEFUL_SHUTDOWN before they go, so
// that routers that know it (RFC 8326) have another way by then.
const farewell = 500 * time.Millisecond

func (p *Plane) end(keep bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.withdrew = time.Now()
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
		for _, is4 := range []bool{true, false} {
			if problem := r.familyProblem(is4); problem != "" && p.hasVIPs(is4) {
				all = append(all, fmt.Sprintf("peer %s is not told of all VIPs: %s", r.Address, problem))
			}
		}
		switch {
		case r.BFD == nil:
		case r.BFD.Err != nil:
			all = append(all, fmt.Sprintf("peer %s is not watched: %v", r.Address, r.BFD.Err))
		case r.BFD.State != bfd.Up && r.State == Established && time.Since(r.Since) > r.Hold && time.Since(r.BFD.Since) > r.Hold:
			all = append(all, fmt.Sprintf("peer %s is not watched: its BFD is not heard; activate it there for this host", r.Address))
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.trouble != nil {
		all = append(all, strings.Split(p.trouble.Error(), "\n")...)
	}
	if p.unseen != nil {
		all = append(all, "peers are not watched: "+p.unseen.Error())
	}
	return all
}

// isVIP reports whether an address is one of those that are announced: other hosts may
// have it, too. The caller holds the lock.
func (p *Plane) isVIP(a netip.Addr) bool {
	_, found := slices.BinarySearchFunc(p.want.VIPs, a, func(v announce.VIP, a netip.Addr) int { return v.Address.Compare(a) })
	return found
}

// hasVIPs reports whether there is anything of a family to be told.
func (p *Plane) hasVIPs(is4 bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.want.VIPs, func(v announce.VIP) bool { return v.Address.Is4() == is4 })
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
		r := Report{State: Idle}
		if s := p.speakers[peer.Address]; s != nil {
			r = s.report()
		}
		r.Address, r.AS, r.Hold, r.Services, r.NoHop = peer.Address, peer.AS, peer.Hold, peer.Services, make(map[bool]bool)
		if w, ok := watched[peer.Address]; ok {
			r.BFD = &w
		}
		for _, is4 := range []bool{true, false} {
			_, has := p.hops[peer.Address][is4]
			r.NoHop[is4] = !has
		}
		all = append(all, r)
	}
	return all
}
