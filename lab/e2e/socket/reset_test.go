package socket_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

func init() {

	clients["keep asking"] = keepAsking
}

// keepAsking asks over one connected UDP socket, again and again; when the socket
// fails it makes another, as resolvers do. It prints who answered when that
// changes, and why a socket was given up.
func keepAsking(args []string) error {
	for {
		c, err := net.Dial("udp", args[0])
		if err != nil {
			return err
		}
		last := ""
		for {
			b := make([]byte, 100)
			_, err := c.Write([]byte("x"))
			n := 0
			if err == nil {
				_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				n, err = c.Read(b)
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				continue // nobody is there; a resolver would ask again
			}
			if err != nil {
				fmt.Println("gave up:", err)
				break
			}
			if who := string(b[:n]); who != last {
				fmt.Println(who)
				last = who
			}
			time.Sleep(time.Millisecond)
		}
		c.Close()
	}
}

const resetServices = `services:
- name: resets
  listen: [192.0.2.10:80]
  health: {interval: 100ms, timeout: 50ms, fall: 1, rise: 1}
  backends: [10.0.0.1:7000]
- name: keeps
  listen: [192.0.2.11:80]
  onDown: keep
  health: {interval: 100ms, timeout: 50ms, fall: 1, rise: 1}
  backends: [10.0.0.1:7000]
`

