// Package announce_test tests what the network is told of VIPs: with real routers, behind
// which clients are.
package announce_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, nil) }

const (
	vip4 = "192.0.2.10"
	vip6 = "2001:db8:10::10"
)

// site is a segment with a router, two directors and three real servers, and a client
// behind the router.
type site struct {
	t         *testing.T
	segment   *lab.Switch
	router    *e2e.World
	client    *lab.Host
	directors [2]*e2e.World
	names     [2]string // of their interfaces
	servers   [3]*e2e.World

	vip4, vip6 string
}

func newSite(t *testing.T) *site { return newSiteFor(t, vip4, vip6) }

// newSiteFor is a site whose service has these VIPs.
func newSiteFor(t *testing.T, vip4, vip6 string) *site {
	t.Helper()
	lab.Need(t)
	s := &site{t: t, vip4: vip4, vip6: vip6}
	var err error
	if s.segment, err = lab.NewSwitch(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.segment.Close(); err != nil {
			t.Error(err)
		}
	})
	plug := func(h *lab.Host, n int) string {
		name, err := s.segment.Plug(h, fmt.Sprintf("10.80.0.%d/24", n), fmt.Sprintf("2001:db8:80::%d/64", n))
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	s.router, s.client = e2e.New(t), e2e.New(t).Host
	plug(s.router.Host, 1)
	_, _, err = lab.Wire(s.client, []string{"198.51.100.2/24", "2001:db8:100::2/64"}, s.router.Host, []string{"198.51.100.1/24", "2001:db8:100::1/64"})
	must(t, err, s.router.Forward(), s.client.Route("0.0.0.0/0", "198.51.100.1"), s.client.Route("::/0", "2001:db8:100::1"),
		s.router.Sysctl("net/ipv4/fib_multipath_hash_policy", "1"), s.router.Sysctl("net/ipv6/fib_multipath_hash_policy", "1"))
	for i := range s.directors {
		s.directors[i] = e2e.New(t)
		s.names[i] = plug(s.directors[i].Host, 11+i)
	}
	for i := range s.servers {
		w := e2e.New(t)
		s.servers[i] = w
		plug(w.Host, 21+i)
		must(t, w.Route("0.0.0.0/0", "10.80.0.1"), w.Route("::/0", "2001:db8:80::1"))
		w.RunAgent(s.services("", "realServer: {vips: auto}"))
		w.StartServer(actor.Command("repeat", fmt.Sprint("s", i+1), vip4+":80", "["+vip6+"]:80",
			fmt.Sprintf("10.80.0.%d:80", 21+i), fmt.Sprintf("[2001:db8:80::%d]:80", 21+i)), "ready")
	}
	return s
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// services is a file with a service of all servers; more is said of each of them.
func (s *site) services(more, role string) string {
	var backends []string
	for i := range s.servers {
		backends = append(backends, fmt.Sprintf("{address: 10.80.0.%[1]d%[2]s}, {address: '[2001:db8:80::%[1]d]'%[2]s}", 21+i, more))
	}
	return fmt.Sprintf(`services:
- name: web
  listen: ['%s:80', '[%s]:80']
  forward: direct
  health: {probe: tcp, interval: 300ms, timeout: 300ms, fall: 2}
  backends: [%s]
guard: off
%s
`, s.vip4, s.vip6, strings.Join(backends, ", "), role)
}

// announce is the section of a director.
func (s *site) announce(i int, more string) string {
	return fmt.Sprintf(`director: {interfaces: [%s]}
announce:
  bgp: {as: 65001, communities: [65001:100], %s, peers: [{address: 10.80.0.1, as: 65000, bfd: {}}]}
`, s.names[i], more)
}

// ways returns by which directors the router sends packets to a VIP.
func (s *site) ways(vip string) (ways string) {
	family := "-4"
	if strings.Contains(vip, ":") {
		family = "-6"
	}
	out, err := s.router.Run(s.t.Context(), lab.Outside, "ip", family, "route", "show", vip)
	if err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	for i := range s.directors {
		if strings.Contains(out, fmt.Sprintf("via 10.80.0.%d ", 11+i)) || strings.Contains(out, fmt.Sprintf("via 2001:db8:80::%d ", 11+i)) {
			ways += fmt.Sprint(i)
		}
	}
	return ways
}

// routed waits until the router sends packets to both VIPs by just these directors, and
// returns how long it took.
func (s *site) routed(when, want string) time.Duration {
	s.t.Helper()
	began := time.Now()
	// Sessions that come back wait for each other's timers, which on a busy machine are
	// several in a row.
	err := lab.Eventually(time.Minute, func() error {
		if w4, w6 := s.ways(vip4), s.ways(vip6); w4 != want || w6 != want {
			return fmt.Errorf("IPv4 goes by %q and IPv6 by %q, not %q", w4, w6, want)
		}
		return nil
	})
	if err != nil {
		s.t.Fatalf("%s: %v", when, err)
	}
	return time.Since(began)
}

// bird is a router's daemon.
func (s *site) bird() *lab.Process {
	s.t.Helper()
	return s.birdWith(`router id 10.80.0.1;
protocol device { scan time 2; }
protocol bfd { interface "*" { min rx interval 100 ms; min tx interval 100 ms; multiplier 3; }; }
protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; merge paths yes limit 16; }
protocol kernel { ipv6 { import none; export where source = RTS_BGP; }; merge paths yes limit 16; }
template bgp directors {
	local 10.80.0.1 as 65000; hold time 9; error wait time 1, 5; bfd on;
	ipv4 { import where net ~ [ 192.0.2.0/24+ ] && (65001,100) ~ bgp_community; export none; };
	ipv6 { import where net ~ [ 2001:db8:10::/64+ ] && (65001,100) ~ bgp_community; export none; };
}
protocol bgp d0 from directors { neighbor 10.80.0.11 as 65001; passive; }
protocol bgp d1 from directors { neighbor 10.80.0.12 as 65001; passive; }
`)
}

func (s *site) birdWith(text string) *lab.Process {
	s.t.Helper()
	conf := s.write("bird.conf", text)
	control := filepath.Join(s.router.Dir, "bird.ctl")
	s.t.Cleanup(func() {
		if !s.t.Failed() {
			return
		}
		for _, what := range []string{"route", "protocols"} {
			s.t.Logf("birdc show %s all:\n%s", what, lab.Indent(s.birdc("show", what, "all")))
		}
	})
	return s.daemon("bird", "-f", "-c", conf, "-s", control, "-P", filepath.Join(s.router.Dir, "bird.pid"))
}

// birdc asks bird.
func (s *site) birdc(args ...string) string {
	out, _ := s.router.Run(context.Background(), lab.Outside, "birdc", append([]string{"-s", filepath.Join(s.router.Dir, "bird.ctl")}, args...)...)
	return out
}

func (s *site) daemon(name string, args ...string) *lab.Process {
	s.t.Helper()
	p, err := s.router.Start(exec.Command(name, args...), lab.Outside)
	must(s.t, err)
	s.t.Cleanup(func() {
		if s.t.Failed() {
			s.t.Logf("%s says:\n%s", name, lab.Indent(p.Log.String()))
		}
	})
	return p
}

func (s *site) write(name, text string) string {
	s.t.Helper()
	path, err := s.router.WriteFile(name, text)
	must(s.t, err)
	return path
}

// talk has connections by the VIPs, and returns what fails the test when one of them
// breaks.
func (s *site) talk() (unbroken func(when string)) {
	s.t.Helper()
	return s.talkAt(s.client)
}

// talkAt is talk from a host.
func (s *site) talkAt(h *lab.Host) (unbroken func(when string)) {
	s.t.Helper()
	p, err := h.Start(actor.Command("talk", "40", s.vip4+":80", "["+s.vip6+"]:80"), lab.Outside)
	must(s.t, err)
	s.router.Eventually("80 connections", func() error {
		if !strings.Contains(p.Log.String(), "talking") {
			return errors.New(p.Log.String())
		}
		return nil
	})
	return func(when string) {
		s.t.Helper()
		if strings.Contains(p.Log.String(), "broken") {
			s.t.Fatalf("%s: %s", when, p.Log)
		}
	}
}

// steady fails the test if the router changes its mind within a time.
func (s *site) steady(when, want string, d time.Duration) {
	s.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if w4, w6 := s.ways(vip4), s.ways(vip6); w4 != want || w6 != want {
			s.t.Fatalf("%s: IPv4 goes by %q and IPv6 by %q, not %q all the time", when, w4, w6, want)
		}
	}
}

