package config

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/pentad/pentad/service"
)

// The schema below is the one definition of pentad.yaml: the decoder reads with
// it and docs/configuration.md is written from it.

// maxBackends bounds the backends of one service.
const maxBackends = 100_000

// The defaults of a probe.
const (
	defaultInterval = 2 * time.Second
	defaultTimeout  = time.Second
	defaultRise     = 2
	defaultFall     = 2
	defaultPath     = "/"
	defaultExpect   = "200-399"
)

var fileSchema = schema[Config]{what: "the file", fields: []field[Config]{
	{
		key: "services", kind: "list of services",
		doc: "The services of this host. May be `[]`, and may be missing where there is a `source`.",
		set: func(d *decoder, n *yaml.Node, to *Config) {
			d.at = make(map[*service.Service]*origin, len(n.Content))
			to.Services = make([]*service.Service, 0, len(n.Content))
			d.list(n, "a list of services", func(e *yaml.Node) {
				to.Services = append(to.Services, d.service(e))
			})
		},
	},
	{
		key: "scope", kind: "mapping",
		doc: "Whose connections are translated.",
		set: func(d *decoder, n *yaml.Node, to *Config) { scopeSchema.decode(d, n, &to.Scope) },
	},
	{
		key: "source", kind: "mapping",
		doc: "Where services come from besides this file. A change takes effect when the agent restarts.",
		set: func(d *decoder, n *yaml.Node, to *Config) { sourceSchema.decode(d, n, &to.Source) },
	},
	{
		key: "api", kind: "mapping",
		doc: "Where metrics and health are served.",
		set: func(d *decoder, n *yaml.Node, to *Config) { apiSchema.decode(d, n, &to.API) },
	},
}}

var scopeSchema = schema[Scope]{what: "scope", fields: []field[Scope]{
	{
		key: "cgroup", kind: "path", fallback: "/",
		doc: "Only processes below this cgroup (v2) see the services. A socket belongs for life to the " +
			"cgroup in which it was created.",
		set: func(d *decoder, n *yaml.Node, to *Scope) {
			v, ok := d.text(n, "the path of a cgroup, such as /system.slice")
			if ok && (!strings.HasPrefix(v, "/") || slices.Contains(strings.Split(v, "/"), "..")) {
				d.errorf(n, "want the path of a cgroup below the root of its hierarchy, such as /system.slice, found %q", v)
				return
			}
			to.Cgroup = v
		},
	},
}}

var sourceSchema = schema[Source]{what: "source", fields: []field[Source]{
	{
		key: "kubernetes", kind: "mapping",
		doc: "This host is a node of a Kubernetes cluster and serves all its Services, to its processes and pods and to what arrives " +
			"from outside. `{}` is enough in a pod.", required: true,
		set: func(d *decoder, n *yaml.Node, to *Source) {
			to.Kubernetes = &Kubernetes{Health: netip.MustParseAddrPort(defaultNodeHealth)}
			kubernetesSchema.decode(d, n, to.Kubernetes)
		},
	},
}}

// defaultNodeHealth is where cloud load balancers look, because it is where
// kube-proxy answers (its --healthz-bind-address).
const defaultNodeHealth = "0.0.0.0:10256"

