package proxy_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/plane/capture"
)

// capturing has processes below Inside be captured, and what arrives from another host.
func capturing(w *world, name string) string {
	return fmt.Sprintf(`services:
- {name: vip, listen: ['192.0.2.10:80'], health: {probe: none}, backends: ['203.0.113.9:81']}
proxies:
- {name: captured, protocol: transparent, listen: ['127.0.0.1:15001', '[::1]:15001']}
- {name: arriving, protocol: transparent, listen: ['198.51.100.1:15002', '[2001:db8:5::1]:15002'], open: true}
capture:
- {name: app, match: {cgroup: %s, destinations: [203.0.113.0/24, '2001:db8::/64'], except: [203.0.113.8/32]}, to: captured}
- {name: lab, match: {interface: %s, ports: [80]}, to: arriving}
`, w.Scope(), name)
}

// Programs that know of no proxy use one, over IPv4 and IPv6, from here and from other
// hosts; and nothing else does.
func TestCapture(t *testing.T) {
	t.Parallel()
	lab.Need(t, "curl", "nginx", "nft")
	w := newWorld(t, "203.0.113.8", "203.0.113.9", "203.0.113.10", "2001:db8::9")
	there := w.another()
	name, _, err := lab.Wire(w.Host, []string{"198.51.100.1/24", "2001:db8:5::1/64"}, there, []string{"198.51.100.2/24", "2001:db8:5::2/64"})
	if err != nil {
		t.Fatal(err)
	}
	for _, route := range []string{"203.0.113.0/24", "192.0.2.0/24"} {
		if err := there.Route(route, "198.51.100.1"); err != nil {
			t.Fatal(err)
		}
	}
	w.RunAgent(capturing(w, name))
	for _, at := range []string{"203.0.113.8:80", "203.0.113.9:80", "203.0.113.9:81", "[2001:db8::9]:80"} {
		w.ServeWeb(at, "hello")
	}
	led := func() int {
		t.Helper()
		n := 0
		for _, p := range []string{"captured", "arriving"} {
			for line := range strings.Lines(w.Get("/metrics")) {
				if v, ok := strings.CutPrefix(line, fmt.Sprintf("pentad_proxy_connections_total{proxy=%q} ", p)); ok {
					var k int
					_, _ = fmt.Sscan(v, &k)
					n += k
				}
			}
		}
		return n
	}
	// reaches runs curl and fails the test unless it reaches the server, by a proxy or not.
	reaches := func(at *lab.Host, cgroup, url string, captured bool) {
		t.Helper()
		before := led()
		out, err := at.Run(e2e.Within(t, e2e.Patience), cgroup, "curl", "-sS", "-g", "--max-time", "10", url)
		if err != nil || out != "hello" {
			t.Errorf("%s: %v: %s", url, err, out)
		}
		if n := led() - before; (n == 1) != captured {
			t.Errorf("%s: %d connections were led to a proxy; want it: %v", url, n, captured)
		}
	}
	reaches(w.Host, lab.Inside, "http://203.0.113.9/", true)
	reaches(w.Host, lab.Inside, "http://[2001:db8::9]/", true)
	reaches(w.Host, lab.Outside, "http://203.0.113.9/", false) // another cgroup
	reaches(w.Host, lab.Inside, "http://203.0.113.8/", false)  // excepted
	reaches(w.Host, lab.Inside, "http://192.0.2.10/", false)   // a service leads there
	// The table is put back, whoever removes it.
	conn, err := w.conn()
	if err != nil {
		t.Fatal(err)
	}
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	flushed := time.Now()
	w.Eventually("the table is put back", func() error {
		return w.Do(func() error {
			v, err := capture.Read()
			if err == nil && !v.Installed() {
				err = errors.New("it is not there")
			}
			return err
		})
	})
	if took := time.Since(flushed); took > time.Second {
		t.Logf("the table was back only %s after a flush", took)
	}
	reaches(w.Host, lab.Inside, "http://203.0.113.9/", true)

	// What the rules say is what explain says.
	inside, err := w.Start(exec.Command("sleep", "60"), lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	explains := func(want string, args ...string) {
		t.Helper()
		if out, _ := w.Pentad(append([]string{"explain"}, args...)...); !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("explain %s says no %q: %s", strings.Join(args, " "), want, out)
		}
	}
	pid := fmt.Sprint(inside.Process.Pid)
	explains("is captured by app and led to 127.0.0.1:15001", "--pid", pid, "203.0.113.9:80")
	explains("is captured by app and led to [::1]:15001", "--pid", pid, "[2001:db8::9]:80")
	explains("the capture app excepts this destination", "--pid", pid, "203.0.113.8:80")
	explains("the capture app is about this process, and not about this destination", "--pid", pid, "10.0.0.5:80")
	explains("the process is in another network namespace", "--pid", fmt.Sprint(os.Getpid()), "203.0.113.9:80")
	elsewhere, err := w.Start(exec.Command("sleep", "60"), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	explains("no capture is about it", "--pid", fmt.Sprint(elsewhere.Process.Pid), "203.0.113.9:80")
	explains("addresses of a link are never captured", "--pid", pid, "[fe80::1]:80")
	explains("the loopback is never captured", "--pid", pid, "127.0.0.1:80")
	explains("is captured by lab and led to 198.51.100.1:15002", "--from", "198.51.100.2", "203.0.113.77:80")
	explains("it is for this host itself", "--from", "198.51.100.2", "203.0.113.9:80")

	// With the agent dead what is captured is refused, and does not go another way.
	w.Agent.Kill()
	if out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Inside, "curl", "-sS", "--max-time", "10", "http://203.0.113.9/"); err == nil {
		t.Errorf("with the proxy dead it went another way: %s", out)
	}
	w.Agent = w.Launch()
	w.Ready()
	reaches(w.Host, lab.Inside, "http://203.0.113.9/", true)
	// Off means gone.
	w.Configure("services: []")
	w.MustPentad("reload")
	w.Eventually("the table is gone", func() error {
		return w.Do(func() error {
			v, err := capture.Read()
			if err == nil && v.Installed() {
				err = errors.New("it is still there")
			}
			return err
		})
	})
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
	w := newWorld(t)
	there, far := w.another(), w.another()
	name, _, err := lab.Wire(w.Host, []string{"198.51.100.1/24", "2001:db8:5::1/64"}, there, []string{"198.51.100.2/24", "2001:db8:5::2/64"})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := lab.Wire(w.Host, []string{"10.7.0.1/24", "2001:db8:7::1/64"}, far, []string{"10.7.0.2/24", "2001:db8:7::2/64"}); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{w.Forward(), there.Route("10.7.0.0/24", "198.51.100.1"), there.Route("2001:db8:7::/64", "2001:db8:5::1")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range []string{"10.7.0.2:80", "[2001:db8:7::2]:80", "10.7.0.2:81"} {
		p, err := far.Start(actor.Command("late reply", at), lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		w.Eventually(at+" is ready", func() error {
			if !strings.Contains(p.Log.String(), "ready") {
				return errors.New(p.Log.String())
			}
			return nil
		})
	}
	w.RunAgent(fmt.Sprintf(`services: []
proxies: [{name: arriving, protocol: transparent, listen: ['198.51.100.1:15002', '[2001:db8:5::1]:15002'], open: true}]
capture: [{name: lab, match: {interface: %s, ports: [80]}, to: arriving}]
`, name))
	for _, to := range []string{"10.7.0.2", "2001:db8:7::2"} {
		if out := w.pipeFrom(t, there, "a question", "ncat", to, "80"); out != "heard a question" {
			t.Errorf("%s says %q", to, out)
		}
	}
	// What no capture is about goes its own way, which is none here.
	if out, err := there.Run(e2e.Within(t, e2e.Patience), lab.Outside, "ncat", "-w", "1s", "10.7.0.2", "81"); err == nil {
		t.Errorf("port 81 was led to the proxy: %s", out)
	}
	if metrics := w.Get("/metrics"); !strings.Contains(metrics, `pentad_proxy_connections_total{proxy="arriving"} 2`) {
		t.Error("not both were led to the proxy, and no more")
	}
}
