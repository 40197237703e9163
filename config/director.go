package config

import (
	"net/netip"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// Director is where packets to services with forward: direct arrive.
type Director struct {
	Interfaces []string // none: this host directs nothing
}

var directorSchema = schema[Director]{what: "director", fields: []field[Director]{
	{
		key: "interfaces", kind: "list of names", required: true, doc: "Where packets to VIPs arrive, and real servers are reached.",
		set: func(d *decoder, n *yaml.Node, to *Director) { to.Interfaces = d.interfaces(n, "a director") },
	},
	word("mode", "How it sees packets. `tc`: by tcx, right for every kind of interface. `auto`: the best that works here, which is `tc`.", []string{"auto", "tc"}, func(*Director, int) {}).or("auto"),
}}

// interfaces reads the interfaces of something that needs at least one.
func (d *decoder) interfaces(n *yaml.Node, what string) (names []string) {
	d.list(n, "a list of interfaces, such as [eth0]", func(e *yaml.Node) {
		if v, ok := d.text(e, "the name of an interface"); ok {
			names = append(names, v)
		}
	})
	if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		d.errorf(n, "%s needs at least one interface", what)
	}
	return names
}

// RealServer is which VIPs this host has for directors that send it packets.
type RealServer struct {
	VIPs []netip.Addr
	Auto bool // those of services with forward: direct that name an address of this host
}

// Wanted reports whether this host is one.
func (r RealServer) Wanted() bool { return r.Auto || len(r.VIPs) > 0 }

var realServerSchema = schema[RealServer]{what: "realServer", fields: []field[RealServer]{
	{
		key: "vips", kind: "list of addresses, or auto", required: true,
		doc: "The VIPs that this host has, without telling anybody on its segments. `auto`: those of services with `forward: direct` of which it is a backend.",
		set: func(d *decoder, n *yaml.Node, to *RealServer) {
			if n.Kind == yaml.ScalarNode && n.Value == "auto" {
				to.Auto = true
				return
			}
			d.list(n, "auto, or a list of addresses, such as [203.0.113.10]", func(e *yaml.Node) {
				v, ok := d.text(e, "an address, such as 203.0.113.10")
				if !ok {
					return
				}
				a, err := netip.ParseAddr(v)
				if err != nil || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Zone() != "" || a.Is4In6() {
					d.errorf(e, "want an address of a VIP, such as 203.0.113.10, found %q", shorten(v))
					return
				}
				to.VIPs = append(to.VIPs, a)
			})
		},
	},
}}

// checkDirected finds services that nobody directs, and backends that cannot be directed
// to.
func (d *decoder) checkDirected(s *service.Service) {
	if s.Forward != service.ForwardDirect {
		return
	}
	for i, b := range s.Backends {
		if b.Address.IsValid() && b.Address.Port() != 0 {
			d.errorf(d.at[s].backendNodes[i], "service %s: backend %s has a port; with \"forward: direct\" packets go on as they are, to the port of the listener: write %s", s.Name, b.Address, b.Address.Addr())
		}
	}
}

// needsDirector finds services that no director sends on.
func (d *decoder) needsDirector(c *Config) {
	if len(c.Director.Interfaces) > 0 || c.RealServer.Wanted() {
		return
	}
	for _, s := range c.Services {
		if at := d.at[s]; s.Forward == service.ForwardDirect && at != nil {
			d.errorf(at.name, "service %s: \"forward: direct\" needs the section \"director\", with the interfaces where packets arrive, or \"realServer\"", s.Name)
			return
		}
	}
}
