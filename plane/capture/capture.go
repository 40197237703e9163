// Package capture leads connections of programs that know of no proxy to one: by programs
// inside connect(), or by a table of nftables of its own, which translates where packets
// go or hands them to the proxy as they are.
//
// It knows nothing of proxies but where they listen. What it leads there stays led while
// the agent is dead: then it is refused, and does not go another way, unless the file
// says so.
package capture

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// Want is whose connections are to be led where.
type Want struct {
	Captures []config.Capture
	Services *service.Snapshot // what is led to them, or by them, is not captured
	Scope    string            // the cgroup of those whose processes this host serves, as the file names it
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool {
	return w.Services == o.Services && w.Scope == o.Scope && reflect.DeepEqual(w.Captures, o.Captures)
}

// planeDir is this plane's part of the pin directory.
const planeDir = "capture"

// Plane is what captures: programs in connect(), and a table of packets.
type Plane struct {
	mu       sync.Mutex
	want     Want
	programs programs
	table    table
	missing  []string // what captures name and this host has not
}

// New returns a plane that has not touched the kernel yet. pins is the directory of all
// pins, on bpffs.
func New(pins string) *Plane { return &Plane{programs: programs{dir: filepath.Join(pins, planeDir)}} }

// Apply has the kernel lead what is wanted, whatever it did before.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want = want
	entries, missing, err := resolve(want)
	if err != nil {
		return err // what there is stays
	}
	services := addressesOf(want.Services)
	inConnect, packets := split(entries)
	var errs []error
	// Whoever is captured by the other from now on is so without a moment in between: the
	// table has what is new before the programs lose anything, and loses nothing before they
	// have it.
	if !reflect.DeepEqual(inConnect, p.programs.entries) && len(packets)+len(p.table.entries) > 0 {
		errs = append(errs, p.table.apply(withOthers(packets, p.table.entries), services))
	}
	errs = append(errs, p.programs.apply(inConnect, services), p.table.apply(packets, services))
	if errors.Join(errs...) == nil {
		// What an agent before has left goes when there is something in its place.
		errs = append(errs, p.programs.prune())
	}
	p.missing = missing
	return errors.Join(errs...)
}

// withOthers returns entries and those of others that have none of their names.
func withOthers(entries, others []entry) []entry {
	all := slices.Clone(entries)
	for _, o := range others {
		if !slices.ContainsFunc(entries, func(e entry) bool { return e.Name == o.Name }) {
			all = append(all, o)
		}
	}
	return all
}

// split separates what programs in connect() do from what packets need.
func split(entries []entry) (inConnect, packets []entry) {
	for _, e := range entries {
		if e.Mode == config.CaptureEBPF {
			inConnect = append(inConnect, e)
		} else {
			packets = append(packets, e)
		}
	}
	return inConnect, packets
}

// resolve finds out what the names in captures stand for. What is not there captures
// nothing; an error says that it is not known whether it is.
func resolve(want Want) (entries []entry, missing []string, err error) {
	for _, c := range want.Captures {
		e, err := resolveOne(c, want.Scope)
		switch {
		case err == nil:
			entries = append(entries, e)
			if e.Interface != "" && !isInterface(e.Interface) {
				missing = append(missing, fmt.Sprintf("capture %s: there is no interface %s; nothing is captured until there is", c.Name, e.Interface))
			}
		case isMissing(err):
			missing = append(missing, fmt.Sprintf("capture %s: nothing is captured: %v", c.Name, err))
		default:
			return nil, nil, fmt.Errorf("capture %s: %w", c.Name, err)
		}
	}
	return entries, missing, nil
}

// errNamespace says that the kernel would look for a cgroup in the wrong place.
var errNamespace = errors.New("the agent has a cgroup namespace of its own, in which the kernel looks for cgroups; it has to run in that of the host")

