package agent_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

const webTwo = `services:
- name: web
  listen: [192.0.2.10:80]
  health: {interval: 100ms, timeout: 50ms}
  backends: [10.0.0.1:7000, 10.0.0.2:7000]`

// Every way to change a file is noticed, and an invalid file changes nothing.
func TestReload(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	text := func(vip string) string {
		return "services: [{name: web, listen: ['" + vip + ":80'], health: {probe: none}, backends: ['10.0.0.1:7000']}]\nscope: {cgroup: " + w.Scope() + "}\n"
	}
	shows := func(vip string) {
		t.Helper()
		w.Eventually("the kernel shows "+vip, func() error {
			v, err := socket.Read(w.Pins)
			if err != nil {
				return err
			}
			if len(v.Services) != 1 || v.Services[0].Listeners[0].Address.Addr().String() != vip {
				return fmt.Errorf("it shows %+v", v.Services)
			}
			return nil
		})
	}
	path := filepath.Join(w.Dir, "pentad.yaml")
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(path, text("192.0.2.1"))
	w.Agent = w.Launch()
	w.Ready()
	shows("192.0.2.1")

	write(path, text("192.0.2.2"))
	shows("192.0.2.2")

	if _, err := w.WriteFile("pentad.yaml", text("192.0.2.3")); err != nil {
		t.Fatal(err)
	}
	shows("192.0.2.3")

	// As Kubernetes mounts a ConfigMap: the file is a link into a directory
	// that is itself a link, and that one is switched.
	for i, vip := range []string{"192.0.2.4", "192.0.2.5", "192.0.2.6"} {
		dir := fmt.Sprintf("..version-%d", i)
		if err := os.Mkdir(filepath.Join(w.Dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		write(filepath.Join(w.Dir, dir, "pentad.yaml"), text(vip))
		next := filepath.Join(w.Dir, "..next")
		if err := os.Symlink(dir, next); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(w.Dir, "..data")); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if err := os.Symlink("..data/pentad.yaml", next); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(next, path); err != nil {
				t.Fatal(err)
			}
		}
		shows(vip)
	}

	// Invalid: said in the log and by status, with the line; nothing changes.
	w.WriteFile("pentad.yaml", "services:\n- name: web\n  lisen: [192.0.2.7:80]\n")
	var status string
	w.Eventually("status shows the error", func() error {
		var err error
		if status, err = w.Pentad("status"); err == nil {
			return fmt.Errorf("status is fine: %s", status)
		}
		if !strings.Contains(status, `pentad.yaml:3:3: unknown key "lisen" in a service; did you mean "listen"?`) {
			return fmt.Errorf("status: %s", status)
		}
		return nil
	})
	if !strings.Contains(w.Agent.Log.String(), `did you mean`) {
		t.Errorf("the log does not say it:\n%s", w.Agent.Log)
	}
	shows("192.0.2.6")
	// Gone: the same.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	w.Eventually("status shows that the file is gone", func() error {
		if out, _ := w.Pentad("status"); !strings.Contains(out, "cannot be read") {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	})
	shows("192.0.2.6")
	// Mended.
	write(path, text("192.0.2.8"))
	shows("192.0.2.8")
	w.Ready()
}

// A drain lasts across agents, and so does what probes found out.
func TestDrain(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	w.Serve("two", "10.0.0.2:7000")
	w.RunAgent(webTwo)
	w.MustPentad("backend", "drain", "web", "10.0.0.1:7000")
	w.AwaitStates("web", service.Drained, service.Serving)
	if have := w.Answers("192.0.2.10:80", 30); have["two"] != 30 {
		t.Errorf("answers are %v", have)
	}
	w.Agent.Kill()
	w.AwaitStates("web", service.Drained, service.Serving)
	w.Agent = w.Launch()
	w.Ready()
	w.AwaitStates("web", service.Drained, service.Serving)
	w.MustPentad("backend", "enable", "web", "10.0.0.1:7000")
	w.AwaitStates("web", service.Serving, service.Serving)

	for _, c := range []struct{ args, want string }{
		{"drain nope 10.0.0.1:7000", "service nope"},
		{"drain web 10.0.0.9:7000", "backend 10.0.0.9:7000"},
		{"drain web 10.0.0.9", "want ADDRESS:PORT"},
	} {
		out, err := w.Pentad(append([]string{"backend"}, strings.Fields(c.args)...)...)
		if err == nil || !strings.Contains(out, c.want) {
			t.Errorf("backend %s: %v: %s", c.args, err, out)
		}
	}
	w.Agent.Kill()
	if out := w.MustPentad("backend", "drain", "web", "10.0.0.1:7000"); !strings.Contains(out, "web 10.0.0.1:7000: drained") {
		t.Errorf("drain without an agent: %s", out)
	}
	w.AwaitStates("web", service.Drained, service.Serving)
}

