package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/pentad/pentad/bench/report"
	"github.com/pentad/pentad/lab"
)

// ready starts both proxies, if they do not run yet, and waits until a Service
// works behind each.
func (b *bench) ready(ctx context.Context, theirs bool) error {
	if err := b.ensureService(ctx, "single", singleIP, addressOf(0, 0)); err != nil {
		return err
	}
	type side struct {
		n     *node
		start func() error
	}
	sides := []side{{b.ours, b.startOurs}}
	if theirs {
		sides = append(sides, side{b.theirs, b.startTheirs})
	}
	for _, x := range sides {
		if x.n.proxy == nil {
			if err := x.start(); err != nil {
				return err
			}
		}
		// A pod that asks before its node is ready is one whose packets are translated.
		if x.n == b.ours {
			if err := b.healthy(ctx); err != nil {
				return err
			}
		}
		w, err := startTalk(x.n.pod, x.n.Host, lab.Inside, "watch")
		if err != nil {
			return err
		}
		if _, err := w.say(singleIP + ":80 *"); err != nil {
			return fmt.Errorf("%w\n%s", err, x.n.proxy.Log)
		}
		w.in.Close()
	}
	return nil
}

// Rounds in which two sides take turns, and what each does in a round: so much that a
// round takes some milliseconds, so that what else the machine does concerns both.
const (
	connectRounds   = 100
	connectsInRound = "1000"
	rateRounds      = 500
	rateInRound     = "8 100ms"
	streamRounds    = 400
	streamInRound   = "100ms"
)

// connects measures connect(2) from a pod to a ClusterIP of the large cluster, in
// turn.
func connects(ctx context.Context, b *bench) error {
	if err := b.fill(ctx); err != nil {
		return err
	}
	if err := b.ready(ctx, true); err != nil {
		return err
	}
	if err := b.allLive(); err != nil {
		return err
	}
	var service, direct strings.Builder
	for i := range b.services {
		fmt.Fprintf(&service, "%s:80\n", clusterIP(i))
		fmt.Fprintf(&direct, "%s:%d\n", addressOf(i, 0), whoPort)
	}
	nodes := []*node{b.ours, b.theirs}
	var clients []*talk // ours and theirs by the Service, ours and theirs to the endpoint
	for _, to := range []string{service.String(), direct.String()} {
		for _, n := range nodes {
			t, err := startTalk(n.pod, n.Host, lab.Inside, "latency")
			if err != nil {
				return err
			}
			defer t.in.Close()
			if _, err := fmt.Fprintln(t.in, to); err != nil {
				return err
			}
			clients = append(clients, t)
		}
	}
	for _, x := range []struct{ what, via string }{{"on the same node", "10.245.0.9"}, {"on another host", "10.0.0.50"}} {
		for _, n := range nodes {
			if err := n.RouteReplace("10.244.0.0/16", x.via); err != nil {
				return err
			}
		}
		us, err := inTurn(clients, connectRounds, func(t *talk) (float64, error) { return t.number(connectsInRound) })
		if err != nil {
			return err
		}
		b.table.Add(report.Row{What: "TCP connect from a pod to a ClusterIP, endpoint " + x.what + ", against kube-proxy",
			Value: ratio(us[0], us[1]), Limit: 0.8, Below: true,
			Detail: fmt.Sprintf("median of %d pairs; %.1f us against %.1f; to the endpoint itself %.1f and %.1f: a Service costs %.1f us against %.1f",
				connectRounds, middle(us[0])/1000, middle(us[1])/1000, middle(us[2])/1000, middle(us[3])/1000,
				between(us[0], us[2])/1000, between(us[1], us[3])/1000)})
	}
	return nil
}

// allLive waits until the Services that were made last work behind both proxies.
func (b *bench) allLive() error {
	for _, n := range []*node{b.ours, b.theirs} {
		w, err := startTalk(n.pod, n.Host, lab.Inside, "watch")
		if err != nil {
			return err
		}
		for i := max(0, b.services-makers); i < b.services; i++ {
			if _, err := w.say(clusterIP(i) + ":80 *"); err != nil {
				return err
			}
		}
		w.in.Close()
	}
	return nil
}

// inTurn has all measure once in every round, each first as often as others, and
// returns what each measured, in the order of the rounds.
func inTurn[T any](all []T, rounds int, measure func(T) (float64, error)) ([][]float64, error) {
	found := make([][]float64, len(all))
	for round := range rounds {
		for i := range all {
			k := (i + round) % len(all)
			v, err := measure(all[k])
			if err != nil {
				return nil, err
			}
			found[k] = append(found[k], v)
		}
	}
	return found, nil
}

// middle is the median of values in any order.
func middle(all []float64) float64 { return median(slices.Sorted(slices.Values(all))) }

// ratio is the median of the quotients of pairs, and between that of their differences.
func ratio(a, b []float64) float64 {
	return pairs(a, b, func(x, y float64) float64 { return x / y })
}

