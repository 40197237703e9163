package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// Object is a service as the hosts of a fleet share it: the mapping that stands below
// `services` in a file, with a selector.
type Object struct {
	Services []*service.Service // of its name; of several ports there may be several
	Selector map[string]string  // labels that a host has that takes it; none: every host does
	Warnings Errors
}

// Takes reports whether a host with these labels takes the object.
func (o *Object) Takes(labels map[string]string) bool {
	for key, value := range o.Selector {
		if labels[key] != value {
			return false
		}
	}
	return true
}

// selectorKey is the key that an object has besides those of a service.
const selectorKey = "selector"

// ParseObject reads the object of a name. The error is of type Errors; its positions are
// those of the text.
func ParseObject(name string, text []byte) (*Object, error) {
	d := newDecoder("services/" + name)
	d.taken = taken{make(map[string]*origin), make(map[service.Listener]string)}
	root := d.document(text)
	if root == nil {
		return nil, d.failed()
	}
	if root = resolve(root); root.Kind != yaml.MappingNode {
		d.errorf(root, "want a service: a mapping with the keys listen and backends, found %s", found(root))
		return nil, d.failed()
	}
	o := &Object{}
	node := d.withoutSelector(root, &o.Selector)
	if at := valueOf(node, "name"); at == nil {
		node.Content = append([]*yaml.Node{scalar("name", root), scalar(name, root)}, node.Content...)
	} else if at.Value != name {
		d.errorf(at, "the service is called %s here, and its object %s; they are the same", shorten(at.Value), name)
	}
	c := &Config{Services: d.byPort(d.service(node))}
	d.errors = append(d.errors, d.claim(c.Services)...)
	d.defaultForward(c)
	if err := d.failed(); err != nil {
		return nil, err
	}
	d.warn(c)
	for _, s := range c.Services {
		if !d.disabled[s] {
			s.Source = service.SourceEtcd
			o.Services = append(o.Services, s)
		}
	}
	o.Warnings = d.sorted(d.warnings)
	return o, nil
}

// withoutSelector returns the mapping of a service alone, and reads the selector.
func (d *decoder) withoutSelector(n *yaml.Node, to *map[string]string) *yaml.Node {
	c := *n
	c.Content = nil
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == selectorKey {
			*to = d.labels(resolve(n.Content[i+1]))
			continue
		}
		c.Content = append(c.Content, n.Content[i], n.Content[i+1])
	}
	return &c
}

// scalar is a word that stands nowhere in the text; errors of it point at its mapping.
func scalar(value string, at *yaml.Node) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: value, Line: at.Line, Column: at.Column}
}

// labels reads a mapping of words to words.
func (d *decoder) labels(n *yaml.Node) map[string]string {
	if n.Kind != yaml.MappingNode {
		d.errorf(n, "want labels such as {rack: a1}, found %s", found(n))
		return nil
	}
	all := make(map[string]string)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], resolve(n.Content[i+1])
		if value.Kind != yaml.ScalarNode || value.Tag == "!!null" || value.Value == "" {
			d.errorf(value, "want a word as the value of the label %s, found %s", key.Value, found(value))
			continue
		}
		all[key.Value] = value.Value
	}
	return all
}

// ObjectText is an object as it is written.
type ObjectText struct {
	Name string
	Text []byte
}

// ErrNoObjects says that a file has nothing that a fleet could share.
var ErrNoObjects = errors.New("there are no services in it")

// Objects returns the services of a file as objects, each with the defaults of the file, so
// that it stands for itself; and the names of sections that are for one host and stay in its
// file. The whole file is checked; the error is of type Errors where it is not valid.
// A service of a file for objects may have a selector.
func Objects(name string, data []byte) (all []ObjectText, left []string, err error) {
	d := newDecoder(name)
	root := d.document(data)
	if root == nil {
		return nil, nil, d.failed()
	}
	if root = resolve(root); root.Kind != yaml.MappingNode {
		d.errorf(root, "want a mapping with the key services, found %s", found(root))
		return nil, nil, d.failed()
	}
	d.setDefaults(root)
	var services *yaml.Node
	for i := 0; i+1 < len(root.Content); i += 2 {
		value := resolve(root.Content[i+1])
		switch key := root.Content[i].Value; {
		case key == "services":
			services = value
		case key == "defaults":
			d.checkDefaults(value, nil)
		case key != "<<" && !strings.HasPrefix(key, "x-"):
			left = append(left, key)
		}
	}
	if services == nil {
		return nil, left, ErrNoObjects
	}
	d.list(services, "a list of services", func(e *yaml.Node) {
		if t, ok := d.objectText(e); ok {
			all = append(all, t)
		}
	})
	for _, problem := range Conflicts(all) {
		d.errorf(services, "%s", problem)
	}
	return all, left, d.failed()
}

// objectText returns one service of a file as an object, after it was checked in its place.
func (d *decoder) objectText(e *yaml.Node) (t ObjectText, ok bool) {
	before := len(d.errors)
	if e.Kind != yaml.MappingNode {
		d.errorf(e, "want a service: a mapping, found %s", found(e))
		return t, false
	}
	var selector map[string]string
	s := d.service(d.withoutSelector(e, &selector))
	d.byPort(s)
	if len(d.errors) > before {
		return t, false
	}
	t.Name = s.Name
	node := standalone(d.withDefaults(e))
	for i := 0; i+1 < len(node.Content); i += 2 {
		if node.Content[i].Value == "name" {
			node.Content = slices.Delete(node.Content, i, i+2)
			break
		}
	}
	text, err := yaml.Dump(node, yaml.WithIndent(2))
	if err != nil {
		d.errorf(e, "service %s cannot be written: %v", t.Name, err)
		return t, false
	}
	t.Text = text
	return t, true
}

// Conflicts says which of several objects cannot be had together: two of one name, or two
// with one listener on hosts that would take both. Objects that are not valid are passed
// over.
func Conflicts(all []ObjectText) (problems []string) {
	type owner struct {
		name   string
		object *Object
	}
	names := make(map[string]bool)
	listeners := make(map[service.Listener][]owner)
	for _, t := range all {
		if names[t.Name] {
			problems = append(problems, fmt.Sprintf("service %s is there twice; names are unique", t.Name))
			continue
		}
		names[t.Name] = true
		o, err := ParseObject(t.Name, t.Text)
		if err != nil {
			continue
		}
		for _, s := range o.Services {
			for _, l := range s.Listeners {
				for _, other := range listeners[l.At()] {
					if other.name != t.Name && other.object.meets(o) {
						problems = append(problems, fmt.Sprintf("service %s: listener %s already belongs to service %s", t.Name, l, other.name))
					}
				}
				listeners[l.At()] = append(listeners[l.At()], owner{t.Name, o})
			}
		}
	}
	return problems
}

// meets reports whether a host may take both.
func (o *Object) meets(other *Object) bool {
	for key, value := range o.Selector {
		if v, ok := other.Selector[key]; ok && v != value {
			return false
		}
	}
	return true
}

// standalone returns a copy of a node that needs no other: with what its aliases and merge
// keys stand for.
func standalone(n *yaml.Node) *yaml.Node {
	n = resolve(n)
	if n.Kind == yaml.MappingNode {
		n = flattened(n)
	}
	c := *n
	c.Anchor = ""
	c.Content = make([]*yaml.Node, len(n.Content))
	for i, child := range n.Content {
		c.Content[i] = standalone(child)
	}
	return &c
}
