package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Settings are parameters of the kernel that are changed, and put back: what each was is
// noted in a file first. What somebody has changed since is his.
type Settings struct {
	Root string // where they are, such as /proc/sys
	File string // where it is noted what they were
}

// Setting is one of them, and what it is to be.
type Setting struct {
	Name  string // below Root, such as net/ipv4/ip_forward
	Value int
	Least bool // a higher one is right as well
}

// noted is what a setting was, and what it was made.
type noted struct{ Was, Is int }

// Set makes a setting what it is to be. It returns what it was, and whether it was
// changed: not if it is so already, if it was changed before, or if it is not there. The
// error is fs.ErrPermission where it is of the whole machine, and this is a namespace.
func (s Settings) Set(x Setting) (was int, changed bool, err error) {
	all, err := s.read()
	if err != nil {
		return 0, false, err
	}
	was, err = s.Get(x.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if _, done := all[x.Name]; done || err == nil && (was == x.Value || x.Least && was > x.Value) {
		return was, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	// Noted first: what is noted and was not done does no harm.
	all[x.Name] = noted{was, x.Value}
	if err := errors.Join(s.write(all), s.put(x.Name, x.Value)); err != nil {
		delete(all, x.Name)
		return was, false, errors.Join(err, s.write(all))
	}
	return was, true, nil
}

// Restore puts back what was changed, unless somebody else has changed it since.
func (s Settings) Restore() error {
	all, err := s.read()
	if err != nil {
		return err
	}
	var errs []error
	for name, n := range all {
		if have, err := s.Get(name); err == nil && have == n.Is {
			errs = append(errs, s.put(name, n.Was))
		}
	}
	if err := os.Remove(s.File); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (s Settings) read() (map[string]noted, error) {
	all := make(map[string]noted)
	raw, err := os.ReadFile(s.File)
	if errors.Is(err, fs.ErrNotExist) {
		return all, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", s.File, err)
	}
	return all, nil
}

func (s Settings) write(all map[string]noted) error {
	raw, err := json.Marshal(all)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.File), 0o755); err != nil {
		return err
	}
	return os.WriteFile(s.File, raw, 0o600)
}

// Get returns what a setting is.
func (s Settings) Get(name string) (int, error) {
	raw, err := os.ReadFile(filepath.Join(s.Root, name))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(raw)))
}

func (s Settings) put(name string, value int) error {
	// Only a file that is there: to make one is refused as if there were no permission.
	f, err := os.OpenFile(filepath.Join(s.Root, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(value))
	return errors.Join(err, f.Close())
}
