package config

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// Include says which other files have services, too.
type Include struct {
	Files []string // patterns as of filepath.Match, below the directory of the file
	Skip  bool     // one that is not valid is left out, and not the whole configuration
}

var includeSchema = schema[Include]{what: "include", fields: []field[Include]{
	{
		key: "files", kind: "list of patterns", required: true,
		doc: "Patterns of files, such as `[conf.d/*.yaml]`; below the directory of this file unless they begin with a slash.",
		set: func(d *decoder, n *yaml.Node, to *Include) { to.Files = d.patterns(n) },
	},
	word("onError", "`fail`: when one of them is not valid nothing is put in force. `skip`: the others are, and of that one what was in force before.",
		[]string{"fail", "skip"}, func(to *Include, i int) { to.Skip = i == 1 }).or("fail"),
}}

// include reads the short or the long form.
func (d *decoder) include(n *yaml.Node, to *Config) {
	if n.Kind == yaml.SequenceNode {
		to.Include.Files = d.patterns(n)
		return
	}
	includeSchema.decode(d, n, &to.Include)
}

func (d *decoder) patterns(n *yaml.Node) []string {
	var all []string
	d.list(n, "a list of patterns, such as [conf.d/*.yaml]", func(e *yaml.Node) {
		p, ok := d.text(e, "a pattern such as conf.d/*.yaml")
		if _, err := filepath.Match(p, "x"); ok && err != nil {
			d.errorf(e, "want a pattern such as conf.d/*.yaml, found %s", found(e))
		} else if ok {
			all = append(all, p)
		}
	})
	return all
}

// includedSchema is what a file that is included may have.
var includedSchema = schema[Config]{what: "an included file", extensible: true, fields: []field[Config]{
	mappings("services", "list of services", "The services of this file.", &serviceSchema, (*decoder).services).must(),
	mapping("defaults", "mapping", "What every service of this file has that does not say otherwise; those of the file that includes it by default.",
		&defaultsSchema, (*decoder).checkDefaults),
}}

// Text is a configuration as it is written: a file and those that it includes.
type Text struct {
	Name     string // for messages; patterns are below its directory
	Data     []byte
	Included []Part // in the order of their names
	Patterns []string
}

// Part is an included file.
type Part struct {
	Name string
	Data []byte
	Err  error `json:"-"` // why it cannot be read
}

// Digest is the same for texts that say the same.
func (t *Text) Digest() string {
	h := sha256.New()
	for _, part := range append([]Part{{Name: t.Name, Data: t.Data}}, t.Included...) {
		fmt.Fprintf(h, "%q %d\n%s", part.Name, len(part.Data), part.Data)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// Equal reports whether both say the same.
func (t *Text) Equal(o *Text) bool {
	if t == nil || o == nil {
		return t == o
	}
	return bytes.Equal(t.Data, o.Data) && slices.EqualFunc(t.Included, o.Included, func(a, b Part) bool {
		return a.Name == b.Name && bytes.Equal(a.Data, b.Data) && (a.Err == nil) == (b.Err == nil)
	})
}

// ReadText returns the text of a file and of those that it includes.
func ReadText(path string) (*Text, error) {
	data, err := Read(path)
	if err != nil {
		return nil, err
	}
	return WithIncluded(path, data), nil
}

// WithIncluded returns a text with the files that it includes.
func WithIncluded(name string, data []byte) *Text {
	t := &Text{Name: name, Data: data, Patterns: patternsIn(name, data)}
	for _, path := range Included(t.Patterns) {
		p := Part{Name: path}
		p.Data, p.Err = Read(path)
		t.Included = append(t.Included, p)
	}
	return t
}

// Included returns the files that there are, each once, in the order of their names.
func Included(patterns []string) []string {
	var all []string
	for _, p := range patterns {
		// A pattern that makes no sense is said to be one where it is read.
		some, _ := filepath.Glob(p)
		for _, name := range some {
			// As a shell does: those are what editors leave there.
			if !strings.HasPrefix(filepath.Base(name), ".") || strings.HasPrefix(filepath.Base(p), ".") {
				all = append(all, name)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// patternsIn finds what a text includes. What is wrong with it is said by Parse.
func patternsIn(name string, data []byte) []string {
	if !bytes.Contains(data, []byte("include")) {
		return nil
	}
	d := &decoder{file: name}
	root := d.document(data)
	if root == nil || root.Kind != yaml.MappingNode {
		return nil
	}
	c := &Config{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		if root.Content[i].Value == "include" {
			d.include(resolve(root.Content[i+1]), c)
		}
	}
	for i, p := range c.Include.Files {
		if !filepath.IsAbs(p) {
			c.Include.Files[i] = filepath.Join(filepath.Dir(name), p)
		}
	}
	return c.Include.Files
}

// addIncluded reads the files that a text includes into a configuration.
func (d *decoder) addIncluded(t *Text, c *Config, at *yaml.Node) {
	for _, p := range t.Patterns {
		isThere := func(part Part) bool { return part.Name == p }
		if !strings.ContainsAny(p, `*?[\`) && !slices.ContainsFunc(t.Included, isThere) && at != nil {
			d.warnings = append(d.warnings, d.problem(at, "there is no file %s to include", p))
		}
	}
	if len(t.Included) > 0 {
		c.Files = make(map[string][]*service.Service)
	}
	for _, p := range t.Included {
		sub := &decoder{file: p.Name, at: d.at, disabled: d.disabled}
		if len(d.errors) == 0 && d.defaults != nil {
			sub.defaults, sub.elsewhere = d.defaults, &foreign{d.file, make(map[*yaml.Node]bool)}
			sub.elsewhere.add(d.defaults)
		}
		part := &Config{}
		sub.decodePart(p, part)
		if errs := append(sub.errors, d.claim(part.Services)...); len(errs) > 0 {
			d.release(part.Services)
			d.rejectPart(p.Name, sub.sorted(errs), c)
			continue
		}
		c.Files[p.Name] = part.Services
		c.Services = append(c.Services, part.Services...)
	}
}

func (d *decoder) decodePart(p Part, part *Config) {
	if p.Err != nil {
		d.errorf(&yaml.Node{Line: 1, Column: 1}, "cannot be read: %v", p.Err)
		return
	}
	root := d.document(p.Data)
	if root == nil {
		return
	}
	d.setDefaults(root)
	includedSchema.decode(d, root, part)
}

// rejectPart leaves out an included file that is not valid, or has it all fail.
func (d *decoder) rejectPart(name string, errs Errors, c *Config) {
	if !c.Include.Skip {
		d.errors = append(d.errors, errs...)
		return
	}
	if c.Skipped == nil {
		c.Skipped = make(map[string]Errors)
	}
	c.Skipped[name] = errs
	for _, e := range errs {
		e.Message += " (the file is left out)"
		d.warnings = append(d.warnings, e)
	}
}

// place says where something stands, as seen from a file.
func place(from, file string, line int) string {
	if from == file {
		return fmt.Sprintf("at line %d", line)
	}
	return fmt.Sprintf("at %s:%d", file, line)
}
