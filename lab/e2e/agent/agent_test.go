package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// answers asks a VIP n times and counts who answered.
func (w *world) answers(vip string, n int, args ...string) map[string]int {
	w.t.Helper()
	counts := make(map[string]int)
	for line := range strings.Lines(w.client("ask", append([]string{vip, fmt.Sprint(n)}, args...)...) + "\n") {
		counts[strings.TrimSpace(line)]++
	}
	return counts
}

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
		w.eventually("the kernel shows "+vip, func() error {
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
	w.agent = w.launch()
	w.ready()
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
	w.eventually("status shows the error", func() error {
		var err error
		if status, err = w.pentad("status"); err == nil {
			return fmt.Errorf("status is fine: %s", status)
		}
		if !strings.Contains(status, `pentad.yaml:3:3: unknown key "lisen" in a service; did you mean "listen"?`) {
			return fmt.Errorf("status: %s", status)
		}
		return nil
	})
	if !strings.Contains(w.agent.Log.String(), `did you mean`) {
		t.Errorf("the log does not say it:\n%s", w.agent.Log)
	}
	shows("192.0.2.6")
	// Gone: the same.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	w.eventually("status shows that the file is gone", func() error {
		if out, _ := w.pentad("status"); !strings.Contains(out, "cannot be read") {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	})
	shows("192.0.2.6")
	// Mended.
	write(path, text("192.0.2.8"))
	shows("192.0.2.8")
	w.ready()
}

func TestHealthAndGroups(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	one := w.serve("one", "10.0.0.1:7000")
	two := w.serve("two", "10.0.0.2:7000")
	three := w.serve("three", "10.0.0.3:7000")
	w.run(`services:
- name: web
  listen: [192.0.2.10:80]
  health: {interval: 100ms, timeout: 50ms}
  backends:
  - 10.0.0.1:7000
  - 10.0.0.2:7000
  - {address: 10.0.0.3:7000, group: 1}`)
	expect := func(want ...string) {
		t.Helper()
		have := w.answers("192.0.2.10:80", 60)
		for _, name := range want {
			if have[name] == 0 {
				t.Errorf("answers are %v, want from all of %v", have, want)
			}
			delete(have, name)
		}
		if len(have) > 0 {
			t.Errorf("also answered %v, want only %v", have, want)
		}
	}
	const up, standby, down = service.Serving, service.Standby, service.Down
	w.awaitStates("web", up, up, standby)
	expect("one", "two")
	one.Kill()
	w.awaitStates("web", down, up, standby)
	expect("two")
	two.Kill()
	w.awaitStates("web", down, down, up)
	expect("three")
	three.Kill()
	w.awaitStates("web", down, down, down)
	expect("connection refused")
	if out := w.mustPentad("service", "list"); !strings.Contains(out, "nothing: refused") {
		t.Errorf("service list:\n%s", out)
	}
	w.serve("three", "10.0.0.3:7000")
	w.awaitStates("web", down, down, up)
	expect("three")
	w.serve("one", "10.0.0.1:7000")
	w.awaitStates("web", up, down, standby)
	expect("one")
}

func TestHTTPProbe(t *testing.T) {
	t.Parallel()
	lab.Need(t, "nginx")
	w := newWorld(t, "10.0.0.1")
	conf, err := w.WriteFile("nginx.conf", fmt.Sprintf(`daemon off; pid %[1]s/nginx.pid; error_log stderr; worker_processes 1;
events {} http { access_log off; client_body_temp_path %[1]s/t1; proxy_temp_path %[1]s/t2; fastcgi_temp_path %[1]s/t3; uwsgi_temp_path %[1]s/t4; scgi_temp_path %[1]s/t5;
server { listen 10.0.0.1:7000; server_name _;
location /well { return 200 "fine\n"; } location /moved { return 302 /well; } location /ill { return 503; }
location /host { if ($host != "shop.example") { return 400; } return 204; } } }`, w.Dir))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Start(command("nginx", "-c", conf, "-e", "stderr"), lab.Outside); err != nil {
		t.Fatal(err)
	}
	w.listening("10.0.0.1:7000")
	text := "services:"
	for i, health := range []string{
		"path: /well", "path: /moved", "path: /moved, expect: '200'", "path: /ill", "path: /ill, expect: '200,500-599'",
		"path: /host", "path: /host, host: shop.example",
	} {
		text += fmt.Sprintf("\n- {name: s%d, listen: ['192.0.2.%d:80'], backends: ['10.0.0.1:7000'], health: {probe: http, interval: 100ms, timeout: 90ms, %s}}", i, 10+i, health)
	}
	w.run(text)
	for i, want := range []service.State{service.Serving, service.Serving, service.Down, service.Down, service.Serving, service.Down, service.Serving} {
		w.awaitStates(fmt.Sprintf("s%d", i), want)
	}
}

