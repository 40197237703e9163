package config

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// ProxyProtocol is how clients tell a proxy where they want to go.
type ProxyProtocol uint8

// The protocols of proxies.
const (
	SOCKS5      ProxyProtocol = iota
	HTTP                      // CONNECT, and requests with an absolute URI
	Transparent               // they do not: their connections were led here
	Fixed                     // they cannot: all go to one target (see Forward)
	SSH                       // of upstreams only
)

// ProxyProtocols are the words for those that a proxy can speak, in the order of the
// constants.
var ProxyProtocols = []string{"socks5", "http", "transparent"}

// String returns the word for the protocol.
func (p ProxyProtocol) String() string {
	return append(ProxyProtocols, "forward", "ssh")[p]
}

// Proxy is a server that forwards what its clients ask for.
type Proxy struct {
	Name      string
	Protocols []ProxyProtocol
	Listen    []netip.AddrPort
	UsersFile string // empty: nobody is asked who he is
	Allow     []netip.Prefix
	Deny      []netip.Prefix // wins over Allow
	Open      bool           // whoever can reach it may use it
	Rules     []ProxyRule    // the first that fits; what fits none is refused. None: all goes direct
	// Of Transparent: it takes datagrams, too, and goes on with the address of its client.
	UDP, KeepSource bool
	Target          string // HOST:PORT where all go, of Fixed

	MaxConnections int
	MaxPerClient   int
	Handshake      time.Duration // for all that a client has to say before it is connected
	Connect        time.Duration // for a connection to the target
	Idle           time.Duration
	IdleUDP        time.Duration
	Drain          time.Duration // for connections to end by themselves when the agent ends
}

// ProxyRule says by which way connections go that fit it. What it does not name fits.
type ProxyRule struct {
	Destinations []netip.Prefix
	Ports        []PortRange
	Domains      []string // lower case; one that begins with a dot stands for all below it, too
	Clients      []netip.Prefix
	Users        []string
	Via          []string // names of upstreams, the nearest first; or one of the ways below
}

// Ways that need no upstream.
const (
	Direct = "direct"
	Refuse = "refuse"
)

// PortRange is First to Last, both included.
type PortRange struct{ First, Last uint16 }

var proxySchema = schema[Proxy]{what: "a proxy", fields: []field[Proxy]{
	nameField(func(to *Proxy, v string) { to.Name = v }, "out"),
	{
		key: "protocol", kind: "word, or list of words", required: true,
		doc: "How clients say where they want to go; several may share a port. `socks5`: RFC 1928, with CONNECT, BIND and UDP ASSOCIATE. `http`: CONNECT, and " +
			"requests with an absolute URI. `transparent`: they say nothing, and their connections are led here, by a REDIRECT of a firewall.",
		set: func(d *decoder, n *yaml.Node, to *Proxy) { to.Protocols = d.protocols(n) },
	},
	{
		key: "listen", kind: "ADDRESS:PORT, or list of those", required: true,
		doc: "Where it listens. At an address that others can reach it needs `users`, `allow` or `open: true`.",
		set: func(d *decoder, n *yaml.Node, to *Proxy) {
			d.oneOrMore(n, func(e *yaml.Node) {
				if at := d.ownAddress(e, "127.0.0.1:1080"); at.IsValid() {
					to.Listen = append(to.Listen, at)
				}
			})
		},
	},
	section("users", "Who may use it. Without this key nobody is asked.", &usersSchema, itself),
	prefixes("allow", "Where clients may come from; everywhere by default.", func(to *Proxy, v []netip.Prefix) { to.Allow = v }),
	prefixes("deny", "Where they may not come from, also if `allow` has it.", func(to *Proxy, v []netip.Prefix) { to.Deny = v }),
	truth("open", "Whoever can reach it may use it, and that is meant.", func(to *Proxy, v bool) { to.Open = v }).or("false"),
	mappings("rules", "list of rules", "Which way connections go: the first rule that fits. What fits none is refused. Without rules all goes direct.",
		&proxyRuleSchema, func(d *decoder, n *yaml.Node, to *Proxy) {
			d.list(n, "a list of rules", func(e *yaml.Node) {
				var r ProxyRule
				proxyRuleSchema.decode(d, e, &r)
				to.Rules = append(to.Rules, r)
			})
		}),
	number("maxConnections", "connections", "How many connections of clients there are at most; further ones wait until one ends.", 1, 1_000_000,
		func(to *Proxy, v int) { to.MaxConnections = v }).or(strconv.Itoa(DefaultProxy.MaxConnections)),
	number("maxPerClient", "connections", "The same for one client address; further ones are closed.", 1, 1_000_000,
		func(to *Proxy, v int) { to.MaxPerClient = v }).or(strconv.Itoa(DefaultProxy.MaxPerClient)),
	truth("keepSource", "Targets that are reached directly see the address of the client, not of this host. Of `transparent` only, for clients of other hosts; what targets answer has to come by this host.",
		func(to *Proxy, v bool) { to.KeepSource = v }).or("false"),
	section("timeouts", "How long it waits.", &proxyTimeoutsSchema, itself),
}}

