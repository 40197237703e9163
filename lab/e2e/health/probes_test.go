package health_test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/service"
)

func TestHealthAndGroups(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	one := w.Serve("one", "10.0.0.1:7000")
	two := w.Serve("two", "10.0.0.2:7000")
	three := w.Serve("three", "10.0.0.3:7000")
	w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80]
  health: {interval: 100ms, timeout: 50ms}
  backends:
  - 10.0.0.1:7000
  - 10.0.0.2:7000
  - {address: 10.0.0.3:7000, group: 1}`)
	expect := func(want ...string) {
		t.Helper()
		have := w.Answers("192.0.2.10:80", 60)
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
	w.AwaitStates("web", up, up, standby)
	expect("one", "two")
	one.Kill()
	w.AwaitStates("web", down, up, standby)
	expect("two")
	two.Kill()
	w.AwaitStates("web", down, down, up)
	expect("three")
	three.Kill()
	w.AwaitStates("web", down, down, down)
	expect("connection refused")
	if out := w.MustPentad("service", "list"); !strings.Contains(out, "nothing: refused") {
		t.Errorf("service list:\n%s", out)
	}
	w.Serve("three", "10.0.0.3:7000")
	w.AwaitStates("web", down, down, up)
	expect("three")
	w.Serve("one", "10.0.0.1:7000")
	w.AwaitStates("web", up, down, standby)
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
	if _, err := w.Start(exec.Command("nginx", "-c", conf, "-e", "stderr"), lab.Outside); err != nil {
		t.Fatal(err)
	}
	w.Listening("10.0.0.1:7000")
	text := "services:"
	for i, health := range []string{
		"path: /well", "path: /moved", "path: /moved, expect: '200'", "path: /ill", "path: /ill, expect: '200,500-599'",
		"path: /host", "path: /host, host: shop.example",
	} {
		text += fmt.Sprintf("\n- {name: s%d, listen: ['192.0.2.%d:80'], backends: ['10.0.0.1:7000'], health: {probe: http, interval: 100ms, timeout: 90ms, %s}}", i, 10+i, health)
	}
	w.RunAgent(text)
	for i, want := range []service.State{service.Serving, service.Serving, service.Down, service.Down, service.Serving, service.Down, service.Serving} {
		w.AwaitStates(fmt.Sprintf("s%d", i), want)
	}
}

// A probe goes to the backend that it names, also when that address is the VIP
// of another service, or becomes it, and the agent lies in the scope.
func TestProbeIsNotTranslated(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("two", "10.0.0.2:7000")
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
	w.Configure(outer)
	p, err := w.Start(exec.Command(e2e.Program(), w.Args("run", "-c", "pentad.yaml")...), lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	w.Agent = p
	w.Ready()
	// Nobody listens on 10.0.0.1:7000; once it is a VIP, a translated probe succeeds.
	w.AwaitStates("outer", service.Down)
	w.Configure(outer + inner)
	w.AwaitStates("inner", service.Serving)
	done := func() uint64 {
		var s struct {
			Agent struct{ Probes struct{ Done uint64 } }
		}
		if err := json.Unmarshal([]byte(w.MustPentad("status", "-o", "json")), &s); err != nil {
			t.Fatal(err)
		}
		return s.Agent.Probes.Done
	}
	before := done()
	w.Eventually("ten more probes are done", func() error {
		if n := done() - before; n < 10 {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	w.AwaitStates("outer", service.Down)
	if strings.Contains(w.Agent.Log.String(), `"backend is up" service=outer`) {
		t.Error("a probe of outer was translated")
	}
}
