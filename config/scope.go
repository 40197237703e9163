package config

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Scope says whose connections are translated.
type Scope struct {
	Cgroup string // path below the root of the cgroup2 hierarchy, "/" for all
}

var defaultScope = Scope{Cgroup: "/"}

var scopeSchema = schema[Scope]{what: "scope", fields: []field[Scope]{
	field[Scope]{
		key: "cgroup", kind: "path",
		doc: "Only processes below this cgroup (v2) see the services. A socket belongs for life to the " +
			"cgroup in which it was created.",
		set: func(d *decoder, n *yaml.Node, to *Scope) {
			v, ok := d.text(n, "the path of a cgroup, such as /system.slice")
			if ok && (!strings.HasPrefix(v, "/") || slices.Contains(strings.Split(v, "/"), "..")) {
				d.errorf(n, "want the path of a cgroup below the root of its hierarchy, such as /system.slice, found %q", shorten(v))
				return
			}
			to.Cgroup = v
		},
	}.or(defaultScope.Cgroup),
}}
