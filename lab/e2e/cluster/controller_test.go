package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/kube"
)

const base = "../../../deploy/kubernetes/base/"

// control is a control plane without nodes, for a test of the controller.
type control struct {
	*scene
	pools      dynamic.ResourceInterface
	kubeconfig string
}

func newControl(t *testing.T) *control {
	t.Helper()
	lab.Need(t, "etcd")
	site, err := lab.NewSite()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Site: site}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	h, err := w.Host()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.AddAddress("10.0.0.1/32"); err != nil {
		t.Fatal(err)
	}
	if w.cluster, err = kube.Start(t.Context(), binaries, h, "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	return newControlIn(t, w)
}

// start starts a controller. A short lease lets tests see one take over.
func (c *control) start() *lab.Process {
	c.t.Helper()
	p, err := c.cluster.Host.Start(exec.Command(program, "controller", "--kubeconfig", c.kubeconfig, "--lease", "2s"), lab.Outside)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if c.t.Failed() {
			c.t.Logf("controller:\n%s", lab.Indent(p.Log.String()))
		}
	})
	return p
}

func (c *control) pool(name string, spec map[string]any) {
	c.t.Helper()
	o := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "pentad.io/v1alpha1", "kind": "AddressPool", "metadata": map[string]any{"name": name}, "spec": spec,
	}}
	if _, err := c.pools.Apply(c.t.Context(), name, o, metav1.ApplyOptions{FieldManager: "test", Force: true}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *control) balancer(name string, change func(*corev1.Service)) *corev1.Service {
	c.t.Helper()
	return c.service(name, func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		single := corev1.IPFamilyPolicySingleStack
		svc.Spec.IPFamilyPolicy = &single
		if change != nil {
			change(svc)
		}
	})
}

// addresses returns what a Service has and what its condition says.
func (c *control) addresses(name string) (have, reason string, err error) {
	svc, err := c.cluster.Client.CoreV1().Services(c.namespace).Get(c.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		return "", "", err
	}
	var all []string
	for _, in := range svc.Status.LoadBalancer.Ingress {
		all = append(all, in.IP)
	}
	if cond := meta.FindStatusCondition(svc.Status.Conditions, "pentad.io/AddressAllocated"); cond != nil {
		reason = cond.Reason
	}
	return strings.Join(all, " "), reason, nil
}

func (c *control) has(name, addresses, reason string) {
	c.t.Helper()
	if err := lab.Eventually(patience, func() error {
		have, why, err := c.addresses(name)
		if err == nil && (have != addresses || why != reason) {
			err = fmt.Errorf("it has %q, %s", have, why)
		}
		return err
	}); err != nil {
		c.t.Errorf("%s, want %q, %s: %v", name, addresses, reason, err)
	}
}

