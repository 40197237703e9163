package agent_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/view"
)

const daily = `services:
- {name: web, listen: ['192.0.2.10:80', '[2001:db8:f::10]:80'], health: {probe: none},
   backends: ['10.0.0.1:7000', '10.0.0.2:7000', '[2001:db8::1]:7000']}
- {name: one, listen: ['192.0.2.11:80'], health: {probe: none}, backends: ['10.0.0.1:7000']}
- {name: zero, listen: ['192.0.2.12:80'], health: {probe: none}, backends: [{address: '10.0.0.1:7000', weight: 0}]}
`

// Wrong usage ends with 2 and says what would be right; "no" ends with 1.
func TestUsage(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "2001:db8::1")
	w.RunAgent(daily)
	for _, c := range []struct {
		code          int
		command, want string
	}{
		{2, "backend drian web 10.0.0.1:7000", `did you mean "drain"?`},
		{2, "backend", "a command is missing: drain, enable, list"},
		{2, "service lst", `did you mean "list"?`},
		{2, "drain web 10.0.0.1:7000", `did you mean "pentad backend drain"?`},
		{2, "completion bsh", `did you mean "bash"?`},
		{2, "explain", "DEST[:PORT][/tcp|udp] is missing"},
		{2, "service show", "usage: pentad service show SERVICE"},
		{2, "backend drain web", "ADDRESS is missing"},
		{2, "backend drain web nonsense", "want ADDRESS:PORT"},
		{2, "backend drain web 10.0.0.1:7000 --timeout -5s", "a duration is not negative"},
		{2, "backend drain web 10.0.0.1:7000 --timeout 60", "did you mean 60s?"},
		{2, "backend list --state dwon", `did you mean "down"?`},
		{2, "backend list --sort size", "known are"},
		{2, "flow --pid abc", "whole number"},
		{2, "flow --pid -1", "whole number"},
		{2, "flow --pid 999999999", "no such process"},
		{1, "flow --service wbe", `did you mean "web"?`},
		{1, "flow -f --service wbe", `did you mean "web"?`},
		{1, "service show wbe", `did you mean "web"?`},
		{1, "backend list --service wbe", `did you mean "web"?`},
		{2, "backend list web", "did you mean --service web?"},
		{2, "explain web:80", "no destination"},
		{2, "explain 192.0.2.10:http", "no destination"},
		{2, "explain http://192.0.2.10", "what stands before ://"},
		{2, "explain 192.0.2.10:80/sctp", "want protocol tcp or udp"},
		{2, "explain --from foo 192.0.2.10:80", "is no address"},
		{2, "explain --pid 1 --from 10.0.0.9 192.0.2.10:80", "one of them"},
		{2, "explain --pid 999999999 192.0.2.10:80", "no such process"},
		{2, "explain 2001:db8:f::10:80", "did you mean [2001:db8:f::10]:80?"},
		{2, "status -o wide", "want one of table, json, yaml"},
		{2, "status extra", `"extra" is one argument too many`},
		{2, "check pentad.yaml -c other", "named twice"},
		{2, "help nosuch", "no command"},
		{0, "help flow", "Usage:"},
		{0, "explain web/tcp", "goes to one of"},
		{2, "explain wbe", `did you mean "web"?`},
		{2, "top --interval 1ms", "100ms or more"},
		{0, "top --once --interval 100ms", "CONNECTIONS/s"},
		{0, "--version", "pentad "},
		{0, "services ls", "web"},
		{0, "svc list", "web"},
		{0, "backends list --service web --no-headers", "10.0.0.2:7000"},
		{0, "flows", "PROCESS"},
		{0, "explain web", "goes to one of 10.0.0.1:7000, 10.0.0.2:7000"},
		{0, "explain 192.0.2.10:80", "=> connect() to 192.0.2.10:80 goes to one of"},
		{1, "explain 192.0.2.12:80", "10.0.0.1:7000 is of weight 0"},
		{0, "service list --refusing", "nothing: refused (1 backend: weight 0)"},
	} {
		w.Says(c.code, c.command, c.want)
	}
	if out := w.Says(0, "service list --refusing"); strings.Contains(out, "192.0.2.10:80") {
		t.Errorf("a listener that serves is listed as refusing:\n%s", out)
	}
}

