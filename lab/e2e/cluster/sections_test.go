package cluster

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/pentad/pentad/lab"
)

// What is taken out of the file leaves the node, without `down` and without a new
// agent, and comes back with it. A source that has not spoken yet keeps what it has in
// the kernel, and nothing that another takes back.
func TestSectionsComeAndGo(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	s := newScene(t, w)
	svc := s.service("web", func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeNodePort })
	s.endpoints(svc, pods("a1", "b1")...)
	ip, port := hostPort(svc.Spec.ClusterIP, 80), hostPort(a4, svc.Spec.Ports[0].NodePort)
	serves := func() {
		t.Helper()
		s.expectBy("tcp", s.outside, port, seen{"a1 b1", ""})
		s.expect(s.pods["a2"], ip, seen{"a1 b1", ""})
		s.healthy(s.a, "/healthz", http.StatusOK)
	}
	serves()
	with, err := os.ReadFile(s.a.config)
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if _, err := s.a.WriteFile("pentad.yaml", text); err != nil {
			t.Fatal(err)
		}
	}
	own := "services:\n- {name: own, listen: ['192.0.2.7:80'], backends: ['10.244.1.2:8080'], health: {probe: none}}\n"
	table := func() string {
		out, _ := s.a.Run(t.Context(), lab.Outside, "nft", "list", "tables")
		return out
	}
	inKernel := func(what string, wanted ...string) {
		t.Helper()
		s.within(patience, func() error {
			out, err := s.a.pentad("service", "list")
			if err != nil {
				return err
			}
			if !strings.Contains(out, "FROM") {
				out = strings.ReplaceAll(out, "\n", " sockets\n") // without packets all are
			}
			for _, name := range []string{"own", "/web"} {
				isThere := func(line string) bool { return strings.Contains(line, name) && strings.Contains(line, "sockets") }
				if slices.ContainsFunc(strings.Split(out, "\n"), isThere) != slices.Contains(wanted, name) {
					return fmt.Errorf("%s: wanted %v of: %s", what, wanted, out)
				}
			}
			return nil
		})
	}
	mark := filepath.Join(s.a.Pins, "nat")
	for range 2 {
		write(own + "scope: {cgroup: " + s.a.Scope() + "}\n")
		inKernel("without a cluster", "own")
		s.within(patience, func() error {
			if _, err := os.Stat(mark); strings.Contains(table(), "pentad") || !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("the table is there: %s (%v)", table(), err)
			}
			if _, _, err := get(s.a, "/healthz", 10256); err == nil {
				return errors.New("load balancers are answered")
			}
			return nil
		})
		if out, err := s.a.pentad("status"); err != nil || strings.Contains(out, "API server") {
			t.Errorf("status: %v: %s", err, out)
		}
		// Another address for load balancers, too.
		write(own + strings.Replace(string(with), "kubernetes: {", "kubernetes: {health: '0.0.0.0:10999', ", 1))
		inKernel("with the cluster again", "own", "/web")
		s.within(patience, func() error {
			_, _, err := get(s.a, "/healthz", 10999)
			return err
		})
		write(own + string(with))
		serves()
	}

	// Nobody speaks for the cluster, and the file takes its service back. Sockets find it
	// no more; what packets find waits for all sources.
	w.cluster.KillAPIServer()
	s.a.agent.Kill()
	if err := s.a.start(); err != nil {
		t.Fatal(err)
	}
	inKernel("without the API server", "own", "/web")
	write(string(with))
	inKernel("without the service of the file", "/web")
	serves()
}
