package config

import (
	"errors"
	"strings"
	"testing"
)

func TestParseObject(t *testing.T) {
	o, err := ParseObject("web", []byte("# of the shop\nlisten: [192.0.2.1:80]\nselector: {rack: a, row: '1'}\nbackends: [192.0.2.11:80]\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(o.Services) != 1 || o.Services[0].Name != "web" || o.Services[0].Source.String() != "etcd" || len(o.Services[0].Backends) != 1 {
		t.Errorf("have %+v", o.Services)
	}
	for labels, takes := range map[[2]string]bool{{"a", "1"}: true, {"b", "1"}: false, {"a", ""}: false} {
		if o.Takes(map[string]string{"rack": labels[0], "row": labels[1], "other": "x"}) != takes {
			t.Errorf("a host with rack %s and row %q: %v is wrong", labels[0], labels[1], !takes)
		}
	}
	if o, err := ParseObject("web", []byte("name: web\nlisten: [192.0.2.1:80]\nbackends: []\ndisabled: true\n")); err != nil || len(o.Services) != 0 {
		t.Errorf("one that is disabled: %+v, %v", o, err)
	}
	for text, want := range map[string]string{
		"name: db\nlisten: [192.0.2.1:80]\nbackends: []": "services/web:1:7: the service is called db here",
		"[]": "want a service",
		"":   "empty",
		"listen: [192.0.2.1:80]\nbackends: wrong":                         "services/web:2:11",
		"listen: [192.0.2.1:80]\nbackends: []\nselector: a":               "want labels such as",
		"listen: [192.0.2.1:80]\nbackends: []\nselector: {a: [b]}":        "as the value of the label a",
		"listen: [192.0.2.1:80, 192.0.2.1:80]\nbackends: []":              "192.0.2.1:80",
		"listen: [192.0.2.1:80]\nbackends: []\nunknown: 1":                `unknown key "unknown"`,
		"listen: [192.0.2.1:80]\nbackends: []\n---\nlisten: []":           "a second document",
		"listen: [192.0.2.1:80]\nbackends: []\nservices: [{name: other}]": `unknown key "services"`,
	} {
		_, err := ParseObject("web", []byte(text))
		var all Errors
		if !errors.As(err, &all) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: have %v, want %s", text, err, want)
		}
	}
}

// Objects of a file stand for themselves: with the defaults of the file, what aliases and
// merge keys stood for, and their comments.
func TestObjects(t *testing.T) {
	all, left, err := Objects("f", []byte(`x-common: &common {balance: random}
defaults: {flows: false, keepalive: {idle: 20s}}
scope: {cgroup: /}
host: {name: a}
services:
- <<: *common
  name: web
  listen: [192.0.2.1:80]   # the shop
  backends: &b [192.0.2.11:80]
- name: dns
  listen: [192.0.2.1:53/udp]
  backends: [192.0.2.11:53]
- name: web-b
  listen: [192.0.2.2:80]
  backends: *b
  selector: {rack: b}
- name: web-c
  listen: [192.0.2.2:80]
  backends: *b
  selector: {rack: c}
`))
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 4 || strings.Join(left, " ") != "scope host" {
		t.Fatalf("have %d objects, left %v", len(all), left)
	}
	web, err := ParseObject(all[0].Name, all[0].Text)
	if err != nil {
		t.Fatalf("%v\n%s", err, all[0].Text)
	}
	if s := web.Services[0]; s.Balance.String() != "random" || !s.Silent || s.Keepalive.Idle == 0 || !strings.Contains(string(all[0].Text), "# the shop") || strings.Contains(string(all[0].Text), "name:") {
		t.Errorf("have %+v of\n%s", s, all[0].Text)
	}
	dns, err := ParseObject(all[1].Name, all[1].Text)
	if err != nil || dns.Services[0].Keepalive.Idle != 0 || !dns.Services[0].Silent {
		t.Errorf("have %+v, %v of\n%s", dns, err, all[1].Text)
	}
	if b, err := ParseObject(all[2].Name, all[2].Text); err != nil || len(b.Services[0].Backends) != 1 || b.Selector["rack"] != "b" {
		t.Errorf("have %+v, %v of\n%s", b, err, all[2].Text)
	}
	for text, want := range map[string]string{
		"services:\n- {name: a, listen: [192.0.2.1:80], backends: []}\n- {name: a, listen: [192.0.2.2:80], backends: []}\n": "service a is there twice",
		"services:\n- {name: a, listen: [192.0.2.1:80], backends: []}\n- {name: b, listen: [192.0.2.1:80], backends: []}\n": "already belongs to service a",
		"services:\n- {name: a, listen: [192.0.2.1:80], backends: [x]}\n":                                                   "f:2:",
		"services:\n- {listen: [192.0.2.1:80], backends: []}\n":                                                             `"name"`,
		"scope: {cgroup: /}\n":                       "no services",
		"services: 1\n":                              "a list of services",
		"defaults: {balance: wrong}\nservices: []\n": "least-latency",
	} {
		if _, _, err := Objects("f", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: have %v, want %s", text, err, want)
		}
	}
}
