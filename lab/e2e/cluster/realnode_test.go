package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/kube"
)

// real is a cluster of one node that is a real one: kubelet, containerd, scheduler
// and all controllers.
type real struct {
	*scene
	real   *kube.RealNode
	client *lab.Host
}

const imageWeb, imagePentad = "docker.io/lab/web:1", "ghcr.io/pentad/pentad:latest"

func newReal(t *testing.T) *real {
	t.Helper()
	lab.Need(t, "etcd", "containerd", "runc", "unshare")
	ctx := t.Context()
	web := static(t, "web", "github.com/pentad/pentad/lab/kube/web")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	site, err := lab.NewSite()
	check(err)
	w := &world{Site: site, pods: make(map[string]*place)}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	control, err := w.Host("10.0.0.1/24")
	check(err)
	w.cluster, err = kube.Start(ctx, binaries, control, "10.0.0.1")
	check(err)
	check(w.cluster.StartControllerManager())
	check(w.cluster.StartScheduler())
	check(w.cluster.Apply(ctx, base+"rbac.yaml", false))
	w.account, err = w.cluster.AccountKubeconfig(ctx, "kube-system", "pentad")
	check(err)
	h, err := w.Host(a4 + "/24")
	check(err)
	check(h.Forward())
	check(control.Route("10.244.1.0/24", a4))
	r := &real{}
	images := map[string]string{imageWeb: web, imagePentad: static(t, "pentad", "github.com/pentad/pentad/cmd/pentad")}
	r.real, err = w.cluster.StartNode("a", h, a4, "10.244.1.0/24", imageWeb, images)
	check(err)
	// The host goes first, and all that runs there with it.
	w.OnClose(r.real.Close)
	w.OnClose(h.Close)
	r.client, err = w.Host(outside4 + "/24")
	check(err)
	check(r.client.Route("10.96.0.0/16", a4))
	check(r.client.Route("198.51.100.0/24", a4))
	check(r.real.Ready(ctx, w.cluster))
	w.a = &node{place: &place{Host: h, name: "a"}, v4: netip.MustParseAddr(a4)}
	w.a.config, err = h.WriteFile("pentad.yaml", fmt.Sprintf(
		"source: {kubernetes: {kubeconfig: %s, node: a, untracked: [10.244.0.0/16]}}\nscope: {cgroup: %s}\n", w.account, h.Scope()))
	check(err)
	r.scene = newScene(t, w)
	t.Cleanup(func() {
		if t.Failed() {
			log := r.real.Log()
			t.Logf("node:\n%s", lab.Indent(log[max(0, len(log)-6000):]))
		}
	})
	return r
}

// static builds a program that needs nothing beside it.
func static(t *testing.T, name, pkg string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	build := exec.Command("go", "build", "-o", path, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// deployment of the server of the tests. A change of the generation is a rolling
// update.
func deployment(generation string, replicas int32) *appsv1.Deployment {
	labels := map[string]string{"app": "web"}
	none, all := intstr.FromInt32(0), intstr.FromInt32(1)
	port := intstr.FromInt32(8081)
	grace := int64(10)
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Strategy: appsv1.DeploymentStrategy{RollingUpdate: &appsv1.RollingUpdateDeployment{MaxUnavailable: &none, MaxSurge: &all}},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: map[string]string{"generation": generation}},
				Spec: corev1.PodSpec{TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{{
					Name: "web", Image: imageWeb, Args: []string{"serve"}, ImagePullPolicy: corev1.PullNever,
					ReadinessProbe: &corev1.Probe{
						ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: port}}, PeriodSeconds: 1, FailureThreshold: 1,
					},
				}}},
			},
		},
	}
}

// talk asks a server of the tests from the client outside.
func (r *real) talk(address, line string) (answer string, err error) {
	err = errors.Join(err, r.client.Do(func() error {
		c, err := net.DialTimeout("tcp", address, quickly)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(2 * quickly)); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(c, line); err != nil {
			return err
		}
		answer, err = bufio.NewReader(c).ReadString('\n')
		return err
	}))
	return strings.TrimSpace(answer), err
}

