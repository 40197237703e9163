package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"go.yaml.in/yaml/v4"
	"golang.org/x/sys/unix"
)

// MaxSize is how long a configuration file may be, in bytes: a few hundred
// thousand services.
const MaxSize = 64 << 20

// ErrNotFile says that what lies at the path of the configuration is not a file
// that can be read to its end.
var ErrNotFile = errors.New("it is not a regular file")

// Read returns the text of a file. It never waits: what is not a regular file, such
// as a pipe to which nobody writes, is refused, and so is what is longer than
// MaxSize.
func Read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, &os.PathError{Op: "read", Path: path, Err: ErrNotFile}
	}
	data, err := read(f, st.Size())
	if errors.Is(err, ErrLong) {
		err = &os.PathError{Op: "read", Path: path, Err: err}
	}
	return data, err
}

// ErrLong says that a configuration is longer than MaxSize.
var ErrLong = fmt.Errorf("it is longer than %d MiB", MaxSize>>20)

// ReadFrom returns the text of a file that is open, up to MaxSize.
func ReadFrom(r io.Reader) ([]byte, error) { return read(r, 0) }

// read reads up to MaxSize. About size bytes are expected: a buffer that grows leaves
// several times as many behind.
func read(r io.Reader, size int64) ([]byte, error) {
	var b bytes.Buffer
	b.Grow(int(min(size, MaxSize)) + bytes.MinRead)
	_, err := b.ReadFrom(io.LimitReader(r, MaxSize+1))
	if err == nil && b.Len() > MaxSize {
		err = ErrLong
	}
	return b.Bytes(), err
}

// Aliases let a short text stand for a long one: what they make of a file may be
// this many values, or so many times what is written.
const (
	maxExpanded  = 1 << 20
	maxExpansion = 10
)

// expansion counts the values of a document.
type expansion struct {
	written int
	sizes   map[*yaml.Node]int // of nodes that have an anchor; -1 while they are counted
}

// of returns how many values a node stands for; bad is an alias within what it
// stands for, which would have no end.
func (e *expansion) of(n *yaml.Node) (size int, bad *yaml.Node) {
	if n.Kind == yaml.AliasNode {
		switch known, ok := e.sizes[n.Alias]; {
		case known < 0:
			return 0, n
		case ok:
			return known, nil
		}
		// Anchors stand before their aliases, so that this one was counted.
		return 1, nil
	}
	if n.Anchor != "" {
		e.sizes[n] = -1
	}
	e.written++
	size = 1
	for _, c := range n.Content {
		s, bad := e.of(c)
		if bad != nil {
			return 0, bad
		}
		size = min(size+s, 1<<40)
	}
	if n.Anchor != "" {
		e.sizes[n] = size
	}
	return size, nil
}

// bounded reports whether what a document stands for is in proportion to it.
func (d *decoder) bounded(root *yaml.Node) bool {
	e := expansion{sizes: make(map[*yaml.Node]int)}
	size, bad := e.of(root)
	switch {
	case bad != nil:
		d.errorf(bad, "the alias *%s stands within what it stands for", bad.Value)
		return false
	case size > maxExpanded && size/maxExpansion > e.written:
		d.errorf(root, "aliases make %d values of the %d that are written: more than %d times as many", size, e.written, maxExpansion)
		return false
	}
	return true
}
