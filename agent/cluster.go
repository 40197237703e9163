package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/nodehealth"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source/kube"
)

// natEvery is how often the agent looks whether the table for packets from
// elsewhere is whole: a firewall that is reloaded takes it away.
const natEvery = 250 * time.Millisecond

// natPlane is the plane for packets from elsewhere.
type natPlane interface {
	plane
	Refused() []string // what the kernel did not take
}

// cluster is what makes this host a node of a Kubernetes cluster. It is nil on
// other hosts.
type cluster struct {
	config *config.Kubernetes
	node   string
	source *kube.Source
	nat    natPlane
	health *nodehealth.Server

	updates chan kube.Update

	// Written by the loop, under the agent's mu.
	latest    kube.Update
	known     bool               // latest came from the cluster
	merged    []*service.Service // of the file and of the cluster
	overruled []string           // listeners that both have
	changed   time.Time          // when latest came
	count     uint64             // of updates
	problems  map[kube.Problem]bool
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

func newCluster(c *config.Kubernetes, log *slog.Logger, state func() nodehealth.State) (*cluster, error) {
	if c == nil {
		return nil, nil
	}
	node, err := nodeName(c)
	if err != nil {
		return nil, err
	}
	rest, err := kube.Connect(c.Kubeconfig)
	if err != nil {
		return nil, err
	}
	source, err := kube.New(rest, kube.Options{
		Node: node, NodePortAddresses: c.NodePortAddresses, AllowExternalIPs: c.AllowExternalIPs,
	}, log)
	if err != nil {
		return nil, fmt.Errorf("source.kubernetes: %w", err)
	}
	return &cluster{
		config: c, node: node, source: source, nat: nat.New(log), health: nodehealth.New(state, log),
		updates: make(chan kube.Update), problems: make(map[kube.Problem]bool),
	}, nil
}

// run works until the context ends.
func (c *cluster) run(ctx context.Context) error {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	tasks.Go(func() { c.health.Run(ctx, c.config.Health) })
	tasks.Go(func() { c.nat.Run(ctx) })
	return c.source.Run(ctx, func(u kube.Update) { send(ctx, c.updates, u) })
}

// takeCluster reacts to what the cluster wants.
func (a *Agent) takeCluster(ctx context.Context, u kube.Update) error {
	c := a.cluster
	first := !c.known
	c.openChecks(u.Checks)
	a.mu.Lock()
	c.latest, c.known, c.changed = u, true, time.Now()
	c.count++
	c.merge(a.config.Services)
	a.mu.Unlock()
	c.say(a.log)
	a.noteVIPs()
	err := a.apply(ctx)
	// A pod that gets the address of one that was drained is another one.
	a.prune()
	if first {
		tuneConntrack(a.opts.RunDir, a.log)
		a.log.Info("the services of the cluster are in the kernel", "source", "kubernetes", "services", len(u.Services),
			"took", time.Since(a.started).Round(time.Millisecond))
		a.giveBack()
	}
	return err
}

func (c *cluster) openChecks(checks []kube.Check) {
	wanted := make([]nodehealth.Check, len(checks))
	for i, k := range checks {
		wanted[i] = nodehealth.Check(k)
	}
	c.health.Set(wanted)
}

// closedChecks says which healthCheckNodePorts are not open, sorted.
func (c *cluster) closedChecks() []string {
	var all []string
	for k, err := range c.health.Failed() {
		all = append(all, fmt.Sprintf("Service %s/%s: load balancers cannot ask at healthCheckNodePort %d: %v", k.Namespace, k.Name, k.Port, err))
	}
	slices.Sort(all)
	return all
}

// say logs each problem once, for as long as it is there.
func (c *cluster) say(log *slog.Logger) {
	now := make(map[kube.Problem]bool, len(c.latest.Problems))
	for _, p := range c.latest.Problems {
		now[p] = true
		if !c.problems[p] {
			log.Warn("an object of the cluster makes no sense", "source", "kubernetes", "object", p.Object, "problem", p.Message)
		}
	}
	c.problems = now
}

// merge puts the services of the file and those of the cluster together. The file
// comes first: an operator of this host has the last word on it.
func (c *cluster) merge(ofFile []*service.Service) {
	owners := make(map[service.Listener]string)
	for _, s := range ofFile {
		for _, l := range s.Listeners {
			owners[l.At()] = s.Name
		}
	}
	c.overruled = nil
	if len(ofFile) == 0 {
		c.merged = c.latest.Services
		return
	}
	c.merged = append(make([]*service.Service, 0, len(ofFile)+len(c.latest.Services)), ofFile...)
	for _, s := range c.latest.Services {
		free := slices.DeleteFunc(slices.Clone(s.Listeners), func(l service.Listener) bool {
			owner, taken := owners[l.At()]
			if taken {
				c.overruled = append(c.overruled, fmt.Sprintf(
					"service %s: %s is not served for it on this host: it belongs to the service %s of the configuration file", s.Name, l, owner))
			}
			return taken
		})
		switch {
		case len(free) == len(s.Listeners):
			c.merged = append(c.merged, s)
		case len(free) > 0:
			lesser := *s
			lesser.Listeners = free
			c.merged = append(c.merged, &lesser)
		}
	}
}

// desired returns all services of this host, and whether a source has not told
// yet what it has.
func (a *Agent) desired() (services []*service.Service, partial bool) {
	if a.cluster == nil {
		return a.config.Services, false
	}
	return a.cluster.merged, !a.cluster.known
}

// ranges are the addresses that mean something to this node.
func (c *cluster) ranges() service.Ranges {
	return service.Ranges{Guests: c.latest.Guests, Reserved: c.latest.Reserved, Untracked: c.config.Untracked}
}

// tableIsWhole reports whether an earlier agent has left what packets from elsewhere
// need: then the node serves, though the API server has not answered this agent yet.
func tableIsWhole() bool {
	_, whole, err := nat.Installed()
	return err == nil && whole
}

// nodeState is what load balancers are told.
func (a *Agent) nodeState() nodehealth.State {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := nodehealth.State{Healthy: a.inKernel, Updated: a.applied}
	if a.cluster != nil {
		s.Leaving = a.cluster.latest.Leaving
	}
	return s
}

// addTo puts the state of the cluster into a status; the caller holds the agent's mu.
func (c *cluster) addTo(s *api.Status) {
	if c == nil {
		return
	}
	away, why := c.source.Away()
	s.Cluster = &api.Cluster{
		Node: c.node, Services: len(c.latest.Services), Away: away, Changed: c.changed, Leaving: c.latest.Leaving, Updates: c.count,
		Unserved: c.latest.Unserved, Untracked: c.config.Untracked,
	}
	if why != nil {
		s.Cluster.Why = why.Error()
	}
	if !c.known {
		s.Problems = append(s.Problems, "the API server has not answered yet: services of the cluster stay as the agent before left them")
	}
	for _, p := range c.latest.Problems {
		s.Warnings = append(s.Warnings, p.Object+": "+p.Message)
	}
	s.Warnings = slices.Concat(s.Warnings, c.closedChecks(), c.overruled, c.nat.Refused())
	forwards, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err == nil && len(forwards) > 0 && forwards[0] == '0' {
		s.Problems = append(s.Problems, "this host does not forward packets, so that nobody outside reaches pods: sysctl -w net.ipv4.ip_forward=1")
	}
}
