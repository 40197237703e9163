package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/service"
)

func TestDefaults(t *testing.T) {
	c, err := Parse("f", []byte(`services:
- name: orders-db
  listen: [10.96.0.10:3306]
  backends:
  - 192.0.2.11:3306
  - address: 192.0.2.12:3306
    weight: 50
    group: 1
    zone: b
`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		Services: []*service.Service{{
			Name:      "orders-db",
			Source:    service.SourceFile,
			Balance:   service.LeastLatency,
			Listeners: []service.Listener{{Address: netip.MustParseAddrPort("10.96.0.10:3306"), Protocol: service.TCP}},
			Backends: []service.Backend{
				{Address: netip.MustParseAddrPort("192.0.2.11:3306"), Weight: 100},
				{Address: netip.MustParseAddrPort("192.0.2.12:3306"), Weight: 50, Group: 1, Zone: "b"},
			},
			Health:  service.Health{Probe: service.ProbeTCP, Interval: 2 * time.Second, Timeout: time.Second, Rise: 2, Fall: 2},
			Breaker: service.Breaker{Failures: 3, Ejection: 10 * time.Second, MaxEjected: 50},
			Forward: service.ForwardNone,
		}},
		Scope: Scope{Cgroup: "/"},
		API:   API{Listen: netip.MustParseAddrPort("127.0.0.1:9464")},
		Guard: 50,
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("have %+v, want %+v", c, want)
	}
}

func TestEverything(t *testing.T) {
	c, err := Parse("f", []byte(`
services:
- name: web
  listen: ["[2001:db8::10]:80", 10.96.0.1:80, 10.96.0.1:80/udp, 10.96.0.1:81/tcp]
  balance: source-hash
  affinity: {timeout: 3h}
  keepalive: {idle: 20s, interval: 5s, probes: 3}
  backends: ["[2001:db8::1]:8080", 192.0.2.1:8080]
  health: {probe: http, interval: 5s, timeout: 500ms, rise: 1, fall: 5, path: /healthz, host: shop.example, expect: "200,204"}
  breaker: {maxConnections: 500, failures: 3, ejection: 1s, maxEjected: 30%}
  connect: {timeout: 200ms}
  onDown: keep
  flows: false
- {name: dns, listen: [10.96.0.53:53/udp], backends: []}
- {name: db, listen: [10.96.0.10:3306], breaker: {failures: 5}, slowStart: 10s, backends: []}
scope: {cgroup: /system.slice}
api: {listen: "[::1]:9000"}
`))
	if err != nil {
		t.Fatal(err)
	}
	web := c.Services[0]
	var listeners []string
	for _, l := range web.Listeners {
		listeners = append(listeners, l.String())
	}
	if want := "10.96.0.1:80 10.96.0.1:80/udp 10.96.0.1:81 [2001:db8::10]:80"; strings.Join(listeners, " ") != want {
		t.Errorf("listeners %v, want %s", listeners, want)
	}
	if want := (service.Keepalive{Idle: 20 * time.Second, Interval: 5 * time.Second, Probes: 3}); web.Keepalive != want {
		t.Errorf("keepalive %+v, want %+v", web.Keepalive, want)
	}
	if web.Affinity != 3*time.Hour || web.Balance != service.SourceHash {
		t.Errorf("web is %+v", web)
	}
	if want := (service.Health{Probe: service.ProbeHTTP, Interval: 5 * time.Second, Timeout: 500 * time.Millisecond, Rise: 1, Fall: 5,
		Path: "/healthz", Host: "shop.example", Expect: "200,204"}); web.Health != want {
		t.Errorf("health %+v, want %+v", web.Health, want)
	}
	if want := (service.Breaker{MaxConnections: 500, Failures: 3, Ejection: time.Second, MaxEjected: 30}); web.Breaker != want {
		t.Errorf("breaker %+v, want %+v", web.Breaker, want)
	}
	if web.ConnectTimeout != 200*time.Millisecond || web.OnDown != service.Keep || !web.Silent {
		t.Errorf("web is %+v", web)
	}
	db := c.Services[2]
	if want := (service.Breaker{Failures: 5, Ejection: 10 * time.Second, MaxEjected: 50}); db.Breaker != want || db.SlowStart != 10*time.Second {
		t.Errorf("db is %+v", db)
	}
	if p := c.Services[1].Health.Probe; p != service.ProbeNone {
		t.Errorf("a service with UDP listeners only has the probe %s", p)
	}
	if c.Scope.Cgroup != "/system.slice" || c.API.Listen.Port() != 9000 {
		t.Errorf("scope %+v, api %+v", c.Scope, c.API)
	}
}

// What a service says of its breaker, and what holds then.
func TestBreaker(t *testing.T) {
	def := service.Breaker{Failures: 3, Ejection: 10 * time.Second, MaxEjected: 50}
	for text, want := range map[string]service.Breaker{
		"listen: [192.0.2.1:80]":                                            def,
		"listen: [192.0.2.1:80, 192.0.2.1:53/udp]":                          def,
		"listen: [192.0.2.1:53/udp]":                                        {},
		"listen: [192.0.2.1:53/udp], breaker: off":                          {},
		"listen: [192.0.2.1:80], breaker: off":                              {},
		"listen: [192.0.2.1:80], breaker: {maxConnections: 5}":              {MaxConnections: 5, Failures: 3, Ejection: 10 * time.Second, MaxEjected: 50},
		"listen: [192.0.2.1:80], breaker: {maxConnections: 5, failures: 0}": {MaxConnections: 5},
		"listen: [192.0.2.1:80], breaker: {ejection: 1s}":                   {Failures: 3, Ejection: time.Second, MaxEjected: 50},
		"listen: [192.0.2.1:80], breaker: {failures: 9, maxEjected: 100%}":  {Failures: 9, Ejection: 10 * time.Second, MaxEjected: 100},
	} {
		c, err := Parse("f", []byte("services:\n- {name: a, backends: [], "+text+"}\n"))
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if have := c.Services[0].Breaker; have != want {
			t.Errorf("%s: %+v, want %+v", text, have, want)
		}
	}
}

// Each file has exactly these errors.
func TestKubernetes(t *testing.T) {
	c, err := Parse("f", []byte(`
source:
  kubernetes:
    kubeconfig: /etc/kubernetes/pentad.conf
    node: n1
    nodePortAddresses: [10.0.0.0/8]
    allowExternalIPs: [198.51.100.0/24, "2001:db8::/32"]
    untracked: ["2001:db8:244::/48", 10.244.0.0/16]
    health: 127.0.0.1:10256
`))
	if err != nil {
		t.Fatal(err)
	}
	prefixes := func(all ...string) (out []netip.Prefix) {
		for _, p := range all {
			out = append(out, netip.MustParsePrefix(p))
		}
		return out
	}
	want := &Kubernetes{
		Kubeconfig: "/etc/kubernetes/pentad.conf", Node: "n1", Health: netip.MustParseAddrPort("127.0.0.1:10256"),
		NodePortAddresses: prefixes("10.0.0.0/8"), AllowExternalIPs: prefixes("198.51.100.0/24", "2001:db8::/32"),
		Untracked: prefixes("10.244.0.0/16", "2001:db8:244::/48"),
	}
	if have := c.Source.Kubernetes; !have.Equal(want) {
		t.Errorf("have %+v, want %+v", have, want)
	}
	many := strings.TrimSuffix(strings.Repeat("10.0.0.0/8, ", maxUntracked+1), ", ")
	for text, says := range map[string]string{
		"{untracked: 10.244.0.0/16}":       "f:2:27: ",
		"{untracked: [10.244.0.1/16]}":     "without bits behind its length",
		"{untracked: [" + many + "]}":      "at most 8",
		"{allowExternalIPs: [everything]}": `found "everything"`,
		"{kubeConfig: x}":                  `did you mean "kubeconfig"`,
	} {
		if _, err := Parse("f", []byte("source:\n  kubernetes: "+text+"\n")); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", text, err, says)
		}
	}
}

