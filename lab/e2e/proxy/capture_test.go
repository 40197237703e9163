package proxy_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/plane/capture"
)

// capturing has processes below Inside be captured.
func capturing(w *world, mode string) string {
	return fmt.Sprintf(`services:
- {name: vip, listen: ['192.0.2.10:80'], health: {probe: none}, backends: ['203.0.113.9:81']}
proxies:
- {name: captured, protocol: transparent, listen: ['127.0.0.1:15001', '[::1]:15001']}
capture:
- {name: app, match: {cgroup: %s, destinations: [203.0.113.0/24, '2001:db8::/64'], except: [203.0.113.8/32]}, mode: %s, to: captured}
`, w.Scope(), mode)
}

// led returns how many connections were led to proxies.
func (w *world) led() (n int) {
	w.T.Helper()
	for line := range strings.Lines(w.Get("/metrics")) {
		if rest, ok := strings.CutPrefix(line, "pentad_proxy_connections_total{proxy="); ok {
			var name string
			var k int
			_, _ = fmt.Sscanf(rest, "%q} %d", &name, &k)
			n += k
		}
	}
	return n
}

// reaches runs curl and fails the test unless it reaches the server, by a proxy or not.
func (w *world) reaches(cgroup, url string, captured bool) {
	w.T.Helper()
	before := w.led()
	out, err := w.Run(e2e.Within(w.T, e2e.Patience), cgroup, "curl", "-sS", "-g", "--max-time", "10", url)
	if err != nil || out != "hello" {
		w.T.Errorf("%s: %v: %s", url, err, out)
	}
	if n := w.led() - before; (n == 1) != captured {
		w.T.Errorf("%s: %d connections were led to a proxy; want it: %v", url, n, captured)
	}
}

// explains fails the test unless explain says something.
func (w *world) explains(want string, args ...string) {
	w.T.Helper()
	if out, _ := w.Pentad(append([]string{"explain"}, args...)...); !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
		w.T.Errorf("explain %s says no %q: %s", strings.Join(args, " "), want, out)
	}
}

// installed waits until something captures, or nothing does.
func (w *world) installed(want bool) {
	w.T.Helper()
	w.Eventually(fmt.Sprintf("something captures: %v", want), func() error {
		return w.Do(func() error {
			v, err := capture.Read(w.Pins)
			if err == nil && v.Installed() != want {
				err = fmt.Errorf("it does: %v", v.Installed())
			}
			return err
		})
	})
}

// Programs that know of no proxy use one, over IPv4 and IPv6; and nothing else does.
func TestCapture(t *testing.T) {
	t.Parallel()
	lab.Need(t, "curl", "nginx", "nft")
	for _, mode := range []string{"ebpf", "redirect"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			testCapture(t, mode)
		})
	}
}

