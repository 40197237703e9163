package config

import (
	"bytes"
	"errors"
	"io"
	"regexp"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// document returns the top mapping of the one document of a file, or nil with an error
// noted.
func (d *decoder) document(data []byte) *yaml.Node {
	if at := invalidUTF8(data); at != nil {
		d.errorf(at, "this is not YAML: a byte that is no UTF-8")
		return nil
	}
	loader, err := yaml.NewLoader(bytes.NewReader(data))
	if err != nil {
		d.errorf(&yaml.Node{Line: 1, Column: 1}, "this is not YAML: %v", err)
		return nil
	}
	var doc, next yaml.Node
	err = loader.Load(&doc)
	if errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0 {
		d.errorf(&yaml.Node{Line: 1, Column: 1}, "the file is empty; a host without services is written \"services: []\"")
		return nil
	}
	if err != nil {
		d.syntax(data, err)
		return nil
	}
	switch err := loader.Load(&next); {
	case errors.Is(err, io.EOF):
	case err != nil:
		d.syntax(data, err)
		return nil
	case isEmpty(&next):
	default:
		d.errorf(&next, "a second document begins here, and only one is read; remove the line with ---, or write the services below the first \"services:\"")
		return nil
	}
	if !d.bounded(doc.Content[0]) {
		return nil
	}
	return doc.Content[0]
}

// isEmpty reports whether nothing stands in a document, as after a last line with ---.
func isEmpty(doc *yaml.Node) bool {
	return len(doc.Content) == 0 || doc.Content[0].Kind == yaml.ScalarNode && doc.Content[0].Tag == "!!null" && doc.Content[0].Value == ""
}

// invalidUTF8 returns where the first byte is that is no UTF-8, or nil.
func invalidUTF8(data []byte) *yaml.Node {
	if utf8.Valid(data) {
		return nil
	}
	line, start := 1, 0
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && size == 1 {
			return &yaml.Node{Line: line, Column: utf8.RuneCount(data[start:i]) + 1}
		}
		if r == '\n' {
			line, start = line+1, i+1
		}
		i += size
	}
	return nil
}

var (
	missingSpace = regexp.MustCompile(`^(\s*(?:- +)*)([\w./-]+:)[^\s/]`)
	conflict     = regexp.MustCompile(`^(<{7}|={7}|>{7})( |$)`)
)

// syntax says where a text is not YAML, and what is most likely wrong there.
func (d *decoder) syntax(data []byte, err error) {
	at, message := &yaml.Node{Line: 1, Column: 1}, strings.TrimPrefix(err.Error(), "yaml: ")
	var load *yaml.LoadError
	if errors.As(err, &load) {
		message = load.Message
		if strings.Contains(message, "<document start>") {
			message = "text stands after the end of the document"
		}
		if load.Mark.Line > 0 {
			at.Line, at.Column = load.Mark.Line, max(1, load.Mark.Column)
		}
	}
	if load != nil && strings.Contains(message, "unexpected end of stream") && load.ContextMark.Line > 0 {
		at.Line, at.Column = load.ContextMark.Line, max(1, load.ContextMark.Column)
		message = "what is opened here with a quote or a bracket is never closed"
	}
	lines := strings.Split(string(data), "\n")
	for i, line := range lines {
		if conflict.MatchString(line) {
			d.errorf(&yaml.Node{Line: i + 1, Column: 1}, "this is not YAML: a conflict of a merge is left here")
			return
		}
	}
	// A missing space is noticed one line late.
	for i := at.Line; i >= max(1, at.Line-1); i-- {
		if i > len(lines) {
			continue
		}
		line := lines[i-1]
		blank := line[:len(line)-len(strings.TrimLeft(line, " \t"))]
		if n := strings.Index(blank, "\t"); n >= 0 {
			d.errorf(&yaml.Node{Line: i, Column: n + 1}, "this is not YAML: a tab; YAML is indented with spaces")
			return
		}
		if m := missingSpace.FindStringSubmatch(line); m != nil && strings.Contains(message, "mapping values") {
			d.errorf(&yaml.Node{Line: i, Column: len(m[1]) + len(m[2]) + 1}, "this is not YAML: a space is missing after %s", m[2])
			return
		}
	}
	d.errorf(at, "this is not YAML: %s", message)
}