var kubernetesSchema = schema[Kubernetes]{what: "kubernetes", fields: []field[Kubernetes]{
	{
		key: "kubeconfig", kind: "path",
		doc: "How to reach the API server; without it the service account of the pod that pentad runs in.",
		set: func(d *decoder, n *yaml.Node, to *Kubernetes) {
			to.Kubeconfig, _ = d.text(n, "the path of a kubeconfig")
		},
	},
	{
		key: "node", kind: "name",
		doc: "The name of this host's Node; the environment variable NODE_NAME, else the host name, by default.",
		set: func(d *decoder, n *yaml.Node, to *Kubernetes) { to.Node, _ = d.text(n, "the name of a Node") },
	},
	{
		key: "nodePortAddresses", kind: "list of prefixes",
		doc: "NodePorts are served at the addresses of this host that lie in these prefixes, such as `[10.0.0.0/8]`; `[0.0.0.0/0, \"::/0\"]` is " +
			"all. Without it at the addresses that the Node says it has. Processes of the host itself reach them at the loopback, too.",
		set: func(d *decoder, n *yaml.Node, to *Kubernetes) { to.NodePortAddresses = d.prefixes(n) },
	},
	{
		key: "allowExternalIPs", kind: "list of prefixes",
		doc: "externalIPs in these prefixes are served like any address of a Service. Others are served to the outside only and never where they " +
			"are an address of a node: whoever may write a Service could draw connections of others to himself (CVE-2020-8554).",
		set: func(d *decoder, n *yaml.Node, to *Kubernetes) { to.AllowExternalIPs = d.prefixes(n) },
	},
	{
		key: "untracked", kind: "list of prefixes",
		doc: "The addresses of the pods of all nodes, such as `[10.244.0.0/16]`: connections between them are not tracked by the kernel (conntrack), " +
			"except those of pods whose packets had to be translated. They are set up faster and take no room in its table. Not for nodes where " +
			"something else filters the packets of pods by the state of their connections (`ct state`), as network policies made of nftables or " +
			"iptables do.",
		set: func(d *decoder, n *yaml.Node, to *Kubernetes) {
			to.Untracked = d.prefixes(n)
			if len(to.Untracked) > maxUntracked {
				d.errorf(n, "untracked has %d prefixes; at most %d, because every packet is compared with them", len(to.Untracked), maxUntracked)
			}
			slices.SortFunc(to.Untracked, netip.Prefix.Compare)
		},
	},
	{
		key: "health", kind: "ADDRESS:PORT", fallback: defaultNodeHealth,
		doc: "Address of `/healthz` and `/livez`, by which load balancers of clouds judge the node. The default is kube-proxy's.",
		set: func(d *decoder, n *yaml.Node, to *Kubernetes) {
			const want = "an address such as " + defaultNodeHealth
			v, ok := d.text(n, want)
			if !ok {
				return
			}
			at, err := netip.ParseAddrPort(v)
			if err != nil || at.Port() == 0 {
				d.errorf(n, "want %s, found %q", want, v)
				return
			}
			to.Health = at
		},
	},
}}

// maxUntracked bounds source.kubernetes.untracked.
const maxUntracked = 8

var apiSchema = schema[API]{what: "api", fields: []field[API]{
	{
		key: "listen", kind: "ADDRESS:PORT", fallback: "127.0.0.1:9464",
		doc: "Address of `/metrics` and `/healthz`. A change takes effect when the agent restarts.",
		set: func(d *decoder, n *yaml.Node, to *API) {
			if v, ok := d.text(n, "an address such as 127.0.0.1:9464"); ok {
				to.Listen, _ = d.address(n, v, "an address such as 127.0.0.1:9464")
			}
		},
	},
}}

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