// Who drains is told what that does, and what is drained stays so.
func TestDrainByHand(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "2001:db8::1")
	w.Serve("", "10.0.0.1:7000", "10.0.0.2:7000")
	w.RunAgent(daily)
	w.Says(1, "backend drain one 10.0.0.1:7000", "192.0.2.11:80 (one) would refuse every connection", "--force")
	w.AwaitStates("one", service.Serving)
	w.Says(0, "backend drain one 10.0.0.1:7000 --force", "one 10.0.0.1:7000: drained, 0 connections left", "warning: 192.0.2.11:80 (one) refuses every connection now")
	w.Says(0, "backend drain one 10.0.0.1:7000 --force", "it was drained before")
	w.Says(0, "backend enable one 10.0.0.1:7000", "one 10.0.0.1:7000: enabled")
	w.Says(0, "backend enable zero 10.0.0.1:7000", "its weight is 0")
	// The IPv6 listener of web has one backend, and it is not meant.
	w.Says(0, "backend drain web 10.0.0.1", "web 10.0.0.1:7000: drained")
	w.Says(1, "backend drain web 10.0.0.2:7000", "192.0.2.10:80 (web) would refuse")
	w.Says(0, "backend enable --all 10.0.0.1", "web 10.0.0.1:7000: enabled", "one 10.0.0.1:7000: it was enabled before", "zero 10.0.0.1:7000")
	w.Says(1, "backend drain --all 10.0.0.9", "no service has the backend 10.0.0.9")
	w.Says(1, "backend drain wbe 10.0.0.1:7000", `did you mean "web"?`)

	// --wait returns when the last connection is over.
	holder := w.StartClient(w.Host, "watch", "1", "192.0.2.10:80")
	w.Prints(holder, "watching", 1)
	var target string
	for address, l := range w.View().Loads["web"] {
		if l.InFlight > 0 {
			target = address.String()
		}
	}
	waiting, err := w.Start(exec.Command(e2e.Program(), w.Args("backend", "drain", "web", target, "--wait")...), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	w.Eventually("the drain", func() error {
		if !strings.Contains(waiting.Log.String(), "drained, 1 connection left") {
			return errors.New(waiting.Log.String())
		}
		return nil
	})
	select {
	case <-waiting.Done():
		t.Errorf("it did not wait: %s", waiting.Log)
	case <-time.After(time.Second):
	}
	holder.Kill()
	if err := waiting.Wait(); err != nil || !strings.Contains(waiting.Log.String(), "no connection is left") {
		t.Errorf("%v: %s", err, waiting.Log)
	}

	// Its line goes and comes, the service has another name, the host starts anew.
	isDrained := func(what, service string) {
		t.Helper()
		w.Eventually(what, func() error {
			v, err := socket.Read(w.Pins)
			if err != nil {
				return err
			}
			for _, s := range v.Services {
				for _, b := range s.Backends {
					if s.Name == service && b.Address.String() == target && b.Drained {
						return nil
					}
				}
			}
			return fmt.Errorf("%s of %s is not drained", target, service)
		})
	}
	isDrained("at first", "web")
	w.Configure(strings.Replace(daily, "'"+target+"', ", "", 1))
	w.Eventually("without it", func() error {
		if n := len(w.View().Services[1].Backends); n != 2 {
			return fmt.Errorf("%d backends", n)
		}
		return nil
	})
	w.Configure(daily)
	isDrained("after its line came back", "web")
	w.Configure(strings.Replace(daily, "name: web", "name: site", 1))
	isDrained("under another name", "site")
	w.Agent.Kill()
	if err := socket.Remove(w.Pins); err != nil {
		t.Fatal(err)
	}
	w.Agent = w.Launch()
	w.Ready()
	isDrained("after everything in the kernel was gone", "site")
	w.Says(0, "backend enable site "+target, "enabled")
	w.Agent.Kill()

	// Without an agent the kernel is told, and the next agent finds it so.
	w.Says(1, "backend drain site "+target+" --timeout 5s", "no agent runs, which would close what is left")
	w.Says(1, "backend drain sit "+target, `did you mean "site"?`)
	w.Says(1, "backend drain one 10.0.0.1:7000", "would refuse every connection", "--force")
	w.Says(0, "backend drain site "+target, "drained, 0 connections left")
	isDrained("with the agent dead", "site")
	if have := w.Answers("192.0.2.10:80", 20); len(have) != 1 {
		t.Errorf("after a drain with the agent dead %v answer", have)
	}
	w.Agent = w.Launch()
	w.Ready()
	isDrained("by the next agent", "site")
	w.Agent.Kill()
	w.Says(0, "backend enable site "+target, "enabled")
	w.Agent = w.Launch()
	w.Ready()
	if have := w.Answers("192.0.2.10:80", 40); len(have) != 2 {
		t.Errorf("after it was enabled with the agent dead %v answer", have)
	}
}

