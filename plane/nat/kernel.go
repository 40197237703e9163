package nat

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// kernel is one conversation with nf_tables.
type kernel struct {
	conn  *nftables.Conn
	table *nftables.Table
	sets  map[set]*nftables.Set
}

func dial() (*kernel, error) {
	conn, err := nft.Dial()
	if err != nil {
		return nil, err
	}
	k := &kernel{conn: conn, table: &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}}
	k.sets = make(map[set]*nftables.Set)
	for _, s := range allSets() {
		k.sets[s] = s.definition(k.table)
	}
	return k, nil
}

// close ends the conversation; there is nothing to be done about an error.
func (k *kernel) close() { _ = k.conn.CloseLasting() }

// found is a table that is there.
type found struct {
	sound  bool     // this layout, and nothing is missing
	chains []string // of backends
}

// inspect looks at the table without its elements; nil when there is none.
func (k *kernel) inspect() (*found, error) {
	tables, err := k.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // a kernel without nf_tables has no tables
	}
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName }) {
		return nil, nil
	}
	chains, err := k.conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	f := &found{sound: true}
	there := make(map[string]*nftables.Chain)
	for _, c := range chains {
		if c.Table.Name == TableName {
			there[c.Name] = c
		}
	}
	for _, c := range fixedChains(k.table) {
		f.sound = f.sound && k.whole(there[c.chain.Name], len(c.rules))
		delete(there, c.chain.Name)
	}
	for name, c := range there {
		f.chains = append(f.chains, name)
		f.sound = f.sound && k.whole(c, rulesIn(name))
	}
	sets, err := k.conn.GetSets(k.table)
	if err != nil {
		return nil, err
	}
	names := make(map[string]bool, len(sets))
	for _, s := range sets {
		names[s.Name] = true
	}
	for s := range k.sets {
		f.sound = f.sound && names[s.String()]
	}
	return f, nil
}

// whole reports whether a chain is there with as many rules as it should have.
func (k *kernel) whole(c *nftables.Chain, rules int) bool {
	if c == nil {
		return false
	}
	have, err := k.conn.GetRules(k.table, c)
	return err == nil && len(have) == rules
}

// rulesIn returns how many rules a chain of backends has, by its name.
func rulesIn(name string) int {
	switch {
	case strings.HasPrefix(name, rawMark):
		count, _, _ := strings.Cut(strings.TrimPrefix(name, rawMark), "-")
		n, err := strconv.Atoi(count)
		if err != nil {
			return -1 // not this plane's
		}
		return n
	case strings.HasPrefix(name, "stick"):
		return 2
	}
	n := 3
	if strings.Contains(name, affinityMark) {
		n += 2
	}
	if strings.HasSuffix(name, guardedMark) {
		n++
	}
	return n
}

// create makes the table with nothing in it, and replace the same in place of
// what is there, as soon as the rest of the transaction is.
func (k *kernel) create() error {
	k.build()
	return k.conn.Flush()
}

func (k *kernel) replace() {
	k.conn.DelTable(k.table)
	k.build()
}

func (k *kernel) build() {
	k.conn.AddTable(k.table)
	for _, s := range allSets() {
		// What it can complain about depends on the definition alone.
		_ = k.conn.AddSet(k.sets[s], nil)
	}
	for _, c := range fixedChains(k.table) {
		k.addRules(c.chain, c.rules)
	}
}

func (k *kernel) addRules(c *nftables.Chain, rules [][]expr.Any) {
	k.conn.AddChain(c)
	for _, r := range rules {
		k.conn.AddRule(&nftables.Rule{Table: k.table, Chain: c, Exprs: r})
	}
}

func (k *kernel) addChain(c chain) {
	k.addRules(c.definition(k.table), c.rules())
}

func (k *kernel) emptyChain(name string) {
	k.conn.FlushChain(&nftables.Chain{Table: k.table, Name: name})
}

func (k *kernel) removeChain(name string) {
	k.conn.DelChain(&nftables.Chain{Table: k.table, Name: name})
}

// The list of elements of a message is one attribute, whose length has sixteen bits
// (netlink(7)). A message has elements of so many bytes at most, and each has so many
// besides its key, data and comment: the headers of its attributes.
const (
	perMessage = 40_000
	perElement = 96
)

func (k *kernel) add(all []element) error { return k.each(all, k.conn.SetAddElements) }

func (k *kernel) remove(all []element) error { return k.each(all, k.conn.SetDeleteElements) }