var serviceSchema = schema[service.Service]{what: "a service", fields: []field[service.Service]{
	{
		key: "name", kind: "DNS label", required: true,
		doc: "Unique name: lower-case letters, digits and hyphens, at most 63 (RFC 1123, section 2.1).",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			v, ok := d.text(n, "a name such as orders-db")
			if ok && !dnsLabel.MatchString(v) {
				d.errorf(n, "want a DNS label: at most 63 lower-case letters, digits and hyphens, found %q", v)
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
	{
		key: "balance", kind: "word", fallback: "least-latency",
		doc: "`least-latency`: of two backends drawn by weight the one that has fewer connections times a lower latency, which is the " +
			"round trip of handshakes and the time from a request to the first byte of its answer. `least-connections`: the same " +
			"without latency. `random`: by weight, anew for every connection. `source-hash`: a client keeps its backend when " +
			"others come and go; the client is the source address that the socket bound, else its network namespace.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			if i, ok := d.word(n, service.Balances...); ok {
				to.Balance = service.Balance(i)
			}
		},
	},
	{
		key: "affinity", kind: "mapping",
		doc: "The same client (network namespace) keeps its backend.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) { affinitySchema.decode(d, n, to) },
	},
	{
		key: "keepalive", kind: "mapping",
		doc: "TCP keepalive, set when a socket connects, unless the application has set SO_KEEPALIVE itself.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) { keepaliveSchema.decode(d, n, &to.Keepalive) },
	},
	{
		key: "breaker", kind: "mapping or off",
		doc: "When the kernel keeps connections away from a backend by itself. Without this key it ejects backends of TCP services as " +
			"`{failures: 3, ejection: 10s, maxEjected: 50%}` says; `off`: never.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) { d.breaker(n, to) },
	},
	{
		key: "connect", kind: "mapping",
		doc: "How TCP connections are made.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) { connectSchema.decode(d, n, to) },
	},
	{
		key: "onDown", kind: "word", fallback: "reset",
		doc: "What happens to the connections to a backend that fails its probe or is removed. `reset`: they are closed at once, so that " +
			"clients connect anew; connected UDP sockets too. `keep`: they are left alone. Draining never resets.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			if i, ok := d.word(n, service.OnDowns...); ok {
				to.OnDown = service.OnDown(i)
			}
		},
	},
	{
		key: "slowStart", kind: "duration",
		doc: "How long a backend that is new among others, or comes back, takes less than its share, which grows from a tenth; 100ms to 1h.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			to.SlowStart = d.milliseconds(n, 100*time.Millisecond, service.MaxSlowStart)
		},
	},
	{
		key: "flows", kind: "true or false", fallback: "true",
		doc: "Whether `pentad flow` is told of the connections of this service.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) { to.Silent = !d.truth(n, true) },
	},
	{
		key: "backends", kind: "list of backends", required: true,
		doc: "The real addresses, each `ADDRESS:PORT` or a mapping. With none, or none usable, connections are refused at once.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			to.Backends = make([]service.Backend, 0, len(n.Content))
			d.list(n, "a list of backends, such as [192.0.2.11:3306]", func(e *yaml.Node) { d.backend(e, to) })
			if len(to.Backends) > maxBackends {
				d.errorf(n, "a service has at most %d backends, found %d", maxBackends, len(to.Backends))
			}
		},
	},
	{
		key: "health", kind: "mapping",
		doc: "How backends are probed.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) { d.health(n, to) },
	},
}}

var keepaliveSchema = schema[service.Keepalive]{what: "keepalive", fields: []field[service.Keepalive]{
	{
		key: "idle", kind: "duration", required: true,
		doc: "How long a connection is silent before it is probed, 1s to 9h6m7s, in whole seconds.",
		set: func(d *decoder, n *yaml.Node, to *service.Keepalive) { to.Idle = d.seconds(n, service.MaxKeepalive) },
	},
	{
		key: "interval", kind: "duration",
		doc: "Time between probes, 1s to 9h6m7s, in whole seconds; the host's setting (net.ipv4.tcp_keepalive_intvl) by default.",
		set: func(d *decoder, n *yaml.Node, to *service.Keepalive) {
			to.Interval = d.seconds(n, service.MaxKeepalive)
		},
	},
	{
		key: "probes", kind: "1 to 127",
		doc: "How many unanswered probes end the connection; the host's setting (net.ipv4.tcp_keepalive_probes) by default.",
		set: func(d *decoder, n *yaml.Node, to *service.Keepalive) {
			to.Probes, _ = d.integer(n, 1, service.MaxKeepaliveProbes)
		},
	},
}}