// When its probe says down, connections to a backend are closed: those that came
// through a service that wants it, in every network namespace, and no others.
func TestResetOnDown(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	pod := newWorld(t, "10.0.0.1") // a network of its own, with a server of its own
	pod.Serve("one", "10.0.0.1:7000")
	w.Serve("one", "10.0.0.1:7000")
	// This one was there before the agent.
	w.RunAgent(resetServices)
	const n = 50
	here := w.StartClient(w.Host, "watch", fmt.Sprint(n), "192.0.2.10:80", "192.0.2.11:80", "10.0.0.1:7000")
	there := w.StartClient(pod.Host, "watch", fmt.Sprint(n), "192.0.2.10:80", "192.0.2.11:80", "10.0.0.1:7000")
	w.Prints(here, "watching", 1)
	w.Prints(there, "watching", 1)
	if have := inFlight(w.View(), "resets"); have != 2*n {
		t.Errorf("%d in flight, want %d", have, 2*n)
	}
	// Packets vanish, so that no server and no client notices anything by itself.
	if err := w.CutOff(netip.MustParseAddr("10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	w.AwaitStates("resets", service.Down)
	const aborted = "192.0.2.10:80 software caused connection abort"
	w.Prints(here, aborted, n)
	w.Prints(there, aborted, n)
	for _, p := range []*lab.Process{here, there} {
		if lines := strings.Count(p.Log.String(), "\n"); lines != n+1 {
			t.Errorf("other connections ended, too:\n%s", e2e.FirstLines(p.Log.String(), 100))
		}
	}
	if have := inFlight(w.View(), "keeps"); have != 2*n {
		t.Errorf("%d in flight of the service that keeps, want %d", have, 2*n)
	}
	if have := w.View().Counters.Reset; have != 2*n {
		t.Errorf("%d resets were counted, want %d", have, 2*n)
	}
	if err := w.Mend(); err != nil {
		t.Fatal(err)
	}
	w.AwaitStates("resets", service.Serving)
}

// Connections to a backend that is removed are closed, also when its service goes
// with it and also by an agent that finds them there; draining closes nothing
// until its time is over.
func TestResetOnRemovalAndDrain(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	w.Serve("one", "10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000")
	text := func(services ...string) string { return "services:\n" + strings.Join(services, "\n") }
	one := func(n int, backends string) string {
		return fmt.Sprintf("- {name: s%d, listen: ['192.0.2.%d:80'], health: {probe: none}, backends: [%s]}", n, n, backends)
	}
	w.RunAgent(text(one(1, "'10.0.0.1:7000'"), one(2, "'10.0.0.2:7000'"), one(3, "'10.0.0.3:7000'")))
	p := w.StartClient(w.Host, "watch", "10", "192.0.2.1:80", "192.0.2.2:80", "192.0.2.3:80")
	w.Prints(p, "watching", 1)
	// A backend is replaced.
	w.Configure(text(one(1, "'10.0.0.3:7000'"), one(2, "'10.0.0.2:7000'"), one(3, "'10.0.0.3:7000'")))
	w.Prints(p, "192.0.2.1:80 ", 10)
	// A service goes while there is no agent.
	w.Agent.Kill()
	w.Configure(text(one(1, "'10.0.0.3:7000'"), one(3, "'10.0.0.3:7000'")))
	w.Agent = w.Launch()
	w.Ready()
	w.Prints(p, "192.0.2.2:80 ", 10)
	// Draining leaves them until its time is over, which outlives the agent.
	w.MustPentad("backend", "drain", "s3", "10.0.0.3:7000", "--timeout", "3s", "--force")
	drained := time.Now()
	if out := w.MustPentad("backend", "list"); !strings.Contains(out, "what is left is closed in") {
		t.Errorf("backend list:\n%s", out)
	}
	w.Agent.Kill()
	w.Agent = w.Launch()
	w.Ready()
	if have := inFlight(w.View(), "s3"); have != 10 {
		t.Errorf("%d in flight while draining, want 10", have)
	}
	w.Prints(p, "192.0.2.3:80 ", 10)
	if took := time.Since(drained); took < 2900*time.Millisecond {
		t.Errorf("the drained backend's connections were closed after %s", took)
	}
	w.Prints(p, "\n", 31)
	w.atRest()
}

// A connected UDP socket whose backend is gone fails, so that its owner makes
// another, which goes to the new backend.
func TestResetUDP(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	w.Serve("two", "10.0.0.2:7000")
	text := "services: [{name: dns, listen: ['192.0.2.53:53/udp'], backends: ['%s:7000']}]"
	w.RunAgent(fmt.Sprintf(text, "10.0.0.1"))
	p := w.StartClient(w.Host, "keep asking", "192.0.2.53:53")
	w.Prints(p, "one x", 1)
	w.Configure(fmt.Sprintf(text, "10.0.0.2"))
	w.Prints(p, "two x", 1)
	w.Prints(p, "gave up", 1)
}

// A kernel without bpf_sock_destroy closes through sock_diag(7): TCP and UDP, in
// all namespaces, and only what came through the service.
func TestResetByDiag(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "2001:db8::1")
	pod := newWorld(t, "10.0.0.1", "2001:db8::1")
	w.Serve("one", "10.0.0.1:7000", "[2001:db8::1]:7000")
	pod.Serve("one", "10.0.0.1:7000", "[2001:db8::1]:7000")
	lock, err := host.Lock(w.Pins)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	p := socket.New(socket.Options{Pins: w.Pins, Version: "test", Diag: true})
	defer p.Close()
	web := func(down bool) *service.Service {
		s := &service.Service{Name: "web"}
		for _, l := range []string{"192.0.2.10:80", "[2001:db8:f::1]:80"} {
			for _, protocol := range []service.Protocol{service.TCP, service.UDP} {
				s.Listeners = append(s.Listeners, service.Listener{Address: netip.MustParseAddrPort(l), Protocol: protocol})
			}
		}
		for _, b := range []string{"10.0.0.1:7000", "[2001:db8::1]:7000"} {
			s.Backends = append(s.Backends, service.Backend{Address: netip.MustParseAddrPort(b), Weight: 1, Down: down})
		}
		return s
	}
	ctx, stop := context.WithCancel(t.Context())
	var chores sync.WaitGroup
	defer chores.Wait()
	defer stop()
	chores.Go(func() { p.Run(ctx) })
	snap := (&service.Snapshot{}).Next([]*service.Service{web(false)})
	if err := p.Apply(t.Context(), socket.Want{Cgroup: w.Scope(), Services: snap}); err != nil {
		t.Fatal(err)
	}
	here := w.StartClient(w.Host, "watch", "20", "192.0.2.10:80", "[2001:db8:f::1]:80", "10.0.0.1:7000")
	there := w.StartClient(pod.Host, "watch", "20", "192.0.2.10:80", "[2001:db8:f::1]:80", "10.0.0.1:7000")
	udp := w.StartClient(w.Host, "keep asking", "192.0.2.10:80")
	w.Prints(here, "watching", 1)
	w.Prints(there, "watching", 1)
	w.Prints(udp, "one x", 1)
	if err := p.Apply(t.Context(), socket.Want{Cgroup: w.Scope(), Services: snap.Next([]*service.Service{web(true)})}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*lab.Process{here, there} {
		w.Prints(c, "software caused connection abort", 40)
		w.Prints(c, "\n", 41)
	}
	w.Eventually("the UDP socket is closed", func() error {
		if !strings.Contains(udp.Log.String(), "gave up") {
			return errors.New(udp.Log.String())
		}
		return nil
	})
}

// nginx asks its resolver over one connected UDP socket. When the DNS server
// behind the VIP is replaced, nginx goes on with the new one.
func TestNginxResolver(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	w.ServeWeb("10.0.0.3:8080", "the web server")
	dns := func(address, options string) *lab.Process {
		return w.StartServer(exec.Command("dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--log-facility=-", "--log-queries",
			"--listen-address="+address, "--bind-interfaces", "--port=53", "--user=root", options), "started")
	}
	first := dns("10.0.0.1", "--address=/shop.test/10.0.0.3")
	text := "services: [{name: dns, listen: ['192.0.2.53:53/udp'], backends: ['%s:53']}]"
	w.RunAgent(fmt.Sprintf(text, "10.0.0.1"))
	w.Nginx(`resolver 192.0.2.53 valid=1s ipv6=off;
resolver_timeout 1s;
server { listen 127.0.0.1:9000; location / { set $name shop.test; proxy_pass http://$name:8080; } }`, "127.0.0.1:9000")
	ask := func() error {
		out, err := w.Inside("curl", "-sS", "--max-time", "3", "http://127.0.0.1:9000/")
		if err == nil && !strings.Contains(out, "the web server") {
			err = errors.New(strings.TrimSpace(out))
		}
		return err
	}
	w.Eventually("nginx resolves", ask)
	second := dns("10.0.0.2", "--address=/shop.test/10.0.0.3")
	w.Configure(fmt.Sprintf(text, "10.0.0.2"))
	w.Eventually("the kernel has the new server", func() error {
		if a := w.View().Services[0].Backends[0].Address.String(); a != "10.0.0.2:53" {
			return errors.New(a)
		}
		return nil
	})
	first.Kill()
	w.Eventually("nginx resolves with the new server", func() error {
		if err := ask(); err != nil {
			return err
		}
		if !strings.Contains(second.Log.String(), "shop.test") {
			return errors.New("from its memory only")
		}
		return nil
	})
}
