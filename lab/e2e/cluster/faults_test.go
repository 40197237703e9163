package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/nat"
)

// load asks without a pause and counts what fails.
type load struct {
	stop func()
	done sync.WaitGroup

	mu     sync.Mutex
	asked  int
	failed []string
}

func (s *scene) load(address string, from ...*place) *load {
	ctx, stop := context.WithCancel(s.t.Context())
	l := &load{stop: stop}
	for _, p := range from {
		l.done.Go(func() {
			for ctx.Err() == nil {
				_, _, err := p.ask("tcp", address)
				l.mu.Lock()
				l.asked++
				if err != nil {
					l.failed = append(l.failed, fmt.Sprintf("%s %s: %v", time.Now().Format("15:04:05.000"), p.name, err))
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

// end stops the load; none may have failed.
func (l *load) end(t *testing.T) {
	t.Helper()
	l.stop()
	l.done.Wait()
	if len(l.failed) > 0 || l.asked < 10 {
		t.Errorf("%d of %d connections failed: %s", len(l.failed), l.asked, strings.Join(l.failed[:min(5, len(l.failed))], "; "))
	}
	t.Logf("%d connections, none failed", l.asked)
}

// What the cluster and the node suffer while clients connect without a pause, and
// nobody notices: no agent, no API server, no etcd, a firewall that is reloaded.
func TestFaults(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	s := newScene(t, w)
	svc := s.service("web", func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeNodePort })
	s.endpoints(svc, pods("a1", "b1")...)
	ip := hostPort(svc.Spec.ClusterIP, 80)
	port := svc.Spec.Ports[0].NodePort
	s.expectBy("tcp", s.outside, hostPort(a4, port), seen{"a1 b1", ""})
	s.expect(s.pods["a2"], ip, seen{"a1 b1", ""})

	inside := s.load(ip, s.pods["a2"], s.a.place)
	outside := s.load(hostPort(a4, port), s.outside)
	// The agent is killed again and again, and once more while nobody else
	// could tell it anything.
	for range 3 {
		s.a.agent.Kill()
		if err := s.a.start(); err != nil {
			t.Fatal(err)
		}
		s.healthy(s.a, "/healthz", http.StatusOK)
	}
	w.cluster.KillAPIServer()
	s.healthy(s.a, "/healthz", http.StatusOK)
	s.a.agent.Kill()
	if err := s.a.start(); err != nil {
		t.Fatal(err)
	}
	if err := lab.Eventually(patience, func() error {
		out, _ := s.a.pentad("status")
		if !strings.Contains(out, "the API server has not answered yet") {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	s.within(patience, func() error {
		if out, _ := s.b.pentad("status"); !strings.Contains(out, "the API server has not answered for") {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	})
	// The node serves what the agent before left, and says so.
	s.healthy(s.a, "/healthz", http.StatusOK)
	if err := w.cluster.StartAPIServer(); err != nil {
		t.Fatal(err)
	}
	if err := w.cluster.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The agent of node b, which has watched all the time, hears that it is back
	// though nothing has changed.
	s.within(time.Minute, func() error {
		out, err := s.b.pentad("status")
		if err != nil || strings.Contains(out, "has not answered") {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
	// A change arrives after all that.
	s.endpoints(svc, pods("a1", "b2")...)
	s.within(time.Minute, func() error { return s.looksLike("tcp", s.pods["a2"], ip, seen{"a1 b2", ""}) })
	s.within(time.Minute, func() error { return s.looksLike("tcp", s.pods["b2"], ip, seen{"a1 b2", ""}) })

	if err := w.cluster.Etcd().Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	s.healthy(s.a, "/livez", http.StatusOK)
	if err := w.cluster.Etcd().Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	inside.end(t)
	outside.end(t)
	s.flushed(hostPort(a4, port))
	s.leaves()
}

func (s *scene) within(d time.Duration, condition func() error) {
	s.t.Helper()
	if err := lab.Eventually(d, condition); err != nil {
		s.t.Error(err)
	}
}

// flushed has a firewall take all tables away.
func (s *scene) flushed(address string) {
	s.t.Helper()
	for range 3 {
		if out, err := s.a.Run(s.t.Context(), lab.Outside, "nft", "flush", "ruleset"); err != nil {
			s.t.Fatalf("%v: %s", err, out)
		}
		began := time.Now()
		s.within(patience, func() error {
			if out, err := s.a.Run(s.t.Context(), lab.Outside, "nft", "list", "table", "inet", nat.TableName); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		// Polled every 2 ms by a program of its own: what counts is a second.
		if took := time.Since(began); took > time.Second {
			s.t.Errorf("the table was back after %s, want within a second", took)
		}
		s.expectBy("tcp", s.outside, address, seen{"a1 b2", ""})
	}
}

// leaves has the Node go, and asks as a load balancer does; then pentad goes.
func (s *scene) leaves() {
	s.t.Helper()
	n, err := s.cluster.Client.CoreV1().Nodes().Get(s.t.Context(), "a", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: "ToBeDeletedByClusterAutoscaler", Effect: corev1.TaintEffectNoSchedule})
	if _, err := s.cluster.Client.CoreV1().Nodes().Update(s.t.Context(), n, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.healthy(s.a, "/healthz", http.StatusServiceUnavailable)
	s.healthy(s.a, "/livez", http.StatusOK)
	if out, err := s.a.pentad("down"); err != nil {
		s.t.Errorf("down: %v: %s", err, out)
	}
	out, err := s.a.Run(s.t.Context(), lab.Outside, "nft", "list", "ruleset")
	if err != nil || strings.TrimSpace(out) != "" {
		s.t.Errorf("down left behind: %v: %s", err, out)
	}
}

// healthy waits until a node answers a load balancer with a code.
func (s *scene) healthy(n *node, path string, code int) {
	s.t.Helper()
	s.within(patience, func() error {
		have, body, err := get(n, path, 10256)
		if err != nil {
			return err
		}
		var fields struct {
			LastUpdated, CurrentTime time.Time
			NodeEligible             *bool
		}
		if err := json.Unmarshal(body, &fields); err != nil || fields.NodeEligible == nil || fields.CurrentTime.IsZero() {
			return fmt.Errorf("%s: %s: %v", path, body, err)
		}
		if have != code {
			return fmt.Errorf("%s: %d, want %d: %s", path, have, code, body)
		}
		return nil
	})
}

// get asks a node over HTTP, from the node.
func get(n *node, path string, port int) (code int, body []byte, err error) {
	doErr := n.Do(func() error {
		// The default transport dials in another goroutine, which is in
		// another namespace.
		c, err := net.DialTimeout("tcp", hostPort(n.v4.String(), int32(port)), quickly)
		if err != nil {
			return err
		}
		defer c.Close()
		req, err := http.NewRequest(http.MethodGet, "http://node"+path, nil)
		if err != nil {
			return err
		}
		if err := req.Write(c); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		code = resp.StatusCode
		body, err = io.ReadAll(resp.Body)
		return err
	})
	return code, body, doErr
}