func testCapture(t *testing.T, mode string) {
	w := newWorld(t, "203.0.113.8", "203.0.113.9", "203.0.113.10", "2001:db8::9")
	w.RunAgent(capturing(w, mode))
	for _, at := range []string{"203.0.113.8:80", "203.0.113.9:80", "203.0.113.9:81", "[2001:db8::9]:80"} {
		w.ServeWeb(at, "hello")
	}
	w.reaches(lab.Inside, "http://203.0.113.9/", true)
	w.reaches(lab.Inside, "http://[2001:db8::9]/", true)
	w.reaches(lab.Outside, "http://203.0.113.9/", false) // another cgroup
	w.reaches(lab.Inside, "http://203.0.113.8/", false)  // excepted
	w.reaches(lab.Inside, "http://192.0.2.10/", false)   // a service leads there
	// It is put back, whoever removes it.
	if mode == "redirect" {
		conn, err := w.conn()
		if err != nil {
			t.Fatal(err)
		}
		conn.FlushRuleset()
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
	} else if err := os.RemoveAll(filepath.Join(w.Pins, "capture")); err != nil {
		t.Fatal(err)
	}
	harmed := time.Now()
	w.installed(true)
	if took := time.Since(harmed); took > time.Second {
		t.Logf("it was back only %s after it was removed", took)
	}
	w.reaches(lab.Inside, "http://203.0.113.9/", true)

	// What the kernel does is what explain says.
	inside, err := w.Start(exec.Command("sleep", "60"), lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	pid := fmt.Sprint(inside.Process.Pid)
	w.explains("is captured by app and led to 127.0.0.1:15001", "--pid", pid, "203.0.113.9:80")
	w.explains("is captured by app and led to [::1]:15001", "--pid", pid, "[2001:db8::9]:80")
	w.explains("the capture app excepts this destination", "--pid", pid, "203.0.113.8:80")
	w.explains("the capture app is about this process, and not about this destination", "--pid", pid, "10.0.0.5:80")
	w.explains("the process is in another network namespace", "--pid", fmt.Sprint(os.Getpid()), "203.0.113.9:80")
	elsewhere, err := w.Start(exec.Command("sleep", "60"), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	w.explains("no capture is about it", "--pid", fmt.Sprint(elsewhere.Process.Pid), "203.0.113.9:80")
	w.explains("addresses of a link are never captured", "--pid", pid, "[fe80::1]:80")
	w.explains("the loopback is never captured", "--pid", pid, "127.0.0.1:80")

	// With the agent dead what is captured is refused, and does not go another way.
	w.Agent.Kill()
	if out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Inside, "curl", "-sS", "--max-time", "10", "http://203.0.113.9/"); err == nil {
		t.Errorf("with the proxy dead it went another way: %s", out)
	}
	w.explains("is captured by app, whose proxy does not listen at 127.0.0.1:15001: it is refused", "--pid", pid, "203.0.113.9:80")
	w.Agent = w.Launch()
	w.Ready()
	w.reaches(lab.Inside, "http://203.0.113.9/", true)
	// From one mode to the other there is no moment without.
	w.Configure(capturing(w, map[string]string{"ebpf": "redirect", "redirect": "ebpf"}[mode]))
	w.MustPentad("reload")
	w.reaches(lab.Inside, "http://203.0.113.9/", true)
	w.reaches(lab.Inside, "http://203.0.113.8/", false)
	// Off means gone.
	w.Configure("services: []")
	w.MustPentad("reload")
	w.installed(false)
	w.Eventually("nothing is left", func() error {
		left, err := filepath.Glob(filepath.Join(w.Pins, "capture", "*"))
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%q", left)
		}
		return err
	})
}

