package socket_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
)

func init() {
	clients["hold"] = hold
	clients["without pause"] = withoutPause
}

// hold keeps a connection and looks at its name each time a line comes in.
func hold([]string) error {
	fd, err := dial(unix.SOCK_STREAM, 0, vipTCP)
	if err != nil {
		return err
	}
	var line string
	for {
		if err := peerIs(fd, vipTCP); err != nil {
			return err
		}
		fmt.Println("named")
		if _, err := fmt.Scanln(&line); err != nil {
			return nil
		}
	}
}

// withoutPause connects until its standard input ends; every connection must
// succeed and have its name.
func withoutPause([]string) error {
	done := make(chan struct{})
	go func() {
		b := make([]byte, 1)
		_, _ = os.Stdin.Read(b)
		close(done)
	}()
	for n := 0; ; n++ {
		select {
		case <-done:
			fmt.Println(n, "connections")
			return nil
		default:
		}
		if err := tcpNames(nil); err != nil {
			return err
		}
	}
}

// An agent with another layout of maps takes over from an older one while
// clients connect: none fails, and what sockets did before is not forgotten.
func TestOlderLayout(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "2001:db8::1")
	w.Serve("one", "10.0.0.1:7000", "[2001:db8::1]:7000")
	w.RunAgent(`services:
- name: tcp
  listen: [192.0.2.1:80, "[2001:db8:f::1]:80"]
  backends: [10.0.0.1:7000, "[2001:db8::1]:7000"]`)
	holder := actor.Command("hold")
	ask, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	held, err := w.Start(holder, lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	named := func(times int) {
		t.Helper()
		w.Eventually("the held connection has its name", func() error {
			if n := strings.Count(held.Log.String(), "named"); n < times {
				return fmt.Errorf("%d times, want %d: %s", n, times, held.Log)
			}
			return nil
		})
	}
	named(1)
	busy := actor.Command("without pause")
	stop, err := busy.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	client, err := w.Start(busy, lab.Inside)
	if err != nil {
		t.Fatal(err)
	}

	for round := range 3 {
		w.Agent.Kill()
		makeOlder(t, w, round+1)
		if out, err := w.Pentad("service", "list"); err == nil || !strings.Contains(out, "start this version's agent") {
			t.Errorf("service list of an older layout: %v: %s", err, out)
		}
		w.Agent = w.Launch()
		w.Ready()
		if !strings.Contains(w.Agent.Log.String(), "rebuilding the maps of an older layout") {
			t.Errorf("nothing was rebuilt:\n%s", w.Agent.Log)
		}
		fmt.Fprintln(ask, "x")
		named(round + 2)
		// Some more connections with the new maps.
		time.Sleep(50 * time.Millisecond)
	}
	stop.Close()
	if err := client.Wait(); err != nil {
		t.Errorf("the client: %v: %s", err, client.Log)
	}
	t.Log(strings.TrimSpace(client.Log.String()))
	ask.Close()
	if err := held.Wait(); err != nil {
		t.Errorf("the held connection: %v: %s", err, held.Log)
	}
}

// makeOlder makes the pins look as if an earlier version had made them: another
// number of layout, and a map whose values had another size.
func makeOlder(t *testing.T, w *world, set int) {
	t.Helper()
	dir := filepath.Join(w.Pins, "socket", fmt.Sprintf("set-%d", set))
	setLayout(t, dir, 0)
	path := filepath.Join(dir, "services")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 200, MaxEntries: 10})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(path); err != nil {
		t.Fatal(err)
	}
}

func setLayout(t *testing.T, dir string, layout byte) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "about"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	raw, err := m.LookupBytes(uint32(0))
	if err != nil {
		t.Fatal(err)
	}
	raw[0] = layout
	if err := m.Put(uint32(0), raw); err != nil {
		t.Fatal(err)
	}
}

// Pins of a newer pentad are left alone, and everybody says so.
func TestNewerLayout(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent("services: [{name: web, listen: ['192.0.2.10:80'], health: {probe: none}, backends: ['10.0.0.1:7000']}]")
	w.Agent.Kill()
	setLayout(t, filepath.Join(w.Pins, "socket", "set-1"), 99)
	for _, args := range [][]string{{"run", "-c", "pentad.yaml"}, {"service", "list"}, {"status"}} {
		out, err := w.Pentad(args...)
		if err == nil || !strings.Contains(out, "pins of a newer pentad") || !strings.Contains(out, "layout 99") {
			t.Errorf("pentad %v: %v: %s", args, err, out)
		}
	}
	if have := w.Answers("192.0.2.10:80", 3); have["one"] != 3 {
		t.Errorf("the newer one's services answer %v", have)
	}
	w.MustPentad("down")
}
