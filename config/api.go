package config

import (
	"net/netip"

	"go.yaml.in/yaml/v4"
)

// API says where the agent listens for people and scrapers.
type API struct {
	Listen netip.AddrPort
}

// Equal reports whether both mean the same.
func (a API) Equal(o API) bool { return a == o }

var defaultAPI = API{Listen: netip.MustParseAddrPort("127.0.0.1:9464")}

var apiSchema = schema[API]{what: "api", fields: []field[API]{
	field[API]{
		key: "listen", kind: "ADDRESS:PORT",
		doc: "Address of `/metrics` and `/healthz`.",
		set: func(d *decoder, n *yaml.Node, to *API) { to.Listen = d.ownAddress(n, defaultAPI.Listen.String()) },
	}.or(defaultAPI.Listen.String()),
}}
