package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/claim"
	claimetcd "github.com/pentad/pentad/claim/etcd"
	claimkube "github.com/pentad/pentad/claim/kube"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/source/etcd"
	"github.com/pentad/pentad/source/kube"
)

// claims claims blocks of addresses for the pods of this host, in the store that the file
// names. Its methods may be called from several goroutines, but follow from one.
type claims struct {
	log    *slog.Logger
	runDir string
	emit   func(context.Context, claim.View)

	config *config.Config // that is followed; nil: none
	errand

	mu  sync.Mutex
	run *claim.Run // nil: not connected
	err error      // why not
}

// follow claims as is configured from now on, until the context ends.
func (c *claims) follow(ctx context.Context, next *config.Config) {
	if !next.Pods.Claimed() {
		next = nil
	}
	if !c.differs(next) {
		return
	}
	c.close()
	c.config = next
	if next == nil {
		return
	}
	c.begin(ctx, func(ctx context.Context) { c.do(ctx, next) })
}

// differs reports whether another configuration claims otherwise: what is known of blocks
// is of no use then.
func (c *claims) differs(next *config.Config) bool {
	if next != nil && !next.Pods.Claimed() {
		next = nil
	}
	return !sameClaims(next, c.config)
}

// sameClaims reports whether both claim the same in the same store.
func sameClaims(a, b *config.Config) bool {
	if a == nil || b == nil {
		return a == b
	}
	x, y := a.Pods, b.Pods
	return slices.Equal(x.Ranges, y.Ranges) && x.BlockSize == y.BlockSize && slices.Equal(x.Addresses, y.Addresses) &&
		sameSource(a.Source.Kubernetes, b.Source.Kubernetes) && a.Source.Etcd.Equal(b.Source.Etcd) && a.Host.Name == b.Host.Name
}

// close claims nothing any more. What this host has it keeps.
func (c *claims) close() {
	if c.end() {
		c.config = nil
		c.note(nil, nil)
	}
}

func (c *claims) note(r *claim.Run, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.run, c.err = r, err
}

// do claims until the context ends.
func (c *claims) do(ctx context.Context, k *config.Config) {
	untilConnected(ctx, func() (func(context.Context), error) {
		r, closeStore, err := c.connect(ctx, k)
		c.note(r, err)
		return func(ctx context.Context) {
			r.Do(ctx)
			closeStore()
		}, err
	}, func(err error) {
		c.log.Error("blocks of addresses cannot be claimed; it is tried again until they can", "error", err)
	})
}

// connect returns who claims, and what ends its connection.
func (c *claims) connect(ctx context.Context, k *config.Config) (r *claim.Run, end func(), err error) {
	r = &claim.Run{Emit: c.emit, Log: c.log, Room: func(own []claim.Block) (map[netip.Prefix]claim.Room, []netip.Addr, error) { return room(c.runDir, own) }}
	r.Holder.Pools = k.Pods.Pools()
	r.Holder.Self.Machine = claim.MachineID()
	if r.Holder.Incarnation, err = incarnation(c.runDir); err != nil {
		return nil, nil, err
	}
	asked := k.Pods.Addresses
	end = func() {}
	switch {
	case k.Source.Kubernetes != nil:
		node, err := c.connectCluster(ctx, k.Source.Kubernetes, r)
		if err != nil {
			return nil, nil, err
		}
		r.Holder.Preferred = node.PodCIDRs
		if node.MachineID != "" {
			// As the controller knows it; this process may have a root of its own.
			r.Holder.Self.Machine = claim.HashMachineID(node.MachineID)
		}
		if len(asked) == 0 {
			asked = node.Addresses
		}
	default:
		if r.Holder.Self.Name, err = fleetName(k.Host); err != nil {
			return nil, nil, err
		}
		client, err := etcd.Connect(ctx, k.Source.Etcd)
		if err != nil {
			return nil, nil, err
		}
		end = func() { _ = client.Close() } // it is gone either way
		r.Store = claimetcd.New(client, k.Source.Etcd)
	}
	r.Addresses = func() []netip.Addr { return ownAddresses(asked, k.Pods.Ranges) }
	return r, end, nil
}

