package config

import (
	"net/netip"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/ipam"
)

// Pods is the network of this host's pods. The zero value is none.
type Pods struct {
	Blocks     []netip.Prefix // of this host alone
	Ranges     []netip.Prefix // of the pods of all hosts; none: the blocks
	Hosts      []PodHost      // that have blocks, this one among them; in place of Blocks
	BlockSize  int            // bits of the prefix of a block of IPv4 that is claimed
	Addresses  []netip.Addr   // by which other hosts reach this one; none: they are found
	Overlay    Overlay
	Masquerade bool // what goes to other addresses has that of the host
	MTU        int  // 0: the lowest of the interfaces that lead elsewhere
}

// PodHost is a host that has pods.
type PodHost struct {
	Name      string
	Addresses []netip.Addr // one of each family at most; tunnels go to the first
	Blocks    []netip.Prefix
}

// Overlay is how packets get from pods of one host to those of another.
type Overlay uint8

// The ways between hosts.
const (
	OverlayNone   Overlay = iota // somebody else sees to it
	OverlayDirect                // by routes: hosts are on one segment
	OverlayVXLAN                 // in UDP
)

var overlays = []string{"none", "direct", "vxlan"}

// Wanted reports whether there are any.
func (p Pods) Wanted() bool { return len(p.Blocks)+len(p.Hosts)+len(p.Ranges) > 0 }

// Claimed reports whether this host claims its blocks of the ranges, in a store that it
// shares with others.
func (p Pods) Claimed() bool { return p.Wanted() && len(p.Blocks)+len(p.Hosts) == 0 }

// Pools returns the ranges as they are cut into blocks: the n-th of both families go
// together.
func (p Pods) Pools() (pools []ipam.BlockPool) {
	var v4, v6 []netip.Prefix
	for _, r := range p.Ranges {
		if r.Addr().Is4() {
			v4 = append(v4, r.Masked())
		} else {
			v6 = append(v6, r.Masked())
		}
	}
	for i := range max(len(v4), len(v6)) {
		pool := ipam.BlockPool{HostBits: 32 - p.BlockSize}
		if i < len(v4) {
			pool.V4 = v4[i]
		}
		if i < len(v6) {
			pool.V6 = v6[i]
		}
		pools = append(pools, pool)
	}
	return pools
}

// All returns the blocks of all hosts.
func (p Pods) All() []netip.Prefix {
	all := slices.Clone(p.Blocks)
	for _, h := range p.Hosts {
		all = append(all, h.Blocks...)
	}
	return all
}

// Equal reports whether both are the same.
func (p Pods) Equal(o Pods) bool {
	sameHost := func(a, b PodHost) bool {
		return a.Name == b.Name && slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Blocks, b.Blocks)
	}
	return slices.EqualFunc(p.Hosts, o.Hosts, sameHost) && p.Overlay == o.Overlay && slices.Equal(p.Blocks, o.Blocks) && slices.Equal(p.Ranges, o.Ranges) && p.BlockSize == o.BlockSize && slices.Equal(p.Addresses, o.Addresses) && p.Masquerade == o.Masquerade && p.MTU == o.MTU
}

// Sizes of blocks that hosts claim.
const (
	leastBlock   = 16
	defaultBlock = 26
	mostBlock    = 30
)

// The least MTU is that of IPv6 (RFC 8200, section 5).
const (
	leastMTU = 1280
	mostMTU  = 65535
)