func between(a, b []float64) float64 {
	return pairs(a, b, func(x, y float64) float64 { return x - y })
}

func pairs(a, b []float64, join func(x, y float64) float64) float64 {
	all := make([]float64, len(a))
	for i := range a {
		all[i] = join(a[i], b[i])
	}
	return middle(all)
}

// nodePorts measures what comes from outside through a node to an endpoint
// elsewhere, in turn.
func nodePorts(ctx context.Context, b *bench) error {
	if err := b.ready(ctx, true); err != nil {
		return err
	}
	svc, err := b.Client.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "nodeport"},
		Spec: corev1.ServiceSpec{ClusterIP: "10.96.8.11", Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{
			{Name: "who", Port: 80, TargetPort: intstr.FromInt32(whoPort)}, {Name: "sink", Port: 81, TargetPort: intstr.FromInt32(sinkPort)},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	for i, p := range svc.Spec.Ports {
		s := sliceOf("nodeport", p.TargetPort.IntVal, "10.244.255.1", "10.244.255.2", "10.244.255.3")
		s.Name += fmt.Sprint("-", i)
		s.Ports[0].Name = &p.Name
		if _, err := b.Client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, s, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	nodes := []*node{b.ours, b.theirs}
	for _, n := range nodes {
		w, err := startTalk(b.client, b.client, lab.Outside, "watch")
		if err != nil {
			return err
		}
		if _, err := w.say(fmt.Sprintf("%s:%d *", n.v4, svc.Spec.Ports[0].NodePort)); err != nil {
			return err
		}
		w.in.Close()
	}
	for i, x := range []struct {
		what, role, unit, load string
		rounds                 int
	}{
		{"connects/s", "rate", "/s", rateInRound, rateRounds},
		{"throughput", "stream", " Gbit/s", streamInRound, streamRounds},
	} {
		t, err := startTalk(b.client, b.client, lab.Outside, x.role)
		if err != nil {
			return err
		}
		found, err := inTurn(nodes, x.rounds, func(n *node) (float64, error) {
			return t.number(fmt.Sprintf("%s:%d %s", n.v4, svc.Spec.Ports[i].NodePort, x.load))
		})
		t.in.Close()
		if err != nil {
			return err
		}
		b.table.Add(report.Row{What: x.what + " from outside to a NodePort, against kube-proxy", Value: ratio(found[0], found[1]), Limit: 1,
			Detail: fmt.Sprintf("median of %d pairs; %.4g%s against %.4g", x.rounds, middle(found[0]), x.unit, middle(found[1]))})
	}
	return nil
}

// hammers connects without a pause from a pod and from outside until stop is
// called, which returns how many connections there were, how many failed, and the
// last failure.
func (b *bench) hammers(address string) (stop func() (count, failed int, last time.Time, why string, err error), err error) {
	if err := b.via(b.ours); err != nil {
		return nil, err
	}
	inside, err1 := startTalk(b.ours.pod, b.ours.Host, lab.Inside, "hammer", address)
	outside, err2 := startTalk(b.client, b.client, lab.Outside, "hammer", address)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	return func() (count, failed int, last time.Time, why string, err error) {
		for _, t := range []*talk{inside, outside} {
			line, err := t.end()
			if err != nil {
				return 0, 0, last, "", err
			}
			var c, f int
			var at int64
			var reason string
			if _, err := fmt.Sscan(line, &c, &f, &at, &reason); err != nil {
				return 0, 0, last, "", err
			}
			count, failed = count+c, failed+f
			if f > 0 && time.Unix(0, at).After(last) {
				last, why = time.Unix(0, at), reason
			}
		}
		return count, failed, last, why, nil
	}, nil
}

// How a pod ends in a rolling update: it is told, goes on for a moment, and is gone.
const graceOfPods = 200 * time.Millisecond

// rollingUpdate replaces the hundred endpoints of a Service one after another, as a
// Deployment does, while clients connect.
func rollingUpdate(ctx context.Context, b *bench) error {
	if err := b.ready(ctx, false); err != nil {
		return err
	}
	const size = 100
	old, fresh := make([]string, size), make([]string, size)
	for i := range size {
		old[i], fresh[i] = fmt.Sprintf("10.244.240.%d", i+1), fmt.Sprintf("10.244.241.%d", i+1)
	}
	serve := func(verb, address string) error {
		_, err := b.servers.say(fmt.Sprintf("%s %s:%d", verb, address, podPort))
		return err
	}
	for _, a := range old {
		if err := serve("open", a); err != nil {
			return err
		}
	}
	const ip = "10.96.8.9"
	if err := b.ensureService(ctx, "rolling", ip, old...); err != nil {
		return err
	}
	state := sliceOf("rolling", podPort, old...)
	if _, err := b.setSlice(ctx, state); err != nil {
		return err
	}
	w, err := startTalk(b.ours.pod, b.ours.Host, lab.Inside, "watch")
	if err != nil {
		return err
	}
	if _, err := w.say(ip + ":80 " + old[size-1]); err != nil {
		return err
	}
	w.in.Close()
	stop, err := b.hammers(ip + ":80")
	if err != nil {
		return err
	}
	began := time.Now()
	for i := range size {
		if err := serve("open", fresh[i]); err != nil {
			return err
		}
		state.Endpoints = append(state.Endpoints, endpoint(fresh[i], true))
		state.Endpoints[0] = endpoint(old[i], false)
		if _, err := b.setSlice(ctx, state); err != nil {
			return err
		}
		time.Sleep(graceOfPods)
		if err := serve("close", old[i]); err != nil {
			return err
		}
		state.Endpoints = state.Endpoints[1:]
		if _, err := b.setSlice(ctx, state); err != nil {
			return err
		}
	}
	took := time.Since(began)
	count, failed, _, why, err := stop()
	if err != nil {
		return err
	}
	b.table.Add(report.Row{What: "rolling update of 100 endpoints under load: failed connects", Value: float64(failed), Below: true,
		Detail: fmt.Sprintf("of %d, from a pod and from outside, in %.0f s %s", count, took.Seconds(), why)})
	return nil
}

// deletedPod deletes a pod with no grace: its server is gone at once, and the
// controllers of Kubernetes find out in their own time.
func deletedPod(ctx context.Context, b *bench) error {
	if err := b.ready(ctx, false); err != nil {
		return err
	}
	if err := b.StartControllerManager("endpointslice-controller", "serviceaccount-controller"); err != nil {
		return err
	}
	// It makes the service account without which there are no pods.
	if err := lab.Eventually(30*time.Second, func() error {
		_, err := b.Client.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{})
		return err
	}); err != nil {
		return err
	}
	const ip = "10.96.8.10"
	labels := map[string]string{"app": "deleted"}
	_, err := b.Client.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "deleted"},
		Spec: corev1.ServiceSpec{ClusterIP: ip, Selector: labels,
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(podPort)}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	var worst float64
	var details []string
	for round := range 3 {
		took, detail, err := b.deleteOne(ctx, ip, labels, round)
		if err != nil {
			return err
		}
		worst = max(worst, took)
		details = append(details, detail)
	}
	b.table.Add(report.Row{What: "a pod is deleted with no grace: last failing new connection after that, worst", Value: worst, Unit: " s", Limit: 1, Below: true,
		Detail: strings.Join(details, ", ")})
	return nil
}

