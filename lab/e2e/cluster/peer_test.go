package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/kube"
)

// pair is one cluster twice, with the same machines, pods and addresses: in one half
// pentad serves it, in the other kube-proxy.
type pair struct{ ours, theirs *world }

func newPair(t *testing.T) pair {
	t.Helper()
	p := pair{ours: ownWorld(t)}
	site, err := lab.NewSite()
	if err != nil {
		t.Fatal(err)
	}
	p.theirs = &world{Site: site, pods: make(map[string]*place), cluster: p.ours.cluster}
	t.Cleanup(func() {
		if err := site.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(p.theirs.lendAPI(), p.theirs.machines(p.theirs.startKubeProxy)); err != nil {
		t.Fatal(err)
	}
	if err := p.theirs.tellZones(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, w := range []*world{p.ours, p.theirs} {
		// Machines outside know where pods are, as with a routed pod network.
		if err := errors.Join(w.outside.Route("10.244.1.0/24", a4), w.outside.Route("10.244.2.0/24", b4),
			w.outside.Route("2001:db8:244:1::/64", a6), w.outside.Route("2001:db8:244:2::/64", b6)); err != nil {
			t.Fatal(err)
		}
		for _, m := range []*place{w.a.place, w.b.place, w.outside} {
			v4, v6 := ownAddress(m.name, true), ownAddress(m.name, false)
			// Bound, because datagrams are to be answered from where they were sent to.
			err := startServer(m.Host, m.Host, m.name, hostPort(v4, 8080), hostPort(v6, 8080), hostPort(v4, 8081), hostPort(v6, 8081))
			if err := errors.Join(err, m.AnswerAll()); err != nil {
				t.Fatal(err)
			}
		}
	}
	return p
}

// lendAPI makes the API server of another site reachable in this one.
func (w *world) lendAPI() error {
	front, err := w.Host("10.0.0.1/24", "2001:db8::1/64")
	if err != nil {
		return err
	}
	var l net.Listener
	if err := front.Do(func() (err error) {
		l, err = net.Listen("tcp", "10.0.0.1:6443")
		return err
	}); err != nil {
		return err
	}
	w.OnClose(l.Close)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go w.relay(c)
		}
	}()
	return nil
}

func (w *world) relay(near net.Conn) {
	defer near.Close()
	far, err := w.cluster.Config.Dial(context.Background(), "tcp", "10.0.0.1:6443")
	if err != nil {
		return // who connected sees it
	}
	defer far.Close()
	go func() {
		_, _ = io.Copy(far, near)
		far.Close()
	}()
	_, _ = io.Copy(near, far)
}

// startKubeProxy starts kube-proxy on a node.
func (w *world) startKubeProxy(n *node) error {
	kubeconfig, err := w.cluster.Kubeconfig("kube-proxy-"+n.name, "system:kube-proxy", "system:masters")
	if err != nil {
		return err
	}
	config, err := n.WriteFile("kube-proxy.yaml", fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: %s
detectLocalMode: NodeCIDR
clientConnection: {kubeconfig: %s}
conntrack: {maxPerCore: 0}
nftables: {minSyncPeriod: 100ms}
`, n.name, kubeconfig))
	if err != nil {
		return err
	}
	n.agent, err = n.Start(exec.Command(filepath.Join(binaries, string(kube.Proxy)), "--config="+config), lab.Outside)
	return err
}

// tellZones waits for every kube-proxy to be ready and has the Nodes' zones change and
// change back: one that hears of its zone while it starts may never use it.
func (w *world) tellZones(ctx context.Context) error {
	nodes := w.cluster.Client.CoreV1().Nodes()
	for _, n := range []*node{w.a, w.b} {
		err := lab.Eventually(time.Minute, func() error {
			code, body, err := get(n, "/healthz", 10256)
			if err == nil && code != http.StatusOK {
				err = fmt.Errorf("%d %s", code, body)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("kube-proxy of %s: %w\n%s", n.name, err, n.agent.Log)
		}
		for _, zone := range []string{"none", n.name} {
			patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, corev1.LabelTopologyZone, zone)
			if _, err := nodes.Patch(ctx, n.name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
				return err
			}
		}
	}
	return nil
}

// places are those of both halves, by name.
func (p pair) places() map[string][2]*place {
	all := map[string][2]*place{
		"a": {p.ours.a.place, p.theirs.a.place}, "b": {p.ours.b.place, p.theirs.b.place}, "outside": {p.ours.outside, p.theirs.outside},
	}
	for name, mine := range p.ours.pods {
		all[name] = [2]*place{mine, p.theirs.pods[name]}
	}
	return all
}

// question is what one place asks.
type question struct{ place, verb, what string }

// answers are what both halves heard.
type answers struct{ ours, theirs heard }

// ask asks both halves everything at the same time, and waits for each answer as long
// as it says.
func (p pair) ask(t *testing.T, questions []question, times int, wait time.Duration) map[question]answers {
	t.Helper()
	grouped := make(map[question][]string) // by place and verb
	for _, q := range questions {
		at := question{q.place, q.verb, ""}
		grouped[at] = append(grouped[at], q.what)
	}
	all := make(map[question]answers)
	places := p.places()
	var mu sync.Mutex
	var group sync.WaitGroup
	for at, what := range grouped {
		group.Go(func() {
			var got [2][]heard
			var errs [2]error
			var both sync.WaitGroup
			for half, from := range places[at.place] {
				both.Go(func() { got[half], errs[half] = from.many(many{at.verb, what, times, wait}) })
			}
			both.Wait()
			if err := errors.Join(errs[:]...); err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for i, w := range what {
				all[question{at.place, at.verb, w}] = answers{got[0][i], got[1][i]}
			}
		})
	}
	group.Wait()
	return all
}

// TestPeers makes random Services and slices, changes them at random, and asks after
// each change from everywhere what pentad and kube-proxy make of it.
//
// It tries two histories, and four where CI is set, that are always the same.
// PENTAD_PEERS is for how long it tries others; PENTAD_PEERS_SEED says with which it
// begins.
func TestPeers(t *testing.T) {
	t.Parallel()
	long, seed, most := 15*time.Minute, uint64(1), uint64(2)
	if os.Getenv("CI") != "" {
		most = 4
	}
	if s := os.Getenv("PENTAD_PEERS"); s != "" {
		var err error
		if long, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
		seed, most = uint64(time.Now().Unix()), math.MaxUint64
	}
	if s := os.Getenv("PENTAD_PEERS_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	lab.Need(t, "etcd", "nft")
	p := newPair(t)
	tally := make(map[string]int)
	steps, first, failed := 0, seed, 0
	for until := time.Now().Add(long); seed-first < most && time.Now().Before(until) && failed < 3 && !t.Failed(); seed++ {
		c := &history{scene: newScene(t, p.ours), pair: p, generator: generator{rand.New(rand.NewPCG(seed, 0))}, tally: tally}
		if !c.run(until) {
			failed++
			t.Logf("to see this history again: PENTAD_PEERS_SEED=%d", seed)
		}
		steps += c.step
		c.clear()
	}
	t.Logf("seeds %d to %d: %d changes, %d answers compared; differences that are meant: %v", first, seed-1, steps, tally["compared"], tally)
	if failed > 0 {
		t.Errorf("%d histories ended in a difference", failed)
	}
}

// history is a cluster that changes, step by step.
type history struct {
	*scene
	pair
	generator
	tally    map[string]int
	log      []string
	subjects []*subject
	markers  struct{ svc, ip string }
	step     int
	holds    map[question]string  // the server that a connection is to
	last     map[question]answers // what was heard last
}

// subject is a Service of a history.
type subject struct {
	index int
	svc   *corev1.Service // as last seen; deleted if gone
	gone  bool
	asked map[string]bool // all that it ever was asked for
}

// The size of a history.
const (
	historySubjects = 3
	historySteps    = 14
)

func (h *history) run(until time.Time) bool {
	h.holds, h.last = make(map[question]string), make(map[question]answers)
	h.makeMarker()
	for i := range historySubjects {
		h.create(&subject{index: i, asked: make(map[string]bool)})
	}
	for ; h.step < historySteps && time.Now().Before(until); h.step++ {
		if h.step > 0 {
			h.hold()
			h.evolve()
		}
		h.mark()
		if !h.same() {
			h.t.Logf("%s", strings.Join(h.log, "\n"))
			return false
		}
	}
	return true
}

func (h *history) clear() {
	ctx := h.t.Context()
	services, sls := h.ours.cluster.Client.CoreV1().Services(h.namespace), h.ours.cluster.Client.DiscoveryV1().EndpointSlices(h.namespace)
	list, err := services.List(ctx, metav1.ListOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, svc := range list.Items {
		if err := services.Delete(ctx, svc.Name, metav1.DeleteOptions{}); err != nil {
			h.t.Fatal(err)
		}
	}
	if err := sls.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		h.t.Fatal(err)
	}
	for name := range h.places() {
		h.pair.ask(h.t, []question{{name, "drop", ""}}, 1, quickly)
	}
}

// note keeps what was done, for who has to understand a difference.
func (h *history) note(what string, object any, err error) {
	text, _ := json.Marshal(object)
	line := fmt.Sprintf("step %d: %s %s", h.step, what, text)
	if err != nil {
		line += ": refused: " + err.Error()
	}
	h.log = append(h.log, line)
}

// create makes a Service with its slices; the API server may refuse it, then another
// is tried.
func (h *history) create(s *subject) {
	for {
		svc := h.generator.service(s.index)
		made, err := h.ours.cluster.Client.CoreV1().Services(h.namespace).Create(h.t.Context(), svc, metav1.CreateOptions{})
		if err != nil {
			continue
		}
		s.svc = made
		h.note("create", made.Spec, nil)
		break
	}
	h.subjects = append(h.subjects, s)
	h.setIngress(s)
	for n := range 1 + h.IntN(2) {
		h.addSlice(s, n)
	}
}

func (h *history) setIngress(s *subject) {
	if s.svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return
	}
	s.svc.Status.LoadBalancer.Ingress = h.generator.ingress()
	made, err := h.ours.cluster.Client.CoreV1().Services(h.namespace).UpdateStatus(h.t.Context(), s.svc, metav1.UpdateOptions{})
	h.note("ingress of "+s.svc.Name, s.svc.Status.LoadBalancer.Ingress, err)
	if err == nil {
		s.svc = made
	}
}

func (h *history) addSlice(s *subject, n int) {
	for _, v4 := range []bool{true, false} {
		sl := h.generator.slice(s.svc, fmt.Sprintf("%s-%d-%t", s.svc.Name, n, v4), v4)
		h.agree(s, sl)
		_, err := h.ours.cluster.Client.DiscoveryV1().EndpointSlices(h.namespace).Create(h.t.Context(), sl, metav1.CreateOptions{})
		h.note("slice "+sl.Name, sl, err)
	}
}

// evolve makes one change.
func (h *history) evolve() {
	s := oneOf(h.generator, h.subjects...)
	if s.gone {
		h.again(s)
		return
	}
	switch n := h.IntN(100); {
	case n < 45:
		h.changeSlice(s)
	case n < 75:
		h.changeService(s)
	case n < 83:
		h.setIngress(s)
	case n < 90:
		h.addSlice(s, 2+h.IntN(2))
	case n < 95:
		err := h.ours.cluster.Client.CoreV1().Services(h.namespace).Delete(h.t.Context(), s.svc.Name, metav1.DeleteOptions{})
		h.note("delete "+s.svc.Name, nil, err)
		s.gone = err == nil
	default:
		h.whileDead(s)
	}
}

// whileDead changes a slice while no agent of pentad is there to see it.
func (h *history) whileDead(s *subject) {
	h.note("the agents are killed", nil, nil)
	for _, n := range []*node{h.ours.a, h.ours.b} {
		n.agent.Kill()
	}
	h.changeSlice(s)
	for _, n := range []*node{h.ours.a, h.ours.b} {
		if err := n.start(); err != nil {
			h.t.Fatal(err)
		}
	}
}

// again makes a Service that was deleted, with the addresses that it had.
func (h *history) again(s *subject) {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: s.svc.Name, Labels: s.svc.Labels}, Spec: s.svc.Spec}
	made, err := h.ours.cluster.Client.CoreV1().Services(h.namespace).Create(h.t.Context(), svc, metav1.CreateOptions{})
	h.note("create again", svc.Spec, err)
	if err == nil {
		s.svc, s.gone = made, false
		h.setIngress(s)
	}
}

func (h *history) changeService(s *subject) {
	c := h.ours.cluster.Client.CoreV1().Services(h.namespace)
	for range 20 {
		svc := s.svc.DeepCopy()
		h.generator.change(svc, s.index)
		made, err := c.Update(h.t.Context(), svc, metav1.UpdateOptions{})
		if err != nil || made.ResourceVersion == s.svc.ResourceVersion {
			continue
		}
		h.note("update "+svc.Name, made.Spec, nil)
		s.svc = made
		return
	}
}

func (h *history) changeSlice(s *subject) {
	all := h.slicesOf(s)
	if len(all) == 0 {
		h.addSlice(s, 0)
		return
	}
	c := h.ours.cluster.Client.DiscoveryV1().EndpointSlices(h.namespace)
	sl := oneOf(h.generator, all...)
	if h.chance(15) {
		err := c.Delete(h.t.Context(), sl.Name, metav1.DeleteOptions{})
		h.note("delete slice "+sl.Name, nil, err)
		return
	}
	next := h.generator.slice(s.svc, sl.Name, sl.AddressType == discoveryv1.AddressTypeIPv4)
	if h.chance(50) { // only what they are like
		next.Endpoints = sl.Endpoints
		for i := range next.Endpoints {
			for _, known := range servers {
				if a := next.Endpoints[i].Addresses[0]; a == known.v4 || a == known.v6 {
					next.Endpoints[i] = h.endpoint(known, a == known.v4, false, h.chance(30))
				}
			}
		}
	}
	h.agree(s, next)
	next.ResourceVersion = sl.ResourceVersion
	_, err := c.Update(h.t.Context(), next, metav1.UpdateOptions{})
	h.note("slice "+next.Name, next, err)
}

// agree has a slice say of an endpoint what the Service's other slices say of it, or
// nothing: which of two kube-proxy believes is left to chance.
func (h *history) agree(s *subject, sl *discoveryv1.EndpointSlice) {
	said := make(map[string]discoveryv1.Endpoint)
	for _, other := range h.slicesOf(s) {
		for _, e := range other.Endpoints {
			if other.Name != sl.Name {
				said[e.Addresses[0]] = e
			}
		}
	}
	sl.Endpoints = slices.DeleteFunc(sl.Endpoints, func(e discoveryv1.Endpoint) bool {
		_, twice := said[e.Addresses[0]]
		return twice && h.chance(60)
	})
	for i, e := range sl.Endpoints {
		if other, twice := said[e.Addresses[0]]; twice {
			sl.Endpoints[i] = other
		}
	}
}

func (h *history) slicesOf(s *subject) []discoveryv1.EndpointSlice {
	list, err := h.ours.cluster.Client.DiscoveryV1().EndpointSlices(h.namespace).List(h.t.Context(),
		metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + s.svc.Name})
	if err != nil {
		h.t.Fatal(err)
	}
	return list.Items
}

// The marker is a Service by which one sees that all nodes have heard of everything up
// to a step: its port is the step's, and its only endpoint changes from step to step.
const markerExternal = "203.0.113.127"

func (h *history) makeMarker() {
	single := corev1.IPFamilyPolicySingleStack
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "marker"}, Spec: corev1.ServiceSpec{
		IPFamilyPolicy: &single, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, ExternalIPs: []string{markerExternal},
		Ports: []corev1.ServicePort{{Name: "http", Port: 999}},
	}}
	made, err := h.ours.cluster.Client.CoreV1().Services(h.namespace).Create(h.t.Context(), svc, metav1.CreateOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	h.markers.ip = made.Spec.ClusterIP
}

// mark writes the marker and waits until everybody has it.
func (h *history) mark() {
	port, who := int32(1000+h.step), servers[h.step%2*2] // of one node and of the other
	h.scene.update(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "marker"}}, func(svc *corev1.Service) {
		svc.Spec.Ports[0].Port = port
	})
	name, protocol, target, yes := "http", corev1.ProtocolTCP, int32(8080), true
	sl := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "marker", Labels: map[string]string{discoveryv1.LabelServiceName: "marker"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Protocol: &protocol, Port: &target}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{who.v4}, NodeName: &who.node, Conditions: discoveryv1.EndpointConditions{Ready: &yes}}},
	}
	c := h.ours.cluster.Client.DiscoveryV1().EndpointSlices(h.namespace)
	_, err := c.Update(h.t.Context(), sl, metav1.UpdateOptions{})
	if h.step == 0 {
		_, err = c.Create(h.t.Context(), sl, metav1.CreateOptions{})
	}
	if err != nil {
		h.t.Fatal(err)
	}
	ip, ext := "tcp "+hostPort(h.markers.ip, port), "tcp "+hostPort(markerExternal, port)
	questions := []question{{"a", "ask", ip}, {"b", "ask", ip}, {"outside", "ask", ip}, {"outside", "ask", ext}}
	h.within(time.Minute, func() error {
		for q, got := range h.pair.ask(h.t, questions, 2, 300*time.Millisecond) {
			for half, heard := range map[string]heard{"pentad": got.ours, "kube-proxy": got.theirs} {
				for answer := range heard {
					if server, _, _ := strings.Cut(answer, " "); server != who.name {
						return fmt.Errorf("the change has not arrived in %s of %s: %v", half, q.place, heard)
					}
				}
			}
		}
		return nil
	})
}

// addresses are all "NETWORK ADDRESS:PORT" of a Service, as of now and before.
func (s *subject) addresses() []string {
	spec := s.svc.Spec
	at := slices.Concat(spec.ClusterIPs, spec.ExternalIPs)
	for _, in := range s.svc.Status.LoadBalancer.Ingress {
		at = append(at, in.IP)
	}
	for _, p := range spec.Ports {
		network := strings.ToLower(string(p.Protocol))
		for _, a := range at {
			if a != corev1.ClusterIPNone && a != "" {
				s.asked[network+" "+hostPort(a, p.Port)] = true
			}
		}
		for _, a := range []string{a4, b4, a6, b6} {
			if p.NodePort != 0 {
				s.asked[network+" "+hostPort(a, p.NodePort)] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(s.asked))
}

// hold makes connections that the next change shall leave alone.
func (h *history) hold() {
	var questions []question
	for _, s := range h.subjects {
		for _, what := range s.addresses() {
			if network, _, _ := strings.Cut(what, " "); network != "tcp" || s.gone {
				continue
			}
			for _, place := range slices.Sorted(maps.Keys(h.places())) {
				// By lot of its own: what is held depends on addresses that were given out.
				if q := (question{place, "hold", what}); h.holds[q] == "" && rand.IntN(100) < 30 {
					questions = append(questions, q)
				}
			}
		}
	}
	for q, got := range h.pair.ask(h.t, questions, 1, quickly) {
		ours, theirs := got.ours.only(), got.theirs.only()
		if isServer(ours) && isServer(theirs) {
			h.holds[q] = ours
		}
	}
}

// only is the one thing that was heard: a server's name, or a failure.
func (h heard) only() string {
	for answer := range h {
		name, _, _ := strings.Cut(answer, " ")
		return name
	}
	return ""
}

func isServer(name string) bool {
	return slices.ContainsFunc(servers, func(s server) bool { return s.name == name })
}