func TestErrors(t *testing.T) {
	one := func(rest string) string {
		return "services:\n- name: a\n  listen: [192.0.2.1:80]\n  backends: [10.0.0.1:80]\n" + rest
	}
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", `f:1:1: the file is empty; a host without services is written "services: []"`},
		{"comment only", "# nothing\n", `f:1:1: the file is empty; a host without services is written "services: []"`},
		{"not YAML", "services:\n\t- a\n", `f:2:1: this is not YAML: a tab; YAML is indented with spaces`},
		{"a list", "- a\n", `f:1:1: the file must be a mapping with keys such as "services", found a list`},
		{"no services", "scope: {}\n", `f:1:1: the file needs the key "services" or "source"; a host without services is written "services: []"`},
		{"unknown key", "servces: []\n", "f:1:1: unknown key \"servces\" in the file; did you mean \"services\"?"},
		{"unlike any key", one("xyzzy: 1\n"), `f:5:1: unknown key "xyzzy" in the file; known are services, defaults, include, scope, source, proxies, upstreams, forwards, capture, director, realServer, announce, pods, host, api, guard`},
		{"twice", one("scope: {}\nscope: {}\n"), `f:6:1: key "scope" stands twice in the file; the first is at line 5`},
		{"wrong types", "services:\n- 7\n- name: [x]\n  listen: 192.0.2.1:80\n  backends: {}\n",
			"f:2:3: a service must be a mapping with keys such as \"name\", found \"7\"\n" +
				"f:3:9: want a name such as orders-db, found a list\n" +
				"f:4:11: want a list of listeners, such as [10.96.0.10:3306], found \"192.0.2.1:80\"\n" +
				"f:5:13: want a list of backends, such as [192.0.2.11:3306], found a mapping"},
		{"missing", "services:\n- {}\n", "f:2:3: a service needs the key \"name\": DNS label\n" +
			"f:2:3: a service needs the key \"listen\": list of VIP:PORT[/tcp|udp]\nf:2:3: a service needs the key \"backends\": list of backends"},
		{"bad name", "services:\n- {name: Orders_DB, listen: [192.0.2.1:80], backends: []}\n",
			`f:2:10: want a DNS label: at most 63 lower-case letters, digits and hyphens, found "Orders_DB"`},
		{"listeners", "services:\n- name: a\n  backends: []\n  listen:\n  - 192.0.2.1\n  - db.example:80\n  - 192.0.2.1:0\n  - 192.0.2.1:80/udb\n  - 0.0.0.0:80\n  - '[::ffff:192.0.2.1]:80'\n  - 224.0.0.1:80\n  - 192.0.2.1:http\n  - 192.0.2.1:99999\n",
			"f:5:5: want a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp, found \"192.0.2.1\"; the port is missing: 192.0.2.1:80\n" +
				"f:6:5: want a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp, found \"db.example:80\"; names are not resolved, write the IP address\n" +
				"f:7:5: 192.0.2.1:0 is not a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp: port 0 cannot be connected to\n" +
				"f:8:5: want protocol tcp or udp, found \"udb\"; did you mean \"udp\"?\n" +
				"f:9:5: 0.0.0.0:80 is not a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp: the unspecified address cannot be connected to\n" +
				"f:10:5: [::ffff:192.0.2.1]:80 is not a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp: write it as IPv4: 192.0.2.1:80\n" +
				"f:11:5: 224.0.0.1:80 is not a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp: a multicast or broadcast address has no single owner\n" +
				"f:12:5: want a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp, found \"192.0.2.1:http\"; a port is a number from 1 to 65535\n" +
				"f:13:5: want a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp, found \"192.0.2.1:99999\"; a port is a number from 1 to 65535"},
		{"no listener", "services:\n- {name: a, listen: [], backends: []}\n", "f:2:21: a service needs at least one listener, such as 10.96.0.10:3306"},
		{"duplicates", "services:\n- {name: a, listen: [192.0.2.1:80], backends: []}\n- {name: a, listen: [192.0.2.1:80/tcp], backends: [10.0.0.1:1, 10.0.0.1:1]}\n",
			"f:3:10: service a is already defined at line 2; names are unique\n" +
				"f:3:22: service a: listener 192.0.2.1:80 already belongs to service a\n" +
				"f:3:64: service a: backend 10.0.0.1:1 already stands at line 3; give one of them the weight of both"},
		{"families", "services:\n- {name: a, listen: [192.0.2.1:80], backends: [10.0.0.1:80, '[2001:db8::1]:80']}\n- {name: b, listen: [192.0.2.2:80, '[2001:db8::2]:80'], backends: [10.0.0.1:80]}\n",
			"f:2:61: service a: backend [2001:db8::1]:80 is IPv6 but no listener is; give it a listener of that family\n" +
				"f:3:67: service b: a listener is IPv6 but no backend is; give it a backend of that family"},
		{"values", one("  balance: randm\n  affinity: {timeout: 1.5s}\n  health: {probe: tpc, interval: 1ms, timeout: x, rise: 0, fall: two}\n"),
			"f:5:12: want random, source-hash, least-connections or least-latency, found \"randm\"; did you mean \"random\"?\n" +
				"f:6:23: want whole seconds, found \"1.5s\"\n" +
				"f:7:19: want none, tcp, tls, http, grpc, postgres, mysql, redis or exec, found \"tpc\"; did you mean \"tcp\"?\n" +
				"f:7:34: want a duration from 100ms to 1h, such as 2s, found \"1ms\"\n" +
				"f:7:48: want a duration from 10ms to 1h, such as 2s, found \"x\"; the units are ms, s, m and h, as in 500ms or 1h30m\n" +
				"f:7:57: want a whole number from 1 to 100, found \"0\"\n" +
				"f:7:66: want a whole number from 1 to 100, found \"two\""},
		{"backend values", "services:\n- name: a\n  listen: [192.0.2.1:80]\n  backends:\n  - {address: 10.0.0.1:80, weight: -1, group: 256}\n  - {weight: 1}\n  - {address: 10.0.0.2:80, wieght: 5}\n  - {address: 10.0.0.3:80, weight: 65536, zone: " + strings.Repeat("z", 64) + "}\n",
			"f:5:36: want a whole number from 0 to 65535, found \"-1\"\nf:5:47: want a whole number from 0 to 255, found \"256\"\n" +
				"f:6:5: a backend needs the key \"address\": ADDRESS:PORT\nf:7:28: unknown key \"wieght\" in a backend; did you mean \"weight\"?\n" +
				"f:8:36: want a whole number from 0 to 65535, found \"65536\"\nf:8:49: a zone has at most 63 bytes, found 64"},
		{"timeout beyond interval", one("  health: {interval: 1s, timeout: 2s}\n"), "f:5:35: timeout 2s is longer than interval 1s; a probe must end before the next begins"},
		{"timeout beyond the default interval", one("  health: {timeout: 3s}\n"), "f:5:21: timeout 3s is longer than interval 2s; a probe must end before the next begins"},
		{"keys of another probe", one("  health: {path: /x, expect: '200'}\n"), "f:5:18: \"path\" belongs to the probes http, grpc; this probe is tcp\nf:5:30: \"expect\" belongs to the probes http; this probe is tcp"},
		{"http", one("  health: {probe: http, path: x, expect: 99}\n"), "f:5:31: want a path that begins with a slash, found \"x\"\nf:5:42: want status codes such as 200-399 or 200,204, found \"99\""},
		{"keepalive", one("  keepalive: {interval: 10h, probes: 128}\n"),
			"f:5:14: keepalive needs the key \"idle\": duration\nf:5:25: want a duration from 1s to 9h6m7s, such as 2s, found \"10h\"\nf:5:38: want a whole number from 1 to 127, found \"128\""},
		{"breaker", one("  breaker: {maxConnections: 0, failures: x, ejection: 1ms, maxEjected: 0%}\n"),
			"f:5:29: want a whole number from 1 to 1073741824, found \"0\"\nf:5:42: want a whole number from 0 to 1000, found \"x\"\n" +
				"f:5:55: want a duration from 10ms to 1h, such as 2s, found \"1ms\"\nf:5:72: want a percentage from 1% to 100%, found \"0%\""},
		{"breaker that never ejects", one("  breaker: {failures: 0, ejection: 1s, maxEjected: 10%}\n"),
			"f:5:36: \"ejection\" says nothing with \"failures: 0\": nothing is ever ejected\n" +
				"f:5:52: \"maxEjected\" says nothing with \"failures: 0\": nothing is ever ejected"},
		{"breaker of nothing", one("  breaker: {}\n"), "f:5:12: breaker needs a key; without breaker the defaults hold, and the word off ends them"},
		{"breaker of a word", one("  breaker: never\n"), "f:5:12: want a mapping such as {failures: 3}, or off, found \"never\""},
		{"connect", one("  connect: {timeout: 1.5ms}\n  onDown: rest\n  flows: maybe\n  slowStart: 10ms\n"),
			"f:5:22: want a duration from 10ms to 1m, such as 2s, found \"1.5ms\"\nf:6:11: want reset or keep, found \"rest\"; did you mean \"reset\"?\n" +
				"f:7:10: want true or false, found \"maybe\"\nf:8:14: want a duration from 100ms to 1h, such as 2s, found \"10ms\""},
		{"slow start by hash", one("  balance: source-hash\n  slowStart: 10s\n"),
			"f:6:14: slowStart cannot be had with balance source-hash: a client has one place, now or never"},
		{"TCP keys for UDP", "services:\n- name: a\n  listen: [192.0.2.1:53/udp]\n  backends: [10.0.0.1:53]\n  connect: {timeout: 1s}\n  keepalive: {idle: 1s}\n  breaker: {failures: 1}\n",
			"f:5:12: \"connect\" concerns TCP: a service whose listeners are all UDP sends no SYN\n" +
				"f:6:14: \"keepalive\" concerns TCP: a service whose listeners are all UDP has no keepalive\n" +
				"f:7:12: \"breaker\" counts TCP connections: a service whose listeners are all UDP has none"},
		{"role with a tcp probe", one("  health: {role: primary}\n"), "f:5:18: \"role\" belongs to the probes postgres, mysql, redis; this probe is tcp"},
		{"postgres", one("  health: {probe: postgres, role: primry, host: db.example, passwordFile: secret}\n"),
			"f:5:11: the postgres probe needs the key \"user\"\nf:5:35: want any, primary or replica, found \"primry\"; did you mean \"primary\"?\n" +
				"f:5:49: \"host\" is the name in the certificate; without \"tls: true\" there is none\nf:5:75: want a path that begins with a slash, found \"secret\""},
		{"exec", one("  health: {probe: exec, command: [check], tls: yes}\n"),
			"f:5:34: want the full path of a program, found \"check\"\nf:5:48: want true or false, found \"yes\"\nf:5:48: \"tls\" belongs to the probes http, grpc, postgres, mysql, redis; this probe is exec"},
		{"exec of nothing", one("  health: {probe: exec}\n"), "f:5:11: the exec probe needs the key \"command\", such as [/usr/local/bin/check]"},
		{"scope", one("scope: {cgroup: system.slice}\napi: {listen: here}\n"),
			"f:5:17: want the path of a cgroup below the root of its hierarchy, such as /system.slice, found \"system.slice\"\nf:6:15: want an address such as 127.0.0.1:9464, found \"here\""},
		{"scope leaves", one("scope: {cgroup: /a/../..}\n"), "f:5:17: want the path of a cgroup below the root of its hierarchy, such as /system.slice, found \"/a/../..\""},
	} {
		_, err := Parse("f", []byte(c.text))
		if have := fmt.Sprint(err); have != c.want {
			t.Errorf("%s:\nhave %s\nwant %s", c.name, have, c.want)
		}
		var all Errors
		if !errors.As(err, &all) {
			t.Errorf("%s: the error is a %T", c.name, err)
		}
	}
}