// Losing a director, in whatever way, breaks no connection, and the router hears of it in
// a moment.
func TestBird(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	lab.Need(t, "bird")
	s.bird()
	for i, d := range s.directors {
		d.RunAgent(s.services("", s.announce(i, "onExit: withdraw")))
	}
	t.Logf("both directors: %v", s.routed("the router knows both directors", "01"))
	unbroken := s.talk()

	out := s.directors[0].MustPentad("announcement", "list")
	for _, want := range []string{vip4, vip6, "web", "10.80.0.1"} {
		if !strings.Contains(out, want) {
			t.Errorf("announcement list says no %q: %s", want, out)
		}
	}
	if out := s.directors[0].MustPentad("announcement", "peers"); !strings.Contains(out, "established") || strings.Count(out, " up ") != 1 {
		t.Errorf("announcement peers says: %s", out)
	}
	if out, _ := s.directors[0].Pentad("explain", "--from", "198.51.100.2", vip4+":80"); !strings.Contains(out, "to 10.80.0.1") {
		t.Errorf("explain does not say who is told: %s", out)
	}

	must(t, s.segment.Cut(s.directors[1].Host))
	t.Logf("a cable is cut: %v", s.routed("a cable is cut", "0"))
	unbroken("a cable was cut")
	must(t, s.segment.Mend(s.directors[1].Host))
	t.Logf("it is mended: %v", s.routed("the cable is mended", "01"))
	unbroken("the cable was mended")

	must(t, s.directors[1].Agent.Process.Signal(syscall.SIGSTOP))
	t.Logf("an agent hangs: %v", s.routed("an agent hangs", "0"))
	must(t, s.directors[1].Agent.Process.Signal(syscall.SIGCONT))
	t.Logf("it goes on: %v", s.routed("it goes on", "01"))
	s.steady("after it went on", "01", 4*time.Second)
	unbroken("an agent hung")

	s.directors[1].Agent.Kill()
	t.Logf("an agent is killed: %v", s.routed("an agent is killed", "0"))
	unbroken("an agent was killed")
	s.directors[1].Agent = s.directors[1].Launch()
	s.routed("another agent", "01")
	unbroken("another agent has come")

	// Nobody is told of a VIP behind which nobody is.
	s.directors[0].Configure(s.services(", admin: drain", s.announce(0, "onExit: withdraw")))
	s.directors[0].MustPentad("reload", "--force")
	s.routed("one director has no servers", "1")
	unbroken("one director has no servers")
	if out, _ := s.directors[0].Pentad("explain", "--from", "198.51.100.2", vip4+":80"); !strings.Contains(strings.Join(strings.Fields(out), " "), "Nobody is told that 192.0.2.10 is here, because no backend of the service web is usable.") {
		t.Errorf("explain does not say why nobody is told: %s", out)
	}
	s.directors[0].Configure(s.services("", s.announce(0, "onExit: withdraw")))
	s.directors[0].MustPentad("reload")
	s.routed("it has servers again", "01")

	if err := s.directors[0].Agent.Stop(); err != nil {
		t.Errorf("the agent ends with %v", err)
	}
	s.routed("an agent is stopped", "1")
	unbroken("an agent was stopped")
}