// DefaultProxy is a proxy with the defaults of its keys.
var DefaultProxy = Proxy{
	MaxConnections: 20_000, MaxPerClient: 5_000,
	Handshake: 10 * time.Second, Connect: 10 * time.Second, Idle: time.Hour, IdleUDP: 2 * time.Minute, Drain: 5 * time.Second,
}

var usersSchema = schema[Proxy]{what: "users", fields: []field[Proxy]{
	text("file", "path", "A line `USER:HASH` each, as `htpasswd -B` writes it: bcrypt, or argon2id in PHC form. It is read again when it changes. Nobody but its owner may write it.",
		"the path of a file", func(to *Proxy, v string) { to.UsersFile = v }).must(),
}}

var proxyTimeoutsSchema = schema[Proxy]{what: "timeouts", fields: []field[Proxy]{
	span("handshake", "For all that a client has to say before it is connected.", 100*time.Millisecond, 5*time.Minute, time.Millisecond,
		func(to *Proxy, v time.Duration) { to.Handshake = v }).or(Duration(DefaultProxy.Handshake)),
	span("connect", "For the connection to the target.", 100*time.Millisecond, 5*time.Minute, time.Millisecond,
		func(to *Proxy, v time.Duration) { to.Connect = v }).or(Duration(DefaultProxy.Connect)),
	span("idle", "A connection on which nothing is sent for so long is closed.", time.Second, 7*24*time.Hour, time.Millisecond,
		func(to *Proxy, v time.Duration) { to.Idle = v }).or(Duration(DefaultProxy.Idle)),
	span("udp", "What is known of a sender of datagrams is forgotten after so long.", time.Second, 24*time.Hour, time.Millisecond,
		func(to *Proxy, v time.Duration) { to.IdleUDP = v }).or(Duration(DefaultProxy.IdleUDP)),
	span("drain", "When the agent ends, nobody new is let in, and those who are have so long to finish.", 0, time.Hour, time.Millisecond,
		func(to *Proxy, v time.Duration) { to.Drain = v }).or(Duration(DefaultProxy.Drain)),
}}

var proxyRuleSchema = schema[ProxyRule]{what: "a rule", fields: []field[ProxyRule]{
	prefixes("destinations", "Addresses of targets. A name fits if what it resolves to does.", func(to *ProxyRule, v []netip.Prefix) { to.Destinations = v }),
	{
		key: "ports", kind: "list of ports", doc: "Ports of targets, each a number or a range such as `8000-8999`.",
		set: func(d *decoder, n *yaml.Node, to *ProxyRule) {
			d.list(n, "a list of ports, such as [443, 8000-8999]", func(e *yaml.Node) { to.Ports = append(to.Ports, d.ports(e)) })
		},
	},
	{
		key: "domains", kind: "list of names", doc: "Names of targets: `.corp.example` is that and all below it, `www.corp.example` is itself only.",
		set: func(d *decoder, n *yaml.Node, to *ProxyRule) {
			d.list(n, "a list of names, such as [.corp.example]", func(e *yaml.Node) { to.Domains = append(to.Domains, d.domain(e)) })
		},
	},
	prefixes("clients", "Addresses of clients.", func(to *ProxyRule, v []netip.Prefix) { to.Clients = v }),
	{
		key: "users", kind: "list of names", doc: "Users, as they have authenticated.",
		set: func(d *decoder, n *yaml.Node, to *ProxyRule) {
			d.list(n, "a list of users", func(e *yaml.Node) {
				if v, ok := d.text(e, "a user"); ok {
					to.Users = append(to.Users, v)
				}
			})
		},
	},
	{
		key: "via", kind: "name, or list of names", required: true,
		doc: "The upstreams that it goes through, the nearest first; or `direct`, or `refuse`.",
		set: func(d *decoder, n *yaml.Node, to *ProxyRule) { to.Via = d.via(n) },
	},
}}