// connectCluster has blocks claimed in a cluster, and asks what it says of this node.
func (c *claims) connectCluster(ctx context.Context, k *config.Kubernetes, r *claim.Run) (node claimkube.Node, err error) {
	if r.Holder.Self.Name, err = nodeName(k); err != nil {
		return node, err
	}
	rest, err := kube.Connect(k.Kubeconfig)
	if err != nil {
		return node, err
	}
	store, err := claimkube.New(rest)
	if err != nil {
		return node, fmt.Errorf("source.kubernetes: %w", err)
	}
	r.Store = store
	ctx, stop := context.WithTimeout(ctx, nodePatience)
	defer stop()
	if node, err = store.Node(ctx, r.Holder.Self.Name); err != nil {
		return node, fmt.Errorf("the Node %s of this host: %w", r.Holder.Self.Name, err)
	}
	return node, nil
}

// nodePatience is how long the API server is waited for.
const nodePatience = 10 * time.Second

// incarnation returns a word for this start of the host: the run directory is empty after
// the next.
func incarnation(runDir string) (string, error) {
	path := filepath.Join(runDir, "incarnation")
	b, err := os.ReadFile(path)
	if err == nil && len(b) > 0 {
		return string(b), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	word := rand.Text()
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return "", err
	}
	return word, os.WriteFile(path, []byte(word), 0o644)
}

// fleetName returns the name of this host.
func fleetName(h config.Host) (string, error) {
	if h.Name != "" {
		return h.Name, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("the name of this host is not known; set host.name: %w", err)
	}
	return name, nil
}

// ownAddresses returns the addresses by which other hosts reach this one, one of a family:
// those that were asked for and that it has, else the ones from which it reaches others.
func ownAddresses(asked []netip.Addr, pods []netip.Prefix) (all []netip.Addr) {
	has, err := host.Addresses()
	if err != nil {
		return nil
	}
	for _, a := range asked {
		if has[a] {
			all = append(all, a)
		}
	}
	if len(all) > 0 {
		return all
	}
	for _, far := range []string{"192.0.2.1", "2001:db8::1"} {
		// Nothing is sent: the kernel says how it would be.
		routes, err := netlink.RouteGet(netip.MustParseAddr(far).AsSlice())
		if err != nil || len(routes) == 0 {
			continue
		}
		if a, ok := netip.AddrFromSlice(routes[0].Src); ok && a.Unmap().IsGlobalUnicast() {
			all = append(all, a.Unmap())
		}
	}
	if len(all) > 0 {
		return all
	}
	return lowestOfEach(has, pods)
}

// lowestOfEach returns the lowest address of each family that is none of a pod: that of a
// host which leads nowhere but to its neighbours.
func lowestOfEach(has map[netip.Addr]bool, pods []netip.Prefix) (all []netip.Addr) {
	var of [2]netip.Addr
	for a := range has {
		if !a.IsGlobalUnicast() || slices.ContainsFunc(pods, func(p netip.Prefix) bool { return p.Contains(a) }) {
			continue
		}
		f := 0
		if a.Is6() {
			f = 1
		}
		if !of[f].IsValid() || a.Less(of[f]) {
			of[f] = a
		}
	}
	for _, a := range of {
		if a.IsValid() {
			all = append(all, a)
		}
	}
	return all
}

// Blocks implements api.Agent.
func (a *Agent) Blocks() ([]api.Block, error) {
	a.mu.Lock()
	k := a.known
	a.mu.Unlock()
	if k.config == nil || !k.config.Pods.Claimed() {
		return nil, errors.New("this host claims no blocks: its file has no section \"pods\" with ranges alone")
	}
	all := []api.Block{}
	if k.blocks == nil {
		_, _, why := a.claims.state()
		return nil, fmt.Errorf("blocks are not known yet: %w", why)
	}
	rooms, _, err := room(a.opts.RunDir, claim.Table{Blocks: byName(k.blocks.Blocks)}.Of(k.blocks.Self))
	if err != nil {
		return nil, err
	}
	for _, b := range k.blocks.Blocks {
		x := api.Block{Prefixes: b.Prefixes(), Host: b.Owner.Name, Machine: b.Owner.Machine, Addresses: b.Addresses, Draining: b.Draining, Own: b.Owner == k.blocks.Self}
		if x.Own {
			used := rooms[b.Name()].Used
			x.Used = &used
		}
		all = append(all, x)
	}
	return all, nil
}