var breakerSchema = schema[service.Breaker]{what: "breaker", fields: []field[service.Breaker]{
	{
		key: "maxConnections", kind: "1 to 1073741824",
		doc: "Connections that a backend has at most; the next one goes elsewhere. When all have as many, it is refused.",
		set: func(d *decoder, n *yaml.Node, to *service.Breaker) {
			to.MaxConnections, _ = d.integer(n, 1, service.MaxConnections)
		},
	},
	{
		key: "failures", kind: "0 to 1000", fallback: "3",
		doc: "Failed TCP connects of one client in a row (refused, unreachable, unanswered past connect.timeout, or closed by the server " +
			"within a second without a byte) that eject a backend for that client; 0: none do. A client is a user in a network namespace and a cgroup.",
		set: func(d *decoder, n *yaml.Node, to *service.Breaker) {
			if v, ok := d.integer(n, 0, service.MaxFailures); ok {
				to.Failures = v
			}
		},
	},
	{
		key: "ejection", kind: "duration",
		doc: "How long an ejected backend gets no connections, 10ms to 1h; 10s by default. It doubles with each repetition, up to ten times. " +
			"Then one connection tries the backend: it comes back, or is ejected again.",
		set: func(d *decoder, n *yaml.Node, to *service.Breaker) {
			to.Ejection = d.milliseconds(n, 10*time.Millisecond, service.MaxEjection)
		},
	},
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
	{
		key: "timeout", kind: "duration", required: true,
		doc: "How long a SYN waits for its answer before it is sent again and counts as a failed connect, 10ms to 1m; 1s without this key. " +
			"The kernel rounds it up to its tick, 1ms to 10ms.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			to.ConnectTimeout = d.milliseconds(n, 10*time.Millisecond, service.MaxConnectTimeout)
		},
	},
}}

var affinitySchema = schema[service.Service]{what: "affinity", fields: []field[service.Service]{
	{
		key: "timeout", kind: "duration", required: true,
		doc: "How long after its last connection a client is remembered, 1s to 24h, in whole seconds.",
		set: func(d *decoder, n *yaml.Node, to *service.Service) {
			to.Affinity = d.seconds(n, 24*time.Hour)
		},
	},
}}

var backendSchema = schema[service.Backend]{what: "a backend", fields: []field[service.Backend]{
	{
		key: "address", kind: "ADDRESS:PORT", required: true,
		doc: "Where connections go.",
		set: func(d *decoder, n *yaml.Node, to *service.Backend) {
			if v, ok := d.text(n, wantBackend); ok {
				to.Address, _ = d.address(n, v, wantBackend)
			}
		},
	},
	{
		key: "weight", kind: "0 to 65535", fallback: "100",
		doc: "Share of new connections; 0 takes none.",
		set: func(d *decoder, n *yaml.Node, to *service.Backend) {
			if v, ok := d.integer(n, 0, service.MaxWeight); ok {
				to.Weight = uint32(v)
			}
		},
	},
	{
		key: "group", kind: "0 to 255", fallback: "0",
		doc: "Failover group: group 1 serves only when no backend of group 0 can.",
		set: func(d *decoder, n *yaml.Node, to *service.Backend) {
			if v, ok := d.integer(n, 0, service.MaxGroup); ok {
				to.Group = uint32(v)
			}
		},
	},
	{
		key: "zone", kind: "text",
		doc: "Where the backend stands; shown in lists. At most 63 bytes.",
		set: func(d *decoder, n *yaml.Node, to *service.Backend) {
			v, ok := d.text(n, "a zone such as b")
			if ok && len(v) > service.MaxZone {
				d.errorf(n, "a zone has at most %d bytes, found %d", service.MaxZone, len(v))
				return
			}
			to.Zone = v
		},
	},
}}

const wantBackend = "a backend ADDRESS:PORT, such as 192.0.2.11:3306"