func TestTwoAgents(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.RunAgent(webTwo)
	second := w.Launch()
	err := second.Wait()
	want := fmt.Sprintf("another pentad, process %d (", w.Agent.Process.Pid)
	if err == nil || !strings.Contains(second.Log.String(), want) || !strings.Contains(second.Log.String(), "pentad run") {
		t.Errorf("the second agent: %v: %s; want %q", err, second.Log, want)
	}
	w.Ready()
}

// Down leaves nothing, from whatever state, and may be repeated.
func TestDown(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	gone := func(state string) {
		t.Helper()
		for range 2 {
			w.MustPentad("down")
		}
		for _, path := range []string{w.Pins, filepath.Join(w.Dir, "run")} {
			if _, err := os.Stat(path); !os.IsNotExist(err) {
				t.Errorf("%s: %s is still there: %v", state, path, err)
			}
		}
		if n := attached(t, w); n != 0 {
			t.Errorf("%s: %d programs are still attached", state, n)
		}
	}
	gone("nothing was there")
	w.RunAgent(webTwo)
	if n := attached(t, w); n == 0 {
		t.Fatal("no program is attached")
	}
	gone("an agent ran")
	if err := w.Agent.Wait(); err != nil {
		t.Errorf("the agent did not end well: %v", err)
	}
	w.Agent = w.Launch()
	w.Ready()
	w.Agent.Kill()
	gone("the agent was dead")
	w.Agent = w.Launch()
	w.Ready()
	w.Agent.Kill()
	if err := os.Remove(filepath.Join(w.Pins, "socket", "links", "connect4")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(w.Pins, "socket", "set-1", "about")); err != nil {
		t.Fatal(err)
	}
	gone("pins were missing")
}

// attached counts the programs that run for the host's inside.
func attached(t *testing.T, w *world) int {
	t.Helper()
	root, err := host.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, at := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
		ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
		ebpf.AttachCgroupInetSockRelease,
	} {
		n += e2e.QueryPrograms(t, filepath.Join(root, w.Scope()), at)
	}
	return n
}

