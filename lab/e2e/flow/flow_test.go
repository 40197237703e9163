package flow_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/plane/socket"
)

// flowLine is a flow as `pentad flow -o json` prints it.
type flowLine struct {
	Event, Command, Cgroup, Service, Protocol, VIP, Backend, Client, Outcome string
	RTTSeconds, DurationSeconds                                              float64
	PID                                                                      int
	Sent, Received                                                           uint64
}

// follow starts `pentad flow -f`; the function returned gives what it printed.
func (w *world) follow(args ...string) func() []flowLine {
	w.T.Helper()
	all := w.Args(append([]string{"flow", "-f", "-o", "json"}, args...)...)
	p, err := w.Start(exec.Command(e2e.Program(), all...), lab.Outside)
	if err != nil {
		w.T.Fatal(err)
	}
	return func() []flowLine {
		var lines []flowLine
		for text := range strings.Lines(p.Log.String()) {
			var l flowLine
			if err := json.Unmarshal([]byte(text), &l); err != nil {
				continue // the last line is not complete yet
			}
			lines = append(lines, l)
		}
		return lines
	}
}

// awaitFlow waits for a flow for which holds is true.
func (w *world) awaitFlow(what string, lines func() []flowLine, holds func(flowLine) bool) flowLine {
	w.T.Helper()
	var found flowLine
	w.Eventually(what, func() error {
		all := lines()
		for _, l := range all {
			if holds(l) {
				found = l
				return nil
			}
		}
		return fmt.Errorf("it is not among %+v", all)
	})
	return found
}

const flowServices = `services:
- name: web
  listen: [192.0.2.10:80]
  health: {probe: none}
  breaker: {failures: 1, ejection: 1h, maxEjected: 100%}
  backends: [10.0.0.3:8080, {address: '10.0.0.1:8080', weight: 1, group: 1}]
- name: silent
  listen: [192.0.2.11:80]
  flows: false
  health: {probe: none}
  backends: [10.0.0.1:8080]
- name: none
  listen: [192.0.2.12:80]
  backends: []
`