// A file is put in force, or it is said why not; one that takes away too much waits for
// somebody who means it.
func TestReloadByHand(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	many := func(n int) string {
		var b strings.Builder
		b.WriteString("services:\n")
		for i := range n {
			fmt.Fprintf(&b, "- {name: s%d, listen: ['192.0.2.%d:80'], health: {probe: none}, backends: ['10.0.0.1:7000']}\n", i, i+1)
		}
		return b.String()
	}
	w.RunAgent(many(6))
	services := func(n int) {
		t.Helper()
		w.Eventually(fmt.Sprint(n, " services"), func() error {
			if have := len(w.View().Services); have != n {
				return fmt.Errorf("%d", have)
			}
			return nil
		})
	}
	w.Says(0, "reload", "with 6 services is in force")
	w.Says(0, "diff pentad.yaml", "nothing would change")
	w.Configure(many(7))
	w.Says(0, "reload", "with 7 services")
	services(7)
	// Half may go, more may not.
	w.Configure(many(2))
	w.Says(1, "diff pentad.yaml", "- s6: 192.0.2.7:80, 1 backend, 0 connections would be closed")
	w.Says(1, "reload", "takes away 5 of 7 listeners", "pentad reload --force")
	w.Says(1, "status", "PROBLEM", "held back")
	services(7)
	// Nor does a new agent put it in force.
	w.Agent.Kill()
	w.Agent = w.Launch()
	w.Eventually("holding it back still", func() error {
		if out, code := w.RunCode("status"); code != 1 || !strings.Contains(out, "held back") {
			return errors.New(out)
		}
		return nil
	})
	services(7)
	w.Says(0, "reload --force", "with 2 services is in force")
	w.Agent.Kill()
	w.Agent = w.Launch()
	w.Ready()
	services(2)
	w.Says(0, "status")
	// Few listeners have no guard, and a guard can be off.
	w.Configure(many(0) + "  []")
	services(0)
	w.Configure(many(6) + "guard: off\n")
	services(6)
	w.Configure("services: []\nguard: off\n")
	services(0)

	w.Configure("services: [\n")
	w.Says(1, "reload", "pentad.yaml:", "this is not YAML")
	w.Eventually("the problem", func() error {
		if out, code := w.RunCode("status"); code != 1 || !strings.Contains(out, "not valid and not in force") {
			return errors.New(out)
		}
		return nil
	})
	w.Configure(many(1))
	services(1)
	if log := w.Agent.Log.String(); !strings.Contains(log, "the configuration is valid again") {
		t.Error("nothing says that the file is valid again")
	}
	// SIGHUP reads it, and ends nothing.
	if err := w.Agent.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	w.Eventually("reading it again", func() error {
		if log := w.Agent.Log.String(); !strings.Contains(log, "as a signal asks") {
			return errors.New("not yet")
		}
		return nil
	})
	w.Says(0, "status")
	// Of a file that is wrong in every line nobody reads them all.
	w.Configure("services:\n" + strings.Repeat("- {nme: x}\n", 500))
	w.Eventually("not valid", func() error {
		out, _ := w.RunCode("status")
		if !strings.Contains(out, "more errors") || len(out) > 10_000 {
			return fmt.Errorf("%d bytes: %s", len(out), out[:min(len(out), 500)])
		}
		return nil
	})
	if err := w.Agent.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-w.Agent.Done()
	if log := w.Agent.Log.String(); !strings.Contains(log, "signal: terminated") || strings.Count(log, "unknown key") > 25 {
		t.Errorf("the end of the log:\n%s", log[max(0, len(log)-500):])
	}
}

