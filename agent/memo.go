package agent

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/source"
	"github.com/pentad/pentad/source/file"
)

// drainsFile is where it stands in the state directory which backends of the file's
// services are drained: that outlives a restart of the host, which the kernel's maps do
// not.
const drainsFile = "drained.json"

// drainMemo is one of them.
type drainMemo struct {
	Service string         `json:"service"`
	Address netip.AddrPort `json:"address"`
	Until   uint32         `json:"until,omitempty"` // Unix seconds: when to close what is left
}

// loadDrains takes the drains that were saved. Those that the kernel knows, too, are
// what the kernel says.
func (a *Agent) loadDrains() error {
	if a.opts.StateDir == "" {
		return nil
	}
	path := filepath.Join(a.opts.StateDir, drainsFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var memos []drainMemo
	if err == nil {
		err = json.Unmarshal(raw, &memos)
	}
	if err != nil {
		a.log.Error("which backends an operator has drained is known from the kernel alone", "file", path, "error", err)
		return fmt.Errorf("%s, where it stands which backends are drained: %w", path, err)
	}
	byOperator := make(map[health.Key]bool)
	for _, m := range memos {
		k := health.Key{Service: m.Service, Address: m.Address}
		byOperator[k] = true
		if s := a.states[k]; !s.drained && !a.probes.known[k] {
			s.drained, s.lasting, s.drainUntil = true, true, m.Until
			a.states.set(k, s)
		}
	}
	// The kernel does not tell who has drained a backend: the file does so by itself.
	for k, s := range a.states {
		if s.lasting && !byOperator[k] && s.drainUntil == 0 {
			s.drained, s.lasting = false, false
			a.states.set(k, s)
		}
	}
	return nil
}

// saveDrains saves the drains. Where that fails they hold all the same, but not after a
// restart of the host.
func (a *Agent) saveDrains() {
	if err := a.writeDrains(); err != nil {
		a.log.Warn("that backends are drained will not outlive a restart of the host", "error", err)
	}
}

func (a *Agent) writeDrains() error {
	if a.opts.StateDir == "" {
		return nil
	}
	memos := []drainMemo{}
	for k, s := range a.states {
		if s.lasting {
			memos = append(memos, drainMemo{k.Service, k.Address, s.drainUntil})
		}
	}
	slices.SortFunc(memos, func(x, y drainMemo) int {
		if c := strings.Compare(x.Service, y.Service); c != 0 {
			return c
		}
		return x.Address.Compare(y.Address)
	})
	raw, err := json.MarshalIndent(memos, "", "  ")
	if err == nil && string(raw) == a.savedDrains {
		return nil
	}
	if err == nil {
		err = replaceFile(filepath.Join(a.opts.StateDir, drainsFile), raw)
	}
	if err == nil {
		a.savedDrains = string(raw)
	}
	return err
}

// textFile is where the configuration stands that was in force last: an agent that finds a
// broken one goes on with it, also after a restart of the host.
const textFile = "last-good.json"

// heldFile is where it stands which text of the file was held back.
const heldFile = "held"

// saveHeld notes a text that was held back, so that it is when the agent starts again.
func (a *Agent) saveHeld(t *config.Text) {
	if a.opts.StateDir == "" || t == nil {
		return
	}
	if err := replaceFile(filepath.Join(a.opts.StateDir, heldFile), []byte(t.Digest())); err != nil {
		a.log.Warn("that the file is held back will not outlive the agent", "error", err)
	}
}

// firstFile returns what to put in force first, and why that is not the newest text of
// the file, if it is not.
func (a *Agent) firstFile(u source.Update) (first source.Update, broken error) {
	if u.Err != nil {
		return a.lastGood(), u.Err
	}
	held, err := os.ReadFile(filepath.Join(a.opts.StateDir, heldFile))
	if err == nil && a.opts.StateDir != "" && string(held) == u.Text.Digest() {
		if good := a.lastGood(); good.Config != nil {
			return good, fmt.Errorf("%w, as it was before the agent started; `pentad reload --force` puts it in force", errHeld)
		}
	}
	return a.withGoodParts(u), nil
}

// withGoodParts has included files that are not valid be what they were when they were in
// force last.
func (a *Agent) withGoodParts(u source.Update) source.Update {
	if len(u.Config.Skipped) == 0 {
		return u
	}
	last := loadText(a.opts)
	if last == nil {
		return u
	}
	t := *u.Text
	t.Included = slices.Clone(t.Included)
	for i, p := range t.Included {
		at := slices.IndexFunc(last.Included, func(q config.Part) bool { return q.Name == p.Name })
		if u.Config.Skipped[p.Name] != nil && at >= 0 {
			t.Included[i] = last.Included[at]
		}
	}
	mended := file.Parse(&t)
	if mended.Err != nil {
		return u
	}
	mended.Config.Skipped, mended.Text = u.Config.Skipped, u.Text
	return mended
}

// lastGood returns the configuration that was in force last, or one that is empty. What
// is wrong with the newest is still said.
func (a *Agent) lastGood() source.Update {
	t := loadText(a.opts)
	if t == nil {
		return source.Update{}
	}
	u := file.Parse(t)
	if u.Err != nil {
		// An older version wrote it.
		a.log.Warn("the configuration that was in force last is not valid any more", "error", u.Err)
		return source.Update{}
	}
	a.log.Warn("the configuration that was in force last is in force again, until the file is valid")
	u.Text = nil // it is not the file
	return u
}

func loadText(opts Options) *config.Text {
	if opts.StateDir == "" {
		return nil
	}
	raw, err := os.ReadFile(filepath.Join(opts.StateDir, textFile))
	if err != nil {
		return nil
	}
	var t config.Text
	if json.Unmarshal(raw, &t) != nil || t.Name != opts.ConfigFile {
		return nil // it is of another file
	}
	return &t
}

// unsaved is a text that is in force and not saved yet.
type unsaved struct {
	text   *config.Text // nil: there is none
	number uint64       // of what was published with it
}

// saveText has the text of what was published last saved, off the loop: it may be long.
// It waits until the roles have tried what it says: they come first, and a small host has
// no processor to spare. Only the newest counts. Of included files that are not valid it
// is what was in force before.
func (a *Agent) saveText(u source.Update) {
	if a.opts.StateDir == "" || u.Text == nil {
		return
	}
	t := *u.Text
	t.Included = nil
	good := make(map[string]config.Part)
	for _, p := range u.Text.Included {
		if u.Config.Skipped[p.Name] != nil {
			before, known := a.goodPart(p.Name)
			if !known {
				continue
			}
			p = before
		}
		good[p.Name] = p
		t.Included = append(t.Included, p)
	}
	a.goodParts = good
	// Forced or not: it is in force now.
	_ = os.Remove(filepath.Join(a.opts.StateDir, heldFile))
	a.unsaved = unsaved{&t, a.known.number}
}

// goodPart returns an included file as it was in force last.
func (a *Agent) goodPart(name string) (config.Part, bool) {
	if p, known := a.goodParts[name]; known || a.goodParts != nil {
		return p, known
	}
	if last := loadText(a.opts); last != nil {
		for _, p := range last.Included {
			if p.Name == name {
				return p, true
			}
		}
	}
	return config.Part{}, false
}

// queueTried has a text saved once the roles have tried it.
func (a *Agent) queueTried() {
	if a.unsaved.text == nil {
		return
	}
	if done, _ := a.outcomeOf(a.unsaved.number); done {
		a.queueText()
	}
}

// queueText has a text saved whatever became of it.
func (a *Agent) queueText() {
	if a.unsaved.text == nil {
		return
	}
	select {
	case <-a.texts:
	default:
	}
	a.texts <- a.unsaved.text
	a.unsaved = unsaved{}
}

// saveTexts saves what it is told to until nobody has anything to tell any more.
func (a *Agent) saveTexts() {
	for t := range a.texts {
		err := replaceFileBy(filepath.Join(a.opts.StateDir, textFile), func(w io.Writer) error { return writeText(w, t) })
		if err != nil {
			a.log.Warn("a broken file after a restart of the host will leave it without services", "error", err)
		}
	}
}

// writeText writes what json.Unmarshal makes a text of. json.Marshal would hold a text of
// megabytes twice more while it does that, and once until the second collection after.
func writeText(to io.Writer, t *config.Text) error {
	patterns, err := json.Marshal(t.Patterns)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(to) // it keeps the first error
	w.WriteByte('{')
	err = writeNamed(w, t.Name, t.Data)
	w.WriteString(`,"Included":[`)
	for i, p := range t.Included {
		if i > 0 {
			w.WriteByte(',')
		}
		w.WriteByte('{')
		err = errors.Join(err, writeNamed(w, p.Name, p.Data))
		w.WriteByte('}')
	}
	fmt.Fprintf(w, `],"Patterns":%s}`, patterns)
	return errors.Join(err, w.Flush())
}

// writeNamed writes the keys that a text and its parts have in common.
func writeNamed(w *bufio.Writer, name string, data []byte) error {
	quoted, err := json.Marshal(name)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, `"Name":%s,"Data":"`, quoted)
	e := base64.NewEncoder(base64.StdEncoding, w)
	_, err = e.Write(data)
	err = errors.Join(err, e.Close())
	w.WriteByte('"')
	return err
}

// forgetState removes what was saved, and its directory if nothing else is there.
func forgetState(opts Options) error {
	if opts.StateDir == "" {
		return nil
	}
	for _, name := range []string{drainsFile, textFile, heldFile} {
		if err := os.Remove(filepath.Join(opts.StateDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	// Somebody else may have something there.
	_ = os.Remove(opts.StateDir)
	return nil
}

// replaceFile writes a file beside and renames it into place: it is there whole or not
// at all.
func replaceFile(path string, raw []byte) error {
	return replaceFileBy(path, func(w io.Writer) error {
		_, err := w.Write(raw)
		return err
	})
}

func replaceFileBy(path string, write func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	next := path + ".next"
	f, err := os.OpenFile(next, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(next, path)
}
