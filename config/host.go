package config

// Host is this host, as others know it.
type Host struct {
	Name string // empty: the host name
}

var hostSchema = schema[Host]{what: "host", fields: []field[Host]{
	text("name", "name", "By which the other hosts of a fleet know it, one of its own for ever; without it the host name. A node of a cluster has the name of its Node.",
		"the name of this host", func(to *Host, v string) { to.Name = v }),
}}
