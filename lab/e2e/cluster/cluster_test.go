// Package cluster tests pentad as a cluster has it: a real API server, an agent
// on each of several nodes, servers in pods, and clients in a pod, on a node and
// outside of the cluster.
package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/kube"
)

// patience bounds every wait for something that should happen soon.
const patience = 20 * time.Second

// program is the built pentad; binaries are those of Kubernetes.
var program, binaries, helm string

func TestMain(m *testing.M) {
	actor.Main(map[string]actor.Role{"ask": answerLines})
	os.Exit(buildAndRun(m))
}

func buildAndRun(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // every test says that it needs root
	}
	dir, err := os.MkdirTemp("", "pentad-cluster-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "pentad")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/pentad/pentad/cmd/pentad").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %s\n", err, out)
		return 1
	}
	ctx := context.Background()
	if binaries, err = kube.Build(ctx, kube.APIServer, kube.ControllerManager, kube.Scheduler, kube.Kubelet, kube.Proxy); err == nil {
		helm, err = kube.Helm(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if err := shared.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// answerLines is a client: it reads "tcp ADDRESS:PORT" (or udp) and writes what the
// server there says, or "error" and why there is none. It binds an address ("bind"),
// holds a connection ("hold") and says later whether that is "alive" still, lets it
// go ("drop"), makes one that may take long ("wait"), asks by UDP from one port each time ("from PORT ADDRESS:PORT"), and by
// one connected socket, which the first time makes ("again").
func answerLines([]string) error {
	held, asked := make(map[string]net.Conn), newAsker()
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		verb, rest, _ := strings.Cut(lines.Text(), " ")
		answer, err := "", error(nil)
		switch verb {
		case "hold":
			held[rest], answer, err = hold(rest, quickly)
		case "wait":
			held[rest], answer, err = hold(rest, patience)
		case "alive":
			answer, err = isAlive(held[rest])
		case "drop":
			answer = "dropped"
			if c := held[rest]; c != nil {
				c.Close()
			}
		case "many":
			answer, err = asked.many(rest)
		case "from":
			answer, err = askFrom(rest)
		case "again":
			c := held["udp "+rest]
			if c == nil {
				if c, err = net.Dial("udp", rest); err == nil {
					held["udp "+rest] = c
				}
			}
			if c != nil {
				answer, err = askAgain(c)
			}
		default:
			answer, err = askOnce(verb, rest)
		}
		if err != nil {
			fmt.Println("error", strings.ReplaceAll(err.Error(), "\n", " "))
			continue
		}
		fmt.Println(strings.TrimSpace(answer))
	}
	return nil
}

// hold makes a connection and returns what the server said.
func hold(address string, within time.Duration) (net.Conn, string, error) {
	d := net.Dialer{Timeout: within}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", address)
	if err != nil {
		return nil, "", err
	}
	if err := c.SetReadDeadline(time.Now().Add(quickly)); err != nil {
		return nil, "", err
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	return c, string(b[:n]), err
}

// isAlive reports why a connection is none any more.
func isAlive(c net.Conn) (string, error) {
	if c == nil {
		return "", errors.New("there was none")
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return "", err
	}
	if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		return "", err
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return "", fmt.Errorf("it ended: %w", err)
	}
	return "alive", nil
}

// askAgain asks by a UDP socket that is connected.
func askAgain(c net.Conn) (string, error) {
	if _, err := c.Write([]byte("?\n")); err != nil {
		return "", err
	}
	if err := c.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		return "", err
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	return string(b[:n]), err
}

// askFrom asks by UDP from a port: "PORT ADDRESS:PORT".
func askFrom(what string) (string, error) {
	port, address, _ := strings.Cut(what, " ")
	l, err := net.ListenPacket("udp", ":"+port)
	if err != nil {
		return "", err
	}
	defer l.Close()
	to, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		return "", err
	}
	if _, err := l.WriteTo([]byte("?\n"), to); err != nil {
		return "", err
	}
	if err := l.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		return "", err
	}
	b := make([]byte, 100)
	n, _, err := l.ReadFrom(b)
	return string(b[:n]), err
}

// quickly is how long a client waits for an answer.
const quickly = 2 * time.Second

func askOnce(network, address string) (string, error) {
	if network == "bind" {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return "", err
		}
		return "bound", l.Close()
	}
	d := net.Dialer{Timeout: quickly}
	d.SetMultipathTCP(false)
	c, err := d.Dial(network, address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(quickly)); err != nil {
		return "", err
	}
	if network == "udp" {
		if _, err := c.Write([]byte("?\n")); err != nil {
			return "", err
		}
	}
	return bufio.NewReader(c).ReadString('\n')
}

