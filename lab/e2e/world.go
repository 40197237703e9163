// Package e2e tests pentad as its users have it: the built program, on lab
// hosts, with clients and servers that nobody here wrote.
package e2e

import (
	"context"
	"fmt"
	"net"
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

// patience bounds every wait for something that should happen soon. It is long
// because it only ends tests that fail.
const patience = 20 * time.Second

// program is the built pentad.
var program string

func TestMain(m *testing.M) {
	actor.Main(clients)
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

// world is a lab host with the tools of a test.
type world struct {
	*lab.Host
	t     testing.TB
	agent *lab.Process
}

// newWorld makes a host with addresses for its servers.
func newWorld(t testing.TB, addresses ...string) *world {
	t.Helper()
	h, err := lab.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Host: h, t: t}
	t.Cleanup(func() {
		if t.Failed() && w.agent != nil {
			t.Logf("the agent's log:\n%s", lab.Indent(w.agent.Log.String()))
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

// serve starts a who server and waits until it listens.
func (w *world) serve(name string, addresses ...string) *lab.Process {
	w.t.Helper()
	return w.start(actor.Command("who", append([]string{"-echo", "-mptcp", name}, addresses...)...), "ready")
}

// start starts a server outside and waits until it has printed a word.
func (w *world) start(cmd *exec.Cmd, word string) *lab.Process {
	w.t.Helper()
	p, err := w.Start(cmd, lab.Outside)
	if err != nil {
		w.t.Fatal(err)
	}
	w.eventually(cmd.Path+" is ready", func() error {
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

// listening waits until something outside the translation accepts on an address.
func (w *world) listening(address string) {
	w.t.Helper()
	w.eventually(address+" accepts", func() error {
		return w.Do(func() error {
			c, err := net.DialTimeout("tcp", address, time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
	})
}

func (w *world) eventually(what string, condition func() error) {
	w.t.Helper()
	if err := lab.Eventually(patience, condition); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

// args adds where this host's pentad lives.
func (w *world) args(args ...string) []string {
	return append(args, "--pins", w.Pins, "--run-dir", filepath.Join(w.Dir, "run"))
}

// pentad runs a command of pentad and returns all that it printed.
func (w *world) pentad(args ...string) (string, error) {
	return w.Run(w.t.Context(), lab.Outside, program, w.args(args...)...)
}

// mustPentad fails the test when the command fails.
func (w *world) mustPentad(args ...string) string {
	w.t.Helper()
	out, err := w.pentad(args...)
	if err != nil {
		w.t.Fatalf("pentad %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return out
}

// configure writes the configuration; the scope is added.
func (w *world) configure(text string) {
	w.t.Helper()
	if _, err := w.WriteFile("pentad.yaml", text+"\nscope: {cgroup: "+w.Scope()+"}\n"); err != nil {
		w.t.Fatal(err)
	}
}

// launch starts an agent and does not wait.
func (w *world) launch(extra ...string) *lab.Process {
	w.t.Helper()
	p, err := w.Start(exec.Command(program, w.args(append([]string{"run", "-c", "pentad.yaml"}, extra...)...)...), lab.Outside)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// run configures and starts an agent and waits until all is well.
func (w *world) run(text string) {
	w.t.Helper()
	w.configure(text)
	w.agent = w.launch()
	w.ready()
}

func (w *world) ready() {
	w.t.Helper()
	w.eventually("the agent is ready", func() error {
		out, err := w.pentad("status")
		if err != nil {
			return fmt.Errorf("%w: %s%s", err, out, w.agent.Log)
		}
		return nil
	})
}

// view reads the kernel.
func (w *world) view() *socket.View {
	w.t.Helper()
	v, err := socket.Read(w.Pins)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// awaitStates waits until the backends of a service have these states, in the
// order of their addresses.
func (w *world) awaitStates(name string, want ...service.State) {
	w.t.Helper()
	w.eventually("service "+name, func() error {
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

// inside runs a client inside and returns what it printed.
func (w *world) inside(name string, args ...string) (string, error) {
	return w.Run(w.t.Context(), lab.Inside, name, args...)
}

// must runs a client inside and fails the test when it fails.
func (w *world) must(name string, args ...string) string {
	w.t.Helper()
	out, err := w.inside(name, args...)
	if err != nil {
		w.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// client runs one of the clients of this program inside and fails the test with
// what it found.
func (w *world) client(name string, args ...string) string {
	w.t.Helper()
	p, err := w.Start(actor.Command(name, args...), lab.Inside)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		w.t.Errorf("client %s: %v: %s", name, err, p.Log)
	}
	return strings.TrimSpace(p.Log.String())
}

// within returns a context for one command.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func command(name string, args ...string) *exec.Cmd { return exec.Command(name, args...) }

// queryPrograms counts the programs attached to a cgroup at one place.
func queryPrograms(t testing.TB, cgroup string, at ebpf.AttachType) int {
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
