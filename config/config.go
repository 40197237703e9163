// Package config is what users write: it reads pentad.yaml, checks it strictly
// and turns it into services. Every error carries its line and column, and all
// errors of a file are found at once.
//
// It never touches the kernel or the network: what it accepts can be checked on
// any machine.
package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// DefaultPath is where the configuration lies unless the user says otherwise.
const DefaultPath = "/etc/pentad/pentad.yaml"

// Config is a valid configuration with its defaults applied.
type Config struct {
	Services   []*service.Service // in the order of the file
	Scope      Scope
	Source     Source
	API        API
	Director   Director
	RealServer RealServer
	Announce   Announce
	Pods       Pods
	Host       Host

	Proxies   []Proxy
	Upstreams []Upstream
	Forwards  []Forward
	Captures  []Capture

	Guard int // percent of the listeners that a new text may take away unless it is forced; GuardOff: all

	Include Include
	// Files are the services of each included file, those in Services.
	Files map[string][]*service.Service
	// Skipped are included files that are not valid, and why.
	Skipped map[string]Errors

	// Warnings are what is valid and most likely not meant.
	Warnings Errors

	needs []need
}

// GuardOff is a guard that lets everything through.
const GuardOff = 100

const defaultGuard = 50

// fileSchema lists the sections of the file.
var fileSchema = schema[Config]{what: "the file", extensible: true, fields: []field[Config]{
	mappings("services", "list of services",
		"The services of this host. May be `[]`, and may be missing where there is a `source`.",
		&serviceSchema, (*decoder).services),
	mapping("defaults", "mapping", "What every service of this file has that does not say otherwise, key by key.",
		&defaultsSchema, (*decoder).checkDefaults),
	mapping("include", "list of patterns, or mapping", "Other files that have services, too: one a team, say. Each has the keys `services` and `defaults`.",
		&includeSchema, (*decoder).include),
	section("scope", "Whose connections are translated.", &scopeSchema, func(c *Config) *Scope { return &c.Scope }),
	section("source", "Where services come from besides this file.", &sourceSchema, func(c *Config) *Source { return &c.Source }),
	mappings("proxies", "list of proxies", "Servers that forward connections for clients that ask them to.", &proxySchema, (*decoder).proxies),
	mappings("upstreams", "list of upstreams", "Proxies of others, which rules of ours can go through.", &upstreamSchema, (*decoder).upstreams),
	mappings("forwards", "list of forwards", "Connections to one address that go to another, through upstreams, kept up for ever.", &forwardSchema, (*decoder).forwards),
	mappings("capture", "list of captures", "Whose connections are led to a proxy that they do not know of.", &captureSchema, (*decoder).captures),
	section("director", "Where packets to services with `forward: direct` arrive.", &directorSchema, func(c *Config) *Director { return &c.Director }),
	section("realServer", "This host is one that directors send packets to.", &realServerSchema, func(c *Config) *RealServer { return &c.RealServer }),
	section("announce", "How the network is told which VIPs are here: those of services with `forward` other than `none` that have a usable backend.", &announceSchema, func(c *Config) *Announce { return &c.Announce }),
	mapping("pods", "mapping", "The network of this host's pods, for the CNI plugin `pentad-cni`.", &podsSchema, func(d *decoder, n *yaml.Node, c *Config) {
		c.Pods.Masquerade, c.Pods.BlockSize = true, defaultBlock
		podsSchema.decode(d, n, &c.Pods)
	}),
	section("host", "This host, as others know it.", &hostSchema, func(c *Config) *Host { return &c.Host }),
	mapping("api", "mapping", "Where the page, metrics and health are served.", &apiSchema, (*decoder).api),
	field[Config]{
		key: "guard", kind: "percentage or off",
		doc: "How much of the listeners a new text of this file may take away, 1% to 100%, while there are four or more: what takes away more is " +
			"held back until `pentad reload --force`. `off`: everything is put in force.",
		set: func(d *decoder, n *yaml.Node, to *Config) {
			if n.Kind == yaml.ScalarNode && n.Value == "off" {
				to.Guard = GuardOff
				return
			}
			to.Guard = d.percentage(n)
		},
	}.or("50%"),
}}

