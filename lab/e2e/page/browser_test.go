package page_test

import (
	"bufio"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
)

// app is where the page's sources, and the modules of npm, are.
const app = "../../../api/web/app"

// browser is Chromium on a lab host.
type browser struct {
	t     *testing.T
	in    io.Writer
	lines chan []byte
	shots string
}

// order is one thing to do.
type order map[string]any

// newBrowser starts one outside the scope of services.
func newBrowser(t *testing.T, h *lab.Host) *browser {
	t.Helper()
	modules, err := filepath.Abs(app)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(modules, "node_modules/playwright-core")); err != nil {
		if out, err := exec.CommandContext(t.Context(), "npm", "--prefix", modules, "ci", "--silent", "--no-audit", "--no-fund").CombinedOutput(); err != nil {
			t.Fatalf("npm ci: %v: %s", err, out)
		}
	}
	script, err := filepath.Abs("browse.mjs")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("node", script, modules, t.TempDir())
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = write
	p, err := h.Start(cmd, lab.Outside)
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	b := &browser{t: t, in: stdin, lines: make(chan []byte), shots: os.Getenv("PENTAD_SHOTS")}
	if b.shots == "" {
		b.shots = t.TempDir()
	}
	go func() {
		defer close(b.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			b.lines <- append([]byte(nil), s.Bytes()...)
		}
	}()
	t.Cleanup(func() {
		stdin.Close()
		select {
		case <-p.Done():
		case <-time.After(10 * time.Second):
			p.Kill()
		}
		out.Close()
		if t.Failed() {
			t.Logf("the browser's log:\n%s", p.Log)
		}
	})
	b.answer(order{"do": "start"})
	return b
}

// do has the browser do something and returns what it says.
func (b *browser) do(o order) any {
	b.t.Helper()
	raw, err := json.Marshal(o)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.in.Write(append(raw, '\n')); err != nil {
		b.t.Fatal(err)
	}
	return b.answer(o)
}

func (b *browser) answer(o order) any {
	b.t.Helper()
	select {
	case line, open := <-b.lines:
		var a struct {
			Value any
			Error string
		}
		if err := json.Unmarshal(line, &a); !open || err != nil || a.Error != "" {
			b.t.Fatalf("%v: %s", o, line)
		}
		return a.Value
	case <-time.After(time.Minute):
		b.t.Fatalf("%v: no answer", o)
	}
	return nil
}

// see waits until a text (a regular expression) is in the page, or in a part of it.
func (b *browser) see(text string, where ...string) {
	b.t.Helper()
	o := order{"do": "see", "text": text}
	if len(where) > 0 {
		o["in"] = where[0]
	}
	b.do(o)
}

func (b *browser) click(role, name string) {
	b.t.Helper()
	b.do(order{"do": "click", "role": role, "name": name})
}

func (b *browser) fill(label, text string) {
	b.t.Helper()
	b.do(order{"do": "fill", "label": label, "text": text})
}

// shot keeps what is seen, for docs/page.md and for whom a test fails.
func (b *browser) shot(name string) {
	b.t.Helper()
	b.do(order{"do": "shot", "path": filepath.Join(b.shots, name+".png")})
}

// sound fails the test if the page has met with an error, or with its own policy.
func (b *browser) sound() {
	b.t.Helper()
	if faults, _ := b.do(order{"do": "faults"}).([]any); len(faults) > 0 {
		b.t.Errorf("the page has met with errors: %v", faults)
	}
}
