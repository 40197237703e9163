package config

import (
	"strings"
	"testing"
)

// What people write by mistake is called by its name, at its place, once.
func TestHints(t *testing.T) {
	const web = "services:\n- name: web\n  listen: [192.0.2.1:80]\n  backends: [10.0.0.1:80, 10.0.0.2:80]\n"
	listen := func(text string) string {
		return "services:\n- name: web\n  listen: [" + text + "]\n  backends: [10.0.0.1:80]\n"
	}
	for _, c := range []struct{ name, text, at, want string }{
		{"two documents", "services: []\n---\n" + web, "2:1", "a second document begins here"},
		{"text after JSON", "{\"services\": []}\n]]] this is }} not : yaml [\n", "2:1", "text stands after the end of the document"},
		{"wrong indentation", "services:\n- name: web\n  listen: [192.0.2.1:80]\n   backends: [10.0.0.1:80]\n", "4:4", "did not find expected key"},
		{"a tab", "services:\n- name: web\n\tlisten: [192.0.2.1:80]\n", "3:1", "a tab"},
		{"a missing space", "services:\n- name:web\n  listen: [192.0.2.1:80]\n", "2:8", "a space is missing after name:"},
		{"a conflict", "<<<<<<< HEAD\n" + web + "=======\n>>>>>>> b\n", "1:1", "a conflict of a merge"},
		{"bytes", "services:\n- name: \"\xff\"\n", "2:10", "no UTF-8"},
		{"an anchor that is none", web + "  health: *nope\n", "5:11", "unknown anchor"},
		{"no brackets", listen("2001:db8::1:80"), "3:12", `did you mean "[2001:db8::1]:80"?`},
		{"no quotes", listen("[2001:db8::1]:80"), "3:12", "is written in quotes"},
		{"link-local", listen(`"[fe80::1]:80"`), "3:12", "link-local"},
		{"an octet", listen("300.1.1.1:80"), "3:12", "300 is more than 255"},
		{"three octets", listen("10.96.1:80"), "3:12", "has four numbers, this has 3"},
		{"a zero", listen("010.96.0.1:80"), "3:12", "010 has a leading zero"},
		{"a blank", listen(`"10.96.0.1 :80"`), "3:12", "there is a blank"},
		{"a variable", listen(`"${VIP}:80"`), "3:12", "variables of the environment"},
		{"a scheme", listen(`"tcp://10.96.0.1:80"`), "3:12", "what stands before ://"},
		{"a prefix", listen("10.96.0.0/24:80"), "3:12", "not a prefix"},
		{"sctp", listen("10.96.0.1:80/sctp"), "3:12", "other protocols are not served"},
		{"no address", web + "api: {listen: \":9464\"}\n", "5:15", "0.0.0.0:9464"},
		{"a quoted number", web + "  breaker: {failures: \"3\"}\n", "5:23", "write 3 without quotes"},
		{"no unit", web + "  health: {interval: 2}\n", "5:22", "did you mean 2s?"},
		{"no per cent", web + "  breaker: {maxEjected: 50}\n", "5:25", "did you mean 50%?"},
		{"another's word", web + "  balance: roundrobin\n", "5:12", `that is called "random" here`},
		{"another's role", web + "  health: {probe: redis, role: master}\n", "5:32", `that is called "primary" here`},
		{"https", web + "  health: {probe: https, path: /x}\n", "5:19", `write "probe: http" and "tls: true"`},
		{"2xx", web + "  health: {probe: http, expect: 2xx}\n", "5:33", "did you mean 200-299?"},
		{"services in the singular", "service: []\n", "1:1", `did you mean "services"?`},
		{"a key that is meant", strings.Replace(web, "listen:", "listeners:", 1), "3:3", `did you mean "listen"?`},
		{"a long value", web + "  balance: " + strings.Repeat("a", 5000) + "\n", "5:12", "..."},
		{"merging a list", web + "  <<: [1]\n", "5:7", "merges mappings"},
		{"wrong defaults", "defaults: {balance: rand}\n" + web, "1:21", `did you mean "random"?`},
		{"defaults of a name", "defaults: {name: web}\n" + web, "1:12", `unknown key "name" in defaults`},
	} {
		_, err := Parse("f", []byte(c.text))
		if err == nil {
			t.Errorf("%s: valid", c.name)
			continue
		}
		text := err.Error()
		if !strings.HasPrefix(text, "f:"+c.at+": ") || !strings.Contains(text, c.want) || strings.Contains(text, "\n") || len(text) > 400 {
			t.Errorf("%s: %s\nwant f:%s, %s", c.name, text, c.at, c.want)
		}
	}
}