// A short interval shortens a timeout that nobody set.
func TestShortInterval(t *testing.T) {
	c, err := Parse("f", []byte("services:\n- {name: a, listen: [192.0.2.1:80], backends: [], health: {interval: 500ms}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if h := c.Services[0].Health; h.Timeout != 500*time.Millisecond {
		t.Errorf("health is %+v", h)
	}
}

func TestAnchors(t *testing.T) {
	c, err := Parse("f", []byte("services:\n- {name: a, listen: [192.0.2.1:80], backends: &b [10.0.0.1:80], health: &h {interval: 3s}}\n- {name: b, listen: [192.0.2.2:80], backends: *b, health: *h}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if b := c.Services[1]; len(b.Backends) != 1 || b.Health.Interval != 3*time.Second {
		t.Errorf("b is %+v", b)
	}
}

func TestLoad(t *testing.T) {
	if _, err := Load(filepath.Join(t.TempDir(), "none.yaml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

// Whatever the text, Parse ends, and either errors with a place or makes a
// configuration whose services are complete.
func FuzzParse(f *testing.F) {
	f.Add("services:\n- {name: a, listen: [192.0.2.1:80/udp], backends: [{address: 10.0.0.1:80, weight: 3}]}\n")
	f.Add("services: &a [*a]\n")
	f.Add("services:\n- &x {name: a, listen: &l [192.0.2.1:80], backends: *l, health: *x}\n")
	f.Add("services: []\nscope: {cgroup: /}\napi: {listen: '[::1]:1'}\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse("f", []byte(text))
		if err != nil {
			var all Errors
			if !errors.As(err, &all) || len(all) == 0 {
				t.Fatalf("error %T: %v", err, err)
			}
			for _, e := range all {
				if e.Line < 1 || e.Column < 1 || e.Message == "" {
					t.Fatalf("an error without a place: %+v", e)
				}
			}
			return
		}
		for _, s := range c.Services {
			if s.Name == "" || len(s.Listeners) == 0 {
				t.Fatalf("incomplete: %+v", s)
			}
			for _, b := range s.Backends {
				if !b.Address.IsValid() || b.Address.Port() == 0 {
					t.Fatalf("backend without an address: %+v", s)
				}
			}
		}
	})
}
