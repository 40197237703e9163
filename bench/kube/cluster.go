package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/kube"
)

// cluster is what is measured:
//
//	control plane 10.0.0.1
//	node ours 10.0.0.11 (pentad) and its pod 10.245.1.2
//	node theirs 10.0.0.12 (kube-proxy) and its pod 10.245.2.2
//	far 10.0.0.50, at which all of 10.244.0.0/16 is: every endpoint
//	client 10.0.0.100, which reaches nodes and ClusterIPs
type cluster struct {
	*kube.Cluster
	*lab.Site
	bin          string
	ours, theirs *node
	far, client  *lab.Host
	servers      *talk
	filled       bool
	kept         []*talk // servers end when nobody can talk to them
}

// node is a node with one pod.
type node struct {
	*lab.Host
	name  string
	v4    string
	pod   *lab.Host
	near  *lab.Host // a pod that has all endpoints, for when they shall be on the node
	proxy *lab.Process
}

const namespace = "default"

func newBench(ctx context.Context, program string, services int) (*bench, error) {
	site, err := lab.NewSite()
	if err != nil {
		return nil, err
	}
	b := &bench{cluster: &cluster{Site: site}, program: program, services: services}
	if err := b.build(ctx); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func (c *cluster) build(ctx context.Context) error {
	var err error
	if c.bin, err = kube.Build(ctx, kube.APIServer, kube.ControllerManager, kube.Proxy); err != nil {
		return err
	}
	control, err := c.Site.Host("10.0.0.1/24")
	if err != nil {
		return err
	}
	if c.Cluster, err = kube.Start(ctx, c.bin, control, "10.0.0.1"); err != nil {
		return err
	}
	if c.far, err = c.Site.Host("10.0.0.50/24"); err != nil {
		return err
	}
	// Every address of the range is one of this host.
	if err := c.far.RouteLocal("10.244.0.0/16"); err != nil {
		return err
	}
	if c.servers, err = startTalk(c.far, c.far, lab.Outside, "serve"); err != nil {
		return err
	}
	if _, err := c.servers.read(); err != nil {
		return err
	}
	if c.client, err = c.Site.Host("10.0.0.100/24"); err != nil {
		return err
	}
	if c.ours, err = c.node(ctx, "ours", 1); err != nil {
		return err
	}
	c.theirs, err = c.node(ctx, "theirs", 2)
	return err
}

func (c *cluster) node(ctx context.Context, name string, index int) (*node, error) {
	n := &node{name: name, v4: fmt.Sprintf("10.0.0.%d", 10+index)}
	var err error
	if n.Host, err = c.Site.Host(n.v4 + "/24"); err != nil {
		return nil, err
	}
	pod := fmt.Sprintf("10.245.%d.2", index)
	if n.pod, err = c.Pod(n.Host, pod, ""); err != nil {
		return nil, err
	}
	err = errors.Join(n.Forward(), n.Route("10.244.0.0/16", "10.0.0.50"), c.far.Route(pod+"/32", n.v4))
	if err != nil {
		return nil, err
	}
	if n.near, err = c.nearPod(n); err != nil {
		return nil, err
	}
	return n, c.AddNode(ctx, name, name, []string{n.v4}, []string{fmt.Sprintf("10.245.%d.0/24", index)})
}

// nearPod makes a pod of a node that answers at every endpoint's address.
func (c *cluster) nearPod(n *node) (*lab.Host, error) {
	h, err := c.Pod(n.Host, "10.245.0.9", "")
	if err != nil {
		return nil, err
	}
	if err := h.RouteLocal("10.244.0.0/16"); err != nil {
		return nil, err
	}
	t, err := startTalk(h, n.Host, lab.Outside, "serve")
	if err != nil {
		return nil, err
	}
	c.kept = append(c.kept, t)
	_, err = t.read()
	return h, err
}

// podRanges are the addresses of all pods.
const podRanges = "10.244.0.0/15"

// startOurs starts pentad on its node.
func (b *bench) startOurs() error {
	kubeconfig, err := b.Kubeconfig("pentad", "pentad", "system:masters")
	if err != nil {
		return err
	}
	path, err := b.ours.WriteFile("pentad.yaml", fmt.Sprintf(
		"source: {kubernetes: {kubeconfig: %s, node: ours, untracked: [%s]}}\nscope: {cgroup: %s}\n", kubeconfig, podRanges, b.ours.Scope()))
	if err != nil {
		return err
	}
	cmd := exec.Command(b.program, "--pins", b.ours.Pins, "--run-dir", filepath.Join(b.ours.Dir, "run"), "run", "-c", path)
	b.ours.proxy, err = b.ours.Start(cmd, lab.Outside)
	return err
}

// healthy waits until pentad says that all is well.
func (b *bench) healthy(ctx context.Context) error {
	return lab.Eventually(time.Minute, func() error {
		out, err := b.ours.Run(ctx, lab.Outside, b.program, "--pins", b.ours.Pins, "--run-dir", filepath.Join(b.ours.Dir, "run"), "status")
		if err != nil {
			return fmt.Errorf("status: %w: %s\n%s", err, out, b.ours.proxy.Log)
		}
		return nil
	})
}

// startTheirs starts kube-proxy on its node.
func (b *bench) startTheirs() error {
	kubeconfig, err := b.Kubeconfig("kube-proxy", "system:kube-proxy", "system:masters")
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(b.bin, string(kube.Proxy)), "--proxy-mode=nftables", "--kubeconfig="+kubeconfig,
		"--hostname-override=theirs", "--cluster-cidr="+podRanges, "--conntrack-max-per-core=0",
		"--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
	b.theirs.proxy, err = b.theirs.Start(cmd, lab.Outside)
	return err
}

// stop ends a proxy, if it runs, and takes what it made out of the kernel.
func (b *bench) stop(n *node) error {
	if n.proxy == nil {
		return nil
	}
	n.proxy.Kill()
	n.proxy = nil
	ctx, done := context.WithTimeout(context.Background(), time.Minute)
	defer done()
	if n == b.ours {
		if out, err := n.Run(ctx, lab.Outside, b.program, "--pins", n.Pins, "--run-dir", filepath.Join(n.Dir, "run"), "down"); err != nil {
			return fmt.Errorf("down: %w: %s", err, out)
		}
		return nil
	}
	out, err := n.Run(ctx, lab.Outside, "nft", "flush", "ruleset")
	if err != nil {
		return fmt.Errorf("nft: %w: %s", err, out)
	}
	return nil
}

// via makes a node the one by which the client reaches ClusterIPs.
func (b *bench) via(n *node) error { return b.client.RouteReplace(kube.ServiceRange4, n.v4) }

// talk is a helper to which lines are written and which answers with lines.
type talk struct {
	in  io.WriteCloser
	out *bufio.Reader
	p   *lab.Process
}

func startTalk(h, node *lab.Host, cgroup, role string, args ...string) (*talk, error) {
	cmd := actor.Command(role, args...)
	in, inside, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	outside, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdin, cmd.Stdout = in, out
	p, err := h.StartPod(cmd, node, cgroup)
	in.Close()
	out.Close()
	return &talk{inside, bufio.NewReader(outside), p}, err
}

func (t *talk) read() (string, error) {
	line, err := t.out.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("helper: %w: %s", err, t.p.Log)
	}
	return strings.TrimSpace(line), nil
}

