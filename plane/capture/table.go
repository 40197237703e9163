package capture

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// table is the table of packets, see rules.go.
type table struct {
	entries  []entry // as the kernel has them
	services map[service.Listener]bool
	trusted  bool           // the kernel has what this says
	rules    map[string]int // how many each chain has
	seen     uint32         // the generation of the rule set at which all was there
	counted  time.Time      // when the elements of the sets were counted last
}

// countEvery is how often elements are counted, at most: there may be many of them, and
// others may change theirs all the time.
const countEvery = 10 * time.Second

// apply has the table lead what is wanted. Without an entry there is none.
func (p *table) apply(entries []entry, services map[service.Listener]bool) error {
	if p.intact(entries) {
		if err := p.update(services); err != nil {
			p.trusted = false
			return err
		}
		return nil
	}
	p.trusted = false
	if err := p.build(entries, services); err != nil {
		return fmt.Errorf("table inet %s: %w", TableName, err)
	}
	if err := setRoutes(interfacesOf(entries)); err != nil {
		return fmt.Errorf("routes of captured packets: %w", err)
	}
	p.entries, p.services, p.trusted = entries, services, true
	p.seen, p.counted = 0, time.Time{} // somebody may have been faster: it is looked at
	return nil
}

// build makes the table anew, in one transaction.
func (p *table) build(entries []entry, services map[service.Listener]bool) error {
	if len(entries) == 0 {
		return removeTable()
	}
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
func (p *table) update(services map[service.Listener]bool) error {
	var added, removed []service.Listener
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
	if len(added)+len(removed) == 0 || len(p.entries) == 0 {
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
	if err := conn.Flush(); err != nil {
		return err
	}
	p.services = services
	return nil
}

// perMessage is how many elements one message has: its length has 16 bits.
const perMessage = 500

func change(conn *nftables.Conn, t *nftables.Table, addresses []service.Listener, do func(*nftables.Set, []nftables.SetElement) error) error {
	for _, f := range service.EachFamily {
		var elements []nftables.SetElement
		for _, a := range addresses {
			if service.FamilyOf(a.Address.Addr()) == f {
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

// intact reports whether the table is there, with all its rules, and leads these. What
// was found wrong stays so until it is made anew.
func (p *table) intact(entries []entry) bool {
	p.trusted = p.trusted && reflect.DeepEqual(entries, p.entries) && (len(entries) == 0 || p.isThere()) && p.areRouted()
	return p.trusted
}

// areRouted reports whether what the table marks is delivered here.
func (p *table) areRouted() bool {
	interfaces := interfacesOf(p.entries)
	return len(interfaces) == 0 || routesIntact(interfaces)
}

// isThere looks only if somebody has changed anything in nf_tables.
func (p *table) isThere() bool {
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
	var v View
	if err := v.readTable(); err != nil || len(v.sets[setName(service.V4)])+len(v.sets[setName(service.V6)]) != len(p.services) {
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

// removeTable removes the table, whoever made it.
func removeTable() error {
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
