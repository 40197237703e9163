package pods_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
)

// fleet is hosts on one segment that share an etcd.
type fleet struct {
	t       *testing.T
	segment *lab.Switch
	store   *lab.Host
	etcd    *lab.Process
	nodes   []*node
}

func newFleet(t *testing.T, hosts int) *fleet {
	t.Helper()
	lab.Need(t)
	f := &fleet{t: t, store: e2e.New(t).Host}
	var err error
	if f.segment, err = lab.NewSwitch(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.segment.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := f.segment.Plug(f.store, "198.51.100.10/24"); err != nil {
		t.Fatal(err)
	}
	f.startEtcd()
	for i := range hosts {
		n := &node{World: e2e.New(t), t: t}
		if _, err := f.segment.Plug(n.Host, fmt.Sprintf("198.51.100.%d/24", 11+i), fmt.Sprintf("2001:db8:100::%d/64", 11+i)); err != nil {
			t.Fatal(err)
		}
		f.nodes = append(f.nodes, n)
	}
	return f
}

func (f *fleet) startEtcd() {
	f.t.Helper()
	const url = "http://198.51.100.10:2379"
	p, err := f.store.Start(exec.Command("etcd", "--data-dir", filepath.Join(f.store.Dir, "etcd"), "--unsafe-no-fsync", "--listen-client-urls", url+",http://127.0.0.1:2379",
		"--advertise-client-urls", url, "--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380",
		"--initial-cluster", "default=http://127.0.0.1:2380"), lab.Outside)
	if err != nil {
		f.t.Fatal(err)
	}
	f.etcd = p
}

// ctl runs etcdctl.
func (f *fleet) ctl(args ...string) string {
	f.t.Helper()
	cmd := exec.Command("etcdctl", args...)
	cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
	p, err := f.store.Start(cmd, lab.Outside)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		f.t.Fatalf("etcdctl %v: %v: %s", args, err, p.Log)
	}
	return p.Log.String()
}

func (f *fleet) config(i int, pods string) string {
	return fmt.Sprintf(`services: []
host: {name: host-%d}
source: {etcd: {endpoints: ["http://198.51.100.10:2379"]}}
pods: %s
`, i, pods)
}

const fleetPods = `{overlay: vxlan, ranges: [10.244.0.0/16, "2001:db8:244::/48"]}`

// run starts the agent of a host.
func (f *fleet) run(i int, pods string) { f.nodes[i].RunAgent(f.config(i, pods)) }

// blocks returns what a host knows of all blocks.
func (n *node) blocks() (all []api.Block) {
	n.t.Helper()
	out := n.MustPentad("pod", "blocks", "-o", "json")
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		n.t.Fatalf("%v: %s", err, out)
	}
	return all
}

func own(all []api.Block) (mine []api.Block) {
	return slices.DeleteFunc(slices.Clone(all), func(b api.Block) bool { return !b.Own })
}

// mayAdd waits until pods can be added.
func (n *node) mayAdd() {
	n.t.Helper()
	n.Eventually("the host has a block", func() error {
		if all := own(n.blocks()); len(all) == 0 {
			return errors.New("it has none")
		}
		b, err := os.ReadFile(filepath.Join(n.Dir, "run", "pods.json"))
		if err == nil && !strings.Contains(string(b), `"v4"`) {
			err = errors.New(string(b))
		}
		return err
	})
}

