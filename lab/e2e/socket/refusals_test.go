package socket_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/pentad/pentad/lab"
)

// Every service counts what it has refused: across agents, and by itself.
func TestRefusalsAreCounted(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	const one = "services:\n- {name: one, listen: ['192.0.2.10:80'], backends: []}\n"
	w.RunAgent(one + "- {name: two, listen: ['192.0.2.11:80', '192.0.2.11:53/udp'], backends: []}\n")
	w.Client("ask", "192.0.2.10:80", "3")
	w.Client("ask", "192.0.2.11:80", "2")
	counted := func(name string, n int) {
		t.Helper()
		var s struct{ Refused int }
		if err := json.Unmarshal([]byte(w.MustPentad("service", "show", name, "-o", "json")), &s); err != nil || s.Refused != n {
			t.Errorf("service show says that %s has refused %d, want %d (%v)", name, s.Refused, n, err)
		}
		if line := fmt.Sprintf("pentad_service_refused_total{service=%q} %d\n", name, n); !strings.Contains(w.Get("/metrics"), line) {
			t.Errorf("the metrics have no %q", line)
		}
	}
	counted("one", 3)
	counted("two", 2)
	w.Agent.Kill()
	w.Agent = w.Launch()
	w.Ready()
	counted("two", 2)
	w.Configure(one)
	w.MustPentad("reload")
	w.Configure(one + "- {name: three, listen: ['192.0.2.12:80'], backends: []}\n")
	w.MustPentad("reload")
	counted("one", 3)
	counted("three", 0)
	w.Client("ask", "192.0.2.12:80", "1")
	counted("three", 1)
}
