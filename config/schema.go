package config

import (
	"net/netip"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// A schema is the one definition of a part of pentad.yaml: the decoder reads with it,
// and docs/reference/keys.md is written from it. This file is the machinery; each section
// of the file has one of its own, with its struct, schema, defaults and checks.

// schema is the keys of one kind of mapping, in the order of the documentation.
type schema[T any] struct {
	what       string // "a service"
	fields     []field[T]
	extensible bool // keys that begin with x- are passed over
}

// field is one key of a mapping: how it is read and what the documentation says.
type field[T any] struct {
	key       string
	kind      string // for people: "duration", "list of addresses"
	fallback  string // the default, as written; empty: none
	doc       string
	required  bool
	words     []string // that it may be; nil: it is no word
	low, high int      // of a whole number; both 0: it is none
	set       func(d *decoder, n *yaml.Node, to *T)
	nested    func(prefix string) []Key // keys of what it holds; nil: it holds no mapping
	several   bool                      // it holds a list of mappings
}

// must is the field as one that has to be there.
func (f field[T]) must() field[T] {
	f.required = true
	return f
}

// or is the field with a default, as it is written.
func (f field[T]) or(fallback string) field[T] {
	f.fallback = fallback
	return f
}

// section is a key that holds a mapping.
func section[T, S any](key, doc string, of *schema[S], in func(*T) *S) field[T] {
	return field[T]{key: key, kind: "mapping", doc: doc, nested: of.describe,
		set: func(d *decoder, n *yaml.Node, to *T) { of.decode(d, n, in(to)) }}
}

// mapping is a key that holds a mapping about which its reader has more to say than its
// keys have.
func mapping[T, S any](key, kind, doc string, of *schema[S], read func(*decoder, *yaml.Node, *T)) field[T] {
	return field[T]{key: key, kind: kind, doc: doc, nested: of.describe, set: read}
}

// mappings is a key that holds a list of mappings.
func mappings[T, S any](key, kind, doc string, of *schema[S], read func(*decoder, *yaml.Node, *T)) field[T] {
	f := mapping(key, kind, doc, of, read)
	f.several = true
	f.nested = func(path string) []Key { return of.describe(strings.TrimSuffix(path, ".") + "[].") }
	return f
}

// number is a key that holds a whole number.
func number[T any](key, kind, doc string, low, high int, set func(*T, int)) field[T] {
	return field[T]{key: key, kind: kind, doc: doc, low: low, high: high, set: func(d *decoder, n *yaml.Node, to *T) {
		if v, ok := d.integer(n, low, high); ok {
			set(to, v)
		}
	}}
}

// span is a key that holds a duration of whole units.
func span[T any](key, doc string, low, high, unit time.Duration, set func(*T, time.Duration)) field[T] {
	return field[T]{key: key, kind: "duration", doc: doc, set: func(d *decoder, n *yaml.Node, to *T) {
		if v, ok := d.duration(n, low, high, unit); ok {
			set(to, v)
		}
	}}
}

// word is a key that holds one of a few words.
func word[T any](key, doc string, words []string, set func(*T, int)) field[T] {
	return field[T]{key: key, kind: "word", doc: doc, words: words, set: func(d *decoder, n *yaml.Node, to *T) {
		if i, ok := d.word(n, words...); ok {
			set(to, i)
		}
	}}
}

// truth is a key that holds true or false.
func truth[T any](key, doc string, set func(*T, bool)) field[T] {
	return field[T]{key: key, kind: "true or false", doc: doc, set: func(d *decoder, n *yaml.Node, to *T) {
		if v, ok := d.truth(n); ok {
			set(to, v)
		}
	}}
}

// text is a key that holds text; what is an example for who wrote none.
func text[T any](key, kind, doc, what string, set func(*T, string)) field[T] {
	return field[T]{key: key, kind: kind, doc: doc, set: func(d *decoder, n *yaml.Node, to *T) {
		if v, ok := d.text(n, what); ok {
			set(to, v)
		}
	}}
}

// prefixes is a key that holds a list of address prefixes.
func prefixes[T any](key, doc string, set func(*T, []netip.Prefix)) field[T] {
	return field[T]{key: key, kind: "list of prefixes", doc: doc,
		set: func(d *decoder, n *yaml.Node, to *T) { set(to, d.prefixes(n)) }}
}

// Key is one key of pentad.yaml, for documentation.
type Key struct {
	Path     string // "services[].health.path"
	Kind     string // "duration"
	Default  string // empty: none
	Required bool
	Doc      string

	Words     []string // that it may be; nil: it is no word
	Low, High int      // of a whole number; both 0: it is none
	Several   bool     // it holds a list of mappings
}

// Keys returns every key of pentad.yaml in the order of the documentation.
func Keys() []Key { return fileSchema.describe("") }

func (s *schema[T]) describe(prefix string) []Key {
	var keys []Key
	for _, f := range s.fields {
		keys = append(keys, Key{
			Path: prefix + f.key, Kind: f.kind, Default: f.fallback, Required: f.required, Doc: f.doc, Words: f.words, Low: f.low, High: f.high, Several: f.several,
		})
		if f.nested != nil {
			keys = append(keys, f.nested(prefix+f.key+".")...)
		}
	}
	return keys
}

// decode reads a mapping into to and returns the value nodes by key, or nil
// when n is no mapping.
func (s *schema[T]) decode(d *decoder, n *yaml.Node, to *T) map[string]*yaml.Node {
	n = resolve(n)
	if n.Kind != yaml.MappingNode {
		d.errorf(n, "%s must be a mapping with keys such as %q, found %s", s.what, s.fields[0].key, found(n))
		return nil
	}
	seen := make(map[string]*yaml.Node, len(n.Content)/2)
	merges := 0
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Value == "<<" && s.extensible {
			d.errorf(key, "the key << is not taken at the top of a file; write it where it is to merge something")
			return seen
		}
		if key.Value == "<<" {
			// After what is written here.
			if merges++; merges == 2 {
				d.errorf(key, "the key << stands twice in %s; one may name a list of mappings", s.what)
			}
			continue
		}
		s.decodeOne(d, key, value, seen, to)
	}
	s.merge(d, n, seen, to, 0)
	for _, f := range s.fields {
		if f.required && seen[f.key] == nil && !d.has(f.key) {
			d.errorf(n, "%s needs the key %q: %s", s.what, f.key, f.kind)
		}
	}
	return seen
}