func (t *talk) say(line string) (string, error) {
	if _, err := fmt.Fprintln(t.in, line); err != nil {
		return "", err
	}
	return t.read()
}

// end closes what the helper reads and returns its last line.
func (t *talk) end() (string, error) {
	t.in.Close()
	return t.read()
}

// number says a line to a helper and reads its number.
func (t *talk) number(line string) (float64, error) {
	answer, err := t.say(line)
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(answer, 64)
}

// addressOf is the n-th endpoint of the i-th Service.
func addressOf(i, n int) string {
	k := i*manyEndpoints + n
	return netip.AddrFrom4([4]byte{10, 244, byte(k >> 8), byte(k)}).String()
}

// makers is how many Services are made at the same time.
const makers = 8

// fill makes the Services of the large cluster.
func (b *bench) fill(ctx context.Context) error {
	if b.filled {
		return nil
	}
	b.filled = true
	fmt.Fprintf(os.Stderr, "making %d Services with %d endpoints each\n", b.services, manyEndpoints)
	work := make(chan int)
	errs := make(chan error, makers)
	var all sync.WaitGroup
	for range cap(errs) {
		all.Go(func() {
			for i := range work {
				if err := b.makeService(ctx, i); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	for i := range b.services {
		select {
		case work <- i:
		case err := <-errs:
			close(work)
			return err
		}
	}
	close(work)
	all.Wait()
	return ctx.Err()
}

// clusterIP is the address of the i-th Service.
func clusterIP(i int) string {
	return netip.AddrFrom4([4]byte{10, 96, byte(16 + i>>8), byte(i)}).String()
}

func (b *bench) makeService(ctx context.Context, i int) error {
	name := fmt.Sprintf("many-%05d", i)
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{
		ClusterIP: clusterIP(i), Ports: []corev1.ServicePort{{Name: "http", Port: 80}},
	}}
	if _, err := b.Client.CoreV1().Services(namespace).Create(ctx, svc, metav1.CreateOptions{}); err != nil {
		return err
	}
	addresses := make([]string, manyEndpoints)
	for n := range addresses {
		addresses[n] = addressOf(i, n)
	}
	return b.makeSlice(ctx, name, whoPort, addresses...)
}

// ensureService makes a Service with an address and endpoints, unless it is there.
func (b *bench) ensureService(ctx context.Context, name, ip string, endpoints ...string) error {
	_, err := b.Client.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		return err
	}
	_, err = b.Client.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	return b.makeSlice(ctx, name, whoPort, endpoints...)
}

func sliceOf(service string, port int32, addresses ...string) *discoveryv1.EndpointSlice {
	protocol, name := corev1.ProtocolTCP, "http"
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Protocol: &protocol, Port: &port}},
	}
	for _, a := range addresses {
		s.Endpoints = append(s.Endpoints, endpoint(a, true))
	}
	return s
}

// endpoint is a ready endpoint, or one that serves while it terminates.
func endpoint(address string, ready bool) discoveryv1.Endpoint {
	elsewhere, zone, yes, terminating := "far", "far", true, !ready
	return discoveryv1.Endpoint{
		Addresses: []string{address}, NodeName: &elsewhere, Zone: &zone,
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &yes, Terminating: &terminating},
	}
}

func (b *bench) makeSlice(ctx context.Context, service string, port int32, addresses ...string) error {
	_, err := b.Client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, sliceOf(service, port, addresses...), metav1.CreateOptions{})
	return err
}

// setSlice replaces the endpoints of a Service and returns when the API server had
// answered.
func (b *bench) setSlice(ctx context.Context, s *discoveryv1.EndpointSlice) (time.Time, error) {
	_, err := b.Client.DiscoveryV1().EndpointSlices(namespace).Update(ctx, s, metav1.UpdateOptions{})
	return time.Now(), err
}
