// Package e2e is what the tests of pentad as its users have it share: a lab host with
// the built program, and clients. The tests have a folder a room of the house.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Patience bounds every wait for something that should happen soon. It is long
// because it only ends tests that fail.
const Patience = 20 * time.Second

// program is the built pentad.
var program string

// Program is the path of the built pentad.
func Program() string { return program }

// Main builds pentad and runs the tests of a room. A process that was started as one of
// the room's clients, or of those that several rooms have, is that client instead.
func Main(m *testing.M, clients map[string]actor.Role) {
	roles := map[string]actor.Role{"ask": askWho, "watch": watch, "tell": tell, "be told": beTold, "repeat": repeat, "talk": talk, "ask often": askOften}
	maps.Copy(roles, clients)
	actor.Main(roles)
	os.Exit(buildAndRun(m))
}

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "pentad-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "pentad")
	build := exec.Command("go", "build", "-o", program, "github.com/pentad/pentad/cmd/pentad")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %s\n", err, out)
		return 1
	}
	return m.Run()
}

// World is a lab host with the tools of a test.
type World struct {
	*lab.Host
	T     testing.TB
	Agent *lab.Process // the one that RunAgent started
}

// New makes a host with addresses for its servers.
func New(t testing.TB, addresses ...string) *World {
	t.Helper()
	h, err := lab.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	w := &World{Host: h, T: t}
	t.Cleanup(func() {
		if t.Failed() && w.Agent != nil {
			t.Logf("the agent's log:\n%s", lab.Indent(w.Agent.Log.String()))
		}
		if err := h.Close(); err != nil {
			t.Errorf("the host is not gone: %v", err)
		}
	})
	for _, a := range addresses {
		bits := "/32"
		if strings.Contains(a, ":") {
			bits = "/128"
		}
		if err := h.AddAddress(a + bits); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// Serve starts a who server and waits until it listens.
func (w *World) Serve(name string, addresses ...string) *lab.Process {
	w.T.Helper()
	return w.StartServer(actor.Command("who", append([]string{"-echo", "-mptcp", name}, addresses...)...), "ready")
}

// StartServer starts a server outside and waits until it has printed a word.
func (w *World) StartServer(cmd *exec.Cmd, word string) *lab.Process {
	w.T.Helper()
	p, err := w.Start(cmd, lab.Outside)
	if err != nil {
		w.T.Fatal(err)
	}
	w.Eventually(cmd.Path+" is ready", func() error {
		select {
		case <-p.Done():
			return fmt.Errorf("it ended: %s", p.Log)
		default:
		}
		if !strings.Contains(p.Log.String(), word) {
			return fmt.Errorf("it printed only: %s", p.Log)
		}
		return nil
	})
	return p
}

// Listening waits until something outside the translation accepts on an address.
func (w *World) Listening(address string) {
	w.T.Helper()
	w.Eventually(address+" accepts", func() error {
		return w.Do(func() error {
			c, err := net.DialTimeout("tcp", address, time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
	})
}

// Eventually waits, with patience, until a condition holds.
func (w *World) Eventually(what string, condition func() error) {
	w.T.Helper()
	if err := lab.Eventually(Patience, condition); err != nil {
		w.T.Fatalf("%s: %v", what, err)
	}
}

// Args adds where this host's pentad lives.
func (w *World) Args(args ...string) []string {
	return append(args, "--pins", w.Pins, "--run-dir", filepath.Join(w.Dir, "run"))
}

// Pentad runs a command of pentad and returns all that it printed.
func (w *World) Pentad(args ...string) (string, error) {
	return w.Run(w.T.Context(), lab.Outside, program, w.Args(args...)...)
}

// MustPentad fails the test when the command fails.
func (w *World) MustPentad(args ...string) string {
	w.T.Helper()
	out, err := w.Pentad(args...)
	if err != nil {
		w.T.Fatalf("pentad %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return out
}

// Configure writes the configuration; the scope is added.
func (w *World) Configure(text string) {
	w.T.Helper()
	if _, err := w.WriteFile("pentad.yaml", text+"\nscope: {cgroup: "+w.Scope()+"}\n"); err != nil {
		w.T.Fatal(err)
	}
}

// Launch starts an agent and does not wait.
func (w *World) Launch(extra ...string) *lab.Process {
	w.T.Helper()
	p, err := w.Start(exec.Command(program, w.Args(append([]string{"run", "-c", "pentad.yaml"}, extra...)...)...), lab.Outside)
	if err != nil {
		w.T.Fatal(err)
	}
	return p
}

// RunAgent configures and starts an agent and waits until all is well.
func (w *World) RunAgent(text string) {
	w.T.Helper()
	w.Configure(text)
	w.Agent = w.Launch()
	w.Ready()
}

// Ready waits until the agent says that all is well.
func (w *World) Ready() {
	w.T.Helper()
	w.Eventually("the agent is ready", func() error {
		out, err := w.Pentad("status")
		if err != nil {
			return fmt.Errorf("%w: %s%s", err, out, w.Agent.Log)
		}
		return nil
	})
}

// View reads the kernel.
func (w *World) View() *socket.View {
	w.T.Helper()
	v, err := socket.Read(w.Pins)
	if err != nil {
		w.T.Fatal(err)
	}
	return v
}

// AwaitStates waits until the backends of a service have these states, in the
// order of their addresses.
func (w *World) AwaitStates(name string, want ...service.State) {
	w.T.Helper()
	w.Eventually("service "+name, func() error {
		v, err := socket.Read(w.Pins)
		if err != nil {
			return err
		}
		s := (&service.Snapshot{Services: v.Services}).Find(name)
		if s == nil {
			return fmt.Errorf("it is not in the kernel")
		}
		if have := s.States(); fmt.Sprint(have) != fmt.Sprint(want) {
			return fmt.Errorf("states are %v, want %v", have, want)
		}
		return nil
	})
}

// Inside runs a client inside and returns what it printed.
func (w *World) Inside(name string, args ...string) (string, error) {
	return w.Run(w.T.Context(), lab.Inside, name, args...)
}

// Must runs a client inside and fails the test when it fails.
func (w *World) Must(name string, args ...string) string {
	w.T.Helper()
	out, err := w.Inside(name, args...)
	if err != nil {
		w.T.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// Client runs one of the clients of this program inside and fails the test with
// what it found.
func (w *World) Client(name string, args ...string) string {
	w.T.Helper()
	p, err := w.Start(actor.Command(name, args...), lab.Inside)
	if err != nil {
		w.T.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		w.T.Errorf("client %s: %v: %s", name, err, p.Log)
	}
	return strings.TrimSpace(p.Log.String())
}

// Within returns a context for one command.
func Within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// QueryPrograms counts the programs attached to a cgroup at one place.
func QueryPrograms(t testing.TB, cgroup string, at ebpf.AttachType) int {
	t.Helper()
	f, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	result, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: at})
	if err != nil {
		t.Fatal(err)
	}
	return len(result.Programs)
}

// Answers asks a VIP n times and counts who answered.
func (w *World) Answers(vip string, n int, args ...string) map[string]int {
	w.T.Helper()
	counts := make(map[string]int)
	for line := range strings.Lines(w.Client("ask", append([]string{vip, fmt.Sprint(n)}, args...)...) + "\n") {
		counts[strings.TrimSpace(line)]++
	}
	return counts
}

// RunCode runs pentad and returns what it printed and its exit code.
func (w *World) RunCode(args ...string) (string, int) {
	w.T.Helper()
	out, err := w.Pentad(args...)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return out, 0
	case errors.As(err, &exit):
		return out, exit.ExitCode()
	}
	w.T.Fatalf("pentad %s: %v", strings.Join(args, " "), err)
	return "", 0
}

// Says fails the test unless a command ends with a code and prints all texts.
func (w *World) Says(code int, command string, texts ...string) string {
	w.T.Helper()
	out, have := w.RunCode(strings.Fields(command)...)
	if have != code {
		w.T.Errorf("pentad %s: exit code %d, want %d: %s", command, have, code, out)
	}
	for _, text := range texts {
		if !strings.Contains(out, text) {
			w.T.Errorf("pentad %s prints no %q:\n%s", command, text, out)
		}
	}
	return out
}

// Load returns what the kernel knows of a backend of the service web.
func (w *World) Load(address string) socket.Load {
	w.T.Helper()
	return w.View().Loads["web"][netip.MustParseAddrPort(address)]
}

// AwaitLoad waits until what the kernel knows of a backend of the service web is so.
func (w *World) AwaitLoad(what, address string, holds func(socket.Load) bool) {
	w.T.Helper()
	w.Eventually(address+" is "+what, func() error {
		if l := w.Load(address); !holds(l) {
			return fmt.Errorf("it is %+v", l)
		}
		return nil
	})
}

// StartClient starts a client that runs until its standard input or the host ends.
func (w *World) StartClient(at *lab.Host, name string, args ...string) *lab.Process {
	w.T.Helper()
	cmd := actor.Command(name, args...)
	if _, err := cmd.StdinPipe(); err != nil {
		w.T.Fatal(err)
	}
	p, err := at.StartPod(cmd, w.Host, lab.Inside)
	if err != nil {
		w.T.Fatal(err)
	}
	return p
}

// Prints waits until a client has printed a word so many times.
func (w *World) Prints(p *lab.Process, word string, times int) {
	w.T.Helper()
	w.Eventually(fmt.Sprintf("%q is printed %d times", word, times), func() error {
		select {
		case <-p.Done():
			return fmt.Errorf("it ended: %s", p.Log)
		default:
		}
		if n := strings.Count(p.Log.String(), word); n != times {
			return fmt.Errorf("%d times: %s", n, FirstLines(p.Log.String(), 20))
		}
		return nil
	})
}

// ServeWeb starts an nginx that answers a text.
func (w *World) ServeWeb(address, text string) *lab.Process {
	w.T.Helper()
	return w.Nginx(fmt.Sprintf("server { listen %s; location / { return 200 %q; } }", address, text), address)
}

// Nginx starts an nginx inside with the directives of its http block and waits
// until it listens.
func (w *World) Nginx(http, address string) *lab.Process {
	w.T.Helper()
	dir, err := os.MkdirTemp(w.Dir, "nginx-")
	if err != nil {
		w.T.Fatal(err)
	}
	config := "daemon off; master_process off; user root; pid nginx.pid; error_log stderr; events {}\nhttp { access_log off;\n" + http + "\n}\n"
	if err := os.WriteFile(filepath.Join(dir, "nginx.conf"), []byte(config), 0o644); err != nil {
		w.T.Fatal(err)
	}
	p, err := w.Start(exec.Command("nginx", "-p", dir, "-c", "nginx.conf", "-e", "stderr"), lab.Inside)
	if err != nil {
		w.T.Fatal(err)
	}
	w.Listening(address)
	return p
}

// Password writes the password file of a test.
func (w *World) Password() string {
	w.T.Helper()
	path := filepath.Join(w.Dir, "password")
	if err := os.WriteFile(path, []byte("hunter2\n"), 0o600); err != nil {
		w.T.Fatal(err)
	}
	return path
}

// FirstLines returns the first lines of a text.
func FirstLines(text string, n int) string {
	lines := strings.SplitN(text, "\n", n+1)
	return strings.Join(lines[:min(n, len(lines))], "\n")
}

// Get returns what the agent says of a page at its port for metrics.
func (w *World) Get(page string) string {
	w.T.Helper()
	var body string
	err := w.Do(func() error {
		// The connection is opened on this thread, which is on the host.
		c, err := net.Dial("tcp", "127.0.0.1:9464")
		if err != nil {
			return err
		}
		client := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}
		resp, err := client.Get("http://127.0.0.1:9464" + page)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		body = string(b)
		return err
	})
	if err != nil {
		w.T.Fatalf("%s: %v", page, err)
	}
	return body
}
