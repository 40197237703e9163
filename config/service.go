package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// maxBackends bounds the backends of one service.
const maxBackends = 100_000

// isLabel reports whether a text is a DNS label in lower case (RFC 1123, section 2.1). A
// regular expression takes a twentieth of the time in which a large file is read.
func isLabel(v string) bool {
	if len(v) == 0 || len(v) > 63 || v[0] == '-' || v[len(v)-1] == '-' {
		return false
	}
	return !strings.ContainsFunc(v, func(r rune) bool {
		return r != '-' && (r < 'a' || r > 'z') && (r < '0' || r > '9')
	})
}

var serviceSchema = schema[service.Service]{what: "a service", fields: []field[service.Service]{
	{
		key: "name", kind: "DNS label", required: true,
		doc: "Unique name: lower-case letters, digits and hyphens, at most 63 (RFC 1123, section 2.1).",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			v, ok := d.text(n, "a name such as orders-db")
			if ok && !isLabel(v) {
				d.errorf(n, "want a DNS label: at most 63 lower-case letters, digits and hyphens, found %q", shorten(v))
				return
			}
			to.Name = v
		},
	},
	{
		key: "listen", kind: "list of VIP:PORT[/tcp|udp]", required: true,
		doc: "The virtual addresses. IPv6 is written `[2001:db8::10]:53/udp`. The address need not lie on any interface.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			at := d.at[to]
			d.list(n, "a list of listeners, such as [10.96.0.10:3306]", func(e *yaml.Node) {
				if l, ok := d.listener(e); ok {
					at.listeners = append(at.listeners, l)
					at.listenerNodes = append(at.listenerNodes, e)
				}
			})
			if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
				d.errorf(n, "a service needs at least one listener, such as 10.96.0.10:3306")
			}
			to.Listeners = slices.Clone(at.listeners)
			slices.SortFunc(to.Listeners, service.Listener.Compare)
		},
	},
	word("balance",
		"`least-latency`: of two backends drawn by weight the one that has fewer connections times a lower latency, which is the "+
			"round trip of handshakes and the time from a request to the first byte of its answer. `least-connections`: the same "+
			"without latency. `random`: by weight, anew for every connection. `source-hash`: a client keeps its backend when "+
			"others come and go; the client is the source address that the socket bound, else its network namespace.",
		service.Balances, func(to *service.Service, i int) { to.Balance = service.Balance(i) }).or("least-latency"),
	section("affinity", "The same client (network namespace) keeps its backend.", &affinitySchema, itself),
	section("keepalive", "TCP keepalive, set when a socket connects, unless the application has set SO_KEEPALIVE itself.",
		&keepaliveSchema, func(to *service.Service) *service.Keepalive { return &to.Keepalive }),
	mapping("breaker", "mapping or off",
		"When the kernel keeps connections away from a backend by itself. Without this key it ejects backends of TCP services as "+
			"`{failures: 3, ejection: 10s, maxEjected: 50%}` says; `off`: never.",
		&breakerSchema, (*decoder).breaker),
	section("connect", "How TCP connections are made.", &connectSchema, itself),
	word("onDown",
		"What happens to the connections to a backend that fails its probe or is removed. `reset`: they are closed at once, so that "+
			"clients connect anew; connected UDP sockets too. `keep`: they are left alone. Draining never resets.",
		service.OnDowns, func(to *service.Service, i int) { to.OnDown = service.OnDown(i) }).or("reset"),
	word("forward",
		"What becomes of packets to the service that arrive from other hosts, or come from guests of this one: `none`: only sockets of this host see the service. "+
			"`nat`: they are led to a backend by a table of nftables, which also tells their answers the way. `direct`: they go on as they are to backends that have the address of the service, too, "+
			"and answer by themselves; those are written without a port; it needs `director`. By default `none`, and with `source.kubernetes` `nat`.",
		service.Forwards, func(to *service.Service, i int) { to.Forward = service.Forward(i) }),
	span("slowStart",
		"How long a backend that is new among others, or comes back, takes less than its share, which grows from a tenth; 100ms to 1h.",
		100*time.Millisecond, service.MaxSlowStart, time.Millisecond, func(to *service.Service, v time.Duration) { to.SlowStart = v }),
	truth("flows", "Whether `pentad flow` is told of the connections of this service.",
		func(to *service.Service, v bool) { to.Silent = !v }).or("true"),
	mappings("backends", "list of backends",
		"The real addresses, each `ADDRESS[:PORT]` or a mapping. With none, or none usable, connections are refused at once.",
		&backendSchema, (*decoder).backends).must(),
	mapping("health", "mapping", "How backends are probed.", &healthSchema, (*decoder).health),
	{
		key: "disabled", kind: "true or false", fallback: "false",
		doc: "The service is checked, and is not there.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			if v, ok := d.truth(n); ok {
				d.disabled[to] = v
			}
		},
	},
}}

