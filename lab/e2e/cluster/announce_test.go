package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/dynamic"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/pentad/pentad/lab"
)

// A Service of type LoadBalancer gets an address from the controller, its nodes announce
// it to a router, and it is reached from there: with no other software.
func TestLoadBalancer(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	lab.Need(t, "bird")
	c := newControlIn(t, w)
	c.start()
	conf, err := w.outside.WriteFile("bird.conf", `router id 10.0.0.100;
protocol device { scan time 2; }
protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; merge paths yes limit 16; }
protocol kernel { ipv6 { import none; export where source = RTS_BGP; }; merge paths yes limit 16; }
template bgp nodes { local 10.0.0.100 as 65000; passive; error wait time 1, 5; ipv4 { import all; export none; }; ipv6 { import all; export none; }; }
protocol bgp a from nodes { neighbor 10.0.0.11 as 65001; }
protocol bgp b from nodes { neighbor 10.0.0.12 as 65001; }
`)
	if err != nil {
		t.Fatal(err)
	}
	router, err := w.outside.Start(exec.Command("bird", "-f", "-c", conf, "-s", filepath.Join(w.outside.Dir, "bird.ctl"), "-P", filepath.Join(w.outside.Dir, "bird.pid")), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{w.a, w.b} {
		text, err := os.ReadFile(n.config)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.WriteFile("pentad.yaml", string(text)+"\nannounce: {bgp: {as: 65001, peers: [{address: 10.0.0.100, as: 65000}]}}\n"); err != nil {
			t.Fatal(err)
		}
	}
	c.pool("main", map[string]any{"addresses": []any{"192.0.2.0/30", "2001:db8:2::/126"}})
	svc := c.service("web", func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		dual := corev1.IPFamilyPolicyRequireDualStack
		svc.Spec.IPFamilyPolicy = &dual
	})
	const at4, at6 = "192.0.2.0", "2001:db8:2::"
	c.has("web", at4+" "+at6, "Allocated")
	// ways are the nodes by which the router sends packets to the addresses.
	ways := func(when, want string) {
		t.Helper()
		c.within(patience, func() error {
			for family, address := range map[string]string{"-4": at4, "-6": at6} {
				out, err := w.outside.Run(t.Context(), lab.Outside, "ip", family, "route", "show", address)
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				got := ""
				for name, via := range map[string]string{"a": "10.0.0.11 |2001:db8::11 ", "b": "10.0.0.12 |2001:db8::12 "} {
					v4, v6, _ := strings.Cut(via, "|")
					if strings.Contains(out, "via "+v4) || strings.Contains(out, "via "+v6) {
						got += name
					}
				}
				if got != want && got != reverse(want) {
					return fmt.Errorf("%s: %s goes by %q, not %q: %s", when, address, got, want, router.Log)
				}
			}
			return nil
		})
	}
	ways("nobody is ready", "")
	c.endpoints(svc, pods("a1", "b1")...)
	ways("both have pods", "ab")
	c.expect(w.outside, hostPort(at4, 80), seen{"a1 b1", ""})
	c.expect(w.outside, hostPort(at6, 80), seen{"a1 b1", ""})
	if out, err := w.a.pentad("announcement", "list"); err != nil || !strings.Contains(out, at4) || strings.Contains(out, svc.Spec.ClusterIP) {
		t.Errorf("announcement list says %s, %v", out, err)
	}

	// With the policy Local only nodes with pods announce, and pods see the client.
	svc = c.update(svc, func(svc *corev1.Service) { svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal })
	c.endpoints(svc, pods("b1")...)
	ways("the policy is Local", "b")
	c.expect(w.outside, hostPort(at4, 80), seen{"b1", outside4})
	c.expect(w.outside, hostPort(at6, 80), seen{"b1", outside6})
	c.endpoints(svc)
	ways("there are no pods", "")
	if out, _ := w.b.pentad("explain", "--from", outside4, hostPort(at4, 80)); !strings.Contains(strings.Join(strings.Fields(out), " "), "Nobody is told that 192.0.2.0 is here") {
		t.Errorf("explain says: %s", out)
	}
	c.endpoints(svc, pods("a1")...)
	ways("a pod is at the other node", "a")
	if err := c.cluster.Client.CoreV1().Services(c.namespace).Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	ways("the Service is gone", "")
}

func reverse(s string) string {
	b := []byte(s)
	for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
		b[i], b[j] = b[j], b[i]
	}
	return string(b)
}

// newControlIn prepares the cluster of a world for controllers.
func newControlIn(t *testing.T, w *world) *control {
	t.Helper()
	// Resources of a definition are there a moment after it.
	for _, file := range []string{"crd.yaml", "controller.yaml"} {
		if err := w.cluster.Apply(t.Context(), base+file, false); err != nil {
			t.Fatal(err)
		}
	}
	client, err := dynamic.NewForConfig(w.cluster.Config)
	if err != nil {
		t.Fatal(err)
	}
	c := &control{pools: client.Resource(schema.GroupVersionResource{Group: "pentad.io", Version: "v1alpha1", Resource: "addresspools"})}
	if err := lab.Eventually(patience, func() error {
		_, err := c.pools.List(t.Context(), metav1.ListOptions{})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if c.kubeconfig, err = w.cluster.AccountKubeconfig(t.Context(), "kube-system", "pentad-controller"); err != nil {
		t.Fatal(err)
	}
	c.scene = newScene(t, w)
	return c
}
