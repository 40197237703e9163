//go:build cluster

package pods_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/pentad/pentad/claim"
	claimkube "github.com/pentad/pentad/claim/kube"
	"github.com/pentad/pentad/claim/race"
	"github.com/pentad/pentad/ipam"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/lab/kube"
)

const base = "../../../deploy/kubernetes/base/"

// clustered is hosts on one segment that are nodes of a cluster.
type clustered struct {
	t       *testing.T
	cluster *kube.Cluster
	nodes   []*node
	configs []string // of the agents
}

func newClustered(t *testing.T, nodes int) *clustered {
	t.Helper()
	lab.Need(t, "etcd")
	binaries, err := kube.Build(t.Context(), kube.APIServer)
	if err != nil {
		t.Fatal(err)
	}
	segment, err := lab.NewSwitch()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := segment.Close(); err != nil {
			t.Error(err)
		}
	})
	master := e2e.New(t).Host
	if _, err := segment.Plug(master, "198.51.100.10/24"); err != nil {
		t.Fatal(err)
	}
	c := &clustered{t: t}
	if c.cluster, err = kube.Start(t.Context(), binaries, master, "198.51.100.10"); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"addressblocks.yaml", "rbac.yaml", "controller.yaml"} {
		// A definition is there a moment after it was made.
		if err := lab.Eventually(20*time.Second, func() error { return c.cluster.Apply(t.Context(), base+f, false) }); err != nil {
			t.Fatal(err)
		}
	}
	for i := range nodes {
		n := &node{World: e2e.New(t), t: t}
		v4, v6 := fmt.Sprintf("198.51.100.%d", 11+i), fmt.Sprintf("2001:db8:100::%d", 11+i)
		if _, err := segment.Plug(n.Host, v4+"/24", v6+"/64"); err != nil {
			t.Fatal(err)
		}
		if err := c.cluster.AddNode(t.Context(), fmt.Sprint("node-", i), "", []string{v4, v6}, []string{fmt.Sprintf("10.244.%d.0/24", 100+i), fmt.Sprintf("2001:db8:244::%x00/120", 100+i)}); err != nil {
			t.Fatal(err)
		}
		c.nodes = append(c.nodes, n)
		c.configs = append(c.configs, c.configOf(i))
	}
	return c
}

// kubeconfig is that of a node's agent.
func (c *clustered) kubeconfig(i int) string {
	c.t.Helper()
	path, err := c.cluster.PodKubeconfig(c.t.Context(), "kube-system", "pentad", fmt.Sprint("node-", i))
	if err != nil {
		c.t.Fatal(err)
	}
	return path
}

func (c *clustered) configOf(i int) string {
	return fmt.Sprintf("source: {kubernetes: {kubeconfig: %s, node: node-%d}}\npods: {overlay: vxlan, blockSize: 24, ranges: [10.244.0.0/16, '2001:db8:244::/112']}\n", c.kubeconfig(i), i)
}

func (c *clustered) blocks() (map[string]string, error) {
	store, err := claimkube.New(c.cluster.Config)
	if err != nil {
		return nil, err
	}
	var all map[string]string
	ctx, stop := context.WithCancel(c.t.Context())
	defer stop()
	err = store.Follow(ctx, func(t claim.Table) {
		all = make(map[string]string)
		for p, b := range t.Blocks {
			all[p.String()] = b.Owner.Name
		}
		stop()
	})
	if all != nil {
		return all, nil
	}
	return nil, err
}