// With a service manager that waits, an agent with a broken file waits as well, and says
// when it is ready, reloads and stops.
func TestServiceManager(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	at := filepath.Join(w.Dir, "notify.sock")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	hears := func(want string) {
		t.Helper()
		if err := manager.SetReadDeadline(time.Now().Add(e2e.Patience)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1000)
		for {
			n, err := manager.Read(b)
			if err != nil {
				t.Fatalf("no %s: %v", want, err)
			}
			if strings.HasPrefix(string(b[:n]), want) {
				return
			}
		}
	}
	w.Configure("services: [\n")
	// At a terminal the reason is all that is wanted.
	if out, code := w.RunCode("run", "-c", "pentad.yaml"); code != 1 || !strings.Contains(out, "this is not YAML") {
		t.Errorf("exit code %d: %s", code, out)
	}
	cmd := exec.Command(e2e.Program(), w.Args("run", "-c", "pentad.yaml")...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+at, "WATCHDOG_USEC=300000")
	if w.Agent, err = w.Start(cmd, lab.Outside); err != nil {
		t.Fatal(err)
	}
	hears("READY=1")
	w.Says(1, "status", "this is not YAML", "none in force yet")
	w.Configure(daily)
	w.Eventually("the services", func() error {
		v, err := socket.Read(w.Pins)
		if err == nil && len(v.Services) != 3 {
			err = fmt.Errorf("%d services", len(v.Services))
		}
		return err
	})
	hears("WATCHDOG=1")
	// It does not wait for a manager that does not listen.
	time.Sleep(2 * time.Second)
	w.Says(0, "reload")
	w.Says(0, "reload")
	// What lies there since is read away.
	for b := make([]byte, 1000); ; {
		if err := manager.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := manager.Read(b); err != nil {
			break
		}
	}
	w.Says(0, "reload")
	hears("RELOADING=1")
	hears("READY=1")
	if err := w.Agent.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	hears("STOPPING=1")
}