// Who connected where, what became of it, and what it carried; with the agent dead.
func TestFlow(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.3")
	w.ServeWeb("10.0.0.1:8080", strings.Repeat("x", 1000))
	w.RunAgent(flowServices)
	w.Agent.Kill()
	flows := w.follow()
	other := w.follow("--service", "none")
	// The first follower is there once it has seen something.
	w.Eventually("flows are followed", func() error {
		_, _ = w.Inside("curl", "-sS", "http://192.0.2.12/")
		if len(flows()) == 0 || len(other()) == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	refused := w.awaitFlow("a refusal", flows, func(l flowLine) bool { return l.Event == "refused" })
	if refused.Command != "curl" || refused.PID == 0 || refused.Service != "none" || refused.VIP != "192.0.2.12:80" || refused.Backend != "" {
		t.Errorf("refused: %+v", refused)
	}
	// The first goes to the backend that refuses, the second to the other group.
	if out, err := w.Inside("curl", "-sS", "http://192.0.2.10/"); err == nil {
		t.Errorf("a refusing backend answered %s", out)
	}
	w.Must("curl", "-sS", "-o", "/dev/null", "http://192.0.2.10/")
	w.Must("curl", "-sS", "-o", "/dev/null", "http://192.0.2.11/")
	failed := w.awaitFlow("the failed connect", flows, func(l flowLine) bool { return l.Event == "failed" })
	if failed.Command != "curl" || failed.Backend != "10.0.0.3:8080" || failed.Outcome != "failed: connection refused" {
		t.Errorf("failed: %+v", failed)
	}
	w.awaitFlow("the ejection", flows, func(l flowLine) bool { return l.Event == "ejected" && l.Backend == "10.0.0.3:8080" })
	established := w.awaitFlow("the handshake", flows, func(l flowLine) bool { return l.Event == "established" })
	if established.Backend != "10.0.0.1:8080" || established.RTTSeconds == 0 || established.Command != "curl" {
		t.Errorf("established: %+v", established)
	}
	closed := w.awaitFlow("the end", flows, func(l flowLine) bool { return l.Event == "closed" && l.Service == "web" })
	if closed.Sent < 50 || closed.Received < 1000 || closed.Received > 2000 || closed.DurationSeconds == 0 || closed.RTTSeconds == 0 || closed.PID != established.PID {
		t.Errorf("closed: %+v", closed)
	}
	// Its cgroup is looked up when it connects: it may be gone by then.
	if closed.Cgroup != "" && closed.Cgroup != w.Scope() {
		t.Errorf("closed: in the cgroup %s", closed.Cgroup)
	}
	for _, l := range flows() {
		if l.Service == "silent" {
			t.Errorf("a silent service told %+v", l)
		}
	}
	for _, l := range other() {
		if l.Service != "none" {
			t.Errorf("asked for the service none: %+v", l)
		}
	}
	// Open connections, with their processes.
	watcher := w.StartClient(w.Host, "watch", "3", "192.0.2.10:80")
	w.Prints(watcher, "watching", 1)
	var open []flowLine
	if err := json.Unmarshal([]byte(w.MustPentad("flow", "-o", "json")), &open); err != nil {
		t.Fatal(err)
	}
	if len(open) != 3 || open[0].PID != watcher.Process.Pid || open[0].VIP != "192.0.2.10:80" || open[0].Outcome != "open" || open[0].RTTSeconds == 0 || open[0].Cgroup != w.Scope() || !strings.Contains(open[0].Client, ":") {
		t.Errorf("open: %+v", open)
	}
	lives := w.awaitFlow("a handshake of who lives", flows, func(l flowLine) bool { return l.Event == "established" && l.PID == watcher.Process.Pid })
	if lives.Cgroup != w.Scope() {
		t.Errorf("established: in the cgroup %q", lives.Cgroup)
	}
	if out := w.MustPentad("flow", "--pid", "1"); strings.Contains(out, "192.0.2.10") {
		t.Errorf("of process 1:\n%s", out)
	}
}

// Followers have places; those of the dead are free within seconds.
func TestFollowers(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	w.RunAgent(flowServices)
	var all []*socket.Follower
	following, stop := context.WithCancel(t.Context())
	defer stop()
	var runs sync.WaitGroup
	for {
		f, err := socket.Follow(w.Pins)
		if errors.Is(err, socket.ErrFollowers) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		all = append(all, f)
		runs.Go(func() {
			if err := f.Run(following, func(socket.Event) {}); err != nil {
				t.Error(err)
			}
		})
	}
	if len(all) != 8 {
		t.Errorf("%d places", len(all))
	}
	if out, err := w.Pentad("flow", "-f"); err == nil || !strings.Contains(out, "follow flows already") {
		t.Errorf("a ninth follower: %v: %s", err, out)
	}
	// From here none of them says that it is still there.
	stop()
	runs.Wait()
	w.Eventually("a place is free", func() error {
		f, err := socket.Follow(w.Pins)
		if err == nil {
			f.Close()
		}
		return err
	})
	// A follower ends when pentad is removed.
	p, err := w.Start(exec.Command(e2e.Program(), w.Args("flow", "-f")...), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	w.MustPentad("down")
	if err := p.Wait(); err == nil || !strings.Contains(p.Log.String(), "nothing in this kernel any more") {
		t.Errorf("after down: %v: %s", err, p.Log)
	}
}

// burst connects and closes N UDP sockets.
func burst(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	vip := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, vip); err != nil {
			return err
		}
		unix.Close(fd)
	}
	return nil
}

// udpLeaves connects a UDP socket to a VIP, and then to a server by its own name.
func udpLeaves(args []string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, text := range args {
		to, err := netip.ParseAddrPort(text)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
			return err
		}
	}
	return nil
}

// Whatever a socket leaves its VIP by, followers are told that it has: by its backend's
// own name, another server's, or another VIP.
func TestLeavingIsTold(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.3")
	w.RunAgent("services:\n- {name: dns, listen: ['192.0.2.53:53/udp'], backends: ['10.0.0.1:53']}\n- {name: other, listen: ['192.0.2.54:53/udp'], backends: ['10.0.0.1:54']}")
	f, err := socket.Follow(w.Pins)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var mu sync.Mutex
	told := make(map[string]int)
	ctx, stop := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() {
		if err := f.Run(ctx, func(e socket.Event) {
			mu.Lock()
			defer mu.Unlock()
			told[e.Kind.String()+" "+e.VIP.String()]++
		}); err != nil {
			t.Error(err)
		}
	})
	defer run.Wait()
	defer stop()
	for _, to := range []string{"10.0.0.1:53", "10.0.0.3:53", "192.0.2.54:53"} {
		w.Client("udp leaves", "192.0.2.53:53", to)
	}
	w.Eventually("all ends are told", func() error {
		mu.Lock()
		defer mu.Unlock()
		if told["connect 192.0.2.53:53"] != 3 || told["closed 192.0.2.53:53"] != 3 ||
			told["connect 192.0.2.54:53"] != 1 || told["closed 192.0.2.54:53"] != 1 {
			return fmt.Errorf("told were %v", told)
		}
		return nil
	})
}