// sharedKeys are what services may have in common.
var sharedKeys = []string{"balance", "affinity", "keepalive", "breaker", "connect", "onDown", "forward", "slowStart", "flows", "health"}

// tcpKeys are those that make no sense of a service whose listeners are all UDP.
var tcpKeys = []string{"keepalive", "breaker", "connect", "health"}

var defaultsSchema = schema[service.Service]{what: "defaults", fields: sharedFields()}

func sharedFields() []field[service.Service] {
	var some []field[service.Service]
	for _, f := range serviceSchema.fields {
		if slices.Contains(sharedKeys, f.key) {
			some = append(some, f)
		}
	}
	return some
}

// checkDefaults reads the defaults as if they were a service's own: what is wrong with
// them is said once.
func (d *decoder) checkDefaults(n *yaml.Node, _ *Config) {
	s := &service.Service{Balance: service.LeastLatency, Listeners: []service.Listener{{Protocol: service.TCP}}}
	d.checkTogether(defaultsSchema.decode(d, n, s), s)
}

// defaultForward says of services of which the file does not what becomes of packets to
// them.
func (d *decoder) defaultForward(c *Config) {
	for _, s := range c.Services {
		if at := d.at[s]; c.Source.Kubernetes == nil && at != nil && !at.forward {
			s.Forward = service.ForwardNone
		}
	}
}

// setDefaults finds the defaults, wherever in the file they stand.
func (d *decoder) setDefaults(root *yaml.Node) {
	root = resolve(root)
	for i := 0; root.Kind == yaml.MappingNode && i+1 < len(root.Content); i += 2 {
		if root.Content[i].Value != "defaults" {
			continue
		}
		// What is wrong with them is said where they are read.
		if n := resolve(root.Content[i+1]); n.Kind == yaml.MappingNode {
			d.defaults = flattened(n)
		}
	}
}

// flattened returns a mapping with what it merges.
func flattened(n *yaml.Node) *yaml.Node {
	c := *n
	c.Content = nil
	has := make(map[string]bool)
	eachPair(n, 0, func(key, value *yaml.Node) {
		if !has[key.Value] {
			has[key.Value] = true
			c.Content = append(c.Content, key, value)
		}
	})
	return &c
}

// eachPair goes through a mapping and, after it, through those that it merges.
func eachPair(n *yaml.Node, depth int, do func(key, value *yaml.Node)) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value != "<<" {
			do(n.Content[i], n.Content[i+1])
		}
	}
	for i := 0; i+1 < len(n.Content) && depth < maxMerged; i += 2 {
		if n.Content[i].Value != "<<" {
			continue
		}
		from := resolve(n.Content[i+1])
		if from.Kind == yaml.SequenceNode {
			for _, one := range from.Content {
				eachPair(resolve(one), depth+1, do)
			}
			continue
		}
		if from.Kind == yaml.MappingNode {
			eachPair(from, depth+1, do)
		}
	}
}

// withDefaults returns the mapping of a service with what it does not say itself.
func (d *decoder) withDefaults(n *yaml.Node) *yaml.Node {
	if d.defaults == nil || n.Kind != yaml.MappingNode {
		return n
	}
	has := make(map[string]bool)
	eachPair(n, 0, func(key, _ *yaml.Node) { has[key.Value] = true })
	c := *n
	c.Content = slices.Clone(n.Content)
	udp := listensUDP(n)
	for i := 0; i+1 < len(d.defaults.Content); i += 2 {
		key := d.defaults.Content[i].Value
		if has[key] || !slices.Contains(sharedKeys, key) || udp && slices.Contains(tcpKeys, key) {
			continue
		}
		c.Content = append(c.Content, d.defaults.Content[i], d.defaults.Content[i+1])
	}
	return &c
}

