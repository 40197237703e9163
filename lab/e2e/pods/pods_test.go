// Package pods_test tests the network of pods: the CNI plugin on a host with an agent, or
// without one.
package pods_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/plane/pod/attach"
)

// plugin is the path of the built plugin.
var plugin string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] != "" && !strings.HasPrefix(os.Args[1], "-test.") {
		e2e.Main(m, nil) // a helper
	}
	dir, err := os.MkdirTemp("", "pentad-cni-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	plugin = filepath.Join(dir, "pentad-cni")
	build := exec.Command("go", "build", "-o", plugin, "github.com/pentad/pentad/cmd/pentad-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %s\n", err, out)
		os.Exit(1)
	}
	e2e.Main(m, nil)
}

const file = `services: []
pods:
  blocks: [10.244.1.0/26, "2001:db8:244:1::/122"]
  ranges: [10.244.0.0/16, "2001:db8:244::/48"]
`

// pod is a network namespace that gets a device.
type pod struct {
	*lab.Host
	id, netns string
	process   *lab.Process
	v4, v6    netip.Addr
	device    string
}

// node is a host with a neighbour outside.
type node struct {
	*e2e.World
	t       *testing.T
	outside *lab.Host
	pods    int
}

func newNode(t *testing.T) *node {
	t.Helper()
	lab.Need(t)
	n := &node{World: e2e.New(t), t: t, outside: e2e.New(t).Host}
	_, _, err := lab.Wire(n.Host, []string{"198.51.100.1/24", "2001:db8:100::1/64"}, n.outside, []string{"198.51.100.2/24", "2001:db8:100::2/64"})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) newPod() *pod {
	n.t.Helper()
	n.pods++
	h := e2e.New(n.t).Host
	p, err := h.Start(exec.Command("sleep", "1000"), lab.Outside)
	if err != nil {
		n.t.Fatal(err)
	}
	return &pod{Host: h, process: p, id: fmt.Sprintf("container%d", n.pods), netns: fmt.Sprintf("/proc/%d/ns/net", p.Process.Pid)}
}

// cni runs the plugin, and returns what it prints.
func (n *node) cni(verb string, p *pod, version, more string) (map[string]any, error) {
	n.t.Helper()
	conf := fmt.Sprintf(`{"cniVersion": %q, "name": "pods", "type": "pentad-cni", "network": %q%s}`, version, filepath.Join(n.Dir, "run", "pods.json"), more)
	cmd := exec.Command(plugin)
	cmd.Stdin = strings.NewReader(conf)
	var out bytes.Buffer
	cmd.Stdout = &out
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_PATH=/nowhere")
	if p != nil {
		cmd.Env = append(cmd.Env, "CNI_CONTAINERID="+p.id, "CNI_NETNS="+p.netns, "CNI_IFNAME=eth0", "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web")
	}
	proc, err := n.Start(cmd, lab.Outside)
	if err != nil {
		n.t.Fatal(err)
	}
	failed := proc.Wait()
	answer := make(map[string]any)
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
			n.t.Fatalf("%s: %v: %s%s", verb, err, out.String(), proc.Log)
		}
	}
	if failed != nil {
		return answer, fmt.Errorf("%s: %w: %s%s", verb, failed, out.String(), proc.Log)
	}
	return answer, nil
}

// add gives a pod its device.
func (n *node) add(p *pod) {
	n.t.Helper()
	result, err := n.cni("ADD", p, "1.1.0", "")
	if err != nil {
		n.t.Fatal(err)
	}
	for _, ip := range result["ips"].([]any) {
		a := netip.MustParsePrefix(ip.(map[string]any)["address"].(string)).Addr()
		if a.Is4() {
			p.v4 = a
		} else {
			p.v6 = a
		}
	}
	p.device = result["interfaces"].([]any)[0].(map[string]any)["name"].(string)
}

// serve has a pod, or a host, answer.
func (n *node) serve(h *lab.Host, name string) {
	n.t.Helper()
	p, err := h.Start(actor.Command("repeat", name, ":80"), lab.Outside)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Eventually(name+" serves", func() error {
		if !strings.HasPrefix(p.Log.String(), "ready\n") {
			return errors.New(p.Log.String())
		}
		return nil
	})
}

// asks fails the test unless a host reaches a server, which sees it as client.
func (n *node) asks(from *lab.Host, to netip.Addr, server, client string) {
	n.t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		p, err := from.Start(actor.Command("ask often", network, netip.AddrPortFrom(to, 80).String(), "1"), lab.Outside)
		if err != nil {
			n.t.Fatal(err)
		}
		if err := p.Wait(); err != nil || !strings.HasPrefix(p.Log.String(), server+" "+client) {
			n.t.Errorf("%s to %s: %q, %v; want %s %s", network, to, p.Log, err, server, client)
		}
	}
}