func isMissing(err error) bool {
	var noUser user.UnknownUserError
	var noGroup user.UnknownGroupError
	return errors.Is(err, errNamespace) || errors.Is(err, host.ErrCgroup) || errors.Is(err, fs.ErrNotExist) ||
		errors.As(err, &noUser) || errors.As(err, &noGroup)
}

func isInterface(name string) bool {
	_, err := net.InterfaceByName(name)
	return err == nil
}

// ownCgroups reports whether this process has another view of cgroups than the first one
// of the host, as far as it can be seen.
func ownCgroups() bool {
	own, err1 := os.Readlink("/proc/self/ns/cgroup")
	first, err2 := os.Readlink("/proc/1/ns/cgroup")
	return err1 == nil && err2 == nil && own != first
}

func resolveOne(c config.Capture, scope string) (e entry, err error) {
	e.Capture = c
	cgroup := c.Cgroup
	if c.Mode == config.CaptureEBPF {
		cgroup = cmp.Or(cgroup, scope, "/")
	}
	if cgroup != "" {
		if c.Mode != config.CaptureEBPF && ownCgroups() {
			return e, errNamespace
		}
		if e.cgroup, err = placeOf(cgroup); err != nil {
			return e, err
		}
		e.level = uint32(strings.Count(cgroup, "/"))
	}
	if e.asking, err = cgroupOfProxy(c, scope); err != nil {
		return e, err
	}
	if c.User != "" {
		if e.user, err = c.UserID(); err != nil {
			return e, err
		}
		e.hasUser = true
	}
	if c.Group != "" {
		if e.group, err = c.GroupID(); err != nil {
			return e, err
		}
		e.hasGroup = true
	}
	return e, nil
}

// addressesOf returns the listeners and backends of services.
func addressesOf(s *service.Snapshot) map[service.Listener]bool {
	all := make(map[service.Listener]bool)
	if s == nil {
		return all
	}
	for _, x := range s.Services {
		for _, l := range x.Listeners {
			all[service.Listener{Address: l.Address, Protocol: l.Protocol}] = true
			for _, b := range x.Backends {
				all[service.Listener{Address: b.Address, Protocol: l.Protocol}] = true
			}
		}
	}
	return all
}

// cgroupOfProxy returns the cgroup of the program that asks where a connection wanted to
// go: of a proxy of this file the agent's own, else all that this host serves.
func cgroupOfProxy(c config.Capture, scope string) (place, error) {
	if c.Mode != config.CaptureEBPF {
		return place{}, nil
	}
	if c.Proxy == "" {
		return placeOf(cmp.Or(scope, "/"))
	}
	own, err := host.CgroupOf(os.Getpid())
	if err != nil {
		return place{}, err
	}
	return placeOf(own)
}

func placeOf(cgroup string) (p place, err error) {
	if p.path, err = host.CgroupPath(cgroup); err != nil {
		return p, err
	}
	p.id, err = host.CgroupID(p.path)
	return p, err
}

// Intact reports whether the kernel has what Apply made, and what it is about is still
// the same.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	entries, _, err := resolve(p.want)
	if err != nil {
		return true // it cannot be seen now
	}
	inConnect, packets := split(entries)
	// Both are looked at: what was found wrong is made anew, whatever is looked at next.
	programs, table := p.programs.intact(inConnect), p.table.intact(packets)
	return programs && table
}

// Distrust has the next Apply make everything anew.
func (p *Plane) Distrust() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.programs.trusted, p.table.trusted = false, false
}

// Run has no chores.
func (*Plane) Run(ctx context.Context) { <-ctx.Done() }

// Close has nothing to let go of.
func (*Plane) Close() {}

// Warnings says what captures name and this host has not.
func (p *Plane) Warnings() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.missing
}

// Remove takes out all that captures, whoever made it.
func Remove(pins string) error {
	return errors.Join(removePrograms(filepath.Join(pins, planeDir)), removeTable(), setRoutes(nil))
}