// listensUDP reports whether all listeners of a service are of UDP.
func listensUDP(n *yaml.Node) bool {
	listen := valueOf(n, "listen")
	if listen == nil || len(listen.Content) == 0 {
		return false
	}
	return !slices.ContainsFunc(listen.Content, func(l *yaml.Node) bool { return !strings.HasSuffix(resolve(l).Value, "/udp") })
}

// valueOf returns the value of a key, or nil.
func valueOf(n *yaml.Node, key string) (value *yaml.Node) {
	eachPair(n, 0, func(k, v *yaml.Node) {
		if k.Value == key && value == nil {
			value = resolve(v)
		}
	})
	return value
}

// itself is for sections that are a part of the service as it is.
func itself[T any](v *T) *T { return v }

var keepaliveSchema = schema[service.Keepalive]{what: "keepalive", fields: []field[service.Keepalive]{
	span("idle", "How long a connection is silent before it is probed, 1s to 9h6m7s, in whole seconds.",
		time.Second, service.MaxKeepalive, time.Second, func(to *service.Keepalive, v time.Duration) { to.Idle = v }).must(),
	span("interval", "Time between probes, 1s to 9h6m7s, in whole seconds; the host's setting (net.ipv4.tcp_keepalive_intvl) by default.",
		time.Second, service.MaxKeepalive, time.Second, func(to *service.Keepalive, v time.Duration) { to.Interval = v }),
	number("probes", "1 to 127",
		"How many unanswered probes end the connection; the host's setting (net.ipv4.tcp_keepalive_probes) by default.",
		1, service.MaxKeepaliveProbes, func(to *service.Keepalive, v int) { to.Probes = v }),
}}

var breakerSchema = schema[service.Breaker]{what: "breaker", fields: []field[service.Breaker]{
	number("maxConnections", "1 to 1073741824",
		"Connections that a backend has at most; the next one goes elsewhere. When all have as many, it is refused.",
		1, service.MaxConnections, func(to *service.Breaker, v int) { to.MaxConnections = v }),
	number("failures", "0 to 1000",
		"Failed TCP connects of one client in a row (refused, unreachable, unanswered past connect.timeout, or closed by the server "+
			"within a second without a byte) that eject a backend for that client; 0: none do. A client is a user in a network namespace and a cgroup.",
		0, service.MaxFailures, func(to *service.Breaker, v int) { to.Failures = v }).or("3"),
	span("ejection",
		"How long an ejected backend gets no connections, 10ms to 1h; 10s by default. It doubles with each repetition, up to ten times. "+
			"Then one connection tries the backend: it comes back, or is ejected again.",
		10*time.Millisecond, service.MaxEjection, time.Millisecond, func(to *service.Breaker, v time.Duration) { to.Ejection = v }),
	{
		key: "maxEjected", kind: "percentage",
		doc: "How much of a failover group may be ejected, 1% to 100%; 50% by default. When more is, the whole group is used as if nothing " +
			"were, unless a later group can serve: rather a doubtful backend than none.",
		set: func(d *decoder, n *yaml.Node, to *service.Breaker) {
			to.MaxEjected = d.percentage(n)
		},
	},
}}

var connectSchema = schema[service.Service]{what: "connect", fields: []field[service.Service]{
	span("timeout",
		"How long a SYN waits for its answer before it is sent again and counts as a failed connect, 10ms to 1m; 1s without this key. "+
			"The kernel rounds it up to its tick, 1ms to 10ms.",
		10*time.Millisecond, service.MaxConnectTimeout, time.Millisecond, func(to *service.Service, v time.Duration) { to.ConnectTimeout = v }).must(),
}}

var affinitySchema = schema[service.Service]{what: "affinity", fields: []field[service.Service]{
	span("timeout", "How long after its last connection a client is remembered, 1s to 24h, in whole seconds.",
		time.Second, 24*time.Hour, time.Second, func(to *service.Service, v time.Duration) { to.Affinity = v }).must(),
}}