// In connect() a socket is told where it wanted to go, whatever its kind; a proxy of
// somebody else is told, too, as after a REDIRECT; nobody can take the place of a proxy
// that is away; and with onProxyDown: direct it is done without one.
func TestCaptureInConnect(t *testing.T) {
	t.Parallel()
	lab.Need(t, "nginx", "redsocks", "microsocks", "curl")
	w := newWorld(t, "203.0.113.8", "203.0.113.9", "203.0.113.10", "203.0.113.11", "2001:db8::9")
	const others = `capture:
- {name: other, match: {cgroup: %[1]s, destinations: [203.0.113.10/32]}, to: 127.0.0.1:12345}
- {name: way-out, match: {cgroup: %[1]s, destinations: [203.0.113.11/32]}, onProxyDown: direct, to: 127.0.0.1:12346}
- {name: nobody, match: {user: '65534', destinations: [203.0.113.8/32], ports: [80, 8000-8999]}, to: 127.0.0.1:12346}
`
	w.RunAgent(strings.Replace(capturing(w, "ebpf"), "capture:\n", fmt.Sprintf(others, w.Scope()), 1)) // the first that fits
	for _, at := range []string{"203.0.113.8:80", "203.0.113.9:80", "203.0.113.10:80", "203.0.113.11:80", "[2001:db8::9]:80"} {
		w.ServeWeb(at, "hello")
	}
	visit := func(args ...string) string {
		t.Helper()
		p, err := w.Start(actor.Command("visit", args...), lab.Inside)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil {
			return fmt.Sprintf("%v: %s", err, p.Log)
		}
		return p.Log.String()
	}
	for _, c := range []struct {
		kind, to string
		led      int
	}{
		{"tcp4", "203.0.113.9:80", 1},
		{"tcp6", "[2001:db8::9]:80", 1},
		{"mapped", "203.0.113.9:80", 1},
		{"mptcp", "203.0.113.9:80", 1},
		{"mptcp", "[2001:db8::9]:80", 1},
		{"again", "203.0.113.9:80", 2},
	} {
		before := w.led()
		if out, want := visit(c.kind, c.to), "hello of "+c.to; out != want {
			t.Errorf("%s %s: %q, want %q", c.kind, c.to, out, want)
		}
		if n := w.led() - before; n != c.led {
			t.Errorf("%s %s: %d connections were led to the proxy, want %d", c.kind, c.to, n, c.led)
		}
	}

	// Who says something and is gone is heard all the same.
	const shots = 200
	ear := w.StartServer(actor.Command("hear", "203.0.113.9:82"), "ready")
	shooter, err := w.Start(actor.Command("fire", "203.0.113.9:82", strconv.Itoa(shots)), lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	if err := shooter.Wait(); err != nil {
		t.Errorf("%v: %s", err, shooter.Log)
	}
	w.Eventually("all is heard", func() error {
		if n := strings.Count(ear.Log.String(), "heard x\n"); n != shots {
			return fmt.Errorf("%d of %d", n, shots)
		}
		return nil
	})

	// redsocks is somebody else's, and asks as it always does. Its own connections go to
	// the loopback, which is never captured.
	conf, err := w.WriteFile("redsocks.conf", `base { log_debug = off; log_info = on; log = "stderr"; daemon = off; redirector = iptables; }
redsocks { local_ip = 127.0.0.1; local_port = 12345; ip = 127.0.0.1; port = 1081; type = socks5; }
`)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Start(exec.Command("microsocks", "-i", "127.0.0.1", "-p", "1081"), lab.Outside); err != nil {
		t.Fatal(err)
	}
	w.Listening("127.0.0.1:1081")
	redsocks, err := w.Start(exec.Command("redsocks", "-c", conf), lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	w.Listening("127.0.0.1:12345")
	if out := visit("tcp4", "203.0.113.10:80"); out != "hello of 203.0.113.10:80" {
		t.Errorf("by redsocks: %s", out)
	}
	if !strings.Contains(redsocks.Log.String(), "->203.0.113.10:80") {
		t.Errorf("redsocks was not told: %s", redsocks.Log)
	}

	// Where the proxy is not, and that is meant to be, all goes its own way.
	if out := visit("tcp4", "203.0.113.11:80"); out != "hello of 203.0.113.11:80" {
		t.Errorf("without a proxy: %s", out)
	}
	// Another user is another matter.
	w.reaches(lab.Inside, "http://203.0.113.8/", false)
	out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Inside, "setpriv", "--reuid=65534", "--clear-groups", "curl", "-sS", "--max-time", "10", "http://203.0.113.8/")
	if err == nil {
		t.Errorf("a user who is captured went past the proxy: %s", out)
	}

	// Nobody takes the port of a proxy that is away.
	w.Agent.Kill()
	w.ServeWeb("127.0.0.1:15001", "I am the proxy")
	if out := visit("tcp4", "203.0.113.9:80"); !strings.Contains(out, "refused") {
		t.Errorf("somebody else was taken for the proxy: %s", out)
	}
	// What was captured without the agent's help goes on.
	if out := visit("tcp4", "203.0.113.10:80"); out != "hello of 203.0.113.10:80" {
		t.Errorf("by redsocks, with the agent dead: %s", out)
	}
	w.MustPentad("down")
	if out := visit("tcp4", "203.0.113.9:80"); out != "hello of 203.0.113.9:80" {
		t.Errorf("after down: %s", out)
	}
}

// A capture of a cgroup within another one comes first, and the other leaves it alone.
func TestCaptureWithin(t *testing.T) {
	t.Parallel()
	lab.Need(t, "nginx", "curl")
	w := newWorld(t, "203.0.113.9")
	root, err := host.CgroupPath(w.Scope())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(root, "inner"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(filepath.Join(root, "inner")) })
	w.RunAgent(fmt.Sprintf(`services: []
proxies:
- {name: outer, protocol: transparent, listen: '127.0.0.1:15001'}
- {name: inner, protocol: transparent, listen: '127.0.0.1:15002'}
capture:
- {name: outer, match: {cgroup: %[1]s}, to: outer}
- {name: inner, match: {cgroup: %[1]s/inner}, to: inner}
`, w.Scope()))
	w.ServeWeb("203.0.113.9:80", "hello")
	for cgroup, proxy := range map[string]string{lab.Inside: "outer", lab.Inside + "/inner": "inner"} {
		w.reaches(cgroup, "http://203.0.113.9/", true)
		if metrics := w.Get("/metrics"); !strings.Contains(metrics, fmt.Sprintf("pentad_proxy_connections_total{proxy=%q} 1", proxy)) {
			t.Errorf("what %s says went elsewhere than to the proxy %s", cgroup, proxy)
		}
		p, err := w.Start(exec.Command("sleep", "60"), cgroup)
		if err != nil {
			t.Fatal(err)
		}
		w.explains("is captured by "+proxy, "--pid", fmt.Sprint(p.Process.Pid), "203.0.113.9:80")
		p.Kill()
	}
}