// ReleaseBlock implements api.Agent.
func (a *Agent) ReleaseBlock(ctx context.Context, r api.ReleaseRequest) (api.Block, error) {
	a.claims.mu.Lock()
	run := a.claims.run
	a.claims.mu.Unlock()
	if run == nil {
		return api.Block{}, fmt.Errorf("%w: this host claims no blocks, or is not connected to where they lie", api.ErrRefused)
	}
	b, err := run.Free(ctx, r.Block)
	switch {
	case errors.Is(err, claim.ErrNone):
		return api.Block{}, fmt.Errorf("%w: %s: %w", api.ErrNotFound, r.Block, err)
	case errors.Is(err, claim.ErrOwn), errors.Is(err, claim.ErrChanged):
		return api.Block{}, fmt.Errorf("%w: %s: %w", api.ErrRefused, r.Block, err)
	}
	return api.Block{Prefixes: b.Prefixes(), Host: b.Owner.Name, Machine: b.Owner.Machine, Addresses: b.Addresses, Draining: b.Draining}, err
}

func byName(all []claim.Block) map[netip.Prefix]claim.Block {
	m := make(map[netip.Prefix]claim.Block, len(all))
	for _, b := range all {
		m[b.Name()] = b
	}
	return m
}

// state tells whether there is a connection, since when the store has not answered, and
// why.
func (c *claims) state() (connected bool, since time.Time, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.run == nil {
		return false, time.Time{}, c.err
	}
	since, why = c.run.Away()
	return true, since, why
}

// addBlocks puts the state of blocks into a status; the caller holds mu.
func (a *Agent) addBlocks(s *api.Status) {
	k := a.known
	if k.config == nil || !k.config.Pods.Claimed() {
		return
	}
	_, since, why := a.claims.state()
	s.Blocks = &api.Blocks{Away: since}
	if why != nil {
		s.Blocks.Why = why.Error()
	}
	if k.blocks != nil && errors.Is(why, claim.ErrCopied) {
		s.Problems = append(s.Problems, why.Error())
	}
	if k.blocks == nil {
		problem := "no block of addresses is known yet, so that no pod can be added"
		if why != nil {
			problem += ": " + why.Error()
		}
		s.Problems = append(s.Problems, problem)
		return
	}
	for _, b := range k.blocks.Blocks {
		s.Blocks.All++
		if b.Owner == k.blocks.Self {
			s.Blocks.Own = append(s.Blocks.Own, b.Name())
		}
		if b.Owner.Name == k.blocks.Self.Name && b.Owner != k.blocks.Self {
			s.Warnings = append(s.Warnings, fmt.Sprintf("the block %s is that of another machine of the name %s; if that one is gone for good: pentad pod release %s --force", b.Name(), b.Owner.Name, b.Name()))
		}
	}
	s.Warnings = append(s.Warnings, k.blocks.Odd...)
	if k.blocks.Problem != "" {
		s.Problems = append(s.Problems, k.blocks.Problem)
	}
	s.Warnings = append(s.Warnings, unreachable(k)...)
}

// unreachable names hosts to whose pods nothing leads.
func unreachable(k *known) (warnings []string) {
	w, ok := wantPods(k)
	if !ok || w.Config.Overlay == config.OverlayNone {
		return nil
	}
	reached := make(map[string]bool)
	for _, h := range w.Config.Hosts {
		reached[h.Name] = true
	}
	var missing []string
	for _, b := range k.blocks.Blocks {
		if name := hostName(b.Owner); b.Owner.Name != "" && !reached[name] && !slices.Contains(missing, b.Owner.Name) {
			missing = append(missing, b.Owner.Name)
		}
	}
	if len(missing) > 0 {
		warnings = append(warnings, "nothing leads to the pods of these hosts, which have no address of the family of the tunnels: "+strings.Join(missing, ", "))
	}
	return warnings
}