// Pods reach each other, their host and who is outside, over both families, and go when
// they are taken away.
func TestPods(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.RunAgent(file)
	a, b := n.newPod(), n.newPod()
	if _, err := n.cni("STATUS", nil, "1.1.0", ""); err != nil {
		t.Error(err)
	}
	n.add(a)
	n.add(b)
	if a.v4 == b.v4 || a.v6 == b.v6 || !a.v4.IsValid() || !a.v6.IsValid() {
		t.Fatalf("the pods have %s, %s and %s, %s", a.v4, a.v6, b.v4, b.v6)
	}
	for h, name := range map[*lab.Host]string{a.Host: "a", b.Host: "b", n.Host: "node", n.outside: "outside"} {
		n.serve(h, name)
	}
	node4, node6 := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:100::1")
	out4, out6 := netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8:100::2")
	connected := func() {
		t.Helper()
		n.asks(a.Host, b.v4, "b", a.v4.String())
		n.asks(b.Host, a.v6, "a", b.v6.String())
		n.asks(n.Host, a.v4, "a", "")
		n.asks(n.Host, a.v6, "a", "")
		n.asks(a.Host, node4, "node", a.v4.String())
		n.asks(a.Host, node6, "node", a.v6.String())
		n.asks(a.Host, a.v4, "a", a.v4.String())
		// Who is outside sees the host.
		n.asks(a.Host, out4, "outside", node4.String())
		n.asks(b.Host, out6, "outside", node6.String())
	}
	connected()
	if _, err := n.cni("CHECK", a, "1.1.0", ""); err != nil {
		t.Error(err)
	}
	// Again it is the same.
	was := *a
	n.add(a)
	if a.v4 != was.v4 || a.device != was.device {
		t.Errorf("a second ADD gives %s at %s, before it was %s at %s", a.v4, a.device, was.v4, was.device)
	}
	// Of one that was interrupted before it could say whose the device is nothing is left.
	if out, err := n.Run(t.Context(), lab.Outside, "ip", "link", "set", "dev", a.device, "alias", ""); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n.add(a)
	connected()
	// What somebody takes away comes back.
	for _, args := range [][]string{
		{"ip", "route", "del", a.v4.String()}, {"ip", "-6", "route", "del", a.v6.String()}, {"nft", "delete", "table", "inet", "pentad-pods"},
		{"ip", "route", "del", "unreachable", "10.244.1.0/26"},
	} {
		if out, err := n.Run(t.Context(), lab.Outside, args[0], args[1:]...); err != nil {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	n.Eventually("all is back", func() error {
		out, err := n.Run(t.Context(), lab.Outside, "sh", "-c", "ip route; ip -6 route; nft list tables")
		for _, want := range []string{a.v4.String() + " dev", a.v6.String() + " dev", "pentad-pods", "unreachable 10.244.1.0/26"} {
			if !strings.Contains(out, want) {
				return fmt.Errorf("there is no %s: %s (%v)", want, out, err)
			}
		}
		return nil
	})
	connected()
	// Without an agent pods go on, come and go.
	n.Agent.Kill()
	connected()
	c := n.newPod()
	n.add(c)
	n.asks(c.Host, a.v4, "a", c.v4.String())
	if _, err := n.cni("DEL", c, "1.1.0", ""); err != nil {
		t.Error(err)
	}
	if _, err := n.cni("DEL", c, "1.1.0", ""); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if _, err := n.cni("CHECK", c, "1.1.0", ""); err == nil {
		t.Error("CHECK finds a device that is gone")
	}
	// The address of nobody answers at once.
	began := time.Now()
	p, err := a.Start(actor.Command("ask often", "tcp", netip.AddrPortFrom(c.v4, 80).String(), "1"), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	_ = p.Wait()
	if took := time.Since(began); took > time.Second || !strings.Contains(p.Log.String(), "failed") {
		t.Errorf("the address of a dead pod: %s after %v", p.Log, took)
	}
	// An address that is not the pod's gets nowhere, whatever rp_filter is.
	for _, args := range [][]string{{"all"}, {a.device}} {
		if err := n.Sysctl("net/ipv4/conf/"+args[0]+"/rp_filter", "0"); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.AddAddress("10.244.1.63/32", "2001:db8:244:1::3f/128"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ source, to string }{{"10.244.1.63", b.v4.String()}, {"2001:db8:244:1::3f", b.v6.String()}} {
		if out, err := a.Run(t.Context(), lab.Outside, "curl", "-s", "-m", "1", "--interface", c.source, fmt.Sprintf("http://%s/", hostOf(c.to))); err == nil {
			t.Errorf("the pod sends as %s: %s", c.source, out)
		}
	}
	// Nor does one to the host's loopback, though the host would take it.
	if err := errors.Join(n.Sysctl("net/ipv4/conf/"+a.device+"/route_localnet", "1"), a.Sysctl("net/ipv4/conf/all/route_localnet", "1")); err != nil {
		t.Fatal(err)
	}
	if out, err := a.Run(t.Context(), lab.Outside, "sh", "-c", "ip route add 127.1.2.3/32 via 169.254.1.1 && ip rule add pref 0 to 127.1.2.3 lookup main && ip rule del pref 0 lookup local && ip rule add pref 1 lookup local"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := a.Run(t.Context(), lab.Outside, "curl", "-s", "-m", "1", "--interface", a.v4.String(), "http://127.1.2.3/"); err == nil || strings.Contains(out, "node") {
		t.Errorf("the pod reaches the host's loopback: %s", out)
	}
	// A pod that is gone has left nothing.
	a.process.Kill()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	n.Eventually("its device is gone", func() error {
		if out, err := n.Run(t.Context(), lab.Outside, "ip", "link", "show", a.device); err == nil {
			return errors.New(out)
		}
		return nil
	})
	n.MustPentad("down")
	out, _ := n.Run(t.Context(), lab.Outside, "sh", "-c", "ip link; ip route; ip -6 route; nft list tables")
	for _, left := range []string{"pd0a", "unreachable 10.244", "unreachable 2001:db8:244", "pentad-pods"} {
		if strings.Contains(out, left) {
			t.Errorf("%s is left: %s", left, out)
		}
	}
}

func hostOf(a string) string {
	if strings.Contains(a, ":") {
		return "[" + a + "]"
	}
	return a
}

// Many pods at once have addresses of their own; one more than there are is told to come
// later; what is collected is what nobody knows.
func TestManyPods(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.RunAgent("services: []\npods: {blocks: [10.244.1.0/28]}\n")
	var pods []*pod
	for range 16 {
		pods = append(pods, n.newPod())
	}
	errs := make([]error, len(pods))
	var all sync.WaitGroup
	for i, p := range pods {
		all.Go(func() {
			result, err := n.cni("ADD", p, "1.0.0", "")
			if errs[i] = err; err == nil {
				p.v4 = netip.MustParsePrefix(result["ips"].([]any)[0].(map[string]any)["address"].(string)).Addr()
			}
		})
	}
	all.Wait()
	seen := make(map[netip.Addr]bool)
	for i, p := range pods {
		switch {
		case errs[i] != nil && strings.Contains(errs[i].Error(), `"code": 11`) && strings.Contains(errs[i].Error(), "10.244.1.0/28"):
		case errs[i] != nil:
			t.Error(errs[i])
		case seen[p.v4]:
			t.Errorf("%s was given twice", p.v4)
		default:
			seen[p.v4] = true
		}
	}
	if len(seen) != 15 {
		t.Errorf("%d pods have an address, not 15", len(seen))
	}
	// That is no reason to take those away that are well.
	if _, err := n.cni("STATUS", nil, "1.1.0", ""); err != nil {
		t.Error(err)
	}
	// A pod with the network of the host would cut it off.
	if _, err := n.cni("ADD", &pod{id: "own", netns: "/proc/self/ns/net"}, "1.0.0", ""); err == nil || !strings.Contains(err.Error(), "is that of the host") {
		t.Errorf("a pod with the network of the host: %v", err)
	}
	if _, err := n.cni("GC", nil, "1.1.0", ""); err == nil {
		t.Error("GC that names nobody has removed something")
	}
	// Only two are known to the runtime.
	kept := ""
	for _, p := range pods {
		if p.v4.IsValid() && strings.Count(kept, "eth0") < 2 {
			kept += fmt.Sprintf(`,{"containerID": %q, "ifname": "eth0"}`, p.id)
		}
	}
	if _, err := n.cni("GC", nil, "1.1.0", fmt.Sprintf(`, "cni.dev/valid-attachments": [%s]`, kept[1:])); err != nil {
		t.Error(err)
	}
	out, err := n.Run(t.Context(), lab.Outside, "sh", "-c", "ip -o link | grep -c pd0a")
	if err != nil || strings.TrimSpace(out) != "2" {
		t.Errorf("after GC there are %s devices, %v", out, err)
	}
	if attach.Protocol != host.RouteProtocol {
		t.Errorf("the plugin marks routes with %d, the agent with %d", attach.Protocol, host.RouteProtocol)
	}
}