// conn is a conversation with nf_tables of the host.
func (w *world) conn() (c *nftables.Conn, err error) {
	err = w.Do(func() error {
		c, err = nftables.New(nftables.AsLasting())
		return err
	})
	return c, err
}

// What arrives from another host to go to a third is led to the proxy, over IPv4 and
// IPv6. The third has no way back to the first: without the proxy nothing would arrive.
func TestCaptureArriving(t *testing.T) {
	t.Parallel()
	lab.Need(t, "ncat")
	for _, mode := range []string{"tproxy", "redirect"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			testCaptureArriving(t, mode)
		})
	}
}

// path is a host on whose way from one to the other everything is captured.
type path struct {
	*world
	there, far *lab.Host
	name       string // of the interface at which what comes from there arrives
	nameFar    string
}

func newPath(t *testing.T) *path {
	w := newWorld(t)
	p := &path{world: w, there: w.another(), far: w.another()}
	var err error
	if p.name, _, err = lab.Wire(w.Host, []string{"198.51.100.1/24", "2001:db8:5::1/64"}, p.there, []string{"198.51.100.2/24", "2001:db8:5::2/64"}); err != nil {
		t.Fatal(err)
	}
	if p.nameFar, _, err = lab.Wire(w.Host, []string{"10.7.0.1/24", "2001:db8:7::1/64"}, p.far, []string{"10.7.0.2/24", "2001:db8:7::2/64"}); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{w.Forward(), p.there.Route("10.7.0.0/24", "198.51.100.1"), p.there.Route("2001:db8:7::/64", "2001:db8:5::1")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// serve starts a server on the far host.
func (p *path) serve(role string, args ...string) {
	p.T.Helper()
	server, err := p.far.Start(actor.Command(role, args...), lab.Outside)
	if err != nil {
		p.T.Fatal(err)
	}
	p.Eventually(fmt.Sprint(args)+" is ready", func() error {
		if !strings.Contains(server.Log.String(), "ready") {
			return errors.New(server.Log.String())
		}
		return nil
	})
}

// ask has the host there ask by UDP, and returns the answer.
func (p *path) ask(role string, args ...string) string {
	p.T.Helper()
	client, err := p.there.Start(actor.Command(role, args...), lab.Outside)
	if err != nil {
		p.T.Fatal(err)
	}
	if err := client.Wait(); err != nil {
		return fmt.Sprintf("%v: %s", err, client.Log)
	}
	return client.Log.String()
}

func testCaptureArriving(t *testing.T, mode string) {
	w := newPath(t)
	for _, at := range []string{"10.7.0.2:80", "[2001:db8:7::2]:80", "10.7.0.2:81"} {
		w.serve("late reply", at)
	}
	w.RunAgent(fmt.Sprintf(`services: []
proxies: [{name: arriving, protocol: transparent, listen: ['198.51.100.1:15002', '[2001:db8:5::1]:15002'], open: true}]
capture: [{name: lab, match: {interface: %s, ports: [80]}, mode: %s, to: arriving}]
`, w.name, mode))
	for _, to := range []string{"10.7.0.2", "2001:db8:7::2"} {
		if out := w.pipeFrom(t, w.there, "a question", "ncat", to, "80"); out != "heard a question" {
			t.Errorf("%s says %q", to, out)
		}
	}
	// What no capture is about goes its own way, which is none here.
	if out, err := w.there.Run(e2e.Within(t, e2e.Patience), lab.Outside, "ncat", "-w", "1s", "10.7.0.2", "81"); err == nil {
		t.Errorf("port 81 was led to the proxy: %s", out)
	}
	if n := w.led(); n != 2 {
		t.Errorf("%d connections were led to the proxy, want 2", n)
	}
	if mode == "tproxy" {
		w.explains("is captured by lab and handed to 198.51.100.1:15002", "--from", "198.51.100.2", "10.7.0.2:80")
	} else {
		w.explains("is captured by lab and led to 198.51.100.1:15002", "--from", "198.51.100.2", "10.7.0.2:80")
	}
	w.explains("it is for this host itself", "--from", "198.51.100.2", "10.7.0.1:80")
	w.explains("the capture lab is about this process, and not about this destination", "--from", "198.51.100.2", "10.7.0.2:81")
}

// A host without IPv6 captures IPv4.
func TestCaptureWithoutIPv6(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newPath(t)
	for _, name := range []string{"all", "default", "lo"} {
		if err := w.Sysctl("net/ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil {
			t.Fatal(err)
		}
	}
	w.serve("tell", "far", "10.7.0.2:53")
	w.RunAgent(fmt.Sprintf(`services: []
proxies: [{name: whole, protocol: transparent, listen: '127.0.0.1:15003'}]
capture: [{name: lab, match: {interface: %s, protocol: [tcp, udp]}, to: whole}]
`, w.name))
	for _, kind := range []string{"tcp", "udp"} {
		if out := w.ask("be told", kind, "10.7.0.2:53"); out != "far sees 10.7.0.1" {
			t.Errorf("over %s: %s", kind, out)
		}
	}
	if out, err := w.Pentad("status"); err != nil {
		t.Errorf("status: %v: %s", err, out)
	}
}

// In mode tproxy datagrams are captured, too; the proxy may listen at the loopback; and a
// proxy may go on with the address of its client.
func TestCaptureWhole(t *testing.T) {
	t.Parallel()
	lab.Need(t, "nft")
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprintf("keepSource %v", keep), func(t *testing.T) {
			t.Parallel()
			testCaptureWhole(t, keep)
		})
	}
}