func (b *bench) deleteOne(ctx context.Context, ip string, labels map[string]string, round int) (float64, string, error) {
	var names, addresses []string
	for i := range 3 {
		name, address := fmt.Sprintf("pod-%d-%d", round, i), fmt.Sprintf("10.244.%d.%d", 242+round, i+1)
		if _, err := b.servers.say(fmt.Sprintf("open %s:%d", address, podPort)); err != nil {
			return 0, "", err
		}
		if err := b.makePod(ctx, name, address, labels); err != nil {
			return 0, "", err
		}
		names, addresses = append(names, name), append(addresses, address)
	}
	for _, a := range addresses {
		for _, from := range []struct{ h, n *lab.Host }{{b.ours.pod, b.ours.Host}, {b.client, b.client}} {
			w, err := startTalk(from.h, from.n, lab.Inside, "watch")
			if err != nil {
				return 0, "", err
			}
			if _, err := w.say(ip + ":80 " + a); err != nil {
				return 0, "", err
			}
			w.in.Close()
		}
	}
	stop, err := b.hammers(ip + ":80")
	if err != nil {
		return 0, "", err
	}
	time.Sleep(500 * time.Millisecond)
	now := int64(0)
	if _, err := b.servers.say(fmt.Sprintf("close %s:%d", addresses[0], podPort)); err != nil {
		return 0, "", err
	}
	deleted := time.Now()
	if err := b.Client.CoreV1().Pods(namespace).Delete(ctx, names[0], metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		return 0, "", err
	}
	time.Sleep(2 * time.Second)
	count, failed, last, why, err := stop()
	if err != nil {
		return 0, "", err
	}
	for _, n := range names[1:] {
		if err := b.Client.CoreV1().Pods(namespace).Delete(ctx, n, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
			return 0, "", err
		}
	}
	took := 0.0
	if failed > 0 {
		took = max(0, last.Sub(deleted).Seconds())
	}
	return took, fmt.Sprintf("%.3f s (%d of %d failed, %s)", took, failed, count, why), nil
}

// makePod makes a Pod as a kubelet that runs it reports it.
func (b *bench) makePod(ctx context.Context, name, address string, labels map[string]string) error {
	pods := b.Client.CoreV1().Pods(namespace)
	p, err := pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec:       corev1.PodSpec{NodeName: "theirs", Containers: []corev1.Container{{Name: "web", Image: "web"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	p.Status = corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: address, PodIPs: []corev1.PodIP{{IP: address}},
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
	}
	_, err = pods.UpdateStatus(ctx, p, metav1.UpdateOptions{})
	return err
}