// nameField is the name of something in a list.
func nameField[T any](set func(*T, string), example string) field[T] {
	return field[T]{
		key: "name", kind: "DNS label", required: true,
		doc: "Unique name: lower-case letters, digits and hyphens, at most 63.",
		set: func(d *decoder, n *yaml.Node, to *T) {
			v, ok := d.text(n, "a name such as "+example)
			if ok && !isLabel(v) {
				d.errorf(n, "want a DNS label: at most 63 lower-case letters, digits and hyphens, found %q", shorten(v))
				return
			}
			set(to, v)
		},
	}
}

// oneOrMore reads a list, or one that stands for a list of itself.
func (d *decoder) oneOrMore(n *yaml.Node, each func(*yaml.Node)) {
	if n.Kind == yaml.ScalarNode {
		each(n)
		return
	}
	d.list(n, "a list", each)
}

func (d *decoder) protocols(n *yaml.Node) []ProxyProtocol {
	var all []ProxyProtocol
	d.oneOrMore(n, func(e *yaml.Node) {
		i, ok := d.word(e, ProxyProtocols...)
		if ok && slices.Contains(all, ProxyProtocol(i)) {
			d.errorf(e, "%s stands twice", e.Value)
		}
		if ok {
			all = append(all, ProxyProtocol(i))
		}
	})
	if slices.Contains(all, Transparent) && len(all) > 1 {
		d.errorf(n, "transparent shares no port with others: a connection that was led here and one that says where to are not told apart")
	}
	return all
}

func (d *decoder) ports(n *yaml.Node) PortRange {
	const want = "a port from 1 to 65535, or a range such as 8000-8999"
	text, ok := d.text(n, want)
	if !ok {
		return PortRange{}
	}
	from, to, isRange := strings.Cut(text, "-")
	if !isRange {
		to = from
	}
	first, err1 := strconv.ParseUint(from, 10, 16)
	last, err2 := strconv.ParseUint(to, 10, 16)
	if err1 != nil || err2 != nil || first == 0 || first > last {
		d.errorf(n, "want %s, found %q", want, shorten(text))
	}
	return PortRange{uint16(first), uint16(last)}
}

func (d *decoder) domain(n *yaml.Node) string {
	const want = "a name such as .corp.example"
	text, ok := d.text(n, want)
	if !ok {
		return ""
	}
	if strings.HasPrefix(text, "*.") {
		d.errorf(n, "want %s, found %q; all below a name is written %q", want, shorten(text), shorten(text[1:]))
		return ""
	}
	name := strings.ToLower(strings.TrimSuffix(text, "."))
	if strings.Trim(name, ".") == "" || strings.ContainsAny(name, " /:*") || strings.Contains(name, "..") {
		d.errorf(n, "want %s, found %q", want, shorten(text))
	}
	return name
}

func (d *decoder) via(n *yaml.Node) []string {
	var all []string
	d.oneOrMore(n, func(e *yaml.Node) {
		v, ok := d.text(e, "the name of an upstream, direct or refuse")
		if ok && slices.Contains(all, v) {
			d.errorf(e, "%s stands twice: what it takes would come back to it", shorten(v))
		}
		all = append(all, v)
	})
	if len(all) == 0 && n.Kind == yaml.SequenceNode {
		d.errorf(n, "via needs the name of an upstream, direct or refuse")
	}
	if len(all) > 1 && (slices.Contains(all, Direct) || slices.Contains(all, Refuse)) {
		d.errorf(n, "direct and refuse stand alone: nothing comes before or after them")
	}
	return all
}

// proxies reads the proxies. What they have to do with upstreams is checked when those
// are known, too.
func (d *decoder) proxies(n *yaml.Node, to *Config) {
	d.list(n, "a list of proxies", func(e *yaml.Node) {
		p := DefaultProxy
		seen := proxySchema.decode(d, e, &p)
		if seen == nil {
			return
		}
		d.checkProxy(e, seen, p, to)
		to.Proxies = append(to.Proxies, p)
		d.proxyNodes = append(d.proxyNodes, e)
	})
}

