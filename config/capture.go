package config

import (
	"fmt"
	"net/netip"
	"os/user"
	"path"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// Capture says whose connections are led to a proxy that they do not know of.
type Capture struct {
	Name string

	// Whose: of processes, or those that arrive at an interface to be forwarded.
	Cgroup    string // path below the root of the cgroups (v2); empty: any
	User      string // name or number; empty: any
	Group     string
	Interface string // empty: of processes

	// Which.
	Destinations []netip.Prefix // empty: all
	Ports        []PortRange    // empty: all
	Except       []netip.Prefix

	Proxy string           // the name of a proxy of this host; empty: To says it
	To    []netip.AddrPort // where the proxy listens, of this file or of somebody else
}

// CaptureModes are the ways to capture.
var CaptureModes = []string{"redirect"}

var captureSchema = schema[Capture]{what: "a capture", fields: []field[Capture]{
	nameField(func(to *Capture, v string) { to.Name = v }, "app"),
	section("match", "Whose connections, and which of them.", &captureMatchSchema, itself).must(),
	word("mode", "`redirect`: by a table of nftables of pentad's own, for TCP.", CaptureModes, func(*Capture, int) {}).or("redirect"),
	{
		key: "to", kind: "name, or ADDRESS:PORT", required: true,
		doc: "A proxy of this file with `protocol: transparent`, or where one of somebody else listens.",
		set: func(d *decoder, n *yaml.Node, to *Capture) {
			v, ok := d.text(n, "the name of a proxy, or an address such as 127.0.0.1:15001")
			if !ok {
				return
			}
			if dnsLabel.MatchString(v) {
				to.Proxy = v
				return
			}
			if at := d.ownAddress(n, "127.0.0.1:15001"); at.IsValid() {
				to.To = []netip.AddrPort{at}
			}
		},
	},
}}

var captureMatchSchema = schema[Capture]{what: "match", fields: []field[Capture]{
	{
		key: "cgroup", kind: "path", doc: "Processes below this cgroup (v2), such as `/app.slice`.",
		set: func(d *decoder, n *yaml.Node, to *Capture) {
			v, ok := d.text(n, "a path such as /app.slice")
			if ok && (!path.IsAbs(v) || path.Clean(v) != v || v == "/") {
				d.errorf(n, "want a path such as /app.slice, found %q; all processes are those without this key", shorten(v))
				return
			}
			to.Cgroup = v
		},
	},
	text("user", "name or number", "Processes of this user.", "a user", func(to *Capture, v string) { to.User = v }),
	text("group", "name or number", "Processes of this group.", "a group", func(to *Capture, v string) { to.Group = v }),
	text("interface", "name", "What arrives here to go elsewhere; what is for this host itself is left alone.", "the name of an interface",
		func(to *Capture, v string) { to.Interface = v }),
	word("protocol", "Of this protocol.", []string{"tcp"}, func(*Capture, int) {}).or("tcp"),
	prefixes("destinations", "To these addresses; to all by default. The loopback is left alone always.", func(to *Capture, v []netip.Prefix) { to.Destinations = v }),
	{
		key: "ports", kind: "list of ports", doc: "To these ports, each a number or a range such as `8000-8999`; to all by default.",
		set: func(d *decoder, n *yaml.Node, to *Capture) {
			d.list(n, "a list of ports, such as [443, 8000-8999]", func(e *yaml.Node) { to.Ports = append(to.Ports, d.ports(e)) })
		},
	},
	prefixes("except", "But not to these.", func(to *Capture, v []netip.Prefix) { to.Except = v }),
}}

func (d *decoder) captures(n *yaml.Node, to *Config) {
	d.list(n, "a list of captures", func(e *yaml.Node) {
		var c Capture
		seen := captureSchema.decode(d, e, &c)
		if seen == nil {
			return
		}
		if slices.ContainsFunc(to.Captures, func(o Capture) bool { return o.Name == c.Name && c.Name != "" }) {
			d.errorf(seen["name"], "capture %s is already defined; names are unique", c.Name)
		}
		if match := seen["match"]; match != nil {
			if c.Interface != "" && (c.Cgroup != "" || c.User != "" || c.Group != "") {
				d.errorf(match, "capture %s: interface is for what arrives, which is of no process here: it goes with no cgroup, user or group", c.Name)
			}
			if c.Interface == "" && c.Cgroup == "" && c.User == "" && c.Group == "" {
				d.errorf(match, "capture %s: want a cgroup, user, group or interface: every process would also be those that the proxy itself needs", c.Name)
			}
		}
		to.Captures = append(to.Captures, c)
		d.captureNodes = append(d.captureNodes, e)
	})
}

// checkCaptures finds the proxies that captures lead to.
func (d *decoder) checkCaptures(c *Config) {
	for i := range c.Captures {
		x := &c.Captures[i]
		n := d.captureNodes[i]
		if x.Proxy == "" {
			d.checkArrival(n, *x)
			continue
		}
		names := []string{}
		at := -1
		for j, p := range c.Proxies {
			names = append(names, p.Name)
			if p.Name == x.Proxy {
				at = j
			}
		}
		switch {
		case at < 0:
			d.errorf(n, "capture %s: there is no proxy %q%s", x.Name, x.Proxy, service.Nearest(x.Proxy, names))
		case !slices.Contains(c.Proxies[at].Protocols, Transparent):
			d.errorf(n, "capture %s: clients that do not know of a proxy need one with \"protocol: transparent\"; %s speaks %s", x.Name, x.Proxy, c.Proxies[at].Protocols[0])
		default:
			x.To = c.Proxies[at].Listen
			d.checkReach(n, *x)
		}
		d.checkArrival(n, *x)
	}
}

// checkArrival refuses what the kernel would drop: packets from elsewhere never reach the
// loopback.
func (d *decoder) checkArrival(n *yaml.Node, x Capture) {
	for _, at := range x.To {
		if x.Interface != "" && at.Addr().IsLoopback() {
			d.errorf(n, "capture %s: what arrives at an interface cannot be led to %s: let the proxy listen at an address of this host that is not its loopback", x.Name, at)
			return
		}
	}
}

// checkReach warns of families for which the proxy does not listen.
func (d *decoder) checkReach(n *yaml.Node, x Capture) {
	for _, f := range service.EachFamily {
		wanted := len(x.Destinations) == 0 || slices.ContainsFunc(x.Destinations, func(p netip.Prefix) bool { return service.FamilyOf(p.Addr()) == f })
		if _, ok := x.Target(f); wanted && !ok {
			d.warnings = append(d.warnings, d.problem(n, "capture %s: %s listens at no address of %s: such connections are refused", x.Name, x.Proxy, f))
		}
	}
}

// Target returns where connections of a family are led to.
func (c Capture) Target(f service.Family) (netip.AddrPort, bool) {
	for _, at := range c.To {
		if service.FamilyOf(at.Addr()) == f {
			return at, true
		}
	}
	return netip.AddrPort{}, false
}

// UserID returns the number of the user that is captured. The error says that there is
// none of that name.
func (c Capture) UserID() (uint32, error) {
	return number32(c.User, func(name string) (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
}

// GroupID returns the number of the group that is captured.
func (c Capture) GroupID() (uint32, error) {
	return number32(c.Group, func(name string) (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
}

func number32(text string, find func(string) (string, error)) (uint32, error) {
	if n, err := strconv.ParseUint(text, 10, 32); err == nil {
		return uint32(n), nil
	}
	found, err := find(text)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", text, err)
	}
	n, err := strconv.ParseUint(found, 10, 32)
	return uint32(n), err
}

// needsOfCaptures lists what captures name and the host should have.
func (d *decoder) needsOfCaptures(c *Config) (all []need) {
	for i, x := range c.Captures {
		if x.User != "" {
			all = append(all, need{d.problem(d.captureNodes[i], "capture %s: there is no user %s on this host", x.Name, x.User),
				func(string) bool { _, err := x.UserID(); return err == nil }})
		}
		if x.Cgroup != "" {
			all = append(all, need{d.problem(d.captureNodes[i], "capture %s: there is no cgroup %s on this host now; nothing of it is captured until there is", x.Name, x.Cgroup),
				func(cgroups string) bool { return isThere(cgroups + strings.TrimSuffix(x.Cgroup, "/")) }})
		}
	}
	return all
}