// Hosts that were told nothing of each other claim blocks in etcd, and their pods talk.
// Without etcd and without agents all goes on, and pods come and go.
func TestClaimedBlocks(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3)
	for i := range f.nodes {
		f.run(i, fleetPods)
	}
	var pods [3]*pod
	for i, n := range f.nodes {
		n.mayAdd()
		pods[i] = n.newPod()
		n.add(pods[i])
		n.serve(pods[i].Host, fmt.Sprint("pod", i))
	}
	seen := make(map[netip.Prefix]string)
	for _, b := range f.nodes[0].blocks() {
		if len(b.Prefixes) != 2 || len(b.Addresses) != 2 || b.Draining {
			t.Errorf("a block is %+v", b)
		}
		if seen[b.Prefixes[0]] != "" {
			t.Errorf("two have %s", b.Prefixes[0])
		}
		seen[b.Prefixes[0]] = b.Host
	}
	if len(seen) != 3 {
		t.Errorf("there are the blocks %v", seen)
	}
	connected := func() {
		t.Helper()
		for i, n := range f.nodes {
			to := pods[(i+1)%3]
			n.asks(pods[i].Host, to.v4, fmt.Sprint("pod", (i+1)%3), pods[i].v4.String())
			n.asks(pods[i].Host, to.v6, fmt.Sprint("pod", (i+1)%3), pods[i].v6.String())
		}
	}
	f.nodes[0].Eventually("pods of all hosts are reached", func() error {
		for i, n := range f.nodes {
			if out, err := n.Run(t.Context(), lab.Outside, "sh", "-c", "ip route; ip -6 route"); err != nil || strings.Count(out, "dev pentad.vxlan") < 6 {
				return fmt.Errorf("host %d: %v: %s", i, err, out)
			}
		}
		return nil
	})
	connected()
	f.etcd.Kill()
	f.nodes[0].Eventually("status says that the store is away", func() error {
		if out, _ := f.nodes[0].Pentad("status"); !strings.Contains(out, "away") {
			return errors.New(out)
		}
		return nil
	})
	f.nodes[1].Agent.Kill()
	extra := f.nodes[1].newPod()
	f.nodes[1].add(extra)
	connected()
	f.startEtcd()
	f.run(1, fleetPods)
	f.nodes[1].mayAdd()
	if n := len(own(f.nodes[1].blocks())); n != 1 {
		t.Errorf("host 1 has %d blocks after its agent came back", n)
	}
	connected()
}

// A host claims the next block before the last one is full, and gives it back; a range
// that is taken out of the file is given up when its last pod is gone, and not before.
func TestBlocksComeAndGo(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	const small = `{overlay: direct, ranges: [10.244.0.0/24], blockSize: 28}`
	n := f.nodes[0]
	f.run(0, small)
	n.mayAdd()
	first := own(n.blocks())[0].Prefixes[0]
	var pods []*pod
	for range 20 {
		p := n.newPod()
		n.Eventually("a pod is added", func() error {
			_, err := n.cni("ADD", p, "1.1.0", "")
			return err
		})
		pods = append(pods, p)
	}
	n.Eventually("there is a spare block", func() error {
		free := 0
		for _, b := range own(n.blocks()) {
			free += 15 - *b.Used
		}
		if free < 7 {
			return fmt.Errorf("%d addresses are free: %+v", free, own(n.blocks()))
		}
		return nil
	})
	// Another range: what pods have stays, and nobody else gets it.
	f.run(1, small)
	f.nodes[1].mayAdd()
	const other = `{overlay: direct, ranges: [10.245.0.0/24], blockSize: 28}`
	n.Configure(f.config(0, other))
	n.Eventually("blocks of the old range drain, one is of the new one", func() error {
		all := own(n.blocks())
		draining, fresh := 0, 0
		for _, b := range all {
			if netip.MustParsePrefix("10.245.0.0/24").Contains(b.Prefixes[0].Addr()) {
				fresh++
			} else if b.Draining {
				draining++
			}
		}
		if draining < 2 || draining+fresh != len(all) || fresh == 0 {
			return fmt.Errorf("%+v", all)
		}
		return nil
	})
	for _, b := range own(n.blocks()) {
		if b.Draining && *b.Used == 0 && b.Prefixes[0] == first {
			t.Errorf("%s has no pods: %+v", first, b)
		}
	}
	if out, err := n.Pentad("pod", "release", first.String(), "--force"); err == nil || !strings.Contains(out, "this host's own") {
		t.Errorf("a block of one's own is released by force: %v: %s", err, out)
	}
	for _, p := range pods {
		if _, err := n.cni("DEL", p, "1.1.0", ""); err != nil {
			t.Error(err)
		}
	}
	n.Eventually("the old blocks are given back", func() error {
		for _, b := range f.nodes[1].blocks() {
			if b.Host == "host-0" && strings.HasPrefix(b.Prefixes[0].String(), "10.244.") {
				return fmt.Errorf("%+v", b)
			}
		}
		return nil
	})
	if out, err := n.Run(t.Context(), lab.Outside, "ip", "route", "show", "table", "main", "type", "unreachable"); err != nil || strings.Contains(out, first.String()) {
		t.Errorf("the discard of a block that was given back is left: %v: %s", err, out)
	}
	// A host that is gone for good: somebody says so.
	n.Agent.Kill()
	gone := own(f.nodes[1].blocks())[0].Prefixes[0]
	f.nodes[1].Agent.Kill()
	f.run(0, small)
	n.mayAdd()
	if out, err := n.Pentad("pod", "release", gone.String()); err == nil || !strings.Contains(out, "--force") {
		t.Errorf("a block of another host is released without --force: %v: %s", err, out)
	}
	if out := n.MustPentad("pod", "release", gone.String(), "--force"); !strings.Contains(out, "host-1") {
		t.Errorf("it does not say whose it was: %s", out)
	}
	n.Eventually("it is gone", func() error {
		if out := f.ctl("get", "/pentad/v1/blocks/", "--prefix", "--keys-only"); strings.Contains(out, strings.NewReplacer(".", "-", "/", "-").Replace(gone.String())) {
			return errors.New(out)
		}
		return nil
	})
}