func (d *decoder) checkProxy(n *yaml.Node, seen map[string]*yaml.Node, p Proxy, to *Config) {
	if slices.ContainsFunc(to.Proxies, func(o Proxy) bool { return o.Name == p.Name && p.Name != "" }) {
		d.errorf(seen["name"], "proxy %s is already defined; names are unique", p.Name)
	}
	for _, at := range p.Listen {
		for _, o := range to.Proxies {
			if slices.Contains(o.Listen, at) {
				d.errorf(seen["listen"], "proxy %s: %s is where proxy %s listens", p.Name, at, o.Name)
			}
		}
		others := !at.Addr().IsLoopback()
		if others && p.UsersFile == "" && len(p.Allow) == 0 && !p.Open && seen["listen"] != nil {
			d.errorf(seen["listen"], "proxy %s: others can reach %s, and could use this host to get where they may not; name users, or allow some clients, or write \"open: true\"", p.Name, at)
			break
		}
	}
	if slices.Contains(p.Protocols, Transparent) && seen["users"] != nil {
		d.errorf(seen["users"], "clients of a transparent proxy do not know of it: nobody can be asked who he is")
	}
	if p.KeepSource && !slices.Contains(p.Protocols, Transparent) && seen["keepSource"] != nil {
		d.errorf(seen["keepSource"], "proxy %s: keepSource goes with \"protocol: transparent\"; clients of others mean to be seen as the proxy", p.Name)
	}
	for _, r := range p.Rules {
		if len(r.Users) > 0 && p.UsersFile == "" && seen["rules"] != nil {
			d.errorf(seen["rules"], "proxy %s: a rule for users fits nobody without the key \"users\"", p.Name)
			break
		}
	}
	d.vias = append(d.vias, viaNode{p, seen["rules"]})
}

// viaNode is a proxy whose rules name upstreams.
type viaNode struct {
	proxy Proxy
	rules *yaml.Node
}

// checkVias sees to it that every rule names upstreams that are there.
func (d *decoder) checkVias(c *Config) {
	names := []string{Direct, Refuse}
	for _, u := range c.Upstreams {
		names = append(names, u.Name)
	}
	loops := loopsOf(c)
	for _, v := range d.vias {
		for i, r := range v.proxy.Rules {
			if loops[v.proxy.Name] && leadsBack(c, r, loops) {
				d.errorf(resolve(v.rules.Content[i]), "proxy %s: by way of %s connections come back to it, without end", v.proxy.Name, r.Via[0])
			}
			for _, name := range r.Via {
				if !slices.Contains(names, name) {
					d.errorf(resolve(v.rules.Content[i]), "proxy %s: there is no upstream %q%s", v.proxy.Name, shorten(name), service.Nearest(name, names))
				}
			}
		}
	}
}

// proxyAt returns the proxy of this file that listens at the address of an upstream.
func proxyAt(c *Config, upstream string) (Proxy, bool) {
	for _, u := range c.Upstreams {
		at, err := netip.ParseAddrPort(u.Address)
		if u.Name != upstream || err != nil {
			continue
		}
		for _, p := range c.Proxies {
			if slices.Contains(p.Listen, at) {
				return p, true
			}
		}
	}
	return Proxy{}, false
}

// loopsOf returns the proxies from which one gets back to them by the first upstreams of
// rules, as far as addresses tell.
func loopsOf(c *Config) map[string]bool {
	next := make(map[string][]string)
	for _, p := range c.Proxies {
		for _, r := range p.Rules {
			if len(r.Via) == 0 {
				continue
			}
			if q, ok := proxyAt(c, r.Via[0]); ok {
				next[p.Name] = append(next[p.Name], q.Name)
			}
		}
	}
	loops := make(map[string]bool)
	for name := range next {
		seen := make(map[string]bool)
		for todo := next[name]; len(todo) > 0; {
			at := todo[0]
			todo = todo[1:]
			if at == name {
				loops[name] = true
			}
			if !seen[at] {
				seen[at] = true
				todo = append(todo, next[at]...)
			}
		}
	}
	return loops
}

// leadsBack reports whether a rule of a proxy in a loop is part of one.
func leadsBack(c *Config, r ProxyRule, loops map[string]bool) bool {
	if len(r.Via) == 0 {
		return false
	}
	q, ok := proxyAt(c, r.Via[0])
	return ok && loops[q.Name]
}

// needsOfProxies lists the files that proxies and upstreams name.
func (d *decoder) needsOfProxies(c *Config) (all []need) {
	missing := func(at *yaml.Node, what, path string) {
		if path != "" {
			all = append(all, need{d.problem(at, "%s %s on this host", what, path), func(string) bool { return isThere(path) }})
		}
	}
	for i, p := range c.Proxies {
		missing(d.proxyNodes[i], "proxy "+p.Name+": there is no file of users", p.UsersFile)
	}
	for i, u := range c.Upstreams {
		missing(d.upstreamNodes[i], "upstream "+u.Name+": there is no password file", u.PasswordFile)
	}
	return all
}
