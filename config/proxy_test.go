package config

import (
	"fmt"
	"strings"
	"testing"
)

func TestProxies(t *testing.T) {
	const text = `
proxies:
- name: out
  protocol: [socks5, http]
  listen: [127.0.0.1:1080, '[::1]:1080']
  users: {file: /etc/pentad/users}
  timeouts: {idle: 10m}
  rules:
  - {domains: [.Corp.Example, one.example.], ports: [443, 8000-8999], via: [jump, corp]}
  - {destinations: [10.0.0.0/8], users: [alice], via: corp}
  - {via: direct}
- {name: in, protocol: transparent, listen: 127.0.0.1:15001}
upstreams:
- {name: jump, http: {address: proxy.example:3128, tls: true}}
- {name: corp, socks5: {address: 192.0.2.5:1080, user: me, passwordFile: /etc/pentad/corp}}
`
	c, err := Parse("f", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	const want = "[{out [socks5 http] [127.0.0.1:1080 [::1]:1080] /etc/pentad/users [] [] false " +
		"[{[] [{443 443} {8000 8999}] [.corp.example one.example] [] [] [jump corp]} {[10.0.0.0/8] [] [] [] [alice] [corp]} {[] [] [] [] [] [direct]}] false false  " +
		"20000 5000 10s 10s 10m0s 2m0s 5s} {in [transparent] [127.0.0.1:15001]  [] [] false [] false false  20000 5000 10s 10s 1h0m0s 2m0s 5s}]"
	if have := fmt.Sprint(c.Proxies); have != want {
		t.Errorf("have %s\nwant %s", have, want)
	}
	if have := fmt.Sprint(c.Upstreams); have != "[{jump http proxy.example:3128   true []   false  0s 0} {corp socks5 192.0.2.5:1080 me /etc/pentad/corp false []   false  0s 0}]" {
		t.Errorf("upstreams are %s", have)
	}
	if missing := c.CheckHost("/sys/fs/cgroup"); len(missing) != 2 || !strings.HasPrefix(missing[0].Error(), "f:3:3: proxy out: there is no file of users /etc/pentad/users on this host") {
		t.Errorf("missing are %v", missing)
	}
}

func TestProxyErrors(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"reachable", "proxies: [{name: a, protocol: socks5, listen: 0.0.0.0:1080}]", `f:1:47: proxy a: others can reach 0.0.0.0:1080, and could use this host to get where they may not; name users, or allow some clients, or write "open: true"`},
		{"reachable, and meant", "proxies: [{name: a, protocol: socks5, listen: 0.0.0.0:1080, open: true}]", ""},
		{"some clients", "proxies: [{name: a, protocol: socks5, listen: 192.0.2.1:1080, allow: [192.0.2.0/24]}]", ""},
		{"shared", "proxies: [{name: a, protocol: [transparent, socks5], listen: 127.0.0.1:1}]", "f:1:31: transparent shares no port with others: a connection that was led here and one that says where to are not told apart"},
		{"asked", "proxies: [{name: a, protocol: transparent, listen: 127.0.0.1:1, users: {file: /x}}]", "f:1:72: clients of a transparent proxy do not know of it: nobody can be asked who he is"},
		{"twice", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1}, {name: b, protocol: http, listen: 127.0.0.1:1}]", "f:1:93: proxy b: 127.0.0.1:1 is where proxy a listens"},
		{"same name", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1}, {name: a, protocol: http, listen: 127.0.0.1:2}]", "f:1:66: proxy a is already defined; names are unique"},
		{"no upstream", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, rules: [{via: corq}]}]\nupstreams: [{name: corp, http: {address: x:1}}]", `f:1:66: proxy a: there is no upstream "corq"; did you mean "corp"?`},
		{"a loop", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, rules: [{via: [corp, corp]}]}]\nupstreams: [{name: corp, http: {address: x:1}}]", "f:1:79: corp stands twice: what it takes would come back to it"},
		{"a loop of two", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, rules: [{via: b}]}, {name: b, protocol: http, listen: 127.0.0.1:2, rules: [{via: a}]}]\nupstreams: [{name: a, http: {address: 127.0.0.1:1}}, {name: b, http: {address: 127.0.0.1:2}}]",
			"f:1:66: proxy a: by way of b connections come back to it, without end\nf:1:133: proxy b: by way of a connections come back to it, without end"},
		{"one after the other", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, rules: [{via: b}]}, {name: b, protocol: http, listen: 127.0.0.1:2}]\nupstreams: [{name: b, http: {address: 127.0.0.1:2}}]", ""},
		{"direct and more", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, rules: [{via: [direct, corp]}]}]\nupstreams: [{name: corp, http: {address: x:1}}]", "f:1:72: direct and refuse stand alone: nothing comes before or after them"},
		{"users of nobody", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, rules: [{users: [bob], via: direct}]}]", `f:1:65: proxy a: a rule for users fits nobody without the key "users"`},
		{"both", "upstreams: [{name: a, http: {address: x:1}, socks5: {address: x:1}}]\nservices: []", `f:1:13: upstream a: want one of the keys "socks5", "http" and "ssh"`},
		{"half a login", "upstreams: [{name: a, http: {address: x:1, user: u}}]\nservices: []", "f:1:13: upstream a: user and passwordFile go together"},
		{"reserved", "upstreams: [{name: direct, http: {address: x:1}}]\nservices: []", "f:1:20: direct is no name for an upstream: it is a way without one"},
		{"no port", "upstreams: [{name: a, http: {address: proxy.example}}]\nservices: []", `f:1:39: want HOST:PORT such as 192.0.2.5:3128, found "proxy.example"; the port is missing`},
		{"a URL", "upstreams: [{name: a, http: {address: 'http://proxy.example:1'}}]\nservices: []", `f:1:39: want HOST:PORT such as 192.0.2.5:3128, found "http://proxy.example:1"; write the address without what stands before ://`},
		{"a star", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, rules: [{domains: ['*.corp'], via: direct}]}]", `f:1:77: want a name such as .corp.example, found "*.corp"; all below a name is written ".corp"`},
		{"ports", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, rules: [{ports: [90-80], via: direct}]}]", `f:1:75: want a port from 1 to 65535, or a range such as 8000-8999, found "90-80"`},
		{"keepSource", "proxies: [{name: a, protocol: http, listen: 127.0.0.1:1, keepSource: true}]",
			`f:1:70: proxy a: keepSource goes with "protocol: transparent"; clients of others mean to be seen as the proxy`},
		{"another word", "proxies: [{name: a, protocol: socks, listen: 127.0.0.1:1}]", `f:1:31: want socks5, http or transparent, found "socks"; did you mean "socks5"?`},
	} {
		t.Run(c.name, func(t *testing.T) {
			have := ""
			if _, err := Parse("f", []byte(c.text)); err != nil {
				have = err.Error()
			}
			if have != c.want {
				t.Errorf("have %s\nwant %s", have, c.want)
			}
		})
	}
}

