// Package capture leads connections of programs that know of no proxy to one: by a table
// of nftables of its own, which translates where their first packet goes.
//
// It knows nothing of proxies but where they listen. What it leads there stays led while
// the agent is dead: then it is refused, and does not go another way.
package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/user"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// Want is whose connections are to be led where.
type Want struct {
	Captures []config.Capture
	Services *service.Snapshot // what is led to them, or by them, is not captured
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool {
	return w.Services == o.Services && reflect.DeepEqual(w.Captures, o.Captures)
}

// Plane is the table.
type Plane struct {
	log *slog.Logger

	mu       sync.Mutex
	captures []config.Capture
	entries  []entry // as the table has them
	services map[netip.AddrPort]bool
	trusted  bool           // the table is what this says
	rules    map[string]int // how many each chain has
	seen     uint32         // the generation of the rule set at which all was there
	counted  time.Time      // when the elements of the sets were counted last
	missing  []string       // what captures name and this host has not
}

// countEvery is how often elements are counted, at most: there may be many of them, and
// others may change theirs all the time.
const countEvery = 10 * time.Second

// New returns a plane that has not touched the kernel yet.
func New(log *slog.Logger) *Plane { return &Plane{log: log} }

// Apply has the table lead what is wanted, whatever it was before.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.captures = want.Captures
	entries, missing, err := resolve(want.Captures)
	if err != nil {
		return err // what there is stays
	}
	services := addressesOf(want.Services)
	if p.trusted && reflect.DeepEqual(entries, p.entries) && p.intact() {
		if err := p.update(services); err != nil {
			p.trusted = false
			return err
		}
		p.services, p.missing = services, missing
		return nil
	}
	p.trusted = false
	if err := p.build(entries, services); err != nil {
		return fmt.Errorf("table inet %s: %w", TableName, err)
	}
	p.entries, p.services, p.missing, p.trusted = entries, services, missing, true
	p.seen, p.counted = 0, time.Time{} // somebody may have been faster: it is looked at
	return nil
}

// resolve finds out what the names in captures stand for. What is not there captures
// nothing; an error says that it is not known whether it is.
func resolve(captures []config.Capture) (entries []entry, missing []string, err error) {
	for _, c := range captures {
		e, err := resolveOne(c)
		switch {
		case err == nil:
			entries = append(entries, e)
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

// ownCgroups reports whether this process has another view of cgroups than the first one
// of the host, as far as it can be seen.
func ownCgroups() bool {
	own, err1 := os.Readlink("/proc/self/ns/cgroup")
	first, err2 := os.Readlink("/proc/1/ns/cgroup")
	return err1 == nil && err2 == nil && own != first
}

func resolveOne(c config.Capture) (e entry, err error) {
	e.Capture = c
	if c.Cgroup != "" {
		if ownCgroups() {
			return e, errNamespace
		}
		path, err := host.CgroupPath(c.Cgroup)
		if err != nil {
			return e, err
		}
		if e.cgroup, err = host.CgroupID(path); err != nil {
			return e, err
		}
		e.level = uint32(strings.Count(c.Cgroup, "/"))
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

// addressesOf returns the listeners and backends of services, of TCP.
func addressesOf(s *service.Snapshot) map[netip.AddrPort]bool {
	all := make(map[netip.AddrPort]bool)
	if s == nil {
		return all
	}
	for _, x := range s.Services {
		isTCP := false
		for _, l := range x.Listeners {
			if l.Protocol == service.TCP {
				all[l.Address] = true
				isTCP = true
			}
		}
		for _, b := range x.Backends {
			if isTCP {
				all[b.Address] = true
			}
		}
	}
	return all
}

// build makes the table anew, in one transaction.
func (p *Plane) build(entries []entry, services map[netip.AddrPort]bool) error {
	conn, err := nft.Dial()
	if err != nil {
		return err
	}
	defer func() { _ = conn.CloseLasting() }()
	t := &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}
	conn.AddTable(t) // so that it can be removed
	conn.DelTable(t)
	conn.AddTable(t)
	for _, f := range service.EachFamily {
		if err := conn.AddSet(setOf(t, f), nil); err != nil {
			return err
		}
	}
	all := chains(t, entries)
	p.rules = make(map[string]int)
	for _, c := range all {
		conn.AddChain(c.def)
		p.rules[c.def.Name] = len(c.rules)
	}
	for _, c := range all {
		for _, r := range c.rules {
			conn.AddRule(&nftables.Rule{Table: t, Chain: c.def, Exprs: r})
		}
	}
	if err := change(conn, t, slices.Collect(maps.Keys(services)), conn.SetAddElements); err != nil {
		return err
	}
	return conn.Flush()
}

// update makes the sets of addresses what they should be.
func (p *Plane) update(services map[netip.AddrPort]bool) error {
	var added, removed []netip.AddrPort
	for a := range services {
		if !p.services[a] {
			added = append(added, a)
		}
	}
	for a := range p.services {
		if !services[a] {
			removed = append(removed, a)
		}
	}
	if len(added)+len(removed) == 0 {
		return nil
	}
	conn, err := nft.Dial()
	if err != nil {
		return err
	}
	defer func() { _ = conn.CloseLasting() }()
	t := &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}
	if err := errors.Join(change(conn, t, removed, conn.SetDeleteElements), change(conn, t, added, conn.SetAddElements)); err != nil {
		return err
	}
	return conn.Flush()
}

// perMessage is how many elements one message has: its length has 16 bits.
const perMessage = 500

func change(conn *nftables.Conn, t *nftables.Table, addresses []netip.AddrPort, do func(*nftables.Set, []nftables.SetElement) error) error {
	for _, f := range service.EachFamily {
		var elements []nftables.SetElement
		for _, a := range addresses {
			if service.FamilyOf(a.Addr()) == f {
				elements = append(elements, element(a))
			}
		}
		for some := range slices.Chunk(elements, perMessage) {
			if err := do(setOf(t, f), some); err != nil {
				return err
			}
		}
	}
	return nil
}

// Intact reports whether the table is what Apply made, and what it is about is still the
// same.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	entries, _, err := resolve(p.captures)
	if err != nil {
		return true // it cannot be seen now
	}
	// What was found wrong is made anew, whatever is looked at next.
	p.trusted = p.trusted && reflect.DeepEqual(entries, p.entries) && p.intact()
	return p.trusted
}

// intact reports whether the table is there, with all its rules. It looks only if
// somebody has changed anything in nf_tables.
func (p *Plane) intact() bool {
	now, err := nft.Generation()
	if err != nil || now == p.seen {
		return err == nil
	}
	have, err := counts()
	if err != nil || !maps.Equal(have, p.rules) {
		return false
	}
	if time.Since(p.counted) < countEvery {
		return true // it is looked at again
	}
	p.counted = time.Now()
	v, err := Read()
	if err != nil || len(v.sets[setName(service.V4)])+len(v.sets[setName(service.V6)]) != len(p.services) {
		return false
	}
	p.seen = now
	return true
}

// counts returns how many rules each chain of the table has.
func counts() (map[string]int, error) {
	conn, err := nft.Dial()
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.CloseLasting() }()
	all, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	have := make(map[string]int)
	for _, c := range all {
		if c.Table.Name != TableName {
			continue
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return nil, err
		}
		have[c.Name] = len(rules)
	}
	return have, nil
}

// Distrust has the next Apply make the table anew.
func (p *Plane) Distrust() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trusted = false
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

// Remove removes the table, whoever made it.
func Remove() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // a kernel without nf_tables has no tables
	}
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.Name == TableName {
			conn.DelTable(t)
			return conn.Flush()
		}
	}
	return nil
}
