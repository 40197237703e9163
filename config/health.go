package config

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// The defaults of a probe.
const (
	defaultInterval = 2 * time.Second
	defaultTimeout  = time.Second
	defaultRise     = 2
	defaultFall     = 2
	defaultPath     = "/"
	defaultExpect   = "200-399"
)

var healthSchema = schema[service.Health]{what: "health", fields: []field[service.Health]{
	word("probe",
		"`tcp`, `tls`: a handshake. `http`: a request. `grpc`: Check of grpc.health.v1. `postgres`, `mysql` (and MariaDB), "+
			"`redis`: log in and ask for the role. `exec`: a program. `none`: every backend is taken for healthy, the default "+
			"of a service whose listeners are all UDP.",
		service.Probes, func(to *service.Health, i int) { to.Probe = service.Probe(i) }).or("tcp"),
	span("interval", "Time between two probes of a backend, 100ms to 1h.",
		100*time.Millisecond, time.Hour, 1, func(to *service.Health, v time.Duration) { to.Interval = v }).or("2s"),
	span("timeout", "How long a probe may take, 10ms up to the interval; 1s, or the interval if that is shorter, by default.",
		10*time.Millisecond, time.Hour, 1, func(to *service.Health, v time.Duration) { to.Timeout = v }).or("1s"),
	number("rise", "1 to 100", "Successes in a row that bring a backend up.",
		1, 100, func(to *service.Health, v int) { to.Rise = v }).or("2"),
	number("fall", "1 to 100", "Failures in a row that take a backend down. The first probe of a new backend decides alone.",
		1, 100, func(to *service.Health, v int) { to.Fall = v }).or("2"),
	number("port", "1 to 65535", "Another port to probe than that of the backend.",
		1, 65535, func(to *service.Health, v int) { to.Port = uint16(v) }),
	text("path", "text", "`http`: what is asked for, `/` by default. `grpc`: the service to ask about, the whole server by default.",
		"a path such as /healthz", func(to *service.Health, v string) { to.Path = v }),
	text("host", "text",
		"`http`: the Host header; the backend's address by default. With TLS: the name that the server's certificate must "+
			"have; any certificate will do by default.",
		"a host name", func(to *service.Health, v string) { to.Host = v }),
	{
		key: "expect", kind: "status codes",
		doc: "`http`: which status codes are a success, such as `200` or `200-299,404`; `200-399` by default.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			v, ok := d.text(n, "status codes such as 200-399")
			if !ok {
				return
			}
			if _, err := service.ParseStatusCodes(v); err != nil {
				hint := ""
				if len(v) == 3 && strings.EqualFold(v[1:], "xx") && v[0] >= '1' && v[0] <= '5' {
					hint = fmt.Sprintf("; did you mean %c00-%c99?", v[0], v[0])
				}
				d.errorf(n, "want status codes such as 200-399 or 200,204, found %q%s", shorten(v), hint)
				return
			}
			to.Expect = v
		},
	},
	truth("tls", "`http`, `grpc`, `postgres`, `mysql`, `redis`: speak TLS.",
		func(to *service.Health, v bool) { to.TLS = v }).or("false"),
	text("user", "text", "`postgres`, `mysql`: who logs in; required. `redis`: the ACL user.",
		"a user such as pentad", func(to *service.Health, v string) { to.User = v }),
	{
		key: "passwordFile", kind: "path",
		doc: "`postgres`, `mysql`, `redis`: a file whose first line is the password. Nobody but its owner may have any right to it. " +
			"It is read for every probe.",
		set: func(d *decoder, n *yaml.Node, to *service.Health) {
			v, ok := d.text(n, "the path of a file")
			if ok && !strings.HasPrefix(v, "/") {
				d.errorf(n, "want a path that begins with a slash, found %q", shorten(v))
				return
			}
			to.PasswordFile = v
		},
	},
	word("role",
		"`postgres`, `mysql`, `redis`: only a backend in this role is up: `primary`, `replica` or `any`. Two services with the same "+
			"backends and different roles are \"the primary\" and \"any replica\".",
		service.Roles, func(to *service.Health, i int) { to.Role = service.Role(i) }).or("any"),
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
				d.errorf(n, "want the full path of a program, found %q", shorten(argv[0]))
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

func defaultHealth(s *service.Service) service.Health {
	h := service.Health{Probe: service.ProbeTCP, Interval: defaultInterval, Timeout: defaultTimeout,
		Rise: defaultRise, Fall: defaultFall}
	if onlyUDP(s) {
		h.Probe = service.ProbeNone
	}
	return h
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
			Duration(h.Timeout), Duration(h.Interval))
	}
	d.checkProbe(n, seen, &h)
	s.Health = h
}

// checkProbe finds keys that another probe has, keys that this one needs, and
// contradictions; then it fills in the defaults of the probe.
func (d *decoder) checkProbe(n *yaml.Node, seen map[string]*yaml.Node, h *service.Health) {
	if seen["probe"] != nil && !slices.Contains(service.Probes, resolve(seen["probe"]).Value) {
		return // nobody knows which keys belong to it
	}
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
			d.errorf(seen["path"], "want a path that begins with a slash, found %q", shorten(h.Path))
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
