package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pentad/pentad/bench/report"
	"github.com/pentad/pentad/lab"
)

// start measures how long it takes from the start of a proxy until every Service of
// the large cluster works, and what it needs then.
func start(ctx context.Context, b *bench) error {
	if err := b.fill(ctx); err != nil {
		return err
	}
	if err := b.stop(b.theirs); err != nil {
		return err
	}
	if err := b.stop(b.ours); err != nil {
		return err
	}
	began := time.Now()
	if err := b.startOurs(); err != nil {
		return err
	}
	if err := b.live(b.ours); err != nil {
		return fmt.Errorf("%w\n%s", err, b.ours.proxy.Log)
	}
	b.table.Add(report.Row{What: "10,000 x 10: start to all live, both planes", Value: time.Since(began).Seconds(), Unit: " s", Limit: 8, Below: true,
		Detail: "nothing in the kernel before; Services drawn by lot answer in a pod and from outside"})
	return nil
}

// startTheirsLarge is start for kube-proxy. It comes after the figures of pentad: a
// sync of kube-proxy keeps one of two processors busy for seconds.
func startTheirsLarge(ctx context.Context, b *bench) error {
	if err := b.fill(ctx); err != nil {
		return err
	}
	if b.theirs.proxy != nil {
		b.theirs.proxy.Kill()
	}
	began := time.Now()
	if err := b.startTheirs(); err != nil {
		return err
	}
	if err := b.live(b.theirs); err != nil {
		return fmt.Errorf("%w\n%s", err, b.theirs.proxy.Log)
	}
	b.table.Add(report.Row{What: "10,000 x 10: start to all live, of kube-proxy", Value: time.Since(began).Seconds(), Unit: " s"})
	theirs, err := b.change(ctx, b.theirs, 3)
	if err != nil {
		return err
	}
	b.table.Add(report.Row{What: "one endpoint changed to live, of kube-proxy, median", Value: median(theirs), Unit: " ms", Detail: fmt.Sprintf("%d changes", len(theirs))})
	mb, err := rss(b.theirs.proxy.Process.Pid)
	if err != nil {
		return err
	}
	b.table.Add(report.Row{What: "10,000 x 10: RSS of kube-proxy", Value: mb, Unit: " MB"})
	return nil
}

// samples is how many Services are asked to find out whether all are live.
const samples = 100

// live waits until Services drawn by lot answer, both to a pod of the node and to
// the client outside, and the last by name among them.
func (b *bench) live(n *node) error {
	if err := b.via(n); err != nil {
		return err
	}
	for _, from := range []struct {
		h, node *lab.Host
		cgroup  string
	}{{n.pod, n.Host, lab.Inside}, {b.client, b.client, lab.Outside}} {
		w, err := startTalk(from.h, from.node, from.cgroup, "watch")
		if err != nil {
			return err
		}
		for k := range samples {
			i := b.services - 1
			if k > 0 {
				i = rand.IntN(b.services)
			}
			if _, err := w.say(fmt.Sprintf("%s:80 *", clusterIP(i))); err != nil {
				return err
			}
		}
		w.in.Close()
	}
	return nil
}

// changes measures how long it takes from the answer of the API server to a change
// until it works in both planes.
func changes(ctx context.Context, b *bench) error {
	ours, err := b.change(ctx, b.ours, 200)
	if err != nil {
		return err
	}
	b.table.Add(report.Row{What: "one endpoint changed to live in both planes, median", Value: median(ours), Unit: " ms", Limit: 20, Below: true,
		Detail: fmt.Sprintf("%d changes, 10,000 Services", len(ours))})
	b.table.Add(report.Row{What: "the same, p99", Value: ours[len(ours)*99/100], Unit: " ms", Limit: 100, Below: true})
	mb, err := rss(b.ours.proxy.Process.Pid)
	if err != nil {
		return err
	}
	b.table.Add(report.Row{What: "10,000 x 10: RSS of the agent", Value: mb, Unit: " MB", Limit: 250, Below: true})
	return nil
}

// singleIP is the address of a Service with one endpoint: who answers there tells
// at once which one it is.
const singleIP = "10.96.8.8"

func (b *bench) change(ctx context.Context, n *node, rounds int) ([]float64, error) {
	if err := b.via(n); err != nil {
		return nil, err
	}
	addresses := []string{addressOf(0, 0), addressOf(0, 1)}
	if err := b.ensureService(ctx, "single", singleIP, addresses[0]); err != nil {
		return nil, err
	}
	inside, err1 := startTalk(n.pod, n.Host, lab.Inside, "watch")
	outside, err2 := startTalk(b.client, b.client, lab.Outside, "watch")
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	defer inside.in.Close()
	defer outside.in.Close()
	var took []float64
	for r := range rounds + 1 {
		fresh := addresses[r%2]
		when := make(chan result, 2)
		for _, w := range []*talk{inside, outside} {
			go func() { when <- parse(w.say(singleIP + ":80 " + fresh)) }()
		}
		time.Sleep(20 * time.Millisecond) // they have begun to ask
		answered, err := b.setSlice(ctx, sliceOf("single", whoPort, fresh))
		if err != nil {
			return nil, err
		}
		x, y := <-when, <-when
		if err := errors.Join(x.err, y.err); err != nil {
			return nil, err
		}
		last := x.at
		if y.at.After(last) {
			last = y.at
		}
		if r > 0 { // the first is not a change
			took = append(took, max(0, float64(last.Sub(answered))/1e6))
		}
	}
	slices.Sort(took)
	return took, nil
}

type result struct {
	at  time.Time
	err error
}

func parse(line string, err error) result {
	if err != nil {
		return result{err: err}
	}
	n, err := strconv.ParseInt(line, 10, 64)
	return result{time.Unix(0, n), err}
}

func median(sorted []float64) float64 { return sorted[len(sorted)/2] }

// rss returns the resident memory of a process in MB.
func rss(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.Fields(rest)[0])
			return float64(kb) * 1024 / 1e6, err
		}
	}
	return 0, errors.New("no VmRSS")
}