// What makes no sense in etcd, and pools without a free block, are said, and stop nothing
// else.
func TestBlocksThatMakeNoSense(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	n := f.nodes[0]
	f.ctl("put", "/pentad/v1/blocks/10-244-0-0-28", "rubbish")
	f.ctl("put", "/pentad/v1/blocks/10-244-0-16-28", `{"prefixes":["10.244.0.32/28"],"host":"mallory"}`)
	f.ctl("put", "/pentad/v1/blocks/10-244-0-32-28", `{"prefixes":["10.244.0.32/28"],"host":""}`)
	f.run(0, `{ranges: [10.244.0.0/26], blockSize: 28}`)
	n.mayAdd()
	mine := own(n.blocks())
	if len(mine) != 1 || mine[0].Prefixes[0].String() != "10.244.0.48/28" {
		t.Fatalf("the host has %+v; only the last block is free", mine)
	}
	var pods []*pod
	for range 15 {
		pods = append(pods, n.newPod())
		n.add(pods[len(pods)-1])
	}
	last := n.newPod()
	if _, err := n.cni("ADD", last, "1.1.0", ""); err == nil || !strings.Contains(err.Error(), "\"code\": 11") {
		t.Errorf("a pod without an address: %v", err)
	}
	n.Eventually("status says what is wrong", func() error {
		out, _ := n.Pentad("status")
		for _, want := range []string{"10-244-0-0-28", "not those of its name", "whose it is", "no block of addresses is free"} {
			if !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
				return fmt.Errorf("there is no %q: %s", want, out)
			}
		}
		return nil
	})
	f.ctl("del", "/pentad/v1/blocks/10-244-0-0-28")
	n.Eventually("the pod is added", func() error {
		_, err := n.cni("ADD", last, "1.1.0", "")
		return err
	})
	// A store that forgets its past is read anew.
	revision := strings.Fields(f.ctl("get", "/pentad/v1/blocks/", "--prefix", "-w", "fields"))
	i := slices.Index(revision, `"Revision"`)
	f.ctl("compact", revision[i+2])
	f.ctl("del", "/pentad/v1/blocks/10-244-0-16-28")
	n.Eventually("the list is up to date", func() error {
		if out, _ := n.Pentad("status"); strings.Contains(out, "not those of its name") {
			return errors.New(out)
		}
		return nil
	})
}