// writtenBackend is a backend as it stands in the file.
type writtenBackend struct {
	service.Backend
	disabled bool
}

var backendSchema = schema[writtenBackend]{what: "a backend", fields: []field[writtenBackend]{
	{
		key: "address", kind: "ADDRESS:PORT", required: true,
		doc: "Where connections go. Without a port it stays that of the listener; a service that listens at several ports is one for each then, NAME:PORT.",
		set: func(d *decoder, n *yaml.Node, to *writtenBackend) {
			to.Address = d.backendAddress(n)
		},
	},
	number("weight", "0 to 65535", "Share of new connections; 0 takes none.",
		0, service.MaxWeight, func(to *writtenBackend, v int) { to.Weight = uint32(v) }).or("100"),
	number("group", "0 to 255", "Failover group: group 1 serves only when no backend of group 0 can.",
		0, service.MaxGroup, func(to *writtenBackend, v int) { to.Group = uint32(v) }).or("0"),
	{
		key: "zone", kind: "text",
		doc: "Where the backend stands; shown in lists. At most 63 bytes.",
		set: func(d *decoder, n *yaml.Node, to *writtenBackend) {
			v, ok := d.text(n, "a zone such as b")
			if ok && len(v) > service.MaxZone {
				d.errorf(n, "a zone has at most %d bytes, found %d", service.MaxZone, len(v))
				return
			}
			to.Zone = v
		},
	},
	{
		key: "admin", kind: "word", fallback: "up", words: []string{"up", "drain"},
		doc: "`drain`: the backend takes no new connections, those that it has go on; `pentad backend enable` does not change that.",
		set: func(d *decoder, n *yaml.Node, to *writtenBackend) {
			if i, ok := d.word(n, "up", "drain"); ok {
				to.Drained = i == 1
			}
		},
	},
	{
		key: "disabled", kind: "true or false", fallback: "false",
		doc: "The backend is checked, and is not there.",
		set: func(d *decoder, n *yaml.Node, to *writtenBackend) {
			to.disabled, _ = d.truth(n)
		},
	},
}}

const wantBackend = "a backend ADDRESS:PORT, such as 192.0.2.11:3306"

// backendAddress reads ADDRESS:PORT, or ADDRESS alone: then the port stays what it is.
func (d *decoder) backendAddress(n *yaml.Node) netip.AddrPort {
	v, ok := d.text(n, wantBackend)
	if !ok {
		return netip.AddrPort{}
	}
	if a, ok := bareAddress(v); ok {
		ap, ok := d.address(n, netip.AddrPortFrom(a, 1).String(), wantBackend)
		if !ok {
			return netip.AddrPort{}
		}
		return netip.AddrPortFrom(ap.Addr(), 0)
	}
	ap, _ := d.address(n, v, wantBackend)
	return ap
}

