package config

import (
	"cmp"
	"fmt"
	"net"
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

	UDP bool // datagrams, beside or in place of connections
	TCP bool

	Mode       CaptureMode
	Proxy      string           // the name of a proxy of this host; empty: To says it
	To         []netip.AddrPort // where the proxy listens, of this file or of somebody else
	KeepSource bool             // the proxy goes on with the address of the client
	Direct     bool             // while the proxy does not listen all goes where it wanted to go
}

// CaptureMode is a way to capture.
type CaptureMode uint8

// The ways to capture. The zero value is one that nobody has chosen.
const (
	CaptureEBPF     CaptureMode = iota + 1 // in connect()
	CaptureRedirect                        // by DNAT
	CaptureTProxy                          // by a socket that takes what is not its own
)

// CaptureModes are the words for the ways to capture, in the order of the constants.
var CaptureModes = []string{"ebpf", "redirect", "tproxy"}

// String returns the word for the mode.
func (m CaptureMode) String() string { return CaptureModes[m-1] }

var captureSchema = schema[Capture]{what: "a capture", fields: []field[Capture]{
	nameField(func(to *Capture, v string) { to.Name = v }, "app"),
	section("match", "Whose connections, and which of them.", &captureMatchSchema, itself).must(),
	word("mode", "`ebpf`: inside connect(), for TCP of processes; no packet is touched. `redirect`: packets are translated by a table of nftables of pentad's own, for TCP. "+
		"`tproxy`: packets that arrive at an interface are handed to the proxy as they are, for TCP and UDP; its program has to set IP_TRANSPARENT. By default `ebpf` for processes; "+
		"at an interface `tproxy` to a proxy of this file, and `redirect` to one of somebody else.", CaptureModes,
		func(to *Capture, i int) { to.Mode = CaptureMode(i + 1) }),
	{
		key: "to", kind: "name, or ADDRESS:PORT", required: true,
		doc: "A proxy of this file with `protocol: transparent`, or where one of somebody else listens.",
		set: func(d *decoder, n *yaml.Node, to *Capture) {
			v, ok := d.text(n, "the name of a proxy, or an address such as 127.0.0.1:15001")
			if !ok {
				return
			}
			if isLabel(v) {
				to.Proxy = v
				return
			}
			if at := d.ownAddress(n, "127.0.0.1:15001"); at.IsValid() {
				to.To = []netip.AddrPort{at}
			}
		},
	},
	word("onProxyDown", "What becomes of connections while the proxy does not listen. `refuse`: they are refused. `direct`: they go where they wanted to go, past the proxy (of mode `ebpf` only).",
		[]string{"refuse", "direct"}, func(to *Capture, i int) { to.Direct = i == 1 }).or("refuse"),
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
	{
		key: "protocol", kind: "word, or list of words", fallback: "tcp", doc: "Of these protocols, `tcp` or `udp`; `udp` in mode `tproxy` only.",
		set: func(d *decoder, n *yaml.Node, to *Capture) {
			to.TCP, to.UDP = false, false
			d.oneOrMore(n, func(e *yaml.Node) {
				if i, ok := d.word(e, "tcp", "udp"); ok {
					to.TCP, to.UDP = to.TCP || i == 0, to.UDP || i == 1
				}
			})
		},
	},
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
		c := Capture{TCP: true}
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
		d.checkMode(e, seen, &c)
		to.Captures = append(to.Captures, c)
		d.captureNodes = append(d.captureNodes, e)
	})
}

// checkMode chooses a mode if nobody has, and finds what does not go with it.
func (d *decoder) checkMode(n *yaml.Node, seen map[string]*yaml.Node, c *Capture) {
	if c.Mode == 0 {
		switch {
		case c.Interface == "":
			c.Mode = CaptureEBPF
		case c.Proxy != "" || c.UDP:
			c.Mode = CaptureTProxy
		default:
			c.Mode = CaptureRedirect
		}
	}
	at := cmp.Or(seen["mode"], n)
	switch {
	case c.Mode == CaptureEBPF && c.Interface != "":
		d.errorf(at, "capture %s: mode ebpf is about what processes of this host do; what arrives at an interface is captured by redirect or tproxy", c.Name)
	case c.Mode == CaptureTProxy && c.Interface == "":
		d.errorf(at, "capture %s: mode tproxy is about what arrives at an interface; processes of this host are captured by ebpf or redirect", c.Name)
	case c.UDP && c.Mode != CaptureTProxy:
		d.errorf(at, "capture %s: mode %s captures TCP only: it could not tell the proxy where a datagram wanted to go; UDP that arrives at an interface is captured by tproxy", c.Name, c.Mode)
	}
	if c.Direct && c.Mode != CaptureEBPF {
		d.errorf(seen["onProxyDown"], "capture %s: onProxyDown: direct is for mode ebpf: packets are led away before the kernel knows whether anybody listens", c.Name)
	}
	for _, p := range c.Destinations {
		if p.Addr().IsLoopback() && p.Bits() > 0 || p.Addr().IsLinkLocalUnicast() && p.Addr().Is6() {
			d.errorf(seen["match"], "capture %s: nothing to %s is ever captured: the loopback and addresses of a link are left alone", c.Name, p)
		}
	}
	if c.Mode == CaptureEBPF && len(c.Ports) > MaxCapturePorts {
		d.errorf(seen["match"], "capture %s: %d ranges of ports; mode ebpf takes %d", c.Name, len(c.Ports), MaxCapturePorts)
	}
}

