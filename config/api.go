package config

import (
	"net/netip"

	"go.yaml.in/yaml/v4"
)

// API says where the agent listens for people and scrapers, and what they may do.
type API struct {
	Listen    netip.AddrPort
	Cert, Key string // paths; empty: no TLS
	Token     string // path of a file that holds it; empty: nobody has to say it
	Actions   bool   // the page may drain backends
	Insecure  bool   // other hosts may read everything, without a token, as plain text
}

// Equal reports whether both mean the same.
func (a API) Equal(o API) bool { return a == o }

var defaultAPI = API{Listen: netip.MustParseAddrPort("127.0.0.1:9464")}

var apiSchema = schema[API]{what: "api", fields: []field[API]{
	field[API]{
		key: "listen", kind: "ADDRESS:PORT",
		doc: "Address of the page, `/metrics` and `/healthz`. One that other hosts reach needs `tls` and `tokenFile`, or `insecure: true`.",
		set: func(d *decoder, n *yaml.Node, to *API) { to.Listen = d.ownAddress(n, defaultAPI.Listen.String()) },
	}.or(defaultAPI.Listen.String()),
	section("tls", "Answers are encrypted.", &apiTLSSchema, func(a *API) *API { return a }),
	text("tokenFile", "path", "Its first line, of 16 characters or more, is a secret that whoever asks has to send: `Authorization: Bearer ...`. The page asks for it. Nobody but "+
		"its owner may read or write the file; it is read again when it changes. Without the key everybody who reaches `listen` may read.",
		"the path of a file", func(to *API, v string) { to.Token = v }),
	truth("actions", "Backends can be drained on the page. It needs `tokenFile`.", func(to *API, v bool) { to.Actions = v }).or("false"),
	truth("insecure", "Whoever reaches `listen` from other hosts may read everything: which process talks to whom, too.",
		func(to *API, v bool) { to.Insecure = v }).or("false"),
}}

var apiTLSSchema = schema[API]{what: "tls", fields: []field[API]{
	text("cert", "path", "The certificate and those that it depends on (PEM). It is read again when it changes.", "the path of a file", func(to *API, v string) { to.Cert = v }),
	text("key", "path", "The key of it (PEM).", "the path of a file", func(to *API, v string) { to.Key = v }),
}}

// api reads the section and finds what does not go together.
func (d *decoder) api(n *yaml.Node, c *Config) {
	a := &c.API
	seen := apiSchema.decode(d, n, a)
	at := func(key string) *yaml.Node {
		if k := seen[key]; k != nil {
			return k
		}
		return n
	}
	if (a.Cert == "") != (a.Key == "") {
		d.errorf(at("tls"), "api: tls needs both, \"cert\" and \"key\"")
	}
	if seen["tls"] != nil && a.Cert == "" && a.Key == "" {
		d.errorf(at("tls"), "api: tls is empty: it needs \"cert\" and \"key\"")
	}
	if a.Actions && a.Token == "" {
		d.errorf(at("actions"), "api: actions need \"tokenFile\": without it every user of this host, and every page in its browsers, could drain backends")
	}
	if !a.Listen.IsValid() || a.Listen.Addr().Unmap().IsLoopback() {
		return
	}
	if a.Actions && a.Cert == "" {
		d.errorf(at("actions"), "api: actions at an address that other hosts reach need \"tls\": who hears the token could drain backends")
	}
	if a.Insecure || a.Cert != "" && a.Token != "" {
		return
	}
	d.errorf(at("listen"), "api: %s can be reached from other hosts: it needs \"tls\" and \"tokenFile\"; write insecure: true to let everybody there read what this host does", a.Listen)
}