// place is a host from which clients ask.
type place struct {
	*lab.Host
	name string

	mu      sync.Mutex
	in      io.Writer
	answers *bufio.Reader
}

// newPlace starts the client of a place: with the network of h, in the cgroup of
// the node that it belongs to.
func newPlace(name string, h, node *lab.Host, cgroup string) (*place, error) {
	cmd := actor.Command("ask")
	in, inside, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	outside, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdin, cmd.Stdout = in, out
	if _, err := h.StartPod(cmd, node, cgroup); err != nil {
		return nil, err
	}
	in.Close()
	out.Close()
	return &place{Host: h, name: name, in: inside, answers: bufio.NewReader(outside)}, nil
}

// ask returns which server answered and as whom it saw the client.
func (p *place) ask(network, address string) (server, client string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, err := fmt.Fprintln(p.in, network, address); err != nil {
		return "", "", err
	}
	line, err := p.answers.ReadString('\n')
	if err != nil {
		return "", "", err
	}
	line = strings.TrimSpace(line)
	if why, failed := strings.CutPrefix(line, "error "); failed {
		return "", "", errors.New(why)
	}
	server, client, _ = strings.Cut(line, " ")
	return server, client, nil
}

// node is a host with an agent.
type node struct {
	*place
	v4, v6 netip.Addr
	index  int // of its pods' range
	config string
	agent  *lab.Process
}

// world is the cluster of the tests:
//
//	control plane 10.0.0.1
//	node a 10.0.0.11, pods a1 10.244.1.2, a2 10.244.1.3; zone a
//	node b 10.0.0.12, pods b1 10.244.2.2, b2 10.244.2.3; zone b
//	client 10.0.0.100, which reaches 198.51.100.0/24 by a, 203.0.113.0/24 by b
//
// and the same in IPv6: 2001:db8::11, 2001:db8:244:1::2 and so on.
type world struct {
	*lab.Site
	cluster *kube.Cluster
	a, b    *node
	pods    map[string]*place
	outside *place
	account string // kubeconfig of the agents' service account
}

// shared is the world of the tests that do no harm to each other.
var shared = sharedWorld{}

type sharedWorld struct {
	once sync.Once
	w    *world
	err  error
}

func (s *sharedWorld) close() error {
	if s.w == nil {
		return nil
	}
	return s.w.Close()
}

// theWorld returns the shared world.
func theWorld(t *testing.T) *world {
	t.Helper()
	lab.Need(t, "etcd")
	shared.once.Do(func() { shared.w, shared.err = newWorld() })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, n := range []*node{shared.w.a, shared.w.b} {
				log := n.agent.Log.String()
				t.Logf("agent of %s:\n%s", n.name, lab.Indent(log[max(0, len(log)-6000):]))
			}
		}
	})
	return shared.w
}