// With onExit: keep the router goes on sending, whatever becomes of the agent; but not
// after `pentad down`, and not when the section is taken out.
func TestKeptRoutes(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	lab.Need(t, "bird")
	s.bird()
	keep := strings.Replace(s.announce(0, "onExit: keep, restartTime: 60s"), ", bfd: {}", "", 1)
	d := s.directors[0]
	d.RunAgent(s.services("", keep))
	s.routed("the router knows the director", "0")
	unbroken := s.talk()
	d.Agent.Kill()
	s.steady("the agent was killed", "0", 2*time.Second)
	unbroken("the agent was killed")
	d.Agent = d.Launch()
	d.Ready()
	s.steady("another agent has come", "0", 8*time.Second)
	if err := d.Agent.Stop(); err != nil {
		t.Errorf("the agent ends with %v", err)
	}
	s.steady("the agent was stopped", "0", 2*time.Second)
	unbroken("the agent was stopped")
	d.Agent = d.Launch()
	d.Ready()
	d.Eventually("a session", func() error {
		if out := d.MustPentad("announcement", "peers"); !strings.Contains(out, "established") {
			return errors.New(out)
		}
		return nil
	})
	d.Configure(s.services("", fmt.Sprintf("director: {interfaces: [%s]}", s.names[0])))
	d.MustPentad("reload")
	s.routed("nobody is announced any more", "")
	d.Configure(s.services("", keep))
	d.MustPentad("reload")
	s.routed("the section is there again", "0")
	d.MustPentad("down")
	s.routed("nothing is left", "")
}