// each calls do for the elements of each set, in parts that fit into a message.
func (k *kernel) each(all []element, do func(*nftables.Set, []nftables.SetElement) error) error {
	bySet := make(map[set][]element)
	for _, e := range all {
		bySet[e.in] = append(bySet[e.in], e)
	}
	var errs []error
	for _, s := range allSets() {
		for rest := bySet[s]; len(rest) > 0; {
			n, size := 0, 0
			for n < len(rest) && (n == 0 || size+rest[n].size() <= perMessage) {
				size += rest[n].size()
				n++
			}
			encoded := make([]nftables.SetElement, 0, n)
			for _, e := range rest[:n] {
				encoded = append(encoded, e.encode()...)
			}
			errs = append(errs, do(k.sets[s], encoded))
			rest = rest[n:]
		}
	}
	return errors.Join(errs...)
}

// size is at most how many bytes of a message an element takes; an interval is two.
func (e element) size() int { return 2*(perElement+len(e.key)) + len(e.data) + len(e.note) }

// encode returns an element as messages have it: an interval of a plain set is
// two, one of a concatenation has two keys.
func (e element) encode() []nftables.SetElement {
	key := []byte(e.key)
	switch e.in.name {
	case setServices, setPodsTo:
		return []nftables.SetElement{{Key: key, VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: e.data}, Comment: e.note}}
	case setSlots, setChoices, setMembers:
		return []nftables.SetElement{{Key: key, Val: []byte(e.data)}}
	case setSources:
		half := len(key) / 2
		return []nftables.SetElement{{Key: key[:half], KeyEnd: key[half:]}}
	case setPods, setReserved, setUntracked:
		half := len(key) / 2
		all := []nftables.SetElement{{Key: key[:half]}}
		if end, ok := after(key[half:]); ok {
			all = append(all, nftables.SetElement{Key: end, IntervalEnd: true})
		}
		return all
	}
	return []nftables.SetElement{{Key: key}}
}

// after returns the next address, and false after the last one.
func after(address []byte) ([]byte, bool) {
	next := slices.Clone(address)
	for i := len(next) - 1; i >= 0; i-- {
		next[i]++
		if next[i] != 0 {
			return next, true
		}
	}
	return nil, false
}

// before returns the address before one that is not the first.
func before(address []byte) []byte {
	last := slices.Clone(address)
	for i := len(last) - 1; i >= 0; i-- {
		last[i]--
		if last[i] != 0xff {
			break
		}
	}
	return last
}

// elements reads what follows from snapshots.
func (k *kernel) elements() ([]element, error) {
	var all []element
	for _, s := range allSets() {
		if s.name == setAffinity || s.name == setTracked || s.name == setWaning {
			continue
		}
		have, err := k.conn.GetSetElements(k.sets[s])
		if err != nil {
			return nil, fmt.Errorf("set %s: %w", s, err)
		}
		all = append(all, decode(s, have)...)
	}
	return all, nil
}

// of reads the sets of that name.
func (k *kernel) of(name setName) ([]element, error) {
	var all []element
	for _, family := range service.EachFamily {
		s := set{name, family}
		have, err := k.conn.GetSetElements(k.sets[s])
		if err != nil {
			return nil, fmt.Errorf("set %s: %w", s, err)
		}
		all = append(all, decode(s, have)...)
	}
	return all, nil
}

func decode(s set, have []nftables.SetElement) []element {
	if s.name == setPods || s.name == setReserved || s.name == setUntracked {
		return decodeIntervals(s, have)
	}
	all := make([]element, 0, len(have))
	for _, h := range have {
		e := element{in: s, key: string(h.Key) + string(h.KeyEnd), data: string(h.Val)}
		if s.name == setServices || s.name == setPodsTo {
			e.data, e.note = verdictChain(h.Val), h.Comment
		}
		all = append(all, e)
	}
	return all
}

// verdictChain returns where a verdict leads; the library leaves its attributes as
// they are.
func verdictChain(raw []byte) string {
	attributes, err := netlink.UnmarshalAttributes(raw)
	if err != nil {
		return ""
	}
	for _, a := range attributes {
		if a.Type == unix.NFTA_VERDICT_CHAIN {
			return strings.TrimRight(string(a.Data), "\x00")
		}
	}
	return ""
}

// decodeIntervals puts the ends of intervals to their beginnings.
func decodeIntervals(s set, have []nftables.SetElement) []element {
	slices.SortFunc(have, func(a, b nftables.SetElement) int { return slices.Compare(a.Key, b.Key) })
	var all []element
	for i, h := range have {
		if h.IntervalEnd {
			continue
		}
		last := slices.Repeat([]byte{0xff}, len(h.Key))
		if i+1 < len(have) {
			last = before(have[i+1].Key)
		}
		all = append(all, element{in: s, key: string(h.Key) + string(last)})
	}
	return all
}