// A probe goes to the backend that it names, also when that address is the VIP
// of another service, or becomes it, and the agent lies in the scope.
func TestProbeIsNotTranslated(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.serve("two", "10.0.0.2:7000")
	outer := `services:
- name: outer
  listen: [192.0.2.10:80]
  backends: [10.0.0.1:7000]
  health: {interval: 100ms, timeout: 50ms}`
	inner := `
- name: inner
  listen: [10.0.0.1:7000]
  backends: [10.0.0.2:7000]
  health: {interval: 100ms, timeout: 50ms}`
	w.configure(outer)
	p, err := w.Start(command(program, w.args("run", "-c", "pentad.yaml")...), lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	w.agent = p
	w.ready()
	// Nobody listens on 10.0.0.1:7000; once it is a VIP, a translated probe succeeds.
	w.awaitStates("outer", service.Down)
	w.configure(outer + inner)
	w.awaitStates("inner", service.Serving)
	done := func() uint64 {
		var s struct {
			Agent struct{ Probes struct{ Done uint64 } }
		}
		if err := json.Unmarshal([]byte(w.mustPentad("status", "-o", "json")), &s); err != nil {
			t.Fatal(err)
		}
		return s.Agent.Probes.Done
	}
	before := done()
	w.eventually("ten more probes are done", func() error {
		if n := done() - before; n < 10 {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	w.awaitStates("outer", service.Down)
	if strings.Contains(w.agent.Log.String(), `"backend is up" service=outer`) {
		t.Error("a probe of outer was translated")
	}
}

func TestAffinityAndSourceHash(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	for i, name := range []string{"one", "two", "three"} {
		w.serve(name, fmt.Sprintf("10.0.0.%d:7000", i+1))
	}
	text := `services:
- name: sticky
  listen: [192.0.2.10:80]
  affinity: {timeout: 1h}
  health: {probe: none}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]
- name: short
  listen: [192.0.2.12:80]
  affinity: {timeout: 1s}
  health: {probe: none}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]
- name: hashed
  listen: [192.0.2.11:80]
  balance: source-hash
  health: {probe: none}
  backends: [%s]`
	w.run(fmt.Sprintf(text, "10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000"))
	sticky := w.answers("192.0.2.10:80", 50)
	if len(sticky) != 1 {
		t.Errorf("one client with affinity was served by %v", sticky)
	}
	// The backend leaves the choice: the client moves, and stays there.
	who := onlyKey(sticky)
	w.mustPentad("backend", "drain", "sticky", "10.0.0."+map[string]string{"one": "1", "two": "2", "three": "3"}[who]+":7000")
	moved := w.answers("192.0.2.10:80", 50)
	if len(moved) != 1 || moved[who] > 0 {
		t.Errorf("after the drain of %s one client was served by %v", who, moved)
	}
	// After the time-out a client is a new one: within many time-outs it
	// meets another backend.
	w.eventually("affinity ends", func() error {
		first := onlyKey(w.answers("192.0.2.12:80", 1))
		// Longer than the time-out: the client is idle for that long.
		time.Sleep(1200 * time.Millisecond)
		if next := onlyKey(w.answers("192.0.2.12:80", 1)); next == first {
			return fmt.Errorf("still %s", first)
		}
		return nil
	})

	// One network namespace is one client, unless the socket bound an address.
	if hashed := w.answers("192.0.2.11:80", 50); len(hashed) != 1 {
		t.Errorf("one client of source-hash was served by %v", hashed)
	}
	before := make(map[string]string)
	reached := make(map[string]int)
	for i := range 60 {
		from := fmt.Sprintf("127.0.1.%d:0", i+1)
		before[from] = onlyKey(w.answers("192.0.2.11:80", 1, from))
		reached[before[from]]++
	}
	if len(reached) != 3 {
		t.Errorf("60 clients reached only %v", reached)
	}
	// One backend goes: only its clients move, but for the odd one (Maglev).
	w.configure(fmt.Sprintf(text, "10.0.0.1:7000, 10.0.0.2:7000"))
	w.awaitStates("hashed", service.Serving, service.Serving)
	moves := 0
	for from, was := range before {
		now := onlyKey(w.answers("192.0.2.11:80", 1, from))
		if now == "three" {
			t.Errorf("%s still reaches a removed backend", from)
		}
		if was != "three" && now != was {
			moves++
		}
	}
	if moves > 10 {
		t.Errorf("%d clients moved without need", moves)
	}
}

func onlyKey(m map[string]int) string {
	for k := range m {
		return k
	}
	return ""
}

// A drain lasts across agents, and so does what probes found out.
func TestDrain(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.serve("one", "10.0.0.1:7000")
	w.serve("two", "10.0.0.2:7000")
	w.run(webTwo)
	w.mustPentad("backend", "drain", "web", "10.0.0.1:7000")
	w.awaitStates("web", service.Drained, service.Serving)
	if have := w.answers("192.0.2.10:80", 30); have["two"] != 30 {
		t.Errorf("answers are %v", have)
	}
	w.agent.Kill()
	w.awaitStates("web", service.Drained, service.Serving)
	w.agent = w.launch()
	w.ready()
	w.awaitStates("web", service.Drained, service.Serving)
	w.mustPentad("backend", "enable", "web", "10.0.0.1:7000")
	w.awaitStates("web", service.Serving, service.Serving)

	for _, c := range []struct{ args, want string }{
		{"drain nope 10.0.0.1:7000", "service nope"},
		{"drain web 10.0.0.9:7000", "backend 10.0.0.9:7000"},
		{"drain web 10.0.0.9", "want ADDRESS:PORT"},
	} {
		out, err := w.pentad(append([]string{"backend"}, strings.Fields(c.args)...)...)
		if err == nil || !strings.Contains(out, c.want) {
			t.Errorf("backend %s: %v: %s", c.args, err, out)
		}
	}
	w.agent.Kill()
	if out, err := w.pentad("backend", "drain", "web", "10.0.0.1:7000"); err == nil || !strings.Contains(out, "no agent is running") {
		t.Errorf("drain without an agent: %v: %s", err, out)
	}
}

func TestTwoAgents(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.run(webTwo)
	second := w.launch()
	err := second.Wait()
	want := fmt.Sprintf("another pentad, process %d (", w.agent.Process.Pid)
	if err == nil || !strings.Contains(second.Log.String(), want) || !strings.Contains(second.Log.String(), "pentad run") {
		t.Errorf("the second agent: %v: %s; want %q", err, second.Log, want)
	}
	w.ready()
}

// Down leaves nothing, from whatever state, and may be repeated.
func TestDown(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	gone := func(state string) {
		t.Helper()
		for range 2 {
			w.mustPentad("down")
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
	w.run(webTwo)
	if n := attached(t, w); n == 0 {
		t.Fatal("no program is attached")
	}
	gone("an agent ran")
	if err := w.agent.Wait(); err != nil {
		t.Errorf("the agent did not end well: %v", err)
	}
	w.agent = w.launch()
	w.ready()
	w.agent.Kill()
	gone("the agent was dead")
	w.agent = w.launch()
	w.ready()
	w.agent.Kill()
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
		n += queryPrograms(t, filepath.Join(root, w.Scope()), at)
	}
	return n
}

// The hooks and the maps are put back when somebody else removes them: by the
// running agent, or by the next.
func TestRepair(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.serve("one", "10.0.0.1:7000")
	w.run("services: [{name: web, listen: ['192.0.2.10:80'], health: {probe: none}, backends: ['10.0.0.1:7000']}]")
	works := func(after string) {
		t.Helper()
		if have := w.answers("192.0.2.10:80", 5); have["one"] != 5 {
			t.Errorf("after %s: answers are %v", after, have)
		}
	}
	pin := filepath.Join(w.Pins, "socket", "links", "connect4")
	repaired := func(after string) {
		t.Helper()
		w.eventually("the agent repairs "+after, func() error {
			if n := attached(t, w); n != 9 {
				return fmt.Errorf("%d programs are attached", n)
			}
			_, err := w.pentad("service", "list")
			return err
		})
		w.ready()
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
	w.agent.Kill()
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
	if out, err := w.pentad("status"); err == nil || !strings.Contains(out, "hooks are not attached: connect4") {
		t.Errorf("status does not show the missing hook: %s", out)
	}
	w.agent = w.launch()
	repaired("what happened while it was dead")
}

// More services than the maps were made for: the maps grow, and what sockets did
// before is not lost.
func TestGrowth(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.serve("one", "10.0.0.1:7000")
	small := "services:\n- {name: web, listen: ['192.0.2.10:80'], health: {probe: none}, affinity: {timeout: 1h}, backends: ['10.0.0.1:7000', '10.0.0.2:7000']}\n"
	w.run(small)
	before := w.view().Memory["backends"]
	var big strings.Builder
	big.WriteString(small)
	for i := range 5000 {
		fmt.Fprintf(&big, "- {name: s%d, listen: ['192.0.3.%d:%d'], health: {probe: none}, backends: ['10.0.0.1:7000']}\n", i, i%256, 1000+i)
	}
	w.configure(big.String())
	w.eventually("all services are in the kernel", func() error {
		v, err := socket.Read(w.Pins)
		if err != nil {
			return err
		}
		if len(v.Services) != 5001 {
			return fmt.Errorf("there are %d", len(v.Services))
		}
		return nil
	})
	if have := w.answers("192.0.3.200:1200", 3); have["one"] != 3 {
		t.Errorf("a new service answers %v", have)
	}
	if after := w.view().Memory["backends"]; after <= before {
		t.Errorf("the map backends has %d bytes, had %d", after, before)
	}
	if _, err := os.Stat(filepath.Join(w.Pins, "socket", "set-1")); !os.IsNotExist(err) {
		t.Errorf("the old set of maps is still there: %v", err)
	}
	w.ready()
}

// When everything changes at once the old tables stand beside the new ones until
// the listeners are switched: there must be room for both.
func TestGrowthForBoth(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	text := func(services, backend int) string {
		var b strings.Builder
		b.WriteString("guard: off\nservices:\n")
		for i := range services {
			fmt.Fprintf(&b, "- {name: s%d, listen: ['192.0.2.%d:80'], balance: source-hash, health: {probe: none}, backends: ['10.0.%d.%d:80', '10.0.200.%d:80']}\n",
				i, i, i, backend, i)
		}
		return b.String()
	}
	w.run(text(2, 1))
	for backend, services := range []int{3, 4, 6, 9, 2, 20} {
		w.configure(text(services, backend+2))
		w.eventually("the change is in the kernel", func() error {
			v, err := socket.Read(w.Pins)
			if err != nil {
				return err
			}
			want := fmt.Sprintf("10.0.%d.%d:80", services-1, backend+2)
			s := (&service.Snapshot{Services: v.Services}).Find(fmt.Sprintf("s%d", services-1))
			if len(v.Services) != services || s == nil || s.Backends[0].Address.String() != want {
				return fmt.Errorf("%d services, want %d; the last is %+v, want %s", len(v.Services), services, s, want)
			}
			return nil
		})
		w.ready()
	}
}

// What scripts and scrapers see.
func TestOutputs(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.serve("one", "10.0.0.1:7000")
	w.run(webTwo)
	w.awaitStates("web", service.Serving, service.Down)
	w.answers("192.0.2.10:80", 3)

	var list []struct {
		Name     string
		Listen   []string
		Balance  string
		Backends []struct {
			Address, State string
			Weight         int
		}
	}
	if err := json.Unmarshal([]byte(w.mustPentad("service", "list", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Name != "web" || list[0].Listen[0] != "192.0.2.10:80" || list[0].Backends[1].State != "down" || list[0].Backends[0].Weight != 100 {
		t.Errorf("service list -o json: %+v", list)
	}
	if out := w.mustPentad("service", "show", "web", "-o", "yaml"); !strings.Contains(out, "listen:\n  - 192.0.2.10:80\n") {
		t.Errorf("service show -o yaml:\n%s", out)
	}
	if out := w.mustPentad("backend", "list", "-o", "wide"); !strings.Contains(out, "SINCE") || !strings.Contains(out, "10.0.0.2:7000") {
		t.Errorf("backend list:\n%s", out)
	}
	if out := w.mustPentad("status"); !strings.Contains(out, "12 of 12 attached") || !strings.Contains(out, "1 serving, 1 down") || !strings.Contains(out, "MiB") {
		t.Errorf("status:\n%s", out)
	}
	st, err := os.Stat(filepath.Join(w.Dir, "run", "pentad.sock"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("agent socket: %v %v", st.Mode(), err)
	}
	metrics := get(t, w, "http://127.0.0.1:9464/metrics")
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
	if out := get(t, w, "http://127.0.0.1:9464/healthz"); out != "ok\n" {
		t.Errorf("healthz: %s", out)
	}
	// Without an agent the kernel is read all the same.
	w.agent.Kill()
	w.mustPentad("service", "list")
	if out, err := w.pentad("status"); err == nil || !strings.Contains(out, "no agent is running") || !strings.Contains(out, "12 of 12 attached") {
		t.Errorf("status without an agent: %v\n%s", err, out)
	}
	if out, err := w.pentad("service", "show", "nope"); err == nil || !strings.Contains(out, "pentad service list") {
		t.Errorf("service show of nothing: %s", out)
	}
	w.mustPentad("down")
	if out, err := w.pentad("service", "list"); err == nil || !strings.Contains(out, "nothing in this kernel") {
		t.Errorf("service list after down: %s", out)
	}
	for _, args := range []string{"nope", "service list extra", "service list -o xml", "run --nope", "backend drain one"} {
		p, err := w.Start(command(program, strings.Fields(args)...), lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		if p.Wait(); p.ProcessState.ExitCode() != 2 {
			t.Errorf("pentad %s: exit code %d, want 2: %s", args, p.ProcessState.ExitCode(), p.Log)
		}
	}
}

// get fetches a URL on the host.
func get(t *testing.T, w *world, url string) string {
	t.Helper()
	var body string
	err := w.Do(func() error {
		// The connection is opened on this thread, which is on the host.
		c, err := net.Dial("tcp", "127.0.0.1:9464")
		if err != nil {
			return err
		}
		client := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}
		resp, err := client.Get(url)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		body = string(b)
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v", url, err)
	}
	return body
}

// What is wrong with the host is said in words, and nothing is changed.
func TestBadHost(t *testing.T) {
	t.Parallel()
	lab.Need(t, "setpriv", "curl")
	w := newWorld(t, "10.0.0.1")
	w.configure("services: []")
	says := func(want string, args ...string) {
		t.Helper()
		p, err := w.Start(command(args[0], args[1:]...), lab.Outside)
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
	run := w.args(program, "run", "-c", "pentad.yaml")
	says("missing CAP_BPF", append([]string{"setpriv", "--bounding-set", "-all", "--inh-caps", "-all"}, run...)...)
	says("missing CAP_PERFMON (to pass", append([]string{"setpriv", "--bounding-set", "-all,+bpf,+net_admin", "--inh-caps", "-all"}, run...)...)
	says("CAP_NET_ADMIN (to attach", append([]string{"setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"}, run...)...)
	if _, err := w.WriteFile("pentad.yaml", "services: []\nscope: {cgroup: /there/is/none}\n"); err != nil {
		t.Fatal(err)
	}
	says("no such cgroup: /there/is/none", run...)
	says("does not lie on a bpf filesystem", program, "run", "-c", "pentad.yaml", "--pins", w.Dir, "--run-dir", w.Dir)
	w.WriteFile("pentad.yaml", "services: {}\nscop: 1\n")
	says("pentad.yaml:2:1: unknown key \"scop\" in the file; did you mean \"scope\"?", run...)
	says("pentad.yaml:1:11: want a list of services", run...)
	says("cannot be read", w.args(program, "run", "-c", "none.yaml")...)
}

// The capabilities of the systemd unit are enough.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	lab.Need(t, "setpriv")
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.serve("one", "10.0.0.1:7000")
	w.configure(webTwo)
	p, err := w.Start(command("setpriv", append([]string{"--bounding-set", "-all,+bpf,+net_admin,+perfmon", "--inh-caps", "-all", "--no-new-privs", program},
		w.args("run", "-c", "pentad.yaml")...)...), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	w.agent = p
	w.ready()
	w.awaitStates("web", service.Serving, service.Down)
	if have := w.answers("192.0.2.10:80", 5); have["one"] != 5 {
		t.Errorf("answers are %v", have)
	}
}

// Where no bpf filesystem is mounted, one is.
func TestMountsBPFFS(t *testing.T) {
	t.Parallel()
	lab.Need(t, "unshare")
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.configure(webTwo)
	// A mount namespace of its own, whose /sys has no bpf filesystem.
	script := "while umount /sys/fs/bpf 2>/dev/null; do :; done; exec " + program + " " + strings.Join(w.args("run", "-c", "pentad.yaml"), " ")
	p, err := w.Start(command("unshare", "-m", "sh", "-c", script), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	w.agent = p
	w.eventually("the agent has installed all", func() error {
		if n := attached(t, w); n != 9 {
			return fmt.Errorf("%d programs are attached: %s", n, p.Log)
		}
		return nil
	})
	w.agent.Kill()
	// The pins were on that mount, which went with its namespace.
	w.eventually("the mount is gone with all of it", func() error {
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
		cmd := command(program, "demo")
		cmd.Env = append(os.Environ(), "TMPDIR="+dir)
		p, err := w.Start(cmd, lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		w.eventually("the demo's clients run", func() error {
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
