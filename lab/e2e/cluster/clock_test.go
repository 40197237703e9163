package cluster

import (
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/pentad/pentad/lab"
)

// startAt starts the agent of a node with a clock that is off.
func (n *node) startAt(off time.Duration) (err error) {
	cmd := exec.Command(program, "--pins", n.Pins, "--run-dir", filepath.Join(n.Dir, "run"), "run", "-c", n.config)
	n.agent, err = n.StartWithClock(cmd, lab.Outside, off)
	return err
}

// An hour more or less on a node's clock changes nothing. With days certificates are
// not valid: what is served goes on, and the reason is said.
func TestClockOfNode(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	s := newScene(t, w)
	svc := s.service("web", func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeNodePort
		svc.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	})
	ip, port := hostPort(svc.Spec.ClusterIP, 80), hostPort(a4, svc.Spec.Ports[0].NodePort)
	s.endpoints(svc, pods("a1")...)
	s.expect(s.pods["a2"], ip, seen{"a1", ""})
	inside, outside := s.load(ip, s.pods["a2"]), s.load(port, s.outside)
	restart := func(off time.Duration) {
		t.Helper()
		s.a.agent.Kill()
		if err := s.a.startAt(off); err != nil {
			t.Fatal(err)
		}
		s.healthy(s.a, "/healthz", http.StatusOK)
	}
	for i, off := range []time.Duration{time.Hour, -time.Hour} {
		restart(off)
		_, body, err := get(s.a, "/healthz", 10256)
		if now := fmt.Sprintf("\"currentTime\": \"%s", time.Now().UTC().Add(off).Format("2006-01-02T15")); err != nil ||
			!strings.Contains(strings.ReplaceAll(string(body), "\":\"", "\": \""), now) {
			t.Errorf("the clock is not off by %s: %v: %s", off, err, body)
		}
		s.endpoints(svc, pods([]string{"b1", "a1"}[i])...)
		s.expect(s.pods["a2"], ip, seen{[]string{"b1", "a1"}[i], ""})
		s.expectBy("tcp", s.outside, port, seen{[]string{"b1", "a1"}[i], ""})
		if out, err := s.a.pentad("status"); err != nil {
			t.Errorf("status: %v\n%s", err, out)
		}
	}
	for off, says := range map[time.Duration]string{96 * time.Hour: "certificate has expired", -96 * time.Hour: "not yet valid"} {
		restart(off)
		s.within(patience, func() error {
			out, _ := s.a.pentad("status")
			if !strings.Contains(out, says) || !strings.Contains(out, "the clock of this host is wrong") {
				return fmt.Errorf("status does not say %q:\n%s", says, out)
			}
			return nil
		})
		s.expect(s.pods["a2"], ip, seen{"a1", ""})
	}
	restart(0)
	s.endpoints(svc, pods("b1")...)
	s.expect(s.pods["a2"], ip, seen{"b1", ""})
	inside.end(t)
	outside.end(t)
}

// Of two controllers with different clocks one works, and the other takes over.
func TestClocksOfControllers(t *testing.T) {
	t.Parallel()
	c := newControl(t)
	c.pool("public", map[string]any{"addresses": []any{"192.0.2.0/29"}})
	running := map[string]*lab.Process{}
	start := func(name string, off time.Duration) {
		t.Helper()
		cmd := exec.Command(program, "controller", "--kubeconfig", c.kubeconfig, "--lease", "2s")
		p, err := c.cluster.Host.StartWithClock(cmd, lab.Outside, off)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("controller %s:\n%s", name, lab.Indent(p.Log.String()))
			}
		})
		running[name] = p
	}
	want := 0
	allocates := func() {
		t.Helper()
		want++
		name := fmt.Sprintf("s%d", want)
		c.balancer(name, nil)
		c.has(name, fmt.Sprintf("192.0.2.%d", want-1), "Allocated")
	}
	start("ahead", time.Hour)
	allocates()
	start("behind", -time.Hour)
	allocates()
	running["ahead"].Kill()
	allocates()
	// Back, with a clock at which the lease has long been over.
	start("ahead", time.Hour)
	allocates()
	running["behind"].Kill()
	allocates()
}