// A follower that does not keep up is told how many events it missed, and
// connections do not wait for it. What the kernel counts goes on across agents.
func TestLostEvents(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	w.RunAgent("services: [{name: dns, listen: ['192.0.2.53:53/udp'], backends: ['10.0.0.1:53']}]")
	f, err := socket.Follow(w.Pins)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Its lease runs out, so that several bursts may be needed.
	const n = 40_000
	seen, bursts := 0, 0
	w.Eventually("events are lost", func() error {
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		w.Client("burst", "192.0.2.53:53", fmt.Sprint(n))
		bursts++
		lost := f.Lost()
		quiet := time.AfterFunc(time.Second, stop)
		defer quiet.Stop()
		if err := f.Run(ctx, func(socket.Event) { seen++; quiet.Reset(100 * time.Millisecond) }); err != nil {
			return err
		}
		if lost == 0 {
			return fmt.Errorf("%d events were seen, none lost", seen)
		}
		return nil
	})
	if lost := int(f.Lost()); seen+lost > 2*n*bursts || seen == 0 {
		t.Errorf("%d seen and %d lost of %d events", seen, lost, 2*n*bursts)
	}
	total := fmt.Sprintf(`pentad_backend_connections_total{backend="10.0.0.1:53",service="dns"} %d`, n*bursts)
	for range 2 {
		if metrics := w.Get("/metrics"); !strings.Contains(metrics, total+"\n") {
			t.Errorf("the metrics lack %s", total)
		}
		w.Agent.Kill()
		w.Agent = w.Launch()
		w.Ready()
	}
}

// What becomes of a connection, in one sentence, in every case.
func TestExplain(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80, 192.0.2.10:53/udp]
  health: {probe: none}
  breaker: {failures: 1, ejection: 1h, maxEjected: 100%}
  backends: [10.0.0.2:7000, {address: '10.0.0.1:7000', group: 1}]
- name: dead
  listen: [192.0.2.11:80]
  health: {interval: 100ms}
  backends: [10.0.0.3:7000]
- name: none
  listen: [192.0.2.12:80]
  backends: []
- name: full
  listen: [192.0.2.13:80]
  health: {probe: none}
  breaker: {maxConnections: 1}
  backends: [10.0.0.1:7000]
- name: doubtful
  listen: [192.0.2.14:80]
  health: {probe: none}
  breaker: {failures: 1, ejection: 1h}
  backends: [10.0.0.3:7000]`)
	w.Eventually("the dead backend is down", func() error {
		if out, _ := w.Pentad("backend", "list"); !strings.Contains(out, "its probe fails") {
			return errors.New(out)
		}
		return nil
	})
	inside := w.StartClient(w.Host, "watch", "1", "192.0.2.13:80")
	w.Prints(inside, "watching", 1)
	outside, err := w.Start(exec.Command("sleep", "60"), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	w.Answers("192.0.2.14:80", 3)
	for _, c := range []struct {
		args  []string
		works bool
		want  string
	}{
		{[]string{"192.0.2.10:80"}, true, "goes to 10.0.0.2:7000; the process goes on seeing 192.0.2.10:80."},
		{[]string{"192.0.2.10"}, true, "connect() to 192.0.2.10:53/udp goes to"},
		{[]string{"192.0.2.10:81"}, false, "no service listens there; the same address has"},
		{[]string{"192.0.2.10:80/udp"}, false, "no service listens there; the same address has 192.0.2.10:53/udp (web), 192.0.2.10:80 (web)."},
		{[]string{"10.0.0.2:7000"}, false, "which is a backend of the service web"},
		{[]string{"203.0.113.9:80"}, false, "it is no address of a service"},
		{[]string{"192.0.2.11:80"}, false, "refused at once (ECONNREFUSED), because no backend of the service dead is usable: 10.0.0.3:7000 is down."},
		{[]string{"192.0.2.12:80"}, false, "no backend of the service none is usable: it has none of that family."},
		{[]string{"192.0.2.13:80"}, false, "is ejected or has its maxConnections"},
		{[]string{"192.0.2.14:80"}, true, "more than 50% of the group is ejected, so that ejection does not count"},
		{[]string{"--pid", fmt.Sprint(inside.Process.Pid), "192.0.2.10:80"}, true, "goes to 10.0.0.2:7000"},
		{[]string{"--pid", fmt.Sprint(outside.Process.Pid), "192.0.2.10:80"}, false, "because it is not below the cgroup " + w.Scope()},
		{[]string{"--pid", "99999999", "192.0.2.10:80"}, false, "no such process"},
		{[]string{"example.org:80"}, false, "names are not resolved"},
	} {
		out, err := w.Pentad(append([]string{"explain"}, c.args...)...)
		if (err == nil) != c.works || !strings.Contains(out, c.want) {
			t.Errorf("explain %v: %v, want %q:\n%s", c.args, err, c.want, out)
		}
	}
	// What it says comes true: the first connect fails, the next takes group 1.
	if a := w.Answers("192.0.2.10:80", 2); a["one"] != 1 {
		t.Errorf("answers %v", a)
	}
	if out := w.MustPentad("explain", "192.0.2.10:80"); !strings.Contains(out, "goes to 10.0.0.1:7000, in group 1 because none before it is usable") ||
		!strings.Contains(out, "ejected for 1 client, for another") {
		t.Errorf("after the ejection:\n%s", out)
	}
}