// A peer that refuses is named with its reason, and what to do.
func TestRefusingPeer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	lab.Need(t, "bird")
	s.bird()
	d := s.directors[0]
	d.Configure(s.services("", strings.Replace(s.announce(0, "onExit: withdraw"), "as: 65001", "as: 65009", 1)))
	d.Agent = d.Launch()
	d.Eventually("the reason", func() error {
		out, _ := d.Pentad("announcement", "peers")
		if !strings.Contains(out, "the autonomous system of this host is not the one that it expects") {
			return errors.New(out)
		}
		return nil
	})
}

// All that can be said of a peer and of routes, to a router of the same autonomous system
// and to one of another, over IPv6.
func TestPeersAndAttributes(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	lab.Need(t, "bird")
	s.birdWith(`router id 10.80.0.1;
protocol device { scan time 2; }
template bgp directors {
	hold time 9; error wait time 1, 5; passive; password "secret of both";
	ipv4 { import all; export none; };
	ipv6 { import all; export none; };
}
protocol bgp inner from directors { local 10.80.0.1 as 65001; neighbor 10.80.0.11 as 65001; }
protocol bgp outer from directors { local 2001:db8:80::1 as 65000; neighbor 2001:db8:80::11 as 65001; ttl security on; }
`)
	d := s.directors[0]
	secret, err := d.WriteFile("secret", "secret of both\n")
	must(t, err, os.Chmod(secret, 0o600))
	d.RunAgent(s.services("", fmt.Sprintf(`director: {interfaces: [%s]}
announce:
  bgp:
    as: 65001
    routerID: 10.80.0.77
    communities: [65001:100, "large:65001:1:2", no-export]
    aggregates: [192.0.2.0/25]
    peers:
    - {address: 10.80.0.1, as: 65001, passwordFile: %[2]s, localPref: 250}
    - {address: "2001:db8:80::1", as: 65000, passwordFile: %[2]s, ttlSecurity: true, med: 40, communities: [65001:200], nextHop: ["2001:db8:80::99", 10.80.0.99]}
`, s.names[0], secret)))
	for _, c := range []struct {
		protocol, prefix string
		want             []string
	}{
		{"inner", "192.0.2.0/25", []string{"BGP.local_pref: 250", "BGP.next_hop: 10.80.0.11", "(65001,100)", "(65535,65281)", "(65001, 1, 2)", "BGP.as_path: \n"}},
		{"inner", vip6 + "/128", []string{"BGP.local_pref: 250", "BGP.next_hop: 2001:db8:80::11"}},
		{"outer", "192.0.2.0/25", []string{"BGP.med: 40", "BGP.next_hop: 10.80.0.99", "(65001,200)", "BGP.as_path: 65001\n"}},
		{"outer", vip6 + "/128", []string{"BGP.med: 40", "BGP.next_hop: 2001:db8:80::99", "(65001,200)"}},
	} {
		s.router.Eventually(c.protocol+" knows "+c.prefix, func() error {
			out := s.birdc("show", "route", "all", c.prefix, "protocol", c.protocol)
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					return fmt.Errorf("it has no %q: %s", want, out)
				}
			}
			return nil
		})
	}
	if out := s.birdc("show", "route", "protocol", "inner"); strings.Contains(out, vip4+"/32") {
		t.Errorf("a VIP is announced besides its aggregate: %s", out)
	}
	if out := s.birdc("show", "protocols", "all", "inner"); !strings.Contains(out, "Neighbor ID:      10.80.0.77") {
		t.Errorf("the router ID is another: %s", out)
	}
	// What is said of routes changes without a moment in which there are none.
	before := s.sessions()
	file := d.Dir + "/pentad.yaml"
	text, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, []byte(strings.NewReplacer("med: 40", "med: 41, services: [web], bfd: {}", "localPref: 250", "localPref: 251", "65001:100", "65001:101").Replace(string(text))), 0o600))
	d.MustPentad("reload")
	for protocol, want := range map[string]string{"inner": "BGP.local_pref: 251", "outer": "BGP.med: 41"} {
		s.router.Eventually(protocol+" has "+want, func() error {
			if out := s.birdc("show", "route", "all", vip6+"/128", "protocol", protocol); !strings.Contains(out, want) {
				return errors.New(out)
			}
			return nil
		})
	}
	// Nor is an address that is added, or a password that is gone, any reason.
	must(t, d.AddAddress("10.0.0.5/32"), os.Remove(secret))
	time.Sleep(6 * time.Second) // longer than it takes to look at addresses
	if after := s.sessions(); after != before || before == "" {
		t.Errorf("sessions were\n%s\nand are\n%s", before, after)
	}
	d.Eventually("status says that the password is gone", func() error {
		if out, _ := d.Pentad("status"); !strings.Contains(out, secret) {
			return errors.New(out)
		}
		return nil
	})
	must(t, os.WriteFile(file, []byte(strings.ReplaceAll(string(text), "{address: 10.80.0.2", "{admin: drain, address: 10.80.0.2")), 0o600))
	_, _ = d.Pentad("reload", "--force") // it says what is wrong with the password
	s.router.Eventually("what drains is withdrawn", func() error {
		if out := s.birdc("show", "route", "protocol", "inner"); strings.Contains(out, "192.0.2.0/25") {
			return errors.New(out)
		}
		return nil
	})
	must(t, os.WriteFile(secret, []byte("another\n"), 0o600))
	d.Agent.Kill()
	d.Agent = d.Launch()
	d.Eventually("the reason", func() error {
		out, _ := d.Pentad("announcement", "peers")
		if strings.Count(out, "has it the same password?") != 2 {
			return errors.New(out)
		}
		return nil
	})
}

