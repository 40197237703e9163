package config

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Value is one value of a configuration and where it comes from.
type Value struct {
	Path  string `json:"path"`  // "services.web.balance"
	Value string `json:"value"` // as it is written
	From  string `json:"from"`  // "pentad.yaml:7", or "default"
}

// Values returns what a valid text says, with the defaults of keys that it does not
// name; of one service, if that is named.
func Values(t *Text, service string) ([]Value, error) {
	c, err := ParseText(t)
	if err != nil {
		return nil, err
	}
	v := &values{keys: Keys(), only: service}
	v.file(t.Name, t.Data, nil, true)
	main := v.defaults
	for _, p := range t.Included {
		if c.Skipped[p.Name] == nil {
			v.file(p.Name, p.Data, main, false)
		}
	}
	if service != "" && len(v.all) == 0 {
		return nil, fmt.Errorf("the file has no service %s", service)
	}
	return v.all, nil
}

// values gathers what files say.
type values struct {
	keys     []Key
	only     string
	all      []Value
	defaults *yaml.Node // of the file that is read
	d        *decoder
	udp      bool // all listeners of the service are of UDP
}

func (v *values) file(name string, data []byte, defaults *yaml.Node, isMain bool) {
	d := &decoder{file: name, defaults: defaults}
	if !isMain && defaults != nil {
		d.elsewhere = &foreign{v.d.file, make(map[*yaml.Node]bool)}
		d.elsewhere.add(defaults)
	}
	root := d.document(data)
	if root == nil {
		return // it is left out
	}
	d.setDefaults(root)
	v.defaults, v.d = d.defaults, d
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i].Value, resolve(root.Content[i+1])
		switch {
		case strings.HasPrefix(key, "x-") || key == "defaults":
		case key == "services":
			for _, one := range value.Content {
				n := d.withDefaults(resolve(one))
				v.udp = listensUDP(n)
				v.mapping("services."+nameOf(n), "services[]", n)
			}
		case v.only == "":
			v.node(key, key, value)
		}
	}
	if v.only == "" && isMain {
		v.missing("", "", flatKeys(root))
	}
}

func nameOf(n *yaml.Node) string {
	if name := valueOf(n, "name"); name != nil {
		return name.Value
	}
	return ""
}

func (v *values) add(path, value, from string) {
	if v.only == "" || strings.HasPrefix(path, "services."+v.only+".") {
		v.all = append(v.all, Value{path, value, from})
	}
}

// mapping adds what a mapping says, what it merges, and the defaults of what it does not
// say.
func (v *values) mapping(path, schema string, n *yaml.Node) {
	seen := make(map[string]bool)
	eachPair(n, 0, func(key, value *yaml.Node) {
		if !seen[key.Value] {
			seen[key.Value] = true
			v.node(path+"."+key.Value, schema+"."+key.Value, resolve(value))
		}
	})
	v.missing(path, schema, seen)
}

func (v *values) node(path, schema string, n *yaml.Node) {
	if n.Kind == yaml.MappingNode {
		v.mapping(path, schema, n)
		return
	}
	v.add(path, flow(n), fmt.Sprintf("%s:%d", v.d.fileOf(n), n.Line))
}

// missing adds the defaults of the keys of a mapping that are not there, and those of
// sections that are not.
func (v *values) missing(path, schema string, seen map[string]bool) {
	prefix := schema + "."
	if schema == "" {
		prefix = ""
	}
	for _, k := range v.keys {
		rest, below := strings.CutPrefix(k.Path, prefix)
		section, _, _ := strings.Cut(rest, ".")
		// Without a source there is none, and lists are empty.
		if !below || k.Default == "" || seen[section] || slices.Contains([]string{"source", "defaults", "include"}, section) || strings.Contains(rest, "[]") ||
			v.udp && schema == "services[]" && slices.Contains(tcpKeys, section) {
			continue
		}
		v.add(strings.TrimPrefix(path+"."+rest, "."), k.Default, "default")
	}
}

func flatKeys(n *yaml.Node) map[string]bool {
	seen := make(map[string]bool)
	for i := 0; i+1 < len(n.Content); i += 2 {
		seen[n.Content[i].Value] = true
	}
	return seen
}

// flow writes a value in one line.
func flow(n *yaml.Node) string {
	n = resolve(n)
	var parts []string
	switch n.Kind {
	case yaml.SequenceNode:
		for _, c := range n.Content {
			parts = append(parts, flow(c))
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			parts = append(parts, n.Content[i].Value+": "+flow(n.Content[i+1]))
		}
		return "{" + strings.Join(parts, ", ") + "}"
	}
	return n.Value
}
