package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
	"github.com/pentad/pentad/source/kube"
)

// nodeFacts are what a cluster says of this host.
type nodeFacts = source.Node

// cluster follows the cluster that the file names, and another one when it names
// another. Its methods may be called from several goroutines, but follow from one.
type cluster struct {
	log  *slog.Logger
	emit func(context.Context, source.Update)

	config *config.Kubernetes // that is followed; nil: none
	errand

	mu     sync.Mutex
	node   string
	source *kube.Source // nil: not connected
	err    error        // why not
}

// follow follows what is configured from now on, until the context ends.
func (c *cluster) follow(ctx context.Context, k *config.Kubernetes) {
	if sameSource(k, c.config) {
		c.config = k
		return
	}
	c.close()
	c.config = k
	if k == nil {
		return
	}
	c.begin(ctx, func(ctx context.Context) { c.run(ctx, k) })
}

// errand is something that goes on beside the loop until it is ended.
type errand struct{ stop func() }

func (e *errand) begin(ctx context.Context, do func(context.Context)) {
	ctx, stop := context.WithCancel(ctx)
	var task sync.WaitGroup
	task.Go(func() { do(ctx) })
	e.stop = func() {
		stop()
		task.Wait()
	}
}

// end waits until it is over, and reports whether there was one.
func (e *errand) end() bool {
	if e.stop == nil {
		return false
	}
	e.stop()
	e.stop = nil
	return true
}

// sameSource reports whether both follow the same cluster in the same way.
func sameSource(a, b *config.Kubernetes) bool {
	if a == nil || b == nil {
		return a == b
	}
	x, y := *a, *b
	x.Health, y.Health, x.Untracked, y.Untracked = netip.AddrPort{}, netip.AddrPort{}, nil, nil
	return x.Equal(&y)
}

// close follows nothing any more.
func (c *cluster) close() {
	if c.end() {
		c.config = nil
		c.note("", nil, nil)
	}
}

func (c *cluster) note(node string, s *kube.Source, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.node, c.source, c.err = node, s, err
}

// run emits what the cluster wants until the context ends.
func (c *cluster) run(ctx context.Context, k *config.Kubernetes) {
	untilConnected(ctx, func() (func(context.Context), error) {
		node, s, err := connect(k, c.log)
		c.note(node, s, err)
		return func(ctx context.Context) { _ = s.Run(ctx, func(u source.Update) { c.emit(ctx, u) }) }, err // it ends with the context
	}, func(err error) {
		c.log.Error("the cluster cannot be followed; it is tried again until it can", "source", "kubernetes", "error", err)
	})
}

// untilConnected connects, tries again while it cannot, and does what that returned until
// the context ends. It says each error once for as long as it is the same.
func untilConnected(ctx context.Context, connect func() (do func(context.Context), err error), say func(error)) {
	for backoff, said := retryFirst, ""; ; backoff = min(2*backoff, retryMost) {
		do, err := connect()
		if err == nil {
			do(ctx)
			return
		}
		if err.Error() != said {
			said = err.Error()
			say(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff):
		}
	}
}

func connect(k *config.Kubernetes, log *slog.Logger) (node string, s *kube.Source, err error) {
	if node, err = nodeName(k); err != nil {
		return "", nil, err
	}
	rest, err := kube.Connect(k.Kubeconfig)
	if err != nil {
		return node, nil, fmt.Errorf("source.kubernetes: %w", err)
	}
	s, err = kube.New(rest, kube.Options{Node: node, NodePortAddresses: k.NodePortAddresses, AllowExternalIPs: k.AllowExternalIPs}, log)
	if err != nil {
		return node, nil, fmt.Errorf("source.kubernetes: %w", err)
	}
	return node, s, nil
}

// nodeName returns the name of this host's Node.
func nodeName(c *config.Kubernetes) (string, error) {
	if c.Node != "" {
		return c.Node, nil
	}
	if name := os.Getenv("NODE_NAME"); name != "" {
		return name, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("source.kubernetes: the name of this Node is not known; set source.kubernetes.node: %w", err)
	}
	return name, nil
}

// away tells since when the API server has not answered, and why; zero and nil: it does.
func (c *cluster) away() (node string, since time.Time, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.source == nil {
		return c.node, time.Time{}, c.err
	}
	since, why = c.source.Away()
	return c.node, since, why
}

// heard is what a source of others said last.
type heard struct {
	source.Update
	changed  time.Time // when it spoke last
	count    uint64    // how often it did
	problems map[source.Problem]bool
}

// take takes what the source says, and logs each problem once for as long as it is there.
func (h *heard) take(u source.Update, log *slog.Logger) {
	h.Update, h.changed = u, time.Now()
	h.count++
	now := make(map[source.Problem]bool, len(u.Problems))
	for _, p := range u.Problems {
		now[p] = true
		if !h.problems[p] {
			log.Warn("an object makes no sense", "source", u.From.String(), "object", p.Object, "problem", p.Message)
		}
	}
	h.problems = now
}

// inbox is what the sources said last.
type inbox struct {
	file       source.Update
	kubernetes heard
	etcd       heard
	silent     service.Sources // those that have said nothing yet
	lost       []string        // what a source could not have because another has it
}

// merge returns all services, those of the file first: an operator of this host has the
// last word on it.
func (in *inbox) merge() (services []*service.Service) {
	services, in.lost = service.Merge(in.file.Services, in.etcd.Services, in.kubernetes.Services)
	return services
}

// of returns what a source of others said.
func (in *inbox) of(s service.Source) *heard {
	if s == service.SourceEtcd {
		return &in.etcd
	}
	return &in.kubernetes
}

// take takes what a source of others says, and reports whether it is its first word.
func (in *inbox) take(u source.Update, log *slog.Logger) (first bool) {
	h := in.of(u.From)
	first = h.count == 0
	h.take(u, log)
	in.silent = in.silent.Without(u.From)
	return first
}

// follow says whether there is a source to follow. Of one that is not followed any more
// nothing is left.
func (in *inbox) follow(s service.Source, is bool) {
	switch h := in.of(s); {
	case !is:
		*h = heard{}
		in.silent = in.silent.Without(s)
	case h.count == 0:
		in.silent = in.silent.With(s)
	}
}