var healthSchema = schema[service.Health]{what: "health", fields: []field[service.Health]{
	{
		key: "probe", kind: "word", fallback: "tcp",
		doc: "`tcp`, `tls`: a handshake. `http`: a request. `grpc`: Check of grpc.health.v1. `postgres`, `mysql` (and MariaDB), " +
			"`redis`: log in and ask for the role. `exec`: a program. `none`: every backend is taken for healthy, the default " +
			"of a service whose listeners are all UDP.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if i, ok := d.word(n, service.Probes...); ok {
				to.Probe = service.Probe(i)
			}
		},
	},
	{
		key: "interval", kind: "duration", fallback: "2s",
		doc: "Time between two probes of a backend, 100ms to 1h.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if v, ok := d.duration(n, 100*time.Millisecond, time.Hour); ok {
				to.Interval = v
			}
		},
	},
	{
		key: "timeout", kind: "duration", fallback: "1s",
		doc: "How long a probe may take, 10ms up to the interval; 1s, or the interval if that is shorter, by default.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if v, ok := d.duration(n, 10*time.Millisecond, time.Hour); ok {
				to.Timeout = v
			}
		},
	},
	{
		key: "rise", kind: "1 to 100", fallback: "2",
		doc: "Successes in a row that bring a backend up.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if v, ok := d.integer(n, 1, 100); ok {
				to.Rise = v
			}
		},
	},
	{
		key: "fall", kind: "1 to 100", fallback: "2",
		doc: "Failures in a row that take a backend down. The first probe of a new backend decides alone.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if v, ok := d.integer(n, 1, 100); ok {
				to.Fall = v
			}
		},
	},
	{
		key: "path", kind: "text",
		doc: "`http`: what is asked for, `/` by default. `grpc`: the service to ask about, the whole server by default.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if v, ok := d.text(n, "a path such as /healthz"); ok {
				to.Path = v
			}
		},
	},
	{
		key: "host", kind: "text",
		doc: "`http`: the Host header; the backend's address by default. With TLS: the name that the server's certificate must " +
			"have; any certificate will do by default.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if v, ok := d.text(n, "a host name"); ok {
				to.Host = v
			}
		},
	},
	{
		key: "expect", kind: "status codes",
		doc: "`http`: which status codes are a success, such as `200` or `200-299,404`; `200-399` by default.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			v, ok := d.text(n, "status codes such as 200-399")
			if !ok {
				return
			}
			if _, err := service.ParseStatusCodes(v); err != nil {
				d.errorf(n, "want status codes such as 200-399 or 200,204, found %q", v)
				return
			}
			to.Expect = v
		},
	},
	{
		key: "tls", kind: "true or false", fallback: "false",
		doc: "`http`, `grpc`, `postgres`, `mysql`, `redis`: speak TLS.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			to.TLS = d.truth(n, false)
		},
	},
	{
		key: "user", kind: "text",
		doc: "`postgres`, `mysql`: who logs in; required. `redis`: the ACL user.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if v, ok := d.text(n, "a user such as pentad"); ok {
				to.User = v
			}
		},
	},
	{
		key: "passwordFile", kind: "path",
		doc: "`postgres`, `mysql`, `redis`: a file whose first line is the password. Nobody but its owner may have any right to it. " +
			"It is read for every probe.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			v, ok := d.text(n, "the path of a file")
			if ok && !strings.HasPrefix(v, "/") {
				d.errorf(n, "want a path that begins with a slash, found %q", v)
				return
			}
			to.PasswordFile = v
		},
	},
	{
		key: "role", kind: "word", fallback: "any",
		doc: "`postgres`, `mysql`, `redis`: only a backend in this role is up: `primary`, `replica` or `any`. Two services with the same " +
			"backends and different roles are \"the primary\" and \"any replica\".",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			if i, ok := d.word(n, service.Roles...); ok {
				to.Role = service.Role(i)
			}
		},
	},
	{
		key: "command", kind: "list of words",
		doc: "`exec`: the program, by its full path, and its arguments. Exit code 0 is a success. PENTAD_ADDRESS and PENTAD_PORT name the " +
			"backend. At the time-out the program is killed with all its children.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			var argv []string
			d.list(n, "a list of words, such as [/usr/local/bin/check, --fast]", func(e *yaml.Node) {
				if e.Kind != yaml.ScalarNode || strings.Contains(e.Value, "\x00") {
					d.errorf(e, "want a word, found %s", found(e))
					return
				}
				argv = append(argv, e.Value)
			})
			if len(argv) > 0 && !strings.HasPrefix(argv[0], "/") {
				d.errorf(n, "want the full path of a program, found %q", argv[0])
			}
			to.Command = service.NewCommand(argv)
		},
	},
}}