// The hooks and the maps are put back when somebody else removes them: by the
// running agent, or by the next.
func TestRepair(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent("services: [{name: web, listen: ['192.0.2.10:80'], health: {probe: none}, backends: ['10.0.0.1:7000']}]")
	works := func(after string) {
		t.Helper()
		if have := w.Answers("192.0.2.10:80", 5); have["one"] != 5 {
			t.Errorf("after %s: answers are %v", after, have)
		}
	}
	pin := filepath.Join(w.Pins, "socket", "links", "connect4")
	repaired := func(after string) {
		t.Helper()
		w.Eventually("the agent repairs "+after, func() error {
			if n := attached(t, w); n != 9 {
				return fmt.Errorf("%d programs are attached", n)
			}
			_, err := w.Pentad("service", "list")
			return err
		})
		w.Ready()
		works(after)
	}
	// With the agent alive: a hook is detached, a pin removed, all pins removed.
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.(interface{ Detach() error }).Detach(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	repaired("a detached hook")
	if err := os.Remove(pin); err != nil {
		t.Fatal(err)
	}
	repaired("a removed pin")
	if err := os.RemoveAll(filepath.Join(w.Pins, "socket")); err != nil {
		t.Fatal(err)
	}
	repaired("removed pins")

	// With the agent dead: a listener and a hook are gone.
	w.Agent.Kill()
	listeners, err := ebpf.LoadPinnedMap(filepath.Join(w.Pins, "socket", "set-1", "listeners4"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer listeners.Close()
	var key [8]byte
	if err := listeners.NextKey(nil, &key); err != nil {
		t.Fatal(err)
	}
	if err := listeners.Delete(&key); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(pin); err != nil {
		t.Fatal(err)
	}
	if out, err := w.Pentad("status"); err == nil || !strings.Contains(out, "hooks are not attached: connect4") {
		t.Errorf("status does not show the missing hook: %s", out)
	}
	w.Agent = w.Launch()
	repaired("what happened while it was dead")
}

// What scripts and scrapers see.
func TestOutputs(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent(webTwo)
	w.AwaitStates("web", service.Serving, service.Down)
	w.Answers("192.0.2.10:80", 3)

	var list []struct {
		Name     string
		Listen   []string
		Balance  string
		Backends []struct {
			Address, State string
			Weight         int
		}
	}
	if err := json.Unmarshal([]byte(w.MustPentad("service", "list", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Name != "web" || list[0].Listen[0] != "192.0.2.10:80" || list[0].Backends[1].State != "down" || list[0].Backends[0].Weight != 100 {
		t.Errorf("service list -o json: %+v", list)
	}
	if out := w.MustPentad("service", "show", "web", "-o", "yaml"); !strings.Contains(out, "listen:\n  - 192.0.2.10:80\n") {
		t.Errorf("service show -o yaml:\n%s", out)
	}
	if out := w.MustPentad("backend", "list", "-o", "wide"); !strings.Contains(out, "SINCE") || !strings.Contains(out, "10.0.0.2:7000") {
		t.Errorf("backend list:\n%s", out)
	}
	if out := w.MustPentad("status"); !strings.Contains(out, "12 of 12 attached") || !strings.Contains(out, "1 serving, 1 down") || !strings.Contains(out, "MiB") {
		t.Errorf("status:\n%s", out)
	}
	st, err := os.Stat(filepath.Join(w.Dir, "run", "pentad.sock"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("agent socket: %v %v", st.Mode(), err)
	}
	metrics := w.Get("/metrics")
	for _, want := range []string{
		`pentad_backends{state="down"} 1`, `pentad_connections_translated_total 3`, `pentad_hook_attached{hook="connect4"} 1`,
		`pentad_backend_connections_total{backend="10.0.0.1:7000",service="web"} 3`, `pentad_backend_ejected{backend="10.0.0.2:7000",service="web"} 0`,
		`pentad_backend_connections_in_flight{backend="10.0.0.1:7000",service="web"} 0`, `pentad_backend_rtt_seconds{backend="10.0.0.1:7000",service="web"}`,
		`pentad_backend_metrics_omitted 0`, `pentad_config_valid 1`, `pentad_services_without_room 0`, `pentad_kernel_memory_bytes{map="sockets"}`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s:\n%s", want, metrics)
		}
	}
	if out := w.Get("/healthz"); out != "ok\n" {
		t.Errorf("healthz: %s", out)
	}
	// Without an agent the kernel is read all the same.
	w.Agent.Kill()
	w.MustPentad("service", "list")
	if out, err := w.Pentad("status"); err == nil || !strings.Contains(out, "no agent is running") || !strings.Contains(out, "12 of 12 attached") {
		t.Errorf("status without an agent: %v\n%s", err, out)
	}
	if out, err := w.Pentad("service", "show", "nope"); err == nil || !strings.Contains(out, "pentad service list") {
		t.Errorf("service show of nothing: %s", out)
	}
	w.MustPentad("down")
	if out, err := w.Pentad("service", "list"); err == nil || !strings.Contains(out, "nothing in this kernel") {
		t.Errorf("service list after down: %s", out)
	}
	for _, args := range []string{"nope", "service list extra", "service list -o xml", "run --nope", "backend drain one"} {
		p, err := w.Start(exec.Command(e2e.Program(), strings.Fields(args)...), lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		if p.Wait(); p.ProcessState.ExitCode() != 2 {
			t.Errorf("pentad %s: exit code %d, want 2: %s", args, p.ProcessState.ExitCode(), p.Log)
		}
	}
}

// get fetches a URL on the host.

// What is wrong with the host is said in words, and nothing is changed.
func TestBadHost(t *testing.T) {
	t.Parallel()
	lab.Need(t, "setpriv", "curl")
	w := newWorld(t, "10.0.0.1")
	w.Configure("services: []")
	says := func(want string, args ...string) {
		t.Helper()
		p, err := w.Start(exec.Command(args[0], args[1:]...), lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err == nil || !strings.Contains(p.Log.String(), want) {
			t.Errorf("%v: %v: %s; want %q", args, err, p.Log, want)
		}
		if _, err := os.Stat(filepath.Join(w.Pins, "socket", "links")); !os.IsNotExist(err) {
			t.Errorf("%v left something: %v", args, err)
		}
	}
	run := w.Args(e2e.Program(), "run", "-c", "pentad.yaml")
	says("missing CAP_BPF", append([]string{"setpriv", "--bounding-set", "-all", "--inh-caps", "-all"}, run...)...)
	says("missing CAP_PERFMON (to pass", append([]string{"setpriv", "--bounding-set", "-all,+bpf,+net_admin", "--inh-caps", "-all"}, run...)...)
	says("CAP_NET_ADMIN (to attach", append([]string{"setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"}, run...)...)
	if _, err := w.WriteFile("pentad.yaml", "services: []\nscope: {cgroup: /there/is/none}\n"); err != nil {
		t.Fatal(err)
	}
	says("no such cgroup: /there/is/none", run...)
	says("does not lie on a bpf filesystem", e2e.Program(), "run", "-c", "pentad.yaml", "--pins", w.Dir, "--run-dir", w.Dir)
	w.WriteFile("pentad.yaml", "services: {}\nscop: 1\n")
	says("pentad.yaml:2:1: unknown key \"scop\" in the file; did you mean \"scope\"?", run...)
	says("pentad.yaml:1:11: want a list of services", run...)
	says("cannot be read", w.Args(e2e.Program(), "run", "-c", "none.yaml")...)
}

// The capabilities of the systemd unit are enough.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	lab.Need(t, "setpriv")
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	w.Configure(webTwo)
	p, err := w.Start(exec.Command("setpriv", append([]string{"--bounding-set", "-all,+bpf,+net_admin,+perfmon", "--inh-caps", "-all", "--no-new-privs", e2e.Program()},
		w.Args("run", "-c", "pentad.yaml")...)...), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	w.Agent = p
	w.Ready()
	w.AwaitStates("web", service.Serving, service.Down)
	if have := w.Answers("192.0.2.10:80", 5); have["one"] != 5 {
		t.Errorf("answers are %v", have)
	}
}

// Where no bpf filesystem is mounted, one is.
func TestMountsBPFFS(t *testing.T) {
	t.Parallel()
	lab.Need(t, "unshare")
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Configure(webTwo)
	// A mount namespace of its own, whose /sys has no bpf filesystem.
	script := "while umount /sys/fs/bpf 2>/dev/null; do :; done; exec " + e2e.Program() + " " + strings.Join(w.Args("run", "-c", "pentad.yaml"), " ")
	p, err := w.Start(exec.Command("unshare", "-m", "sh", "-c", script), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	w.Agent = p
	w.Eventually("the agent has installed all", func() error {
		if n := attached(t, w); n != 9 {
			return fmt.Errorf("%d programs are attached: %s", n, p.Log)
		}
		return nil
	})
	w.Agent.Kill()
	// The pins were on that mount, which went with its namespace.
	w.Eventually("the mount is gone with all of it", func() error {
		if n := attached(t, w); n != 0 {
			return fmt.Errorf("%d programs are attached", n)
		}
		return nil
	})
}

// The demo shows what it says, and leaves nothing behind, also on Ctrl-C.
func TestDemo(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t)
	for _, interrupt := range []bool{false, true} {
		// The demo's host is named after a directory here.
		dir := filepath.Join(w.Dir, fmt.Sprint("demo-", interrupt))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(e2e.Program(), "demo")
		cmd.Env = append(os.Environ(), "TMPDIR="+dir)
		p, err := w.Start(cmd, lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		w.Eventually("the demo's clients run", func() error {
			if !strings.Contains(p.Log.String(), "requests, 0 failed") {
				return fmt.Errorf("it printed:\n%s", p.Log)
			}
			return nil
		})
		hosts, err := os.ReadDir(dir)
		if err != nil || len(hosts) != 1 {
			t.Fatalf("the demo's hosts: %v, %v", hosts, err)
		}
		if interrupt {
			if err := p.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Wait(); err != nil {
			t.Errorf("demo: %v:\n%s", err, p.Log)
		}
		if !interrupt {
			for _, want := range []string{"the kernel saw it and left web-2", "its probe failed twice", "it has its share again",
				"clients noticed nothing", "the kernel left web-3 by itself", "again, with no agent", ", 0 at any other time"} {
				if !strings.Contains(p.Log.String(), want) {
					t.Errorf("the demo does not say %q:\n%s", want, p.Log)
				}
			}
		}
		root, err := host.CgroupRoot()
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{filepath.Join(dir, hosts[0].Name()), filepath.Join("/sys/fs/bpf", hosts[0].Name()), filepath.Join(root, hosts[0].Name())} {
			if _, err := os.Stat(path); !os.IsNotExist(err) {
				t.Errorf("interrupted %v: %s is left: %v", interrupt, path, err)
			}
		}
	}
}
