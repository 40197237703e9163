package config

import (
	"net/netip"
	"net/url"
	"slices"

	"go.yaml.in/yaml/v4"
)

// Etcd says how the etcd is reached in which a fleet has what its hosts share.
type Etcd struct {
	Endpoints []string // URLs
	Prefix    string   // of all keys, without a slash at its end
	CA        string   // path; empty: the authorities of this host
	Cert, Key string   // paths, of this host; empty: none
	User      string
	Password  string // path of a file that holds it
}

// Equal reports whether both mean the same.
func (e *Etcd) Equal(o *Etcd) bool {
	if e == nil || o == nil {
		return e == o
	}
	return slices.Equal(e.Endpoints, o.Endpoints) && e.Prefix == o.Prefix && e.CA == o.CA && e.Cert == o.Cert && e.Key == o.Key && e.User == o.User && e.Password == o.Password
}

const defaultEtcdPrefix = "/pentad/v1"

var etcdSchema = schema[Etcd]{what: "etcd", fields: []field[Etcd]{
	{
		key: "endpoints", kind: "list of URLs", required: true,
		doc: "Its members, such as `[\"https://192.0.2.1:2379\"]`. One that answers is enough.",
		set: func(d *decoder, n *yaml.Node, to *Etcd) {
			d.list(n, "a list of URLs, such as [https://192.0.2.1:2379]", func(e *yaml.Node) {
				u, err := url.Parse(e.Value)
				if err != nil || e.Kind != yaml.ScalarNode || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Path != "" && u.Path != "/" || u.User != nil {
					d.errorf(e, "%q is not the URL of a member of etcd, such as https://192.0.2.1:2379", e.Value)
					return
				}
				to.Endpoints = append(to.Endpoints, u.Scheme+"://"+u.Host)
			})
			if len(to.Endpoints) == 0 && n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
				d.errorf(n, "endpoints is empty: no member of etcd could be asked")
			}
		},
	},
	{
		key: "prefix", kind: "path", doc: "Of all keys. Fleets that share an etcd have one each.",
		set: func(d *decoder, n *yaml.Node, to *Etcd) {
			v, ok := d.text(n, "a path such as "+defaultEtcdPrefix)
			for len(v) > 1 && v[len(v)-1] == '/' {
				v = v[:len(v)-1]
			}
			if ok && (len(v) < 2 || v[0] != '/') {
				d.errorf(n, "prefix is a path such as %s", defaultEtcdPrefix)
				return
			}
			to.Prefix = v
		},
	},
	section("tls", "How members are told from others, and this host from others by them. URLs of https need none of it if an authority of this host has signed their certificates.",
		&etcdTLSSchema, func(e *Etcd) *Etcd { return e }),
	text("user", "name", "By which this host logs in.", "the name of a user of etcd", func(to *Etcd, v string) { to.User = v }),
	text("passwordFile", "path", "Of a file that holds the user's password.", "the path of a file", func(to *Etcd, v string) { to.Password = v }),
}}

var etcdTLSSchema = schema[Etcd]{what: "tls", fields: []field[Etcd]{
	text("ca", "path", "Certificates of the authorities that sign members' certificates (PEM). It is read again when it changes.", "the path of a file", func(to *Etcd, v string) { to.CA = v }),
	text("cert", "path", "The certificate of this host (PEM). It is read again at each connection.", "the path of a file", func(to *Etcd, v string) { to.Cert = v }),
	text("key", "path", "The key of it (PEM).", "the path of a file", func(to *Etcd, v string) { to.Key = v }),
}}

// checkEtcd finds what does not go together.
func (d *decoder) checkEtcd(e *Etcd, at *yaml.Node) {
	if (e.Cert == "") != (e.Key == "") {
		d.errorf(at, "etcd: tls needs both, \"cert\" and \"key\"")
	}
	if (e.User == "") != (e.Password == "") {
		d.errorf(at, "etcd needs both, \"user\" and \"passwordFile\"")
	}
	https := func(u string) bool { return len(u) > 8 && u[:8] == "https://" }
	if (e.CA != "" || e.Cert != "") && slices.ContainsFunc(e.Endpoints, func(u string) bool { return !https(u) }) {
		d.errorf(at, "etcd: tls is of no use to endpoints of http")
	}
	if e.User != "" && slices.ContainsFunc(e.Endpoints, func(u string) bool { return !https(u) && !isLoopbackURL(u) }) {
		d.errorf(at, "etcd: the password would go over the network for all to read; endpoints need https")
	}
}

func isLoopbackURL(text string) bool {
	u, err := url.Parse(text)
	if err != nil {
		return false
	}
	a, err := netip.ParseAddr(u.Hostname())
	return err == nil && a.IsLoopback()
}