// A host that is started anew takes its blocks over; a copy of a machine that lives gets
// none, and does not fight for them. Objects that lead elsewhere lead nowhere, and one host
// that is not on the segment keeps nobody from his pods.
func TestCopiesAndLiars(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	f.ctl("put", "/pentad/v1/blocks/10-244-9-0-26", `{"prefixes":["10.244.9.0/26"],"host":"far","addresses":["203.0.113.9"]}`)
	f.ctl("put", "/pentad/v1/blocks/203-0-113-0-24", `{"prefixes":["203.0.113.0/24"],"host":"liar","addresses":["198.51.100.99"]}`)
	f.ctl("put", "/pentad/v1/blocks/10-244-9-64-26", `{"prefixes":["10.244.9.64/26"],"host":"silent"}`)
	f.ctl("put", "/pentad/v1/blocks/10-244-9-128-26", `{"prefixes":["10.244.9.128/26"],"host":"odd","addresses":[""]}`)
	const direct = `{overlay: direct, ranges: [10.244.0.0/16]}`
	n := f.nodes[0]
	n.Configure(f.config(0, direct))
	n.Agent = n.Launch()
	n.Eventually("the agent answers", func() error {
		_, err := n.Pentad("pod", "blocks")
		return err
	})
	n.mayAdd()
	a := n.newPod()
	n.add(a)
	n.Eventually("the host that is not on the segment is named", func() error {
		if out, _ := n.Pentad("status"); !strings.Contains(strings.Join(strings.Fields(out), " "), "10.244.9.0/26 by 203.0.113.9") {
			return errors.New(out)
		}
		return nil
	})
	if out, err := n.Run(t.Context(), lab.Outside, "ip", "route"); err != nil || strings.Contains(out, "198.51.100.99") {
		t.Errorf("a liar has got packets of another network: %v: %s", err, out)
	}
	f.ctl("del", "/pentad/v1/blocks/10-244-9-0-26")
	n.Eventually("all is well without it", func() error {
		out, err := n.Pentad("status")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
	// A copy of it, of the same name.
	copied := f.nodes[1]
	copied.Configure(f.config(0, direct))
	copied.Agent = copied.Launch()
	copied.Eventually("the copy knows what it is", func() error {
		if out, _ := copied.Pentad("status"); !strings.Contains(strings.Join(strings.Fields(out), " "), "another host lives that has the name and the machine id") {
			return errors.New(out)
		}
		return nil
	})
	if _, err := os.Stat(filepath.Join(copied.Dir, "run", "pods.json")); err == nil {
		t.Error("plugins of the copy were told of blocks")
	}
	revision := func() string { return f.ctl("get", "/pentad/v1/blocks/", "--prefix", "-w", "fields") }
	modified := func() (all []string) {
		for line := range strings.Lines(revision()) {
			if strings.Contains(line, "ModRevision") {
				all = append(all, line)
			}
		}
		return all
	}
	var before []string
	n.Eventually("both are at rest", func() error {
		if now := modified(); !slices.Equal(now, before) {
			before = now
			return errors.New("something was written")
		}
		return nil
	})
	n.Eventually("the host that lives is well", func() error {
		out, err := n.Pentad("status")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
	copied.Agent.Kill()
	// The host is started anew: the run directory is empty then, and nobody objects.
	mine := own(n.blocks())
	n.Agent.Kill()
	if err := os.RemoveAll(filepath.Join(n.Dir, "run")); err != nil {
		t.Fatal(err)
	}
	n.RunAgent(f.config(0, direct))
	n.mayAdd()
	if now := own(n.blocks()); len(now) != len(mine) || now[0].Prefixes[0] != mine[0].Prefixes[0] {
		t.Errorf("after a new start it has %+v, before it %+v", now, mine)
	}
}