// sessions says since when each session of the router is established.
func (s *site) sessions() (all string) {
	for line := range strings.Lines(s.birdc("show", "protocols")) {
		if strings.Contains(line, "Established") {
			all += line
		}
	}
	return all
}

// A router that takes one family only is told of that, and the other one is not said to be
// announced.
func TestOneFamily(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	lab.Need(t, "bird")
	s.birdWith(`router id 10.80.0.1;
protocol device { scan time 2; }
protocol bfd { interface "*" { min rx interval 100 ms; min tx interval 100 ms; multiplier 3; }; }
protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }
protocol bgp d0 { local 10.80.0.1 as 65000; neighbor 10.80.0.11 as 65001; passive; bfd on; ipv4 { import all; export none; }; }
`)
	d := s.directors[0]
	d.RunAgent(s.services("", s.announce(0, "onExit: withdraw")))
	d.Eventually("it is told of one", func() error {
		out := strings.Join(strings.Fields(d.MustPentad("announcement", "list")), " ")
		for _, want := range []string{vip4 + " web 10.80.0.1 -", vip6 + " web - peer 10.80.0.1: it takes no IPv6 routes from this host"} {
			if !strings.Contains(out, want) {
				return errors.New(out)
			}
		}
		return nil
	})
	if out := d.MustPentad("status"); !strings.Contains(out, "it takes no IPv6 routes from this host") {
		t.Errorf("status says nothing of it: %s", out)
	}
	// Routers hear that the routes go before they do, and before BFD says goodbye.
	stopped := make(chan error, 1)
	go func() { stopped <- d.Agent.Stop() }()
	s.router.Eventually("the farewell", func() error {
		if out := s.birdc("show", "route", "all", vip4+"/32"); !strings.Contains(out, "(65535,0)") {
			return errors.New(out)
		}
		return nil
	})
	must(t, <-stopped)
	s.router.Eventually("the end", func() error {
		if out := s.birdc("show", "route", "all", vip4+"/32"); strings.Contains(out, "via") {
			return errors.New(out)
		}
		return nil
	})
}