// What is valid and most likely not meant is a warning.
func TestWarnings(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"nothing", "services:\n- {name: a, listen: [10.96.0.1:80], backends: [10.0.0.1:80]}\n---\n", ""},
		{"a chain", "services:\n- {name: a, listen: [10.96.0.1:80], backends: [10.96.0.2:80]}\n- {name: b, listen: [10.96.0.2:80], backends: [10.0.0.1:80]}\n",
			"f:2:48: service a: backend 10.96.0.2:80 is itself a listener of the service b"},
		{"itself", "services:\n- {name: a, listen: [10.96.0.1:80], backends: [10.96.0.1:80]}\n", "f:2:48: service a: backend 10.96.0.1:80 is itself a listener of this service"},
		{"another protocol", "services:\n- {name: a, listen: [10.96.0.1:80], backends: [10.96.0.2:80]}\n- {name: b, listen: [10.96.0.2:80/udp], backends: [10.0.0.1:80]}\n", ""},
		{"no weight", "services:\n- {name: a, listen: [10.96.0.1:80], backends: [{address: 10.0.0.1:80, weight: 0}]}\n", "f:2:10: service a: every backend has weight 0"},
		{"nothing heals", "services:\n- {name: a, listen: [10.96.0.1:80], backends: [10.0.0.1:80, 10.0.0.2:80], health: {probe: none}, breaker: off}\n", "f:2:10: service a: without a probe"},
		{"disabled", "services:\n- {name: a, disabled: true, listen: [10.96.0.1:80], backends: [10.96.0.1:80]}\n", ""},
	} {
		cfg, err := Parse("f", []byte(c.text))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		have := ""
		if len(cfg.Warnings) > 0 {
			have = cfg.Warnings.Error()
		}
		if c.want == "" && have != "" || !strings.HasPrefix(have, c.want) {
			t.Errorf("%s: %q, want %q", c.name, have, c.want)
		}
	}
	cfg, err := Parse("f", []byte("services:\n- {name: a, listen: [10.96.0.1:80], backends: [10.0.0.1:80], health: {probe: exec, command: [/nonexistent]}}\n"+
		"scope: {cgroup: /there/is/none}\n"))
	if err != nil {
		t.Fatal(err)
	}
	missing := cfg.CheckHost(t.TempDir()).Error()
	for _, want := range []string{"there is no program /nonexistent", "there is no cgroup /there/is/none"} {
		if !strings.Contains(missing, want) {
			t.Errorf("missing on this host: %q, want %q", missing, want)
		}
	}
}

// Services take what they do not say from the defaults and from what they merge; what
// makes no sense of them they do not.
func TestDefaultsOfServices(t *testing.T) {
	cfg, err := Parse("f", []byte(`
x-probe: &probe {health: {probe: http, path: /ready}, onDown: keep}
defaults: {balance: random, onDown: reset, health: {probe: tls}, connect: {timeout: 1s}}
services:
- {name: plain, listen: [192.0.2.1:80], backends: [10.0.0.1:80]}
- {name: own, listen: [192.0.2.2:80], backends: [10.0.0.1:80], balance: source-hash}
- {name: merged, <<: *probe, listen: [192.0.2.3:80], backends: [10.0.0.1:80]}
- {name: udp, listen: [192.0.2.4:53/udp], backends: [10.0.0.1:53]}
- {name: off, disabled: true, listen: [192.0.2.5:80], backends: [10.0.0.1:80]}
- name: some
  listen: [192.0.2.6:80]
  backends: [{address: 10.0.0.1:80, disabled: true}, {address: 10.0.0.2:80, admin: drain}, 10.0.0.3:80]
`))
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, s := range cfg.Services {
		have = append(have, s.Name+" "+s.Balance.String()+" "+s.Health.Probe.String()+s.Health.Path+" "+s.OnDown.String()+" "+s.ConnectTimeout.String())
	}
	want := "plain random tls reset 1s|own source-hash tls reset 1s|merged random http/ready keep 1s|udp random none reset 0s|some random tls reset 1s"
	if strings.Join(have, "|") != want {
		t.Errorf("have %q", have)
	}
	some := cfg.Services[len(cfg.Services)-1].Backends
	if len(some) != 2 || !some[0].Drained || some[0].Address.String() != "10.0.0.2:80" || some[1].Drained {
		t.Errorf("backends %+v", some)
	}
}

