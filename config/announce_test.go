package config

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

const announced = `
services:
- {name: web, listen: [192.0.2.10:80], forward: nat, backends: [10.0.0.1:80]}
announce:
  bgp:
`

func TestAnnounce(t *testing.T) {
	c, err := Parse("f", []byte(announced+`    as: 4200000001
    routerID: 198.51.100.11
    communities: [65001:100, "large:4200000001:1:2", no-export]
    aggregates: [192.0.2.0/24]
    onExit: keep
    med: 0
    peers:
    - {address: 192.0.2.1, as: 65000, bfd: {}}
    - {address: "fe80::1%eth0", as: 4200000001, port: 1790, holdTime: 3s, services: [web], localPref: 200, bfd: {interval: 50ms, multiplier: 5}, nextHop: 192.0.2.9}
    - {address: 203.0.113.1, as: 65002, multihop: 4, communities: []}
`))
	if err != nil {
		t.Fatal(err)
	}
	b := c.Announce.BGP
	if b.AS != 4200000001 || b.RouterID != netip.MustParseAddr("198.51.100.11") || !b.Keep || b.RestartTime != 2*time.Minute || *b.Attributes.MED != 0 || b.Attributes.LocalPref != nil ||
		fmt.Sprint(b.Attributes.Communities, b.Attributes.LargeCommunities, b.Aggregates) != "[4259905636 4294967041] [[4200000001 1 2]] [192.0.2.0/24]" {
		t.Errorf("bgp is %+v", b)
	}
	p, q, r := b.Peers[0], b.Peers[1], b.Peers[2]
	if p.Port != 179 || p.Hold != 9*time.Second || p.BFD != (BFD{100 * time.Millisecond, 3}) {
		t.Errorf("the first peer is %+v", p)
	}
	if q.Port != 1790 || q.Address.Zone() != "eth0" || q.BFD != (BFD{50 * time.Millisecond, 5}) || *q.Attributes.LocalPref != 200 || fmt.Sprint(q.NextHops, q.Services) != "[192.0.2.9] [web]" {
		t.Errorf("the second peer is %+v", q)
	}
	if r.BFD != (BFD{}) || r.Multihop != 4 {
		t.Errorf("the third peer is %+v", r)
	}
	if a := r.Attributes.Over(b.Attributes); len(a.Communities) != 0 || *a.MED != 0 {
		t.Errorf("of the third peer is said %+v", a)
	}
	if a := p.Attributes.Over(b.Attributes); len(a.Communities) != 2 || len(a.LargeCommunities) != 1 {
		t.Errorf("of the first peer is said %+v", a)
	}
}

func TestAnnounceErrors(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"    {as: 0, peers: [{address: 192.0.2.1, as: 1}]}", "want a whole number from 1 to 4294967294"},
		{"    {as: 1, peers: []}", "announce.bgp needs at least one peer"},
		{"    {as: 1}", `announce.bgp needs the key "peers"`},
		{"    {as: 1, peers: [{address: 192.0.2.1}]}", `a peer needs the key "as"`},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2}, {address: 192.0.2.1, as: 3}]}", "peer 192.0.2.1 stands there twice"},
		{`    {as: 1, peers: [{address: "fe80::1", as: 2}]}`, "fe80::1 is on every segment: write it with the interface, as fe80::1%eth0"},
		{`    {as: 1, peers: [{address: "::ffff:192.0.2.1", as: 2}]}`, "write ::ffff:192.0.2.1 as IPv4: 192.0.2.1"},
		{`    {as: 1, routerID: "2001:db8::1", peers: [{address: 192.0.2.1, as: 2}]}`, "a router ID is one, whatever is announced"},
		{"    {as: 1, peers: [{address: 224.0.0.5, as: 2}]}", "224.0.0.5 is the address of no host"},
		{`    {as: 1, peers: [{address: 192.0.2.1, as: 2, source: "2001:db8::1"}]}`, "the source 2001:db8::1 is of another family"},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2, multihop: 3, bfd: {}}]}", "BFD watches a peer on the same segment"},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2, multihop: 3, ttlSecurity: true}]}", "\"ttlSecurity\" is for a peer on the same segment"},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 1, multihop: 3}]}", "one of the same, 1, may be anywhere"},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2, localPref: 3}]}", "use med, or communities"},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2, services: [wbe]}]}", `there is no service "wbe"`},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2, services: []}]}", "a peer that is told of no service has no use"},
		{"    {as: 1, communities: [65536:1], peers: [{address: 192.0.2.1, as: 2}]}", `want a community such as 65001:100, large:65001:1:2, or no-export, found "65536:1"`},
		{"    {as: 1, communities: [large:1:2], peers: [{address: 192.0.2.1, as: 2}]}", "want a community such as"},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2, nextHop: [192.0.2.3, 192.0.2.4]}]}", "a route has one"},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2, bfd: {multiplier: 0}}]}", "want a whole number from 1 to 255"},
		{"    {as: 1, peers: [{address: 192.0.2.1, as: 2, bfd: {interval: 1ms}}]}", "10ms"},
	} {
		_, err := Parse("f", []byte(announced+c.text+"\n"))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s\nhave %v\nwant %s", c.text, err, c.want)
		}
	}
}

func TestAnnounceL2(t *testing.T) {
	const services = "services: [{name: web, listen: [192.0.2.10:80], forward: nat, backends: [10.0.0.1:80]}]\n"
	c, err := Parse("f", []byte(services+"announce: {l2: {interfaces: [eth0, eth1], keyFile: /etc/pentad/l2, priority: 200}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (L2{Interfaces: []string{"eth0", "eth1"}, KeyFile: "/etc/pentad/l2", Group: "default", Priority: 200}); !c.Announce.L2.Equal(want) {
		t.Errorf("have %+v, want %+v", c.Announce.L2, want)
	}
	if missing := c.CheckHost("/sys/fs/cgroup"); len(missing) != 1 || !strings.Contains(missing[0].Error(), "announce.l2: there is no file of a key /etc/pentad/l2 on this host") {
		t.Errorf("missing are %v", missing)
	}
	for text, want := range map[string]string{
		"{l2: {}}":                                `announce.l2 needs the key "interfaces"`,
		"{l2: {interfaces: []}}":                  "announce.l2 needs at least one interface",
		"{l2: {interfaces: [a], priority: 256}}":  "0 to 255",
		"{l2: {interfaces: [a], keyfile: /a}}":    `did you mean "keyFile"?`,
		"{l3: {interfaces: [a]}}":                 "unknown key",
		"{l2: {interfaces: eth0, keyFile: /etc}}": "a list of interfaces",
	} {
		if _, err := Parse("f", []byte(services+"announce: "+text+"\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: have %v, want %s", text, err, want)
		}
	}
}