var podsSchema = schema[Pods]{what: "pods", fields: []field[Pods]{
	word("mode", "How pods are connected. `routed`: each has a device of its own, and addresses that this host routes to it.", []string{"routed"}, func(*Pods, int) {}).or("routed"),
	{
		key: "blocks", kind: "list of prefixes",
		doc: "The addresses that this host gives to its pods, and nobody else does: IPv4, IPv6, or both, of which the n-th of each go together. The first address of a block stays free. In its place there may be `hosts`.",
		set: func(d *decoder, n *yaml.Node, to *Pods) { to.Blocks = d.prefixes(n) },
	},
	mappings("hosts", "list of hosts", "All hosts that have pods, this one among them, each with its blocks: the same list on all of them.", &podHostSchema, (*decoder).podHosts),
	word("overlay", "How packets get to the pods of other `hosts`. `none`: somebody else sees to it. `direct`: by routes, for hosts on one segment. `vxlan`: in UDP (RFC 7348), port 8472, over whatever is between them.",
		overlays, func(to *Pods, i int) { to.Overlay = Overlay(i) }).or("none"),
	prefixes("ranges", "The addresses of the pods of all hosts. What goes to others is masqueraded, and what nobody has is unreachable at once. Without it the blocks. "+
		"Without `blocks` and `hosts` this host claims blocks of them, in the cluster or the etcd of `source`: nobody else has an address of those.", func(to *Pods, v []netip.Prefix) { to.Ranges = v }),
	number("blockSize", "bits", "How long the prefix of a block of IPv4 is that hosts claim; one of IPv6 has as many addresses. The same on all hosts.",
		leastBlock, mostBlock, func(to *Pods, v int) { to.BlockSize = v }).or(strconv.Itoa(defaultBlock)),
	{
		key: "addresses", kind: "list of addresses",
		doc: "By which other hosts reach this one, one a family, where blocks are claimed. Without it those that its Node has, else those of the interface by which the default route leads.",
		set: func(d *decoder, n *yaml.Node, to *Pods) { to.Addresses = d.oneOfEachFamily(n) },
	},
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
	if at == nil {
		return
	}
	switch {
	case len(p.Blocks) > 0 && len(p.Hosts) > 0:
		d.errorf(at, "pods has one of the keys \"blocks\", of this host, and \"hosts\", of all")
	case !p.Wanted():
		d.errorf(at, "pods needs one of the keys \"blocks\", of this host, \"hosts\", of all, and \"ranges\", of which hosts claim blocks")
	case p.Claimed() && c.Source.Kubernetes == nil && c.Source.Etcd == nil:
		d.errorf(at, "pods: blocks of the ranges are claimed in a cluster or an etcd that hosts share, and the key \"source\" has none; a host without has \"blocks\" or \"hosts\"")
	}
	if p.Overlay != OverlayNone && len(p.Blocks) > 0 {
		d.errorf(at, "pods: \"overlay: %s\" needs the key \"hosts\", or blocks that are claimed: to whom?", overlays[p.Overlay])
	}
	if len(p.Addresses) > 0 && !p.Claimed() {
		d.errorf(at, "pods: \"addresses\" are of hosts that claim their blocks; others have them in \"hosts\" or need none")
	}
	if p.Claimed() {
		d.checkRanges(p, at)
	}
	for _, h := range p.Hosts {
		if p.Overlay == OverlayVXLAN && h.Addresses[0].Is4() != p.Hosts[0].Addresses[0].Is4() {
			d.errorf(at, "pods: tunnels go to the first address of each host, and those of %s and %s are of different families", p.Hosts[0].Name, h.Name)
		}
		for _, b := range h.Blocks {
			if p.Overlay == OverlayDirect && !slices.ContainsFunc(h.Addresses, func(a netip.Addr) bool { return a.Is4() == b.Addr().Is4() }) {
				d.errorf(at, "pods: with \"overlay: direct\" host %s needs an address of the family of its block %s", h.Name, b)
			}
		}
	}
	all := p.All()
	for i, b := range all {
		if free := b.Addr().BitLen() - b.Bits(); free < 1 || free > 16 && b.Addr().Is4() {
			d.errorf(at, "pods: the block %s has to have two addresses at least, and 65,536 at most", b)
		}
		if a := b.Addr(); a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.IsUnspecified() {
			d.errorf(at, "pods: the block %s is not one of addresses for hosts", b)
		}
		for _, h := range p.Hosts {
			if slices.ContainsFunc(h.Addresses, b.Contains) {
				d.errorf(at, "pods: the block %s has the address of host %s", b, h.Name)
			}
		}
		for _, o := range all[:i] {
			if o.Overlaps(b) {
				d.errorf(at, "pods: the blocks %s and %s overlap: an address would be given twice", o, b)
			}
		}
		if len(p.Ranges) > 0 && !slices.ContainsFunc(p.Ranges, func(r netip.Prefix) bool { return r.Bits() <= b.Bits() && r.Contains(b.Addr()) }) {
			d.errorf(at, "pods: the block %s is in none of the ranges", b)
		}
	}
}

// checkRanges finds ranges that cannot be cut into blocks.
func (d *decoder) checkRanges(p Pods, at *yaml.Node) {
	for i, r := range p.Ranges {
		if size := r.Addr().BitLen() - (32 - p.BlockSize); r.Bits() > size {
			d.errorf(at, "pods: the range %s is smaller than one block, which is a /%d of it", r, size)
		}
		if a := r.Addr(); a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.IsUnspecified() {
			d.errorf(at, "pods: the range %s is not one of addresses for hosts", r)
		}
		for _, o := range p.Ranges[:i] {
			if o.Overlaps(r) {
				d.errorf(at, "pods: the ranges %s and %s overlap: an address would be given twice", o, r)
			}
		}
	}
}

// oneOfEachFamily reads addresses of a host.
func (d *decoder) oneOfEachFamily(n *yaml.Node) (all []netip.Addr) {
	d.list(n, "a list of addresses, such as [198.51.100.11]", func(e *yaml.Node) {
		a := d.hostAddress(e, "198.51.100.11")
		if a.IsValid() && slices.ContainsFunc(all, func(o netip.Addr) bool { return o.Is4() == a.Is4() }) {
			d.errorf(e, "it has an address of this family already; one is enough")
		} else if a.IsValid() {
			all = append(all, a)
		}
	})
	return all
}

var podHostSchema = schema[PodHost]{what: "a host", fields: []field[PodHost]{
	nameField(func(to *PodHost, v string) { to.Name = v }, "node-1"),
	{
		key: "addresses", kind: "list of addresses", required: true, doc: "By which other hosts reach it, one a family. Tunnels go to the first.",
		set: func(d *decoder, n *yaml.Node, to *PodHost) {
			to.Addresses = d.oneOfEachFamily(n)
		},
	},
	{
		key: "blocks", kind: "list of prefixes", required: true, doc: "The addresses that it gives to its pods.",
		set: func(d *decoder, n *yaml.Node, to *PodHost) { to.Blocks = d.prefixes(n) },
	},
}}

func (d *decoder) podHosts(n *yaml.Node, to *Pods) {
	d.list(n, "a list of hosts", func(e *yaml.Node) {
		var h PodHost
		podHostSchema.decode(d, e, &h)
		if len(h.Addresses) == 0 || h.Name == "" {
			return // it is said already
		}
		for _, o := range to.Hosts {
			if o.Name == h.Name {
				d.errorf(e, "host %s stands there twice", h.Name)
			}
			if slices.ContainsFunc(o.Addresses, func(a netip.Addr) bool { return slices.Contains(h.Addresses, a) }) {
				d.errorf(e, "hosts %s and %s have the same address", o.Name, h.Name)
			}
		}
		to.Hosts = append(to.Hosts, h)
	})
}