// The life of Services of type LoadBalancer, with a controller that has the rights
// of its manifest and no others.
func TestController(t *testing.T) {
	t.Parallel()
	c := newControl(t)
	c.start()
	c.balancer("early", nil)
	c.has("early", "", "NoPool")
	c.pool("main", map[string]any{"addresses": []any{"192.0.2.0/30", "2001:db8::/126"}, "avoidBuggyIPs": true})
	c.has("early", "192.0.2.1", "Allocated")

	c.balancer("dual", func(svc *corev1.Service) {
		dual := corev1.IPFamilyPolicyRequireDualStack
		svc.Spec.IPFamilyPolicy = &dual
	})
	c.has("dual", "192.0.2.2 2001:db8::", "Allocated")
	c.balancer("asks", func(svc *corev1.Service) {
		svc.Annotations = map[string]string{"pentad.io/addresses": "192.0.2.2"}
	})
	c.has("asks", "", "InUse")
	c.balancer("legacy", func(svc *corev1.Service) { svc.Spec.LoadBalancerIP = "192.0.2.3" })
	c.has("legacy", "192.0.2.3", "Allocated")
	c.balancer("none", nil)
	c.has("none", "", "Exhausted")
	c.balancer("wrong", func(svc *corev1.Service) { svc.Annotations = map[string]string{"pentad.io/addresses": "web"} })
	c.has("wrong", "", "Invalid")
	other := "example.com/other"
	c.balancer("others", func(svc *corev1.Service) { svc.Spec.LoadBalancerClass = &other })
	ours := "pentad.io/load-balancer"

	// What goes is there for others at once; what asks for another gets it.
	if err := c.cluster.Client.CoreV1().Services(c.namespace).Delete(t.Context(), "dual", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.has("asks", "192.0.2.2", "Allocated")
	c.pool("extra", map[string]any{"addresses": []any{"198.51.100.1-198.51.100.9"}, "autoAssign": false})
	c.balancer("by-name", func(svc *corev1.Service) {
		svc.Annotations = map[string]string{"pentad.io/pool": "extra", "pentad.io/share": "k"}
		svc.Spec.LoadBalancerClass = &ours
	})
	c.has("by-name", "198.51.100.1", "Allocated")
	c.balancer("shares", func(svc *corev1.Service) {
		svc.Annotations = map[string]string{"pentad.io/pool": "extra", "pentad.io/share": "k"}
		svc.Spec.Ports = svc.Spec.Ports[:1]
		svc.Spec.Ports[0].Port = 443
	})
	c.has("shares", "198.51.100.1", "Allocated")
	c.pool("main", map[string]any{"addresses": []any{"192.0.2.3/32", "203.0.113.0/30"}, "priority": 1})
	// Connections go to it: it stays, and says what to do.
	c.has("early", "192.0.2.1", "NotInPool")
	c.has("legacy", "192.0.2.3", "Allocated")
	c.has("none", "203.0.113.0", "Allocated")

	c.pool("over", map[string]any{"addresses": []any{"198.51.100.5/32"}, "serviceSelector": map[string]any{"matchLabels": map[string]any{"tier": "web"}}})
	c.poolIs("over", "Overlapping")
	c.poolIs("extra", "Overlapping")
	c.poolIs("main", "Valid")
	c.balancer("labelled", func(svc *corev1.Service) { svc.Labels = map[string]string{"tier": "web"} })
	c.has("labelled", "198.51.100.5", "Allocated")
	c.has("others", "", "")
	c.event("none", "Exhausted")
	c.event("early", "NotInPool")
}

func (c *control) poolIs(name, reason string) {
	c.t.Helper()
	if err := lab.Eventually(patience, func() error {
		o, err := c.pools.Get(c.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		conditions, _, err := unstructured.NestedSlice(o.Object, "status", "conditions")
		if err != nil || len(conditions) != 1 || conditions[0].(map[string]any)["reason"] != reason {
			return fmt.Errorf("its conditions are %v, %w", conditions, err)
		}
		return nil
	}); err != nil {
		c.t.Errorf("pool %s, want %s: %v", name, reason, err)
	}
}

func (c *control) event(service, reason string) {
	c.t.Helper()
	if err := lab.Eventually(patience, func() error {
		list, err := c.cluster.Client.CoreV1().Events(c.namespace).List(c.t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(list.Items, func(e corev1.Event) bool {
			return e.InvolvedObject.Name == service && e.Reason == reason && e.Type == corev1.EventTypeWarning
		}) {
			return fmt.Errorf("none of %d events", len(list.Items))
		}
		return nil
	}); err != nil {
		c.t.Errorf("event %s of %s: %v", reason, service, err)
	}
}

// Two controllers start together, and whichever is active is killed again and
// again while Services come: each gets one address, nobody gets two, none is lost.
func TestControllersDie(t *testing.T) {
	t.Parallel()
	c := newControl(t)
	c.pool("main", map[string]any{"addresses": []any{"10.8.0.0/24"}})
	running := []*lab.Process{c.start(), c.start()}
	const services = 60
	created := make(chan error, 1)
	go func() {
		for i := range services {
			svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("s%d", i)}, Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeLoadBalancer, Ports: []corev1.ServicePort{{Port: 80}},
			}}
			if _, err := c.cluster.Client.CoreV1().Services(c.namespace).Create(context.Background(), svc, metav1.CreateOptions{}); err != nil {
				created <- err
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		created <- nil
	}()
	seen := make(map[string]string)
	for range 3 {
		time.Sleep(1500 * time.Millisecond)
		c.stable(seen)
		for i, p := range running {
			if strings.Contains(p.Log.String(), "this controller is the active one") {
				p.Kill()
				running[i] = c.start()
			}
		}
	}
	if err := <-created; err != nil {
		t.Fatal(err)
	}
	if err := lab.Eventually(time.Minute, func() error {
		if n := c.stable(seen); n < services {
			return fmt.Errorf("%d of %d Services have an address", n, services)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	owners := make(map[string]string)
	for name, a := range seen {
		if o := owners[a]; o != "" {
			t.Errorf("%s and %s both have %s", o, name, a)
		}
		owners[a] = name
	}
}

// stable counts the Services that have an address, and compares them with what was
// seen before.
func (c *control) stable(seen map[string]string) int {
	c.t.Helper()
	list, err := c.cluster.Client.CoreV1().Services(c.namespace).List(c.t.Context(), metav1.ListOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	n := 0
	for _, s := range list.Items {
		var all []string
		for _, in := range s.Status.LoadBalancer.Ingress {
			all = append(all, in.IP)
		}
		have := strings.Join(all, " ")
		if before := seen[s.Name]; before != "" && before != have {
			c.t.Errorf("%s had %s and has %s", s.Name, before, have)
		}
		if have != "" {
			seen[s.Name] = have
			n++
		}
	}
	return n
}

// The API server takes every manifest as it is.
func TestManifests(t *testing.T) {
	t.Parallel()
	c := newControl(t)
	for _, file := range []string{"crd.yaml", "addressblocks.yaml", "rbac.yaml", "agent.yaml", "controller.yaml"} {
		if err := c.cluster.Apply(t.Context(), base+file, true); err != nil {
			t.Error(err)
		}
	}
}

// The chart says the same as the manifests: what it renders is taken by the API
// server, and gives the same rights.
func TestChart(t *testing.T) {
	t.Parallel()
	c := newControl(t)
	render := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), helm, append([]string{"template", "pentad", "../../../deploy/helm/pentad", "-n", "kube-system", "--kube-version", kube.Version}, args...)...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("helm %v: %v", args, err)
		}
		path := filepath.Join(t.TempDir(), "rendered.yaml")
		if err := os.WriteFile(path, out, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := c.cluster.Apply(t.Context(), path, true); err != nil {
			t.Error(err)
		}
		return path
	}
	path := render("--set", "apiServer=https://192.0.2.1:6443")
	render("--set", "apiServer=https://192.0.2.1:6443,controller.requireClass=true,kubernetes.node=n1,addressPools.public.addresses={203.0.113.0/28}",
		"--set-json", `config={"services":[{"name":"own","listen":["192.0.2.9:80"],"backends":[]}]}`)
	if err := exec.Command(helm, "template", "pentad", "../../../deploy/helm/pentad", "--kube-version", kube.Version).Run(); err == nil {
		t.Error("it renders without the address of the API server")
	}
	wanted := rules(t, base+"rbac.yaml", base+"controller.yaml")
	have := rules(t, path)
	if len(wanted) != 3 || fmt.Sprint(have) != fmt.Sprint(wanted) {
		t.Errorf("rights of the chart:\n%v\nof the manifests:\n%v", have, wanted)
	}
	for inChart, inBase := range map[string]string{"addresspools.yaml": "crd.yaml", "addressblocks.yaml": "addressblocks.yaml"} {
		chart, err1 := os.ReadFile("../../../deploy/helm/pentad/crds/" + inChart)
		manifest, err2 := os.ReadFile(base + inBase)
		if err1 != nil || err2 != nil || string(chart) != string(manifest) {
			t.Errorf("the definition in the chart's %s is another one: %v %v", inChart, err1, err2)
		}
	}
}

// rules returns the rules of all roles in files, by kind and name.
func rules(t *testing.T, paths ...string) map[string]any {
	t.Helper()
	found := make(map[string]any)
	for _, path := range paths {
		if err := kube.Objects(path, func(o *unstructured.Unstructured) error {
			if r, ok := o.Object["rules"]; ok {
				found[o.GetKind()+" "+o.GetName()] = r
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return found
}