// bareAddress reads an address without a port. That it is not one is no news, and is
// found out first where it costs least.
func bareAddress(v string) (netip.Addr, bool) {
	if _, err := netip.ParseAddrPort(v); err == nil {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(strings.Trim(v, "[]"))
	return a, err == nil && a.Is4() == !strings.ContainsAny(v, "[]:") && bracketHint(v) == ""
}

// services reads all services of a file.
func (d *decoder) services(n *yaml.Node, to *Config) {
	to.Services = make([]*service.Service, 0, len(n.Content))
	d.list(n, "a list of services", func(e *yaml.Node) {
		to.Services = append(to.Services, d.byPort(d.service(e))...)
	})
}

// byPort gives backends without a port that of the listener. A service that listens at
// several ports is one for each then: NAME:PORT.
func (d *decoder) byPort(s *service.Service) []*service.Service {
	d.checkDirected(s)
	at := d.at[s]
	without := slices.IndexFunc(s.Backends, func(b service.Backend) bool { return b.Address.IsValid() && b.Address.Port() == 0 })
	if without < 0 {
		return []*service.Service{s}
	}
	if with := slices.IndexFunc(s.Backends, func(b service.Backend) bool { return b.Address.Port() != 0 }); with >= 0 {
		d.errorf(at.backendNodes[without], "service %s: backend %s has no port and %s has one; write a port for all, or for none: then it stays that of the listener",
			s.Name, s.Backends[without].Address.Addr(), s.Backends[with].Address)
		return []*service.Service{s}
	}
	var ports []uint16
	for _, l := range at.listeners {
		ports = append(ports, l.Address.Port())
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	var all []*service.Service
	for _, port := range ports {
		all = append(all, d.atPort(s, port, len(ports) > 1))
	}
	return all
}

// atPort returns the part of a service that listens at a port.
func (d *decoder) atPort(s *service.Service, port uint16, several bool) *service.Service {
	c, at := *s, *d.at[s]
	if several {
		c.Name = fmt.Sprintf("%s:%d", s.Name, port)
	}
	at.listeners, at.listenerNodes = nil, nil
	for i, l := range d.at[s].listeners {
		if l.Address.Port() == port {
			at.listeners, at.listenerNodes = append(at.listeners, l), append(at.listenerNodes, d.at[s].listenerNodes[i])
		}
	}
	c.Listeners = slices.Clone(at.listeners)
	slices.SortFunc(c.Listeners, service.Listener.Compare)
	c.Backends = slices.Clone(s.Backends)
	for i, b := range c.Backends {
		c.Backends[i].Address = netip.AddrPortFrom(b.Address.Addr(), port)
	}
	d.at[&c], d.disabled[&c] = &at, d.disabled[s]
	return &c
}

// service reads one service and checks what concerns several of its keys.
func (d *decoder) service(n *yaml.Node) *service.Service {
	s := &service.Service{Balance: service.LeastLatency}
	at := &origin{file: d.file, name: n}
	d.at[s] = at
	seen := serviceSchema.decode(d, d.withDefaults(resolve(n)), s)
	if seen == nil {
		return s
	}
	if seen["name"] != nil {
		at.name = seen["name"]
	}
	at.health, at.forward = seen["health"], seen["forward"] != nil
	if at.health == nil {
		s.Health = defaultHealth(s)
	}
	if seen["breaker"] == nil {
		s.Breaker = defaultBreaker(s)
	}
	d.checkFamilies(seen["backends"], s)
	d.checkTogether(seen, s)
	return s
}

// The defaults of a breaker.
const (
	defaultFailures   = 3
	defaultEjection   = 10 * time.Second
	defaultMaxEjected = 50
)

// defaultBreaker is the breaker of a service that says nothing of one. Only TCP has
// connects that fail.
func defaultBreaker(s *service.Service) service.Breaker {
	if onlyUDP(s) {
		return service.Breaker{}
	}
	return service.Breaker{Failures: defaultFailures, Ejection: defaultEjection, MaxEjected: defaultMaxEjected}
}

// breaker reads a breaker, or the word that there is none, and refuses keys that
// say nothing because of another.
func (d *decoder) breaker(n *yaml.Node, s *service.Service) {
	if n.Kind == yaml.ScalarNode && n.Value == "off" {
		s.Breaker = service.Breaker{}
		return
	}
	if n.Kind != yaml.MappingNode {
		d.errorf(n, "want a mapping such as {failures: 3}, or off, found %s", found(n))
		return
	}
	s.Breaker = service.Breaker{Failures: defaultFailures, Ejection: defaultEjection, MaxEjected: defaultMaxEjected}
	seen := breakerSchema.decode(d, n, &s.Breaker)
	if seen == nil {
		return
	}
	if len(seen) == 0 {
		d.errorf(n, "breaker needs a key; without breaker the defaults hold, and the word off ends them")
	}
	if s.Breaker.Failures > 0 {
		return
	}
	s.Breaker.Ejection, s.Breaker.MaxEjected = 0, 0
	for _, key := range []string{"ejection", "maxEjected"} {
		if seen[key] != nil {
			d.errorf(seen[key], "%q says nothing with \"failures: 0\": nothing is ever ejected", key)
		}
	}
}

// checkTogether finds keys of a service that contradict each other.
func (d *decoder) checkTogether(seen map[string]*yaml.Node, s *service.Service) {
	if s.SlowStart > 0 && s.Balance == service.SourceHash {
		d.errorf(seen["slowStart"], "slowStart cannot be had with balance source-hash: a client has one place, now or never")
	}
	if !onlyUDP(s) {
		return
	}
	for key, what := range map[string]string{"connect": "sends no SYN", "keepalive": "has no keepalive"} {
		if seen[key] != nil {
			d.errorf(seen[key], "%q concerns TCP: a service whose listeners are all UDP %s", key, what)
		}
	}
	if seen["breaker"] != nil && s.Breaker != (service.Breaker{}) {
		d.errorf(seen["breaker"], "\"breaker\" counts TCP connections: a service whose listeners are all UDP has none")
	}
}

// backends reads the backends of a service.
func (d *decoder) backends(n *yaml.Node, to *service.Service) {
	to.Backends = make([]service.Backend, 0, len(n.Content))
	if at := d.at[to]; at != nil {
		at.backendNodes = make([]*yaml.Node, 0, len(n.Content))
	}
	d.list(n, "a list of backends, such as [192.0.2.11:3306]", func(e *yaml.Node) { d.backend(e, to) })
	if len(to.Backends) > maxBackends {
		d.errorf(n, "a service has at most %d backends, found %d", maxBackends, len(to.Backends))
	}
}

// backend reads the short or the long form and appends it to the service.
func (d *decoder) backend(n *yaml.Node, to *service.Service) {
	b := service.Backend{Weight: service.DefaultWeight}
	switch {
	case n.Kind == yaml.MappingNode && isAddress(n):
		d.errorf(n, "want %s, found a mapping; what begins with a bracket is written in quotes: \"[2001:db8::11]:3306\"", wantBackend)
	case n.Kind == yaml.SequenceNode:
		d.errorf(n, "want %s, found a list; what begins with a bracket is written in quotes: \"[2001:db8::11]:3306\"", wantBackend)
	case n.Kind == yaml.MappingNode:
		w := writtenBackend{Backend: b}
		backendSchema.decode(d, n, &w)
		if w.disabled {
			return
		}
		b = w.Backend
	default:
		b.Address = d.backendAddress(n)
	}
	to.Backends = append(to.Backends, b)
	if at := d.at[to]; at != nil {
		at.backendNodes = append(at.backendNodes, n)
	}
}

// isAddress reports whether YAML has taken [ADDRESS]:PORT for a mapping.
func isAddress(n *yaml.Node) bool {
	return len(n.Content) == 2 && n.Content[0].Kind == yaml.SequenceNode
}

// checkFamilies finds backends that no listener can use, listeners that no
// backend can serve, and backends that stand twice.
func (d *decoder) checkFamilies(list *yaml.Node, s *service.Service) {
	if list == nil || len(s.Listeners) == 0 {
		return
	}
	list = resolve(list)
	nodes := d.at[s].backendNodes
	var wanted, offered [2]bool
	for _, l := range s.Listeners {
		wanted[service.FamilyOf(l.Address.Addr()).Index()] = true
	}
	first := make(map[netip.AddrPort]int, len(s.Backends))
	for i, b := range s.Backends {
		if !b.Address.IsValid() {
			continue
		}
		f := service.FamilyOf(b.Address.Addr()).Index()
		offered[f] = true
		at := nodes[i]
		if !wanted[f] {
			d.errorf(at, "service %s: backend %s is %s but no listener is; give it a listener of that family",
				s.Name, b.Address, service.EachFamily[f])
		}
		if j, ok := first[b.Address]; ok {
			d.errorf(at, "service %s: backend %s already stands at line %d; give one of them the weight of both",
				s.Name, b.Address, nodes[j].Line)
			continue
		}
		first[b.Address] = i
	}
	for f := range service.EachFamily {
		if wanted[f] && !offered[f] && offered[1-f] {
			d.errorf(list, "service %s: a listener is %s but no backend is; give it a backend of that family",
				s.Name, service.EachFamily[f])
		}
	}
}

func onlyUDP(s *service.Service) bool {
	isTCP := func(l service.Listener) bool { return l.Protocol == service.TCP }
	return len(s.Listeners) > 0 && !slices.ContainsFunc(s.Listeners, isTCP)
}