// answers waits until exactly as many pods answer.
func (r *real) answers(address string, pods int) map[string]bool {
	r.t.Helper()
	found := make(map[string]bool)
	if err := lab.Eventually(time.Minute, func() error {
		clear(found)
		for range 30 {
			answer, err := r.talk(address, "who")
			if err != nil {
				return err
			}
			name, client, _ := strings.Cut(answer, " ")
			if client != outside4 {
				return fmt.Errorf("the client is seen as %s", client)
			}
			found[name] = true
		}
		if len(found) != pods {
			return fmt.Errorf("%v answer", found)
		}
		return nil
	}); err != nil {
		r.t.Fatalf("%s, want %d pods: %v", address, pods, err)
	}
	return found
}

// Real pods behind every type of Service: they reach each other and themselves,
// readiness counts, and a rolling update loses nothing.
func TestRealNode(t *testing.T) {
	r := newReal(t)
	ctx := t.Context()
	if err := r.a.start(); err != nil {
		t.Fatal(err)
	}
	apps := r.cluster.Client.AppsV1().Deployments(r.namespace)
	if _, err := apps.Create(ctx, deployment("1", 3), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	svc, err := r.cluster.Client.CoreV1().Services(r.namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, Selector: map[string]string{"app": "web"}, ExternalIPs: []string{"198.51.100.8"},
			Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.ingress(svc, corev1.LoadBalancerIngress{IP: "198.51.100.7"})
	ip := hostPort(svc.Spec.ClusterIP, 80)
	first := r.answers(ip, 3)
	r.answers(hostPort(a4, svc.Spec.Ports[0].NodePort), 3)
	r.answers("198.51.100.7:80", 3)
	r.answers("198.51.100.8:80", 3)
	// A pod calls its own Service: all answer, itself too.
	heard := make(map[string]bool)
	for range 60 {
		answer, err := r.talk(ip, "ask "+ip)
		if err != nil || strings.HasPrefix(answer, "error") {
			t.Fatalf("a pod asks its own Service: %s %v", answer, err)
		}
		name, client, _ := strings.Cut(answer, " ")
		if heard[name] = true; !strings.HasPrefix(client, "10.244.1.") {
			t.Errorf("a pod is seen as %s", client)
		}
	}
	if len(heard) != 3 {
		t.Errorf("%v answered a pod, want all of %v", heard, first)
	}

	if _, err := r.talk(ip, "unready"); err != nil {
		t.Fatal(err)
	}
	r.answers(ip, 2)
	r.rolls(ip)
	r.empties()
}

// rolls updates all pods while clients connect.
func (r *real) rolls(ip string) {
	r.t.Helper()
	ctx, stop := context.WithCancel(r.t.Context())
	var clients sync.WaitGroup
	var mu sync.Mutex
	asked, failed := 0, []string(nil)
	for _, line := range []string{"who", "ask " + ip} {
		clients.Go(func() {
			for ctx.Err() == nil {
				answer, err := r.talk(ip, line)
				mu.Lock()
				if asked++; err != nil || strings.HasPrefix(answer, "error") {
					failed = append(failed, fmt.Sprintf("%s %q: %s %v", time.Now().Format("15:04:05.000"), line, answer, err))
				}
				mu.Unlock()
			}
		})
	}
	apps := r.cluster.Client.AppsV1().Deployments(r.namespace)
	if _, err := apps.Update(ctx, deployment("2", 3), metav1.UpdateOptions{}); err != nil {
		r.t.Fatal(err)
	}
	if err := lab.Eventually(2*time.Minute, func() error {
		d, err := apps.Get(ctx, "web", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s := d.Status; s.ObservedGeneration < d.Generation || s.UpdatedReplicas != 3 || s.AvailableReplicas != 3 || s.Replicas != 3 {
			return fmt.Errorf("%+v", s)
		}
		pods, err := r.cluster.Client.CoreV1().Pods(r.namespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) != 3 {
			err = fmt.Errorf("%d pods are left", len(pods.Items))
		}
		return err
	}); err != nil {
		r.t.Error(err)
	}
	stop()
	clients.Wait()
	if len(failed) > 0 || asked < 100 {
		r.t.Errorf("%d of %d failed during the update: %s", len(failed), asked, strings.Join(failed[:min(3, len(failed))], "; "))
	}
	r.t.Logf("%d connections during the update", asked)
}

// empties takes all pods away, so that nothing of them is left on the machine.
func (r *real) empties() {
	r.t.Helper()
	ctx := r.t.Context()
	if err := r.cluster.Client.AppsV1().Deployments(r.namespace).Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		r.t.Error(err)
	}
	if err := lab.Eventually(time.Minute, func() error {
		pods, err := r.cluster.Client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("%d pods are left", len(pods.Items))
		}
		return err
	}); err != nil {
		r.t.Error(err)
	}
}

// The manifests as a user applies them, but for where the API server is and for what
// keeps this machine's own control groups and pins out of it: the agent and the
// controllers run in pods, with the capabilities that they are given and no others.
func TestManifestsRun(t *testing.T) {
	r := newReal(t)
	ctx := t.Context()
	dir := t.TempDir()
	change := strings.NewReplacer(
		"https://kubernetes.example:6443", "https://10.0.0.1:6443",
		"        kubeconfig: /etc/pentad/kubeconfig\n", "        kubeconfig: /etc/pentad/kubeconfig\n    scope: {cgroup: "+r.a.Scope()+"}\n",
		"args: [run, ", "args: [--pins, "+r.a.Pins+", --run-dir, /run/pentad, run, ",
		"hostPath: {path: /var/lib/pentad,", "hostPath: {path: "+filepath.Join(r.a.Dir, "state")+",",
		"image: "+imagePentad, "image: "+imagePentad+"\n        imagePullPolicy: Never",
	)
	for _, file := range []string{"crd.yaml", "addressblocks.yaml", "agent.yaml", "controller.yaml"} {
		text, err := os.ReadFile(base + file)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, file)
		if err := os.WriteFile(path, []byte(change.Replace(string(text))), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := r.cluster.Apply(ctx, path, false); err != nil {
			t.Fatal(err)
		}
	}
	r.within(time.Minute, func() error {
		ds, err := r.cluster.Client.AppsV1().DaemonSets("kube-system").Get(ctx, "pentad", metav1.GetOptions{})
		if err == nil && ds.Status.NumberReady != 1 {
			err = fmt.Errorf("%+v", ds.Status)
		}
		return err
	})
	if _, err := r.cluster.Client.AppsV1().Deployments(r.namespace).Create(ctx, deployment("1", 2), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	svc, err := r.cluster.Client.CoreV1().Services(r.namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ip := hostPort(svc.Spec.ClusterIP, 80)
	r.answers(ip, 2)
	if answer, err := r.talk(ip, "ask "+ip); err != nil || strings.HasPrefix(answer, "error") {
		t.Errorf("a pod asks its own Service: %s %v", answer, err)
	}
	// The controllers reach the API server by its Service, which pentad serves.
	r.within(time.Minute, func() error {
		d, err := r.cluster.Client.AppsV1().Deployments("kube-system").Get(ctx, "pentad-controller", metav1.GetOptions{})
		if err == nil && d.Status.ReadyReplicas != 2 {
			err = fmt.Errorf("%+v", d.Status)
		}
		return err
	})
	r.within(time.Minute, func() error {
		_, err := r.cluster.Client.CoordinationV1().Leases("kube-system").Get(ctx, "pentad-controller", metav1.GetOptions{})
		return err
	})
	for _, name := range []string{"pentad-controller"} {
		if err := r.cluster.Client.AppsV1().Deployments("kube-system").Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	}
	if err := r.cluster.Client.AppsV1().DaemonSets("kube-system").Delete(ctx, "pentad", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	r.empties()
}