// Error is one thing wrong with a file. Line and Column count from 1.
type Error struct {
	File         string
	Line, Column int
	Message      string
}

// Error returns file:line:column: message.
func (e Error) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
}

// Errors is everything wrong with a file, in the order of its lines.
type Errors []Error

// Error returns one line for each error.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

// Load reads and checks a file and those that it includes. The error is of type Errors
// when the file could be read.
func Load(path string) (*Config, error) {
	t, err := ReadText(path)
	if err != nil {
		return nil, fmt.Errorf("configuration %s cannot be read: %w", path, errors.Unwrap(err))
	}
	return ParseText(t)
}

// Parse checks the text of a file that includes no other; the name is for messages only.
// The error is of type Errors.
func Parse(name string, data []byte) (*Config, error) {
	return ParseText(&Text{Name: name, Data: data})
}

// ParseText checks a text. The error is of type Errors.
func ParseText(t *Text) (*Config, error) {
	d := newDecoder(t.Name)
	root := d.document(t.Data)
	if root == nil {
		return nil, d.failed()
	}
	c := &Config{Scope: defaultScope, API: defaultAPI, Guard: defaultGuard}
	d.setDefaults(root)
	seen := fileSchema.decode(d, root, c)
	if seen != nil && seen["services"] == nil && seen["source"] == nil && seen["include"] == nil && seen["proxies"] == nil && seen["forwards"] == nil && seen["capture"] == nil && seen["pods"] == nil && !d.has("services") {
		d.errorf(root, "the file needs the key \"services\" or \"source\"; a host without services is written \"services: []\"")
	}
	d.taken = taken{make(map[string]*origin), make(map[service.Listener]string)}
	d.errors = append(d.errors, d.claim(c.Services)...)
	d.addIncluded(t, c, seen["include"])
	d.defaultForward(c)
	d.needsDirector(c)
	d.checkVias(c)
	d.checkForwards(c)
	d.checkCaptures(c)
	d.checkAnnounce(c)
	d.checkSource(c, seen["source"])
	d.checkPods(c, seen["pods"])
	if err := d.failed(); err != nil {
		return nil, err
	}
	for _, s := range c.Services {
		s.Source = service.SourceFile
	}
	d.warn(c)
	isDisabled := func(s *service.Service) bool { return d.disabled[s] }
	c.Services = slices.DeleteFunc(c.Services, isDisabled)
	for name, some := range c.Files {
		c.Files[name] = slices.DeleteFunc(some, isDisabled)
	}
	c.Warnings, c.needs = d.sorted(d.warnings), append(d.needs(c, seen["scope"]), slices.Concat(d.needsOfProxies(c), d.needsOfAnnounce(c), d.needsOfCaptures(c))...)
	return c, nil
}

// taken are the names and listeners of the services that were read.
type taken struct {
	names     map[string]*origin
	listeners map[service.Listener]string
}

// release gives back what was claimed for services that are left out.
func (d *decoder) release(services []*service.Service) {
	for _, s := range services {
		at := d.at[s]
		if at == nil || d.taken.names[s.Name] != at {
			continue
		}
		delete(d.taken.names, s.Name)
		for _, l := range at.listeners {
			if d.taken.listeners[l] == s.Name {
				delete(d.taken.listeners, l)
			}
		}
	}
}

// claim takes names and listeners for services, and says what is taken already.
func (d *decoder) claim(services []*service.Service) (errs Errors) {
	for _, s := range services {
		at := d.at[s]
		if at == nil || s.Name == "" {
			continue
		}
		here := &decoder{file: at.file}
		if first, ok := d.taken.names[s.Name]; ok {
			here.errorf(at.name, "service %s is already defined %s; names are unique", s.Name, place(at.file, first.file, first.name.Line))
		} else {
			d.taken.names[s.Name] = at
		}
		for i, l := range at.listeners {
			if owner, ok := d.taken.listeners[l]; ok {
				here.errorf(at.listenerNodes[i], "service %s: listener %s already belongs to service %s",
					s.Name, l, owner)
				continue
			}
			d.taken.listeners[l] = s.Name
		}
		errs = append(errs, here.errors...)
	}
	return errs
}