// Nodes of a cluster claim the ranges that it has given them, where these are blocks of the
// pool; their pods talk; without the API server and the agents pods come and go. The blocks
// of a Node that was deleted are free after a while, and not before.
func TestClusterBlocks(t *testing.T) {
	t.Parallel()
	c := newClustered(t, 2)
	var pods [2]*pod
	for i, n := range c.nodes {
		n.RunAgent(c.configs[i])
		n.mayAdd()
		pods[i] = n.newPod()
		n.add(pods[i])
		n.serve(pods[i].Host, fmt.Sprint("pod", i))
	}
	want := map[string]string{"10.244.100.0/24": "node-0", "10.244.101.0/24": "node-1"}
	have, err := c.blocks()
	if err != nil || fmt.Sprint(have) != fmt.Sprint(want) {
		t.Fatalf("the blocks are %v (%v), want %v: what the cluster gave to the nodes", have, err, want)
	}
	if !strings.HasPrefix(pods[0].v6.String(), "2001:db8:244::64") {
		t.Errorf("the pod has %s, which does not go with %s", pods[0].v6, pods[0].v4)
	}
	connected := func() {
		t.Helper()
		for i, n := range c.nodes {
			to := pods[1-i]
			n.Eventually("there is a way to the other node", func() error {
				out, err := n.Run(t.Context(), lab.Outside, "sh", "-c", "ip route; ip -6 route")
				if err == nil && strings.Count(out, "dev pentad.vxlan") < 2 {
					err = errors.New(out)
				}
				return err
			})
			n.asks(pods[i].Host, to.v4, fmt.Sprint("pod", 1-i), pods[i].v4.String())
			n.asks(pods[i].Host, to.v6, fmt.Sprint("pod", 1-i), pods[i].v6.String())
		}
	}
	connected()
	c.cluster.KillAPIServer()
	c.nodes[0].Agent.Kill()
	extra := c.nodes[0].newPod()
	c.nodes[0].add(extra)
	connected()
	if _, err := c.nodes[0].cni("DEL", extra, "1.1.0", ""); err != nil {
		t.Error(err)
	}
	if err := c.cluster.StartAPIServer(); err != nil {
		t.Fatal(err)
	}
	if err := c.cluster.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.nodes[0].RunAgent(c.configs[0])
	connected()

	// A node writes blocks of its own, and nobody else's.
	rest, err := clientcmd.BuildConfigFromFlags("", filepath.Join(c.cluster.Host.Dir, "kube-system-pentad-node-1.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	rest.Dial = c.cluster.Config.Dial
	thief, err := claimkube.New(rest)
	if err != nil {
		t.Fatal(err)
	}
	for name, allowed := range map[string]bool{"node-0": false, "node-1": true} {
		b := claim.Block{Block: ipam.Block{V4: netip.MustParsePrefix("10.244.200.0/24")}, Owner: claim.Owner{Name: name}, Epoch: 1}
		if err := thief.Create(t.Context(), b); (err == nil) != allowed {
			t.Errorf("node-1 makes a block of %s: %v", name, err)
		}
	}
	if err := c.cluster.Client.Discovery().RESTClient().Delete().AbsPath("/apis/pentad.io/v1alpha1/addressblocks/10-244-200-0-24").Do(t.Context()).Error(); err != nil {
		t.Error(err)
	}

	controller, err := c.cluster.AccountKubeconfig(t.Context(), "kube-system", "pentad-controller")
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.cluster.Host.Start(exec.Command(e2e.Program(), "controller", "--kubeconfig", controller, "--lease", "2s", "--quarantine", "3s"), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	c.nodes[1].Agent.Kill()
	if err := c.cluster.Client.CoreV1().Nodes().Delete(t.Context(), "node-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	deleted := time.Now()
	c.nodes[0].Eventually("the block of the node is free", func() error {
		have, err := c.blocks()
		if err == nil && len(have) != 1 {
			err = fmt.Errorf("%v\n%s", have, p.Log)
		}
		return err
	})
	if took := time.Since(deleted); took < 2500*time.Millisecond {
		t.Errorf("it was free after %s, before the quarantine was over", took)
	}
	c.nodes[0].Eventually("nothing leads there any more", func() error {
		out, err := c.nodes[0].Run(t.Context(), lab.Outside, "ip", "route")
		if err == nil && strings.Contains(out, "10.244.101.") {
			err = errors.New(out)
		}
		return err
	})
	if have, err := c.blocks(); err != nil || have["10.244.100.0/24"] != "node-0" {
		t.Errorf("the blocks are %v (%v): that of the other node is its own", have, err)
	}
}

// The same race as in etcd, at an API server.
func TestClusterRace(t *testing.T) {
	t.Parallel()
	c := newClustered(t, 0)
	r := race.Race{Hosts: 16, Claims: 120, Frees: 10, Wanted: 3, Life: 1500 * time.Millisecond, Pool: ipam.BlockPool{V4: netip.MustParsePrefix("10.0.0.0/16"), HostBits: 6}, Store: func() (claim.Store, error) {
		return claimkube.New(c.cluster.Config)
	}}
	began := time.Now()
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	result, err := r.Run(ctx)
	t.Logf("%+v in %s", result, time.Since(began))
	if err != nil {
		t.Error(err)
	}
	if result.Freed < 10 || result.Refused > 2*result.Claimed {
		t.Errorf("hardly any was freed in two minutes, or most claims were refused: %+v", result)
	}
	// A name that is not that of the prefixes, and another owner, are refused.
	store, err := claimkube.New(c.cluster.Config)
	if err != nil {
		t.Fatal(err)
	}
	b := claim.Block{Block: ipam.Block{V4: netip.MustParsePrefix("10.9.0.0/26")}, Owner: claim.Owner{Name: "a"}, Epoch: 1}
	if err := store.Create(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := store.Create(t.Context(), b); !errors.Is(err, claim.ErrTaken) {
		t.Errorf("a block is made twice: %v", err)
	}
	b.ID, b.Revision = "ffffffff-0000-0000-0000-000000000000", "1"
	for _, err := range []error{store.Update(t.Context(), b), store.Delete(t.Context(), b)} {
		if !errors.Is(err, claim.ErrChanged) {
			t.Errorf("an object of another time is written: %v", err)
		}
	}
}