// frr is another router's daemon.
func (s *site) frr() {
	s.t.Helper()
	dir, err := os.MkdirTemp("", "pentad-frr-")
	must(s.t, err, os.Chmod(dir, 0o777)) // it runs as another user
	s.t.Cleanup(func() { os.RemoveAll(dir) })
	conf := filepath.Join(dir, "frr.conf")
	must(s.t, os.WriteFile(conf, []byte(`hostname router
ip nht resolve-via-default
router bgp 65000
 bgp router-id 10.80.0.1
 no bgp ebgp-requires-policy
 bgp bestpath as-path multipath-relax
 neighbor directors peer-group
 neighbor directors remote-as 65001
 neighbor directors passive
 neighbor directors bfd
 neighbor directors bfd profile fast
 neighbor 10.80.0.11 peer-group directors
 neighbor 10.80.0.12 peer-group directors
 address-family ipv4 unicast
  maximum-paths 16
 exit-address-family
 address-family ipv6 unicast
  neighbor directors activate
  maximum-paths 16
 exit-address-family
bfd
 profile fast
  receive-interval 100
  transmit-interval 100
  detect-multiplier 3
`), 0o644))
	for _, name := range []string{"zebra", "bfdd", "bgpd"} {
		args := []string{"-f", conf, "-i", filepath.Join(dir, name+".pid"), "--vty_socket", dir, "-u", "frr", "-g", "frr", "-A", "127.0.0.1", "-P", "0", "-z", filepath.Join(dir, "zserv.api")}
		if name == "bfdd" {
			args = append(args, "--bfdctl", filepath.Join(dir, "bfdd.sock"))
		}
		s.daemon("/usr/lib/frr/"+name, args...)
		s.router.Eventually(name+" runs", func() error {
			_, err := os.Stat(filepath.Join(dir, name+".vty"))
			return err
		})
	}
}

func TestFRR(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	lab.Need(t, "/usr/lib/frr/bgpd")
	s.frr()
	for i, d := range s.directors {
		d.RunAgent(s.services("", s.announce(i, "onExit: withdraw")))
	}
	t.Logf("both directors: %v", s.routed("the router knows both directors", "01"))
	unbroken := s.talk()
	must(t, s.segment.Cut(s.directors[1].Host))
	t.Logf("a cable is cut: %v", s.routed("a cable is cut", "0"))
	unbroken("a cable was cut")
	must(t, s.segment.Mend(s.directors[1].Host))
	t.Logf("it is mended: %v", s.routed("the cable is mended", "01"))
	must(t, s.directors[1].Agent.Process.Signal(syscall.SIGSTOP))
	t.Logf("an agent hangs: %v", s.routed("an agent hangs", "0"))
	must(t, s.directors[1].Agent.Process.Signal(syscall.SIGCONT))
	t.Logf("it goes on: %v", s.routed("it goes on", "01"))
	s.steady("after it went on", "01", 4*time.Second)
	unbroken("an agent hung")
}
