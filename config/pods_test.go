package config

import (
	"strings"
	"testing"
)

func TestPods(t *testing.T) {
	c, err := Parse("f", []byte("pods: {blocks: [10.244.1.0/26, \"2001:db8:244:1::/122\"], ranges: [10.244.0.0/16, \"2001:db8:244::/48\"], mtu: 1400}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if p := c.Pods; len(p.Blocks) != 2 || len(p.Ranges) != 2 || !p.Masquerade || p.MTU != 1400 {
		t.Errorf("have %+v", p)
	}
	c, err = Parse("f", []byte(`pods:
  overlay: vxlan
  hosts:
  - {name: a, addresses: [198.51.100.11, "2001:db8::11"], blocks: [10.244.1.0/24]}
  - {name: b, addresses: [198.51.100.12], blocks: [10.244.2.0/24, 10.244.3.0/24]}
`))
	if err != nil {
		t.Fatal(err)
	}
	if p := c.Pods; len(p.Hosts) != 2 || p.Overlay != OverlayVXLAN || len(p.All()) != 3 || !p.Wanted() {
		t.Errorf("have %+v", p)
	}
	const store = "source: {etcd: {endpoints: [\"https://192.0.2.1:2379\"]}}\n"
	c, err = Parse("f", []byte(store+"pods: {ranges: [10.244.0.0/16, \"2001:db8:244::/48\", 10.245.0.0/24], overlay: vxlan, addresses: [198.51.100.11]}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if p := c.Pods; !p.Claimed() || p.BlockSize != 26 || len(p.Pools()) != 2 || p.Pools()[0].Blocks() != 1024 || p.Pools()[1].Blocks() != 4 {
		t.Errorf("have %+v, of which pools are %+v", p, p.Pools())
	}
	for text, want := range map[string]string{
		"{ranges: [10.244.0.0/28]}":                                  "smaller than one block, which is a /26",
		"{ranges: [\"2001:db8::/124\"]}":                             "smaller than one block, which is a /122",
		"{ranges: [10.244.0.0/16, 10.244.8.0/24]}":                   "overlap: an address would be given twice",
		"{ranges: [127.0.0.0/8]}":                                    "not one of addresses for hosts",
		"{ranges: [10.244.0.0/16], blockSize: 31}":                   "30",
		"{ranges: [10.244.0.0/16], addresses: [10.0.0.1, 10.0.0.2]}": "one is enough",
	} {
		if _, err := Parse("f", []byte(store+"pods: "+text+"\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: have %v, want %s", text, err, want)
		}
	}
	for text, want := range map[string]string{
		"{blocks: [10.0.0.0/24], hosts: [{name: a, addresses: [192.0.2.1], blocks: [10.1.0.0/24]}]}":                                    "one of the keys",
		"{blocks: [10.0.0.0/24], overlay: direct}":                                                                                      "to whom?",
		"{hosts: [{name: a, addresses: [192.0.2.1], blocks: [10.1.0.0/24]}, {name: a, addresses: [192.0.2.2], blocks: [10.2.0.0/24]}]}": "host a stands there twice",
		"{hosts: [{name: a, addresses: [192.0.2.1], blocks: [10.1.0.0/24]}, {name: b, addresses: [192.0.2.1], blocks: [10.2.0.0/24]}]}": "have the same address",
		"{hosts: [{name: a, addresses: [192.0.2.1], blocks: [10.1.0.0/24]}, {name: b, addresses: [192.0.2.2], blocks: [10.1.0.0/25]}]}": "overlap",
		"{hosts: [{name: a, addresses: [192.0.2.1, 192.0.2.2], blocks: [10.1.0.0/24]}]}":                                                "one is enough",

		"{overlay: vxlan, hosts: [{name: a, addresses: [192.0.2.1], blocks: [10.1.0.0/24]}, {name: b, addresses: [\"2001:db8::1\"], blocks: [10.2.0.0/24]}]}": "are of different families",
		"{overlay: direct, hosts: [{name: a, addresses: [192.0.2.1], blocks: [\"2001:db8:1::/120\"]}]}":                                                       "needs an address of the family",
		"{hosts: [{name: a, addresses: [10.1.0.9], blocks: [10.1.0.0/24]}]}":                                                                                  "has the address of host a",
		"{ranges: [10.244.0.0/16]}":                            "\"source\" has none",
		"{blocks: [10.244.0.0/24], addresses: [198.51.100.1]}": "of hosts that claim their blocks",
		"{blocks: [169.254.0.0/20]}":                           "not one of addresses for hosts",
		"{}":                                                   `pods needs one of the keys "blocks"`,
		"{blocks: [10.0.0.0/32]}":                              "has to have two addresses at least",
		"{blocks: [10.0.0.0/8]}":                               "65,536 at most",
		"{blocks: [10.0.0.0/24, 10.0.0.64/26]}":                "overlap: an address would be given twice",
		"{blocks: [10.0.0.0/24], ranges: [10.1.0.0/16]}":       "is in none of the ranges",
		"{blocks: [10.0.0.0/24], mtu: 100}":                    "1280",
		"{blocks: [10.0.0.0/24], mode: bridged}":               "routed",
		"{blocks: [10.0.0.0/24], masquerade: perhaps}":         "true or false",
	} {
		if _, err := Parse("f", []byte("pods: "+text+"\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: have %v, want %s", text, err, want)
		}
	}
}