// Every output says the same of a listener and its backends, and why.
func TestOneTruth(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "2001:db8::1")
	w.Serve("", "10.0.0.1:7000", "[2001:db8::1]:7000")
	// Of IPv4 nobody is left, of IPv6 somebody; one is full; one has its probe fail.
	w.RunAgent(`services:
- {name: half, listen: ['192.0.2.10:80', '[2001:db8:f::10]:80'], health: {interval: 200ms, timeout: 100ms},
   backends: ['10.0.0.2:7000', '[2001:db8::1]:7000']}
- {name: full, listen: ['192.0.2.11:80'], health: {probe: none}, breaker: {maxConnections: 1}, backends: ['10.0.0.1:7000']}
- {name: chain, listen: ['192.0.2.12:80'], health: {probe: none}, backends: ['192.0.2.11:80']}
`)
	holder := w.StartClient(w.Host, "watch", "1", "192.0.2.11:80")
	w.Prints(holder, "watching", 1)
	w.Eventually("the probe", func() error {
		if out, _ := w.RunCode("backend", "list", "--service", "half"); !strings.Contains(out, "connection refused") {
			return errors.New(out)
		}
		return nil
	})
	w.Says(0, "backend list --service half", "down", "its probe fails: connection refused after", "again in")
	w.Says(0, "backend list --service half -o wide", "tcp: failed in", "tcp: ok in")
	w.Says(0, "backend list --state full", "full", "it has 1 connection, as many as maxConnections allows")
	w.Says(0, "service list", "nothing: refused (1 backend: down)", "nothing: refused (1 backend: full)")
	w.Says(1, "explain 192.0.2.11:80", "is refused at once", "full")
	w.Says(0, "status", "2 listeners without a backend that takes connections: 192.0.2.11:80 (full), 192.0.2.10:80 (half)", "1 full", "1 down")
	w.Says(0, "service show half", "refused", "192.0.2.10:80: 1 backend: down")
	w.Says(1, "explain 192.0.2.12:80", "is itself a virtual address", "of the service full")
	if _, err := w.Inside("true"); err != nil {
		t.Fatal(err)
	}
	var status view.Status
	if err := json.Unmarshal([]byte(w.Says(0, "status -o json")), &status); err != nil || !status.Healthy || len(status.Refusing) != 2 || status.Backends["full"] != 1 {
		t.Errorf("%v: %+v", err, status)
	}
	var services []view.Service
	if err := json.Unmarshal([]byte(w.Says(0, "service list -o json")), &services); err != nil || len(services) != 3 {
		t.Fatalf("%v: %+v", err, services)
	}
	half := services[2]
	if half.Listeners[0].Verdict != view.Refused || half.Listeners[1].Verdict != view.Serving || half.Source != "file" {
		t.Errorf("listeners of half: %+v", half.Listeners)
	}
	var explained []struct{ Verdict, Service string }
	if err := json.Unmarshal([]byte(w.Says(1, "explain -o json 192.0.2.11:80")), &explained); err != nil || explained[0].Verdict != "refused" || explained[0].Service != "full" {
		t.Errorf("%v: %+v", err, explained)
	}
	// Both forms have the same keys.
	yaml := w.Says(0, "status -o yaml")
	for _, key := range []string{"healthy: true", "lateSeconds:", "problems: []", "inFlight: 1"} {
		if !strings.Contains(yaml, key) {
			t.Errorf("status -o yaml has no %q:\n%s", key, yaml)
		}
	}
	// A process in a namespace of its own has no way there.
	cmd := exec.Command("unshare", "--net", "sleep", "60")
	lonely, err := w.Start(cmd, lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	w.Eventually("a namespace of its own", func() error {
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", lonely.Process.Pid))
		host, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", holder.Process.Pid))
		if err == nil && err2 == nil && (theirs == own || theirs == host) {
			err = errors.New("not yet")
		}
		return errors.Join(err, err2)
	})
	holder.Kill()
	w.Eventually("room again", func() error {
		if out, code := w.RunCode("explain", "192.0.2.11:80"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
	w.Says(1, fmt.Sprintf("explain --pid %d 192.0.2.11:80", lonely.Process.Pid), "has no way to any backend", "network is unreachable")
}

// Files that are included are watched as the file itself; one that is not valid takes
// out only its own change.
func TestIncludedFiles(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	part := func(name string, last int) string {
		return fmt.Sprintf("services:\n- {name: %s, listen: ['192.0.2.%d:80'], health: {probe: none}, backends: ['10.0.0.1:7000']}\n", name, last)
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(w.Dir, "conf.d"), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteFile(filepath.Join("conf.d", name), text); err != nil {
			t.Fatal(err)
		}
	}
	names := func(want string) {
		t.Helper()
		w.Eventually("the services "+want, func() error {
			var have []string
			for _, s := range w.View().Services {
				for _, l := range s.Listeners { // it may be between two writes, and have none yet
					have = append(have, s.Name+"@"+l.String())
				}
			}
			if strings.Join(have, " ") != want {
				return fmt.Errorf("have %v", have)
			}
			return nil
		})
	}
	w.RunAgent("include: {files: [conf.d/*.yaml], onError: skip}\n")
	names("")
	write("a.yaml", part("a", 1))
	names("a@192.0.2.1:80")
	write("b.yaml", part("b", 2))
	names("a@192.0.2.1:80 b@192.0.2.2:80")
	write("a.yaml", "services: [\n")
	w.Eventually("the problem", func() error {
		if out, code := w.RunCode("status"); code != 1 || !strings.Contains(out, "a.yaml is not valid and not in force") {
			return errors.New(out)
		}
		return nil
	})
	// A new agent has a as it was, too.
	w.Agent.Kill()
	w.Agent = w.Launch()
	w.Eventually("the problem again", func() error {
		if out, code := w.RunCode("status"); code != 1 || !strings.Contains(out, "a.yaml is not valid and not in force") {
			return errors.New(out)
		}
		return nil
	})
	names("a@192.0.2.1:80 b@192.0.2.2:80")
	// The others go on changing, and a stays what it was.
	write("b.yaml", part("b", 3))
	names("a@192.0.2.1:80 b@192.0.2.3:80")
	write("a.yaml", part("a", 4))
	names("a@192.0.2.4:80 b@192.0.2.3:80")
	w.Says(0, "status")
	if err := os.Remove(filepath.Join(w.Dir, "conf.d/b.yaml")); err != nil {
		t.Fatal(err)
	}
	names("a@192.0.2.4:80")
	w.Says(0, "config show pentad.yaml --service a", "default", "a.yaml:2")

	// That many are of a broken file is no reason to hold the others back.
	var many strings.Builder
	many.WriteString("services:\n")
	for i := range 9 {
		fmt.Fprintf(&many, "- {name: m%d, listen: ['192.0.2.%d:80'], health: {probe: none}, backends: ['10.0.0.1:7000']}\n", i, 100+i)
	}
	write("m.yaml", many.String())
	count := func(n int) {
		t.Helper()
		w.Eventually(fmt.Sprint(n, " services"), func() error {
			if have := len(w.View().Services); have != n {
				return fmt.Errorf("%d", have)
			}
			return nil
		})
	}
	count(10)
	write("m.yaml", "services: [\n")
	write("b.yaml", part("b", 5))
	count(11)
	// What the file drains it does not drain for ever.
	write("m.yaml", "services: []\n")
	w.Says(1, "reload", "held back")
	w.Says(0, "reload --force")
	count(2)
	write("m.yaml", "services: [\n")
	w.Says(1, "reload", "m.yaml is not valid and not in force")
	write("m.yaml", "services: []\n")
	w.Says(0, "reload")
	admin := func(word string) string {
		return "services:\n- {name: b, listen: ['192.0.2.5:80'], health: {probe: none}, backends: [{address: '10.0.0.1:7000', admin: " + word + "}]}\n"
	}
	write("b.yaml", admin("drain"))
	w.AwaitStates("b", service.Drained)
	w.Says(0, "backend enable b 10.0.0.1:7000", "the file says admin: drain")
	w.Agent.Kill()
	w.Agent = w.Launch()
	w.Ready()
	w.AwaitStates("b", service.Drained)
	write("b.yaml", admin("up"))
	w.AwaitStates("b", service.Serving)
}

// An agent that starts with a broken file goes on with the one that was in force last: it
// probes, drains and answers, also when nothing is left in the kernel.
func TestBrokenAtStart(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	two := w.Serve("", "10.0.0.1:7000", "10.0.0.2:7000")
	const text = "services:\n- {name: web, listen: ['192.0.2.10:80'], health: {interval: 200ms, fall: 1, rise: 1}, backends: ['10.0.0.1:7000', '10.0.0.2:7000']}\n"
	w.RunAgent(text)
	w.AwaitStates("web", service.Serving, service.Serving)
	saved := filepath.Join(w.Dir, "run", "last-good.json")
	w.Eventually("the configuration is saved", func() error {
		_, err := os.Stat(saved)
		return err
	})
	for _, gone := range []bool{false, true} {
		w.Agent.Kill()
		if gone {
			if err := socket.Remove(w.Pins); err != nil {
				t.Fatal(err)
			}
		}
		w.Configure("services: [\n")
		w.Agent = w.Launch()
		w.Eventually("the problem", func() error {
			if out, code := w.RunCode("status"); code != 1 || !strings.Contains(out, "this is not YAML") || !strings.Contains(out, "2 backends") {
				return errors.New(out)
			}
			return nil
		})
		w.AwaitStates("web", service.Serving, service.Serving)
		w.Says(0, "backend drain web 10.0.0.1:7000", "drained")
		w.Says(0, "backend enable web 10.0.0.1:7000", "enabled")
	}
	two.Kill()
	w.AwaitStates("web", service.Down, service.Down)
	w.Configure(text)
	w.Eventually("all is well", func() error {
		if out, code := w.RunCode("status"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
}
