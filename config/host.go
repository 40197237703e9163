package config

import (
	"maps"

	"go.yaml.in/yaml/v4"
)

// Host is this host, as others know it.
type Host struct {
	Name   string            // empty: the host name
	Labels map[string]string // by which objects of a fleet select hosts
}

// Equal reports whether both are the same.
func (h Host) Equal(o Host) bool { return h.Name == o.Name && maps.Equal(h.Labels, o.Labels) }

var hostSchema = schema[Host]{what: "host", fields: []field[Host]{
	text("name", "name", "By which the other hosts of a fleet know it, one of its own for ever; without it the host name. A node of a cluster has the name of its Node.",
		"the name of this host", func(to *Host, v string) { to.Name = v }),
	{
		key: "labels", kind: "mapping of words", doc: "By which objects of a fleet say which hosts take them, such as `{rack: a1}`.",
		set: func(d *decoder, n *yaml.Node, to *Host) { to.Labels = d.labels(n) },
	},
}}