// ownWorld returns a world for a test that breaks things.
func ownWorld(t *testing.T) *world {
	t.Helper()
	lab.Need(t, "etcd")
	w, err := newWorld()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func newWorld() (*world, error) {
	site, err := lab.NewSite()
	if err != nil {
		return nil, err
	}
	w := &world{Site: site, pods: make(map[string]*place)}
	if err := w.build(); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

func (w *world) build() error {
	control, err := w.Host("10.0.0.1/24", "2001:db8::1/64")
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(context.Background(), 3*time.Minute)
	defer stop()
	if w.cluster, err = kube.Start(ctx, binaries, control, "10.0.0.1"); err != nil {
		return err
	}
	if err := w.cluster.StartControllerManager("endpointslice-controller", "serviceaccount-controller"); err != nil {
		return err
	}
	if err := w.cluster.Apply(ctx, "../../../deploy/kubernetes/base/rbac.yaml", false); err != nil {
		return err
	}
	if w.account, err = w.cluster.AccountKubeconfig(ctx, "kube-system", "pentad"); err != nil {
		return err
	}
	return w.machines(func(n *node) error { return w.join(ctx, n) })
}

// machines makes both nodes, each with what start starts on it, their pods and the
// client.
func (w *world) machines(start func(*node) error) (err error) {
	if w.a, err = w.newNode("a", 1); err != nil {
		return err
	}
	if w.b, err = w.newNode("b", 2); err != nil {
		return err
	}
	if err := errors.Join(start(w.a), start(w.b)); err != nil {
		return err
	}
	for _, n := range []struct {
		*node
		other string
		index int
	}{{w.a, "12", 2}, {w.b, "11", 1}} {
		err := errors.Join(
			n.Route(fmt.Sprintf("10.244.%d.0/24", n.index), "10.0.0."+n.other),
			n.Route(fmt.Sprintf("2001:db8:244:%d::/64", n.index), "2001:db8::"+n.other),
			// As nodes have one; nobody is there.
			n.Route("0.0.0.0/0", "10.0.0.254"), n.Route("::/0", "2001:db8::254"))
		if err != nil {
			return err
		}
	}
	return w.newClient()
}

func (w *world) newClient() error {
	h, err := w.Host("10.0.0.100/24", "2001:db8::100/64")
	if err != nil {
		return err
	}
	for prefix, via := range map[string]string{
		"198.51.100.0/24": "10.0.0.11", "203.0.113.0/24": "10.0.0.12", "10.96.0.0/16": "10.0.0.11",
		"2001:db8:51::/64": "2001:db8::11", "2001:db8:113::/64": "2001:db8::12", "2001:db8:96::/64": "2001:db8::11",
	} {
		if err := h.Route(prefix, via); err != nil {
			return err
		}
	}
	w.outside, err = newPlace("outside", h, h, lab.Outside)
	return err
}

func (w *world) newNode(name string, index int) (*node, error) {
	v4, v6 := fmt.Sprintf("10.0.0.%d", 10+index), fmt.Sprintf("2001:db8::%d", 10+index)
	h, err := w.Host(v4+"/24", v6+"/64")
	if err != nil {
		return nil, err
	}
	if err := h.Forward(); err != nil {
		return nil, err
	}
	n := &node{v4: netip.MustParseAddr(v4), v6: netip.MustParseAddr(v6), index: index}
	if n.place, err = newPlace(name, h, h, lab.Inside); err != nil {
		return nil, err
	}
	for i := 1; i <= 2; i++ {
		if err := w.newPod(n, fmt.Sprintf("%s%d", name, i), index, i+1); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// join makes a node one of the cluster and starts its agent.
func (w *world) join(ctx context.Context, n *node) error {
	err := w.cluster.AddNode(ctx, n.name, n.name, []string{n.v4.String(), n.v6.String()},
		[]string{fmt.Sprintf("10.244.%d.0/24", n.index), fmt.Sprintf("2001:db8:244:%d::/64", n.index)})
	if err != nil {
		return err
	}
	n.config, err = n.WriteFile("pentad.yaml", fmt.Sprintf(
		"source: {kubernetes: {kubeconfig: %s, node: %s, allowExternalIPs: [%s], untracked: [%s]}}\nscope: {cgroup: %s}\n",
		w.account, n.name, allowedExternal, untracked[n.name], n.Scope()))
	if err != nil {
		return err
	}
	return n.start()
}

// start starts the agent of a node.
func (n *node) start() (err error) {
	cmd := exec.Command(program, "--pins", n.Pins, "--run-dir", filepath.Join(n.Dir, "run"), "run", "-c", n.config)
	n.agent, err = n.Start(cmd, lab.Outside)
	return err
}

// pentad runs a command of pentad on a node.
func (n *node) pentad(args ...string) (string, error) {
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	return n.Run(ctx, lab.Outside, program, append([]string{"--pins", n.Pins, "--run-dir", filepath.Join(n.Dir, "run")}, args...)...)
}

// allowedExternal are the externalIPs that the nodes serve to everybody.
const allowedExternal = `203.0.113.64/26, "2001:db8:113:0:1::/80"`

// untracked has one of the nodes not track connections between pods: nothing else may
// be different there.
var untracked = map[string]string{"b": `10.244.0.0/16, "2001:db8:244::/48"`}

// newPod makes a pod: a network namespace behind its node, with a server that
// answers on ports 8080 and 8081.
func (w *world) newPod(n *node, name string, index, last int) error {
	v4, v6 := podAddresses(index, last)
	h, err := w.Pod(n.Host, v4, v6)
	if err != nil {
		return err
	}
	if w.pods[name], err = newPlace(name, h, n.Host, lab.Inside); err != nil {
		return err
	}
	return startServer(h, n.Host, name, ":8080", ":8081")
}

func podAddresses(index, last int) (v4, v6 string) {
	return fmt.Sprintf("10.244.%d.%d", index, last), fmt.Sprintf("2001:db8:244:%d::%d", index, last)
}

// startServer starts a server with the network of h and waits for it.
func startServer(h, node *lab.Host, name string, addresses ...string) error {
	p, err := h.StartPod(actor.Command("who", append([]string{"-sees", name}, addresses...)...), node, lab.Outside)
	if err != nil {
		return err
	}
	return lab.Eventually(patience, func() error {
		if !strings.Contains(p.Log.String(), "ready") {
			return fmt.Errorf("server %s: %s", name, p.Log)
		}
		return nil
	})
}