// MaxCaptures is how many captures in connect() there may be for one cgroup.
const MaxCaptures = 64

// MaxCapturePorts is how many ranges of ports a capture in connect() may have.
const MaxCapturePorts = 32

// checkCaptures finds the proxies that captures lead to.
func (d *decoder) checkCaptures(c *Config) {
	d.checkNumber(c)
	for i := range c.Captures {
		x := &c.Captures[i]
		n := d.captureNodes[i]
		if x.Proxy == "" {
			x.Proxy = c.proxyAt(x.To)
		}
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
			d.leadTo(n, x, &c.Proxies[at])
		}
		d.checkArrival(n, *x)
	}
}

// proxyAt returns the name of the proxy of this file that listens at an address; empty:
// it is of somebody else.
func (c *Config) proxyAt(at []netip.AddrPort) string {
	for _, p := range c.Proxies {
		if len(at) > 0 && slices.Contains(p.Listen, at[0]) {
			return p.Name
		}
	}
	return ""
}

// leadTo leads a capture to a proxy of this file, which may learn what it is to take.
func (d *decoder) leadTo(n *yaml.Node, x *Capture, p *Proxy) {
	x.To, x.KeepSource = p.Listen, p.KeepSource
	p.UDP = p.UDP || x.UDP
	if x.KeepSource && x.Interface == "" {
		d.errorf(n, "capture %s: %s has keepSource, which is for clients of other hosts: what processes of this host send has its addresses already", x.Name, x.Proxy)
	}
	d.checkReach(n, *x)
	if x.UDP && len(p.Rules) > 0 && !slices.ContainsFunc(p.Rules, func(r ProxyRule) bool { return r.Via[0] == Direct }) {
		d.warnings = append(d.warnings, d.problem(n, "capture %s: no rule of %s goes direct, and datagrams go no other way: they are dropped", x.Name, x.Proxy))
	}
}

// checkArrival refuses what the kernel would drop: packets from elsewhere never reach the
// loopback.
func (d *decoder) checkArrival(n *yaml.Node, x Capture) {
	for _, at := range x.To {
		if x.Interface != "" && x.Mode == CaptureRedirect && at.Addr().IsLoopback() {
			d.errorf(n, "capture %s: what arrives at an interface cannot be led to %s: let the proxy listen at an address of this host that is not its loopback", x.Name, at)
			return
		}
	}
}

// checkNumber finds what is more than the programs of one cgroup take.
func (d *decoder) checkNumber(c *Config) {
	at := make(map[string]int)
	for i, x := range c.Captures {
		if x.Mode != CaptureEBPF {
			continue
		}
		cgroup := cmp.Or(x.Cgroup, c.Scope.Cgroup)
		if at[cgroup]++; at[cgroup] == MaxCaptures+1 {
			d.errorf(d.captureNodes[i], "capture %s: there are more than %d captures of mode ebpf for the cgroup %s; several prefixes and ports can be one capture", x.Name, MaxCaptures, cgroup)
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

// isOwnAddress reports whether an address is one of this host. What cannot be seen is
// taken for one.
func isOwnAddress(a netip.Addr) bool {
	addresses, err := net.InterfaceAddrs()
	return err != nil || a.IsLoopback() || a.IsUnspecified() || slices.ContainsFunc(addresses, func(x net.Addr) bool {
		n, ok := x.(*net.IPNet)
		return ok && n.IP.Equal(a.AsSlice())
	})
}

// needsOfCaptures lists what captures name and the host should have.
func (d *decoder) needsOfCaptures(c *Config) (all []need) {
	for i, x := range c.Captures {
		if x.User != "" {
			all = append(all, need{d.problem(d.captureNodes[i], "capture %s: there is no user %s on this host", x.Name, x.User),
				func(string) bool { _, err := x.UserID(); return err == nil }})
		}
		for _, at := range x.To {
			if x.Proxy == "" {
				all = append(all, need{d.problem(d.captureNodes[i], "capture %s: %s is no address of this host: a proxy elsewhere is not told where connections wanted to go", x.Name, at),
					func(string) bool { return isOwnAddress(at.Addr()) }})
			}
		}
		if x.Interface != "" {
			all = append(all, need{d.problem(d.captureNodes[i], "capture %s: there is no interface %s on this host now; nothing of it is captured until there is", x.Name, x.Interface),
				func(string) bool { _, err := net.InterfaceByName(x.Interface); return err == nil }})
		}
		if x.Cgroup != "" {
			all = append(all, need{d.problem(d.captureNodes[i], "capture %s: there is no cgroup %s on this host now; nothing of it is captured until there is", x.Name, x.Cgroup),
				func(cgroups string) bool { return isThere(cgroups + strings.TrimSuffix(x.Cgroup, "/")) }})
		}
	}
	return all
}
