// Package file is the source that most hosts have: one configuration file,
// watched. It emits the whole configuration each time the text changes, or why
// it is not valid; what to do with either is for the agent to say.
package file

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

// quiet is how long a file must not change before it is read: an editor that
// writes in place is not interrupted half-way, and half a list of services can
// be valid YAML.
const quiet = 15 * time.Millisecond

// lookEvery is how often the file is looked at without a reason: a directory that
// is put in the place of another, or mounted over it, tells nobody.
const lookEvery = time.Second

// Source watches one file. Files written in place, replaced by rename or with
// their directory, and reached through symbolic links that are switched (as
// Kubernetes mounts a ConfigMap) are all noticed.
type Source struct {
	path    string
	watcher *fsnotify.Watcher
	names   map[string]bool     // what the contents of the file depend on
	watched map[string]identity // their directories
	seen    look
	last    *config.Text
}

// identity tells one file or directory from another of the same name.
type identity struct{ device, inode uint64 }

// look is what can be told of the file without reading it.
type look struct {
	file, dir     identity
	size          int64
	changed       unix.Timespec
	missing, lost error  // why the file, or its directory, cannot be looked at
	included      string // the same of included files
}

func identify(path string) (identity, unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return identity{st.Dev, st.Ino}, st, err
}

func (s *Source) look() look {
	var l look
	var st unix.Stat_t
	l.file, st, l.missing = identify(s.path)
	l.size, l.changed = st.Size, st.Ctim
	l.dir, _, l.lost = identify(filepath.Dir(s.path))
	if s.last == nil {
		return l
	}
	var all strings.Builder
	for _, path := range config.Included(s.last.Patterns) {
		id, st, err := identify(path)
		fmt.Fprintln(&all, path, id, st.Size, st.Ctim, err)
	}
	l.included = all.String()
	return l
}

// New returns a source for the file. Close it.
func New(path string) (*Source, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	s := &Source{path: path, watcher: w, watched: make(map[string]identity)}
	if err := s.follow(); err != nil {
		w.Close()
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	return s, nil
}

// Close stops watching.
func (s *Source) Close() error { return s.watcher.Close() }

// Load reads the file as it is now. Run reports only what differs from it.
func (s *Source) Load() (source.Update, error) {
	s.seen = s.look()
	t, err := config.ReadText(s.path)
	if err != nil {
		u := unreadable(err)
		return u, u.Err
	}
	s.setText(t)
	u := Parse(t)
	return u, u.Err
}

// setText notes what was read last. Of the files that it includes others may have to be
// watched now.
func (s *Source) setText(t *config.Text) {
	moved := s.last == nil || !slices.Equal(s.last.Patterns, t.Patterns)
	s.last = t
	if moved {
		s.seen = look{} // looked at once more: one may have changed since it was read
		// What cannot be watched can be looked at, if it is there.
		_ = s.follow()
	}
}

func unreadable(err error) source.Update {
	var path *os.PathError
	if errors.As(err, &path) {
		err = fmt.Errorf("configuration %s cannot be read: %w", path.Path, path.Err)
	}
	return source.Update{From: service.SourceFile, Err: err}
}

// Read returns what a file says now, whoever watches it.
func Read(path string) source.Update {
	t, err := config.ReadText(path)
	if err != nil {
		return unreadable(err)
	}
	return Parse(t)
}

// Parse returns what a text says.
func Parse(t *config.Text) source.Update {
	c, err := config.ParseText(t)
	if err != nil {
		return source.Update{From: service.SourceFile, Err: err}
	}
	return source.Update{From: service.SourceFile, Services: c.Services, Config: c, Text: t}
}

// follow finds out on which names the contents of the file depend (the path,
// every symbolic link on the way, the file at its end) and watches their
// directories: a file that is renamed into place is another file.
func (s *Source) follow() error {
	s.names = make(map[string]bool)
	path := s.path
	// As many links as the kernel follows (path_resolution(7)).
	for range 40 {
		link, next := nextLink(path)
		if link == "" {
			break
		}
		s.names[link] = true
		path = next
	}
	s.names[s.path], s.names[path] = true, true

	wanted := make(map[string]bool)
	for name := range s.names {
		wanted[filepath.Dir(name)] = true
	}
	if s.last != nil {
		for _, p := range s.last.Patterns {
			wanted[filepath.Dir(p)] = true
		}
	}
	for dir, was := range s.watched {
		if is, _, err := identify(dir); !wanted[dir] || err != nil || is != was {
			// It may be gone already.
			_ = s.watcher.Remove(dir)
			delete(s.watched, dir)
		}
	}
	for dir := range wanted {
		if _, ok := s.watched[dir]; ok {
			continue
		}
		// Looked at first: one that is put in its place now is seen the next time.
		is, _, _ := identify(dir)
		if err := s.watcher.Add(dir); err == nil {
			s.watched[dir] = is
		} else if dir == filepath.Dir(s.path) {
			return err
		}
	}
	return nil
}

// nextLink finds the last symbolic link in a path: which one it is, and the
// path without it. link is empty when there is none.
func nextLink(path string) (link, resolved string) {
	rest := ""
	for prefix := path; ; {
		if target, err := os.Readlink(prefix); err == nil {
			if !filepath.IsAbs(target) {
				target = filepath.Join(filepath.Dir(prefix), target)
			}
			return prefix, filepath.Join(target, rest)
		}
		parent := filepath.Dir(prefix)
		if parent == prefix {
			return "", path
		}
		rest = filepath.Join(filepath.Base(prefix), rest)
		prefix = parent
	}
}

// Run emits every change of the file until the context ends. It returns the
// error of the watcher if that breaks.
func (s *Source) Run(ctx context.Context, emit func(source.Update)) error {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	looks := time.NewTicker(lookEvery)
	defer looks.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-s.watcher.Errors:
			// Events were lost (the queue overflowed): look for ourselves.
			timer.Reset(quiet)
			if err != nil && ctx.Err() == nil && !isOverflow(err) {
				return fmt.Errorf("watching %s: %w", s.path, err)
			}
		case e, ok := <-s.watcher.Events:
			if !ok {
				return nil
			}
			if e.Op != fsnotify.Chmod && (s.names[e.Name] || s.isIncluded(e.Name)) {
				timer.Reset(quiet)
			}
		case <-looks.C:
			if s.look() != s.seen {
				timer.Reset(quiet)
			}
		case <-timer.C:
			s.seen = s.look()
			// What cannot be watched can be looked at, if it is there.
			_ = s.follow()
			s.read(emit)
		}
	}
}

// isIncluded reports whether a name is one of the files that are included.
func (s *Source) isIncluded(name string) bool {
	return s.last != nil && slices.ContainsFunc(s.last.Patterns, func(p string) bool {
		ok, err := filepath.Match(p, name)
		return ok && err == nil
	})
}

func isOverflow(err error) bool { return err == fsnotify.ErrEventOverflow }

func (s *Source) read(emit func(source.Update)) {
	t, err := config.ReadText(s.path)
	if err != nil {
		s.last = nil
		emit(unreadable(err))
		return
	}
	if t.Equal(s.last) {
		return
	}
	s.setText(t)
	emit(Parse(t))
}
