package config

import (
	"net/netip"
	"slices"

	"go.yaml.in/yaml/v4"
)

// Pods is the network of this host's pods. The zero value is none.
type Pods struct {
	Blocks     []netip.Prefix // of this host alone
	Ranges     []netip.Prefix // of the pods of all hosts; none: the blocks
	Masquerade bool           // what goes to other addresses has that of the host
	MTU        int            // 0: the lowest of the interfaces that lead elsewhere
}

// Wanted reports whether there are any.
func (p Pods) Wanted() bool { return len(p.Blocks) > 0 }

// Equal reports whether both are the same.
func (p Pods) Equal(o Pods) bool {
	return slices.Equal(p.Blocks, o.Blocks) && slices.Equal(p.Ranges, o.Ranges) && p.Masquerade == o.Masquerade && p.MTU == o.MTU
}

// The least MTU is that of IPv6 (RFC 8200, section 5).
const (
	leastMTU = 1280
	mostMTU  = 65535
)

var podsSchema = schema[Pods]{what: "pods", fields: []field[Pods]{
	word("mode", "How pods are connected. `routed`: each has a device of its own, and addresses that this host routes to it.", []string{"routed"}, func(*Pods, int) {}).or("routed"),
	{
		key: "blocks", kind: "list of prefixes", required: true,
		doc: "The addresses that this host gives to its pods, and nobody else does: IPv4, IPv6, or both, of which the n-th of each go together. The first address of a block stays free.",
		set: func(d *decoder, n *yaml.Node, to *Pods) { to.Blocks = d.prefixes(n) },
	},
	prefixes("ranges", "The addresses of the pods of all hosts. What goes to others is masqueraded, and what nobody has is unreachable at once. Without it the blocks.", func(to *Pods, v []netip.Prefix) { to.Ranges = v }),
	truth("masquerade", "What pods send to addresses outside `ranges` has the address of this host.", func(to *Pods, v bool) { to.Masquerade = v }).or("true"),
	{
		key: "mtu", kind: "bytes or auto", doc: "Of pods' devices. `auto`: the lowest of this host's interfaces that lead elsewhere.",
		set: func(d *decoder, n *yaml.Node, to *Pods) {
			if n.Kind == yaml.ScalarNode && n.Value == "auto" {
				return
			}
			to.MTU, _ = d.integer(n, leastMTU, mostMTU)
		},
	},
}}

// checkPods finds blocks that cannot be.
func (d *decoder) checkPods(c *Config, at *yaml.Node) {
	p := c.Pods
	if at == nil || !p.Wanted() {
		return
	}
	for i, b := range p.Blocks {
		if free := b.Addr().BitLen() - b.Bits(); free < 1 || free > 16 && b.Addr().Is4() {
			d.errorf(at, "pods: the block %s has to have two addresses at least, and 65,536 at most", b)
		}
		for _, o := range p.Blocks[:i] {
			if o.Overlaps(b) {
				d.errorf(at, "pods: the blocks %s and %s overlap: an address would be given twice", o, b)
			}
		}
		if len(p.Ranges) > 0 && !slices.ContainsFunc(p.Ranges, func(r netip.Prefix) bool { return r.Bits() <= b.Bits() && r.Contains(b.Addr()) }) {
			d.errorf(at, "pods: the block %s is in none of the ranges", b)
		}
	}
}