// probeKeys are the keys that belong to some probes only.
var probeKeys = map[string][]service.Probe{
	"path":         {service.ProbeHTTP, service.ProbeGRPC},
	"host":         {service.ProbeHTTP, service.ProbeTLS, service.ProbeGRPC, service.ProbePostgres, service.ProbeMySQL, service.ProbeRedis},
	"expect":       {service.ProbeHTTP},
	"tls":          {service.ProbeHTTP, service.ProbeGRPC, service.ProbePostgres, service.ProbeMySQL, service.ProbeRedis},
	"user":         {service.ProbePostgres, service.ProbeMySQL, service.ProbeRedis},
	"passwordFile": {service.ProbePostgres, service.ProbeMySQL, service.ProbeRedis},
	"role":         {service.ProbePostgres, service.ProbeMySQL, service.ProbeRedis},
	"command":      {service.ProbeExec},
}

// service reads one service and checks what concerns several of its keys.
func (d *decoder) service(n *yaml.Node) *service.Service {
	s := &service.Service{Balance: service.LeastLatency}
	at := &origin{name: n}
	d.at[s] = at
	seen := serviceSchema.decode(d, n, s)
	if seen == nil {
		return s
	}
	if seen["name"] != nil {
		at.name = seen["name"]
	}
	if seen["health"] == nil {
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

// backend reads the short or the long form and appends it to the service.
func (d *decoder) backend(n *yaml.Node, to *service.Service) {
	b := service.Backend{Weight: service.DefaultWeight}
	if n.Kind == yaml.MappingNode {
		backendSchema.decode(d, n, &b)
	} else if v, ok := d.text(n, wantBackend); ok {
		b.Address, _ = d.address(n, v, wantBackend)
	}
	to.Backends = append(to.Backends, b)
}

// checkFamilies finds backends that no listener can use, listeners that no
// backend can serve, and backends that stand twice.
func (d *decoder) checkFamilies(list *yaml.Node, s *service.Service) {
	if list == nil || len(s.Listeners) == 0 {
		return
	}
	list = resolve(list)
	var wanted, offered [2]bool
	for _, l := range s.Listeners {
		wanted[family(l.Address.Addr().Is4())] = true
	}
	first := make(map[string]int, len(s.Backends))
	for i, b := range s.Backends {
		if !b.Address.IsValid() || b.Address.Port() == 0 {
			continue
		}
		f := family(b.Address.Addr().Is4())
		offered[f] = true
		at := list.Content[i]
		if !wanted[f] {
			d.errorf(at, "service %s: backend %s is %s but no listener is; give it a listener of that family",
				s.Name, b.Address, families[f])
		}
		key := b.Address.String()
		if j, ok := first[key]; ok {
			d.errorf(at, "service %s: backend %s already stands at line %d; give one of them the weight of both",
				s.Name, b.Address, list.Content[j].Line)
			continue
		}
		first[key] = i
	}
	for f := range families {
		if wanted[f] && !offered[f] && offered[1-f] {
			d.errorf(list, "service %s: a listener is %s but no backend is; give it a backend of that family",
				s.Name, families[f])
		}
	}
}

var families = [2]string{"IPv4", "IPv6"}

func family(v4 bool) int {
	if v4 {
		return 0
	}
	return 1
}

func defaultHealth(s *service.Service) service.Health {
	h := service.Health{Probe: service.ProbeTCP, Interval: defaultInterval, Timeout: defaultTimeout,
		Rise: defaultRise, Fall: defaultFall}
	if onlyUDP(s) {
		h.Probe = service.ProbeNone
	}
	return h
}

func onlyUDP(s *service.Service) bool {
	isTCP := func(l service.Listener) bool { return l.Protocol == service.TCP }
	return len(s.Listeners) > 0 && !slices.ContainsFunc(s.Listeners, isTCP)
}

// health reads the probe of a service and refuses keys of another probe.
func (d *decoder) health(n *yaml.Node, s *service.Service) {
	h := service.Health{Probe: service.ProbeTCP, Interval: defaultInterval, Timeout: defaultTimeout,
		Rise: defaultRise, Fall: defaultFall}
	seen := healthSchema.decode(d, n, &h)
	if seen == nil {
		return
	}
	if seen["timeout"] == nil {
		h.Timeout = min(h.Timeout, h.Interval)
	}
	if h.Timeout > h.Interval {
		d.errorf(seen["timeout"], "timeout %s is longer than interval %s; a probe must end before the next begins",
			short(h.Timeout), short(h.Interval))
	}
	d.checkProbe(n, seen, &h)
	s.Health = h
}

// checkProbe finds keys that another probe has, keys that this one needs, and
// contradictions; then it fills in the defaults of the probe.
func (d *decoder) checkProbe(n *yaml.Node, seen map[string]*yaml.Node, h *service.Health) {
	for key, probes := range probeKeys {
		if seen[key] == nil || slices.Contains(probes, h.Probe) {
			continue
		}
		words := make([]string, len(probes))
		for i, p := range probes {
			words[i] = p.String()
		}
		d.errorf(seen[key], "%q belongs to the probes %s; this probe is %s", key, strings.Join(words, ", "), h.Probe)
	}
	if h.Host != "" && !h.TLS && h.Probe != service.ProbeHTTP && h.Probe != service.ProbeTLS &&
		slices.Contains(probeKeys["host"], h.Probe) {
		d.errorf(seen["host"], "\"host\" is the name in the certificate; without \"tls: true\" there is none")
	}
	switch h.Probe {
	case service.ProbeHTTP:
		if seen["path"] == nil {
			h.Path = defaultPath
		}
		if h.Expect == "" {
			h.Expect = defaultExpect
		}
		if h.Path != "" && !strings.HasPrefix(h.Path, "/") {
			d.errorf(seen["path"], "want a path that begins with a slash, found %q", h.Path)
		}
	case service.ProbePostgres, service.ProbeMySQL:
		if seen["user"] == nil {
			d.errorf(n, "the %s probe needs the key \"user\"", h.Probe)
		}
	case service.ProbeExec:
		if seen["command"] == nil || len(seen["command"].Content) == 0 {
			d.errorf(n, "the exec probe needs the key \"command\", such as [/usr/local/bin/check]")
		}
	}
}

// Key is one key of pentad.yaml, for documentation.
type Key struct {
	Path     string // "services[].health.path"
	Kind     string // "duration"
	Default  string // empty: none
	Required bool
	Doc      string
}

// Keys returns every key of pentad.yaml in the order of the documentation.
func Keys() []Key {
	keys := fileSchema.describe("")
	nested := map[string]func(string) []Key{
		"services":             serviceSchema.describe,
		"services[].affinity":  affinitySchema.describe,
		"services[].keepalive": keepaliveSchema.describe,
		"services[].breaker":   breakerSchema.describe,
		"services[].connect":   connectSchema.describe,
		"services[].backends":  backendSchema.describe,
		"services[].health":    healthSchema.describe,
		"scope":                scopeSchema.describe,
		"source":               sourceSchema.describe,
		"source.kubernetes":    kubernetesSchema.describe,
		"api":                  apiSchema.describe,
	}
	for i := 0; i < len(keys); i++ {
		if describe := nested[keys[i].Path]; describe != nil {
			path := keys[i].Path + "."
			if strings.HasPrefix(keys[i].Kind, "list") {
				path = keys[i].Path + "[]."
			}
			keys = slices.Insert(keys, i+1, describe(path)...)
		}
	}
	return keys
}

func (s *schema[T]) describe(prefix string) []Key {
	keys := make([]Key, len(s.fields))
	for i, f := range s.fields {
		keys[i] = Key{prefix + f.key, f.kind, f.fallback, f.required, f.doc}
	}
	return keys
}