func testCaptureWhole(t *testing.T, keep bool) {
	w := newPath(t)
	seen := map[string]string{"10.7.0.2": "10.7.0.1", "2001:db8:7::2": "2001:db8:7::1"}
	if keep {
		seen = map[string]string{"10.7.0.2": "198.51.100.2", "2001:db8:7::2": "2001:db8:5::2"}
		for _, err := range []error{w.far.Route("198.51.100.0/24", "10.7.0.1"), w.far.Route("2001:db8:5::/64", "2001:db8:7::1")} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for to := range seen {
		for _, port := range []string{"53", "80"} {
			w.serve("tell", "far", net.JoinHostPort(to, port))
		}
	}
	w.RunAgent(fmt.Sprintf(`services: []
proxies:
- name: whole
  protocol: transparent
  listen: ['127.0.0.1:15003', '[::1]:15003']
  keepSource: %v
  rules: [{ports: [81], via: refuse}, {via: direct}]
capture: [{name: lab, match: {interface: %s, protocol: [tcp, udp], except: [10.7.0.3/32]}, to: whole}]
`, keep, w.name))
	each := func(when string) {
		t.Helper()
		for to, from := range seen {
			for _, kind := range []string{"tcp", "udp"} {
				before := w.led()
				if out := w.ask("be told", kind, net.JoinHostPort(to, "53")); out != "far sees "+from {
					t.Errorf("%s: %s over %s: %q, want %s", when, to, kind, out, from)
				}
				if n := w.led() - before; n != 1 {
					t.Errorf("%s: %s over %s: the proxy has seen %d", when, to, kind, n)
				}
			}
		}
	}
	each("at first")
	w.explains("is captured by lab and handed to 127.0.0.1:15003", "--from", "198.51.100.2", "10.7.0.2:53/udp")
	w.explains("the capture lab excepts this destination", "--from", "198.51.100.2", "10.7.0.3:53/udp")
	if out := w.MustPentad("flow", "--proxy", "whole"); !strings.Contains(out, "10.7.0.2:53 ") {
		t.Errorf("no flow of datagrams: %s", out)
	}
	// What the kernel needs for it is put back, whoever takes it away.
	err := w.Do(func() error {
		rules, err := netlink.RuleList(netlink.FAMILY_ALL)
		for _, r := range rules {
			if r.Protocol == host.RouteProtocol {
				err = errors.Join(err, netlink.RuleDel(&r))
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Eventually("the rules are put back", func() error {
		if out := w.ask("be told", "udp", "10.7.0.2:53"); out != "far sees "+seen["10.7.0.2"] {
			return errors.New(out)
		}
		return nil
	})
	each("after the rules were removed")
	// Each gets the answer to what it has asked, however many ask.
	if to := "10.7.0.2:7"; !keep {
		w.serve("udp echo", to)
		var answered, wrong int
		out := w.ask("ask at once", to, "500")
		if _, err := fmt.Sscanf(out, "%d answered, %d wrong", &answered, &wrong); err != nil || wrong > 0 || answered < 500 {
			t.Errorf("of 500 that asked at once: %s", out)
		}
	}
	// What is for all on the segment is for this host, too.
	ear := w.StartServer(actor.Command("hear datagrams", "0.0.0.0:67"), "ready")
	w.ask("be told", "udp", "198.51.100.255:67")
	w.Eventually("a broadcast arrives", func() error {
		if !strings.Contains(ear.Log.String(), "heard one") {
			return errors.New("it does not")
		}
		return nil
	})
	w.explains("it is for this host itself", "--from", "198.51.100.2", "198.51.100.255:67/udp")
	// A flood of SYN makes the kernel answer with cookies.
	if err := w.Sysctl("net/ipv4/tcp_syncookies", "2"); err != nil {
		t.Fatal(err)
	}
	each("with SYN cookies")
	// With the agent dead what is captured is refused, and does not go another way.
	for _, err := range []error{w.far.RouteReplace("198.51.100.0/24", "10.7.0.1"), w.far.RouteReplace("2001:db8:5::/64", "2001:db8:7::1")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	w.Agent.Kill()
	for to := range seen {
		for _, kind := range []string{"tcp", "udp"} {
			if out := w.ask("be told", kind, net.JoinHostPort(to, "53")); !strings.Contains(out, "refused") {
				t.Errorf("%s over %s, with the agent dead: %s", to, kind, out)
			}
		}
	}
	w.Agent = w.Launch()
	w.Ready()
	each("with another agent")
	// The kernel may take the mark for what the way back has.
	for _, name := range []string{"all", w.name} {
		if err := w.Sysctl("net/ipv4/conf/"+name+"/src_valid_mark", "1"); err != nil {
			t.Fatal(err)
		}
		if err := w.Sysctl("net/ipv4/conf/"+name+"/rp_filter", "1"); err != nil {
			t.Fatal(err)
		}
	}
	if !keep {
		each("with rp_filter and src_valid_mark")
	}
	// Off means gone.
	w.Configure("services: []")
	w.MustPentad("reload")
	w.installed(false)
	w.Eventually("no rule and route is left", func() error {
		return w.Do(func() error {
			rules, err := netlink.RuleList(netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: host.LocalTable}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range rules {
				if r.Protocol == host.RouteProtocol {
					return fmt.Errorf("%v", r)
				}
			}
			if len(routes) > 0 {
				return fmt.Errorf("%v", routes)
			}
			return nil
		})
	})
}
