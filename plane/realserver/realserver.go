// Package realserver makes this host one that a director sends packets to: it has the
// VIPs, so that it takes what is for them, and tells nobody on the segment that it does.
package realserver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// Want is which VIPs this host has.
type Want struct {
	VIPs []netip.Addr
	Auto bool // also those of services that name an address of this host as a real server
	// Services are those among which they are found.
	Services *service.Snapshot
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool {
	return w.Auto == o.Auto && slices.Equal(w.VIPs, o.VIPs) && (!w.Auto || w.Services == o.Services)
}

// settings keep this host from telling others that it has addresses of its loopback: it
// answers ARP only for addresses of the interface that is asked, and asks with those
// (ip-sysctl of the kernel's documentation). IPv6 does so anyway.
var settings = []host.Setting{
	{Name: "net/ipv4/conf/all/arp_ignore", Value: 1, Least: true},
	{Name: "net/ipv4/conf/all/arp_announce", Value: 2, Least: true},
}

// settingsFile is where it stands in the run directory what they were.
const settingsFile = "realserver.json"

func settingsIn(runDir string) host.Settings {
	return host.Settings{Root: "/proc/sys", File: filepath.Join(runDir, settingsFile)}
}

// Plane is the addresses and settings of a real server.
type Plane struct {
	log    *slog.Logger
	runDir string

	mu   sync.Mutex
	want *Want
	vips []netip.Addr // of want
}

// New returns a plane that has not touched the kernel yet.
func New(runDir string, log *slog.Logger) *Plane { return &Plane{log: log, runDir: runDir} }

// vipsFor returns which VIPs are wanted, sorted, of a host with some addresses. It is pure.
func vipsFor(w Want, own map[netip.Addr]bool) []netip.Addr {
	all := slices.Clone(w.VIPs)
	if w.Auto && w.Services != nil {
		for _, s := range w.Services.Services {
			if s.Forward != service.ForwardDirect || !slices.ContainsFunc(s.Backends, func(b service.Backend) bool { return own[b.Address.Addr()] }) {
				continue
			}
			for _, l := range s.Listeners {
				all = append(all, l.Address.Addr())
			}
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// Apply makes this host have just the VIPs that are wanted.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want = nil
	// Nobody is told of an address before it is there.
	for _, x := range settings {
		was, changed, err := settingsIn(p.runDir).Set(x)
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%s: %w", x.Name, err)
		}
		if changed {
			p.log.Info("a setting is made what a real server needs; pentad down puts it back", "setting", sysctl(x.Name), "was", was, "is", x.Value)
		}
	}
	own, err := host.Addresses()
	if err != nil {
		return err
	}
	p.vips = vipsFor(want, own)
	if err := setVIPs(p.vips); err != nil {
		return err
	}
	p.want = &want
	return nil
}

// Intact reports whether the addresses and settings are what Apply made them.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == nil {
		return true // it is about to be applied
	}
	have, err1 := vipsOfHost()
	own, err2 := host.Addresses()
	if err1 != nil || err2 != nil {
		return true // it cannot be seen now
	}
	isThere := func(a netip.Addr) bool { return own[a] } // it may be somebody else's
	isWanted := func(a netip.Addr) bool { return slices.Contains(p.vips, a) }
	return every(p.vips, isThere) && every(have, isWanted) && slices.Equal(vipsFor(*p.want, own), p.vips)
}

func every(all []netip.Addr, is func(netip.Addr) bool) bool {
	return !slices.ContainsFunc(all, func(a netip.Addr) bool { return !is(a) })
}

// Warnings say which setting somebody has made something else since.
func (p *Plane) Warnings() (all []string) {
	for _, x := range settings {
		if have, err := settingsIn(p.runDir).Get(x.Name); err == nil && have < x.Value {
			all = append(all, fmt.Sprintf("real server: %s is %d, and should be %d: this host tells others on the segment that it has the VIPs; sysctl -w %s=%d",
				sysctl(x.Name), have, x.Value, sysctl(x.Name), x.Value))
		}
	}
	return all
}

func sysctl(path string) string { return strings.ReplaceAll(path, "/", ".") }

// Distrust has nothing to read again: the kernel is read each time.
func (*Plane) Distrust() {}

// Run has no chores.
func (*Plane) Run(ctx context.Context) { <-ctx.Done() }

// Close has nothing to let go of.
func (*Plane) Close() {}

// Remove takes the VIPs away and puts the settings back.
func Remove(runDir string) error { return errors.Join(setVIPs(nil), settingsIn(runDir).Restore()) }