func (s *schema[T]) decodeOne(d *decoder, key, value *yaml.Node, seen map[string]*yaml.Node, to *T) {
	f := s.find(key.Value)
	if f == nil {
		if s.extensible && strings.HasPrefix(key.Value, "x-") {
			return // a place for anchors
		}
		d.errorf(key, "unknown key %q in %s%s", shorten(key.Value), s.what, service.Nearest(key.Value, s.keys()))
		if near := service.NearestWord(key.Value, s.keys()); near != "" {
			d.meant = append(d.meant, near)
		}
		return
	}
	if first, ok := seen[f.key]; ok {
		d.errorf(key, "key %q stands twice in %s; the first is at line %d", f.key, s.what, first.Line)
		return
	}
	seen[f.key] = value
	f.set(d, resolve(value), to)
}

// maxMerged bounds mappings that are merged into mappings that are merged.
const maxMerged = 16

// merge takes over, of the mappings that the key << of YAML names, what is not written
// in this one (yaml.org/type/merge.html).
func (s *schema[T]) merge(d *decoder, n *yaml.Node, seen map[string]*yaml.Node, to *T, depth int) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], resolve(n.Content[i+1])
		if key.Value != "<<" {
			continue
		}
		sources := []*yaml.Node{value}
		if value.Kind == yaml.SequenceNode {
			sources = value.Content
		}
		for _, from := range sources {
			if from = resolve(from); from.Kind != yaml.MappingNode || depth == maxMerged {
				d.errorf(n.Content[i+1], "the key << merges mappings, found %s", found(from))
				return
			}
			for j := 0; j+1 < len(from.Content); j += 2 {
				if k := from.Content[j]; seen[k.Value] == nil && k.Value != "<<" {
					s.decodeOne(d, k, from.Content[j+1], seen, to)
				}
			}
			s.merge(d, from, seen, to, depth+1)
		}
	}
}

func (s *schema[T]) find(key string) *field[T] {
	for i := range s.fields {
		if s.fields[i].key == key {
			return &s.fields[i]
		}
	}
	return nil
}

func (s *schema[T]) keys() []string {
	keys := make([]string, len(s.fields))
	for i, f := range s.fields {
		keys[i] = f.key
	}
	return keys
}
