package config

import (
	"net/netip"
	"slices"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// Forward leads connections to one target: those to a local address, as ssh -L does, or
// those to an address of the last SSH server of its way, as ssh -R does.
type Forward struct {
	Name   string
	Listen netip.AddrPort // not valid: Remote
	Remote string         // HOST:PORT at the server
	To     string         // HOST:PORT, as the last upstream sees it; of Remote as this host does
	Via    []string
}

var forwardSchema = schema[Forward]{what: "a forward", fields: []field[Forward]{
	nameField(func(to *Forward, v string) { to.Name = v }, "db"),
	{
		key: "listen", kind: "ADDRESS:PORT", doc: "Where it listens on this host, as `ssh -L` does. It is one of the loopback.",
		set: func(d *decoder, n *yaml.Node, to *Forward) {
			to.Listen = d.ownAddress(n, "127.0.0.1:13306")
			if to.Listen.IsValid() && !to.Listen.Addr().IsLoopback() {
				d.errorf(n, "a forward listens at the loopback, such as 127.0.0.1:%d: others could reach %s", to.Listen.Port(), to.Listen)
			}
		},
	},
	{
		key: "remote", kind: "HOST:PORT", doc: "In place of `listen`: where the last upstream, an SSH server, listens for us, as `ssh -R` has it.",
		set: func(d *decoder, n *yaml.Node, to *Forward) { to.Remote = d.hostPort(n, "127.0.0.1:8080") },
	},
	{
		key: "to", kind: "HOST:PORT", required: true, doc: "The target, as the last upstream sees it; with `remote` as this host does.",
		set: func(d *decoder, n *yaml.Node, to *Forward) { to.To = d.hostPort(n, "10.0.0.5:3306") },
	},
	{
		key: "via", kind: "name, or list of names", required: true, doc: "The upstreams that it goes through, the nearest first.",
		set: func(d *decoder, n *yaml.Node, to *Forward) { to.Via = d.via(n) },
	},
}}

func (d *decoder) forwards(n *yaml.Node, to *Config) {
	d.list(n, "a list of forwards", func(e *yaml.Node) {
		var f Forward
		seen := forwardSchema.decode(d, e, &f)
		if seen == nil {
			return
		}
		if slices.ContainsFunc(to.Forwards, func(o Forward) bool { return o.Name == f.Name && f.Name != "" }) {
			d.errorf(seen["name"], "forward %s is already defined; names are unique", f.Name)
		}
		if (seen["listen"] == nil) == (seen["remote"] == nil) {
			d.errorf(e, "forward %s: want one of the keys \"listen\" and \"remote\"", f.Name)
		}
		for _, o := range to.Forwards {
			if o.Listen.IsValid() && o.Listen == f.Listen {
				d.errorf(seen["listen"], "forward %s: %s is where forward %s listens", f.Name, f.Listen, o.Name)
			}
		}
		to.Forwards = append(to.Forwards, f)
		d.forwardNodes = append(d.forwardNodes, e)
	})
}

// checkForwards sees to it that every forward has a way, and no name or address of a
// proxy.
func (d *decoder) checkForwards(c *Config) {
	for i, f := range c.Forwards {
		n := d.forwardNodes[i]
		for _, p := range c.Proxies {
			if p.Name == f.Name {
				d.errorf(n, "forward %s: there is a proxy of that name", f.Name)
			}
			if f.Listen.IsValid() && slices.Contains(p.Listen, f.Listen) {
				d.errorf(n, "forward %s: %s is where proxy %s listens", f.Name, f.Listen, p.Name)
			}
		}
		var names []string
		last := Fixed
		for _, u := range c.Upstreams {
			names = append(names, u.Name)
			if len(f.Via) > 0 && u.Name == f.Via[len(f.Via)-1] {
				last = u.Protocol
			}
		}
		for _, name := range f.Via {
			if !slices.Contains(names, name) && (name != Direct || f.Remote != "") {
				d.errorf(n, "forward %s: there is no upstream %q%s", f.Name, shorten(name), service.Nearest(name, names))
			}
		}
		if f.Remote != "" && last != SSH && last != Fixed {
			d.errorf(n, "forward %s: only an SSH server can listen for us, and the last upstream is none", f.Name)
		}
	}
}
