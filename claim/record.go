package claim

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/ipam"
)

// Record is how a block is written in a store, as JSON.
type Record struct {
	Prefixes  []netip.Prefix `json:"prefixes"` // one of a family; the first is the name
	Host      string         `json:"host"`
	Machine   string         `json:"machine,omitempty"`
	Addresses []netip.Addr   `json:"addresses,omitempty"`
	Draining  bool           `json:"draining,omitempty"`
	Epoch     uint64         `json:"epoch"`

	Incarnation string `json:"incarnation,omitempty"`
}

// RecordOf returns how a block is written.
func RecordOf(b Block) Record {
	return Record{Prefixes: b.Prefixes(), Host: b.Owner.Name, Machine: b.Owner.Machine, Addresses: b.Addresses, Draining: b.Draining, Epoch: b.Epoch, Incarnation: b.Incarnation}
}

// Key is the name of a block's object: a name that Kubernetes and etcd take.
func Key(name netip.Prefix) string {
	return strings.NewReplacer("/", "-", ":", "-", ".", "-").Replace(name.Masked().String())
}

// Decode reads a block. Where only the contents make no sense it returns the block's
// prefix all the same, with an error: nobody may have it.
func Decode(key string, value []byte) (Block, error) {
	var r Record
	if err := json.Unmarshal(value, &r); err != nil {
		return Block{}, fmt.Errorf("block %s: %w", key, err)
	}
	return r.Block(key)
}

// Block returns the block that the record says, if it is one that its key may hold.
func (r Record) Block(key string) (Block, error) {
	var b Block
	for _, p := range r.Prefixes {
		to := &b.V6
		if p.Addr().Is4() {
			to = &b.V4
		}
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || to.IsValid() {
			return Block{}, fmt.Errorf("block %s: %v are not prefixes, one of a family", key, r.Prefixes)
		}
		*to = p
	}
	if b.Block = (ipam.Block{V4: b.V4, V6: b.V6}); !b.Name().IsValid() || Key(b.Name()) != key {
		return Block{}, fmt.Errorf("block %s: its prefixes %v are not those of its name, by which it is nobody else's", key, r.Prefixes)
	}
	if r.Host == "" {
		return Block{Block: b.Block}, fmt.Errorf("block %s: it does not say whose it is; nobody takes it", key)
	}
	b.Owner, b.Draining, b.Epoch, b.Incarnation = Owner{r.Host, r.Machine}, r.Draining, r.Epoch, r.Incarnation
	for _, a := range r.Addresses {
		if !a.IsGlobalUnicast() || a.Is4In6() || a.Zone() != "" || slices.ContainsFunc(b.Addresses, func(o netip.Addr) bool { return o.Is4() == a.Is4() }) {
			return b, fmt.Errorf("block %s: %v are not addresses of a host, one of a family; nothing leads there by those", key, r.Addresses)
		}
		b.Addresses = append(b.Addresses, a)
	}
	return b, nil
}

// Add puts what a store has under a key into a table.
func (t *Table) Add(key string, b Block, err error) {
	if err != nil {
		t.Problems = append(t.Problems, err.Error())
		t.Bad[key] = true
	}
	if b.Name().IsValid() {
		t.Blocks[b.Name()] = b
	}
}

// NewTable returns an empty table.
func NewTable(fresh bool) Table {
	return Table{Blocks: make(map[netip.Prefix]Block), Bad: make(map[string]bool), Fresh: fresh}
}