// The schema for editors knows every key.
func TestSchema(t *testing.T) {
	root := Schema()
	for _, k := range Keys() {
		at := root
		for part := range strings.SplitSeq(k.Path, ".") {
			name, isList := strings.CutSuffix(part, "[]")
			at = step(at, name)
			if isList {
				at = items(at)
			}
		}
		if at == nil || at["description"] != k.Doc && at["items"] == nil {
			t.Errorf("%s is not in the schema: %v", k.Path, at)
		}
	}
}

func step(at map[string]any, name string) map[string]any {
	for _, one := range append([]map[string]any{at}, options(at)...) {
		if p, ok := one["properties"].(map[string]any); ok && p[name] != nil {
			return p[name].(map[string]any)
		}
	}
	return nil
}

func options(at map[string]any) (all []map[string]any) {
	some, _ := at["anyOf"].([]any)
	for _, o := range some {
		all = append(all, o.(map[string]any))
	}
	return all
}

func items(at map[string]any) map[string]any {
	next, _ := at["items"].(map[string]any)
	return next
}

// Backends without a port have that of the listener.
func TestPortsThatStay(t *testing.T) {
	const shape = "services:\n- {name: web, listen: [%], backends: [&]}\n- {name: other, listen: [192.0.2.9:80], backends: [10.0.0.9:80]}\n"
	parse := func(listen, backends string) string {
		cfg, err := Parse("f", []byte(strings.NewReplacer("%", listen, "&", backends).Replace(shape)))
		if err != nil {
			return err.Error()
		}
		var all []string
		for _, s := range cfg.Services {
			text := s.Name
			for _, l := range s.Listeners {
				text += " " + l.String()
			}
			for _, b := range s.Backends {
				text += " -> " + b.Address.String()
			}
			all = append(all, text)
		}
		return strings.Join(all[:len(all)-1], ", ")
	}
	for _, c := range []struct{ listen, backends, want string }{
		{"192.0.2.1:80", "10.0.0.1, {address: 10.0.0.2}", "web 192.0.2.1:80 -> 10.0.0.1:80 -> 10.0.0.2:80"},
		{"192.0.2.1:443, 192.0.2.1:80", "10.0.0.1", "web:80 192.0.2.1:80 -> 10.0.0.1:80, web:443 192.0.2.1:443 -> 10.0.0.1:443"},
		{"192.0.2.1:53, '192.0.2.1:53/udp'", "10.0.0.1", "web 192.0.2.1:53 192.0.2.1:53/udp -> 10.0.0.1:53"},
		{"'[2001:db8:1::1]:80'", "'[2001:db8::1]'", "web [2001:db8:1::1]:80 -> [2001:db8::1]:80"},
		{"192.0.2.1:80", "10.0.0.1, 10.0.0.2:81", "f:2:50: service web: backend 10.0.0.1 has no port and 10.0.0.2:81 has one; write a port for all, or for none: then it stays that of the listener"},
		{"192.0.2.1:80", "10.0.0.1, 10.0.0.1", "f:2:60: service web: backend 10.0.0.1:0 already stands at line 2; give one of them the weight of both"},
		{"192.0.2.1:80, 192.0.2.9:80", "10.0.0.1", "f:3:26: service other: listener 192.0.2.9:80 already belongs to service web"},
	} {
		if have := parse(c.listen, c.backends); have != c.want {
			t.Errorf("%s -> %s:\nhave %s\nwant %s", c.listen, c.backends, have, c.want)
		}
	}
}