// many are captures of one cgroup.
func many(n int) string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("{name: c%d, match: {user: '%d'}, to: 127.0.0.1:9}", i, i))
	}
	return strings.Join(all, ", ")
}

// A proxy of this file that is named by its address is that proxy.
func TestCaptureByAddress(t *testing.T) {
	c, err := Parse("f", []byte("proxies: [{name: p, protocol: transparent, listen: ['127.0.0.1:1', '[::1]:1']}]\ncapture: [{name: a, match: {user: x}, to: '127.0.0.1:1'}]"))
	if err != nil {
		t.Fatal(err)
	}
	if x := c.Captures[0]; x.Proxy != "p" || len(x.To) != 2 {
		t.Errorf("%+v", x)
	}
}

func TestCaptures(t *testing.T) {
	const proxy = "proxies: [{name: p, protocol: transparent, listen: 127.0.0.1:1}, {name: s, protocol: socks5, listen: 127.0.0.1:2}, " +
		"{name: k, protocol: transparent, keepSource: true, listen: 127.0.0.1:3}]\n"
	for _, c := range []struct{ name, text, want string }{
		{"of a proxy", "capture: [{name: a, match: {cgroup: /a, destinations: [10.0.0.0/8]}, to: p}]", ""},
		{"of somebody else", "capture: [{name: a, match: {user: app}, to: 127.0.0.1:9}]", ""},
		{"of nobody", "capture: [{name: a, match: {ports: [80]}, to: p}]",
			"f:2:28: capture a: want a cgroup, user, group or interface: every process would also be those that the proxy itself needs"},
		{"of two kinds", "capture: [{name: a, match: {interface: eth0, user: x}, to: 192.0.2.1:9}]",
			"f:2:28: capture a: interface is for what arrives, which is of no process here: it goes with no cgroup, user or group"},
		{"to nobody", "capture: [{name: a, match: {user: x}, to: q}]", `f:2:11: capture a: there is no proxy "q"; known are p, s, k`},
		{"to one that asks", "capture: [{name: a, match: {user: x}, to: s}]",
			`f:2:11: capture a: clients that do not know of a proxy need one with "protocol: transparent"; s speaks socks5`},
		{"arrives", "capture: [{name: a, match: {interface: eth0, protocol: [tcp, udp]}, to: p}]", ""},
		{"arrives, and the loopback", "capture: [{name: a, match: {interface: eth0}, mode: redirect, to: p}]",
			"f:2:11: capture a: what arrives at an interface cannot be led to 127.0.0.1:1: let the proxy listen at an address of this host that is not its loopback"},
		{"UDP", "capture: [{name: a, match: {user: x, protocol: udp}, to: p}]",
			"f:2:11: capture a: mode ebpf captures TCP only: it could not tell the proxy where a datagram wanted to go; UDP that arrives at an interface is captured by tproxy"},
		{"UDP by redirect", "capture: [{name: a, match: {interface: eth0, protocol: udp}, mode: redirect, to: 192.0.2.1:9}]",
			"f:2:68: capture a: mode redirect captures TCP only: it could not tell the proxy where a datagram wanted to go; UDP that arrives at an interface is captured by tproxy"},
		{"a protocol", "capture: [{name: a, match: {user: x, protocol: sctp}, to: p}]", `f:2:48: want tcp or udp, found "sctp"; did you mean "tcp"?`},
		{"in connect, and arrives", "capture: [{name: a, match: {interface: eth0}, mode: ebpf, to: p}]",
			"f:2:53: capture a: mode ebpf is about what processes of this host do; what arrives at an interface is captured by redirect or tproxy"},
		{"a socket, and of a process", "capture: [{name: a, match: {user: x}, mode: tproxy, to: p}]",
			"f:2:45: capture a: mode tproxy is about what arrives at an interface; processes of this host are captured by ebpf or redirect"},
		{"direct", "capture: [{name: a, match: {user: x}, onProxyDown: direct, to: p}]", ""},
		{"direct by redirect", "capture: [{name: a, match: {user: x}, mode: redirect, onProxyDown: direct, to: p}]",
			"f:2:68: capture a: onProxyDown: direct is for mode ebpf: packets are led away before the kernel knows whether anybody listens"},
		{"keepSource of a process", "capture: [{name: a, match: {user: x}, to: k}]",
			"f:2:11: capture a: k has keepSource, which is for clients of other hosts: what processes of this host send has its addresses already"},
		{"the loopback", "capture: [{name: a, match: {user: x, destinations: [127.0.0.0/8]}, to: p}]",
			"f:2:28: capture a: nothing to 127.0.0.0/8 is ever captured: the loopback and addresses of a link are left alone"},
		{"a mapped prefix", "capture: [{name: a, match: {user: x, destinations: ['::ffff:10.0.0.0/104']}, to: p}]",
			`f:2:53: want a prefix such as 192.0.2.0/24 or 2001:db8::/32, found "::ffff:10.0.0.0/104"; an address of IPv4 is written as such, also where sockets of IPv6 use it`},
		{"too many", "capture: [" + many(65) + "]",
			"f:2:3255: capture c64: there are more than 64 captures of mode ebpf for the cgroup /; several prefixes and ports can be one capture"},
		{"a cgroup", "capture: [{name: a, match: {user: x, cgroup: app.slice}, to: p}]",
			`f:2:46: want a path such as /app.slice, found "app.slice"; all processes are those without this key`},
	} {
		t.Run(c.name, func(t *testing.T) {
			have := ""
			if _, err := Parse("f", []byte(proxy+c.text)); err != nil {
				have = err.Error()
			}
			if have != c.want {
				t.Errorf("have %s\nwant %s", have, c.want)
			}
		})
	}
}
