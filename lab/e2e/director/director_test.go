// Package director_test tests direct routing: directors, real servers and clients on one
// segment.
package director_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, clients) }

const (
	vip4 = "192.0.2.10"
	vip6 = "2001:db8:10::10"
)

// site is a segment with two directors, three real servers, and a client whose packets
// to VIPs go by one director.
type site struct {
	t         *testing.T
	directors [2]*e2e.World
	names     [2]string // of their interfaces
	client    *lab.Host
	servers   [3]*server
}

// server is a real server: it has the VIPs, and nobody hears of it.
type server struct {
	*e2e.World
	process *lab.Process
}

func newSite(t *testing.T) *site {
	t.Helper()
	lab.Need(t)
	s := &site{t: t}
	w, err := lab.NewSwitch()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	plug := func(h *lab.Host, n int) string {
		name, err := w.Plug(h, fmt.Sprintf("10.80.0.%d/24", n), fmt.Sprintf("2001:db8:80::%d/64", n))
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	host := func() *lab.Host {
		h, err := lab.NewHost()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
		return h
	}
	for i := range s.directors {
		s.directors[i] = e2e.New(t)
		s.names[i] = plug(s.directors[i].Host, 11+i)
	}
	s.client = host()
	plug(s.client, 2)
	for i := range s.servers {
		s.servers[i] = &server{World: e2e.New(t)}
		plug(s.servers[i].Host, 21+i)
		s.servers[i].RunAgent(s.config("realServer: {vips: auto}", both(0, ""), both(1, ""), both(2, "")))
		s.serve(i)
	}
	s.via(0)
	return s
}

func (s *site) serve(i int) {
	s.t.Helper()
	// An answer to a datagram has the address of the socket: the VIP. Probes come to its own.
	p, err := s.servers[i].Start(actor.Command("repeat", fmt.Sprint("s", i+1), vip4+":80", "["+vip6+"]:80",
		fmt.Sprintf("10.80.0.%d:80", 21+i), fmt.Sprintf("[2001:db8:80::%d]:80", 21+i)), lab.Outside)
	if err != nil {
		s.t.Fatal(err)
	}
	s.servers[i].process = p
	s.directors[0].Eventually("a server is ready", func() error {
		if !strings.HasPrefix(p.Log.String(), "ready\n") {
			return fmt.Errorf("it says %q", p.Log)
		}
		return nil
	})
}

// via has the client's packets go by one of the directors.
func (s *site) via(i int) {
	s.t.Helper()
	if err := errors.Join(s.client.RouteReplace("192.0.2.0/24", fmt.Sprintf("10.80.0.%d", 11+i)),
		s.client.RouteReplace("2001:db8:10::/64", fmt.Sprintf("2001:db8:80::%d", 11+i))); err != nil {
		s.t.Fatal(err)
	}
}

// direct has both directors know some servers, of which some drain.
func (s *site) direct(servers ...string) {
	s.t.Helper()
	for i, d := range s.directors {
		text := s.config(fmt.Sprintf("director: {interfaces: [%s]}", s.names[i]), servers...)
		if d.Agent == nil {
			d.RunAgent(text)
			continue
		}
		d.Configure(text)
		d.MustPentad("reload")
	}
}

func (s *site) config(role string, servers ...string) string {
	return fmt.Sprintf(`services:
- name: web
  listen: ['%s:80', '[%s]:80', '%s:80/udp', '[%s]:80/udp']
  forward: direct
  health: {probe: tcp, interval: 200ms, timeout: 200ms, fall: 1}
  backends: [%s]
guard: off
%s
`, vip4, vip6, vip4, vip6, strings.Join(servers, ", "), role)
}

func both(i int, more string) string {
	return fmt.Sprintf("{address: 10.80.0.%[1]d%[2]s}, {address: '[2001:db8:80::%[1]d]'%[2]s}", 21+i, more)
}

// ask asks a VIP N times, and returns how often each server has answered.
func (s *site) ask(network, to string, n int) map[string]int {
	s.t.Helper()
	p, err := s.client.Start(actor.Command("ask often", network, to, fmt.Sprint(n)), lab.Outside)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		s.t.Fatalf("%v: %s", err, p.Log)
	}
	count := make(map[string]int)
	for line := range strings.Lines(p.Log.String()) {
		count[strings.TrimSpace(line)]++
	}
	return count
}

// answered fails the test unless just these servers answer, to the client's own address.
func (s *site) answered(when string, servers ...string) {
	s.t.Helper()
	for _, q := range []struct{ network, to, from string }{
		{"tcp", vip4 + ":80", "10.80.0.2"}, {"udp", vip4 + ":80", "10.80.0.2 2"},
		{"tcp", "[" + vip6 + "]:80", "2001:db8:80::2"}, {"udp", "[" + vip6 + "]:80", "2001:db8:80::2 2"},
	} {
		got := s.ask(q.network, q.to, 60)
		for _, name := range servers {
			// A new server has datagrams only when those that were there are known.
			if got[name+" "+q.from] == 0 && (q.network == "tcp" || name != "s3") {
				s.t.Errorf("%s: %s over %s: %s has not answered in 60 times: %v", when, q.to, q.network, name, got)
			}
			delete(got, name+" "+q.from)
		}
		if len(got) > 0 {
			s.t.Errorf("%s: %s over %s: others answered: %v", when, q.to, q.network, got)
		}
	}
}

// Packets to a VIP get to real servers, who see the client and answer it by themselves.
// Connections stay where they are when servers come and drain, when the agent is killed,
// and when another director takes over.
func TestDirect(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.direct(both(0, ""), both(1, ""))
	s.answered("with two servers", "s1", "s2")

	for _, want := range []string{"belongs to the service web (forward: direct)", "10.80.0.21 (50%), 10.80.0.22 (50%), which has to have the address 192.0.2.10 and answers the client by itself"} {
		if out, _ := s.directors[0].Pentad("explain", "--from", "10.80.0.2", vip4+":80"); !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("explain says no %q: %s", want, out)
		}
	}

	talk, err := s.client.Start(actor.Command("talk", "40", vip4+":80", "["+vip6+"]:80"), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	s.directors[0].Eventually("80 connections", func() error {
		if !strings.Contains(talk.Log.String(), "talking") {
			return errors.New(talk.Log.String())
		}
		return nil
	})
	unbroken := func(when string) {
		t.Helper()
		if strings.Contains(talk.Log.String(), "broken") {
			t.Fatalf("%s: %s", when, talk.Log)
		}
	}
	s.direct(both(0, ""), both(1, ""), both(2, ""))
	s.answered("with three servers", "s1", "s2", "s3")
	unbroken("a server has come")
	s.direct(both(0, ""), both(1, ", admin: drain"), both(2, ""))
	s.answered("while one drains", "s1", "s3")
	unbroken("a server drains")
	// Another director decides the same, and knows nothing of what is there.
	s.via(1)
	s.answered("by the other director", "s1", "s3")
	unbroken("another director has taken over")
	s.via(0)
	// The kernel does it.
	s.directors[0].Agent.Kill()
	s.answered("with the agent dead", "s1", "s3")
	unbroken("the agent was killed")
	s.directors[0].Agent = s.directors[0].Launch()
	s.directors[0].Ready()
	s.answered("with another agent", "s1", "s3")
	unbroken("another agent has come")
	// Who dies takes only his own along.
	s.servers[0].process.Kill()
	s.directors[0].Eventually("a dead server gets nothing", func() error {
		got := s.ask("tcp", vip4+":80", 30)
		if len(got) != 1 || got["s3 10.80.0.2"] != 30 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	for line := range strings.Lines(talk.Log.String()) {
		if strings.Contains(line, "broken") && !strings.Contains(line, "broken: s1:") {
			t.Errorf("a server died, and of another one: %s", line)
		}
	}
	s.directors[0].Eventually("a new server has datagrams", func() error {
		if got := s.ask("udp", vip4+":80", 30); got["s3 10.80.0.2 2"] == 0 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	// Off means gone.
	s.directors[0].Configure("services: []\nguard: off")
	s.directors[0].MustPentad("reload")
	s.directors[0].Eventually("nothing is left", func() error {
		out, err := s.directors[0].Run(t.Context(), lab.Outside, "sh", "-c", "ls -R "+s.directors[0].Pins)
		if err == nil && strings.Contains(out, "director") {
			err = errors.New(out)
		}
		return err
	})
	// A real server that is one no more has neither the addresses nor the settings.
	s.servers[1].MustPentad("down")
	for command, want := range map[string]string{"ip -o addr show dev lo": vip4, "sysctl net.ipv4.conf.all.arp_ignore net.ipv4.conf.all.arp_announce": "= 0\nnet.ipv4.conf.all.arp_announce = 0"} {
		out, err := s.servers[1].Run(t.Context(), lab.Outside, "sh", "-c", command)
		if err != nil || strings.Contains(out, want) != strings.HasPrefix(command, "sysctl") {
			t.Errorf("after down, %s: %v: %s", command, err, out)
		}
	}
}

// Datagrams of several packets go where their first does.
func TestFragments(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.direct(both(0, ""), both(1, ""), both(2, ""))
	for to, from := range map[string]string{vip4 + ":80": "10.80.0.2", "[" + vip6 + "]:80": "2001:db8:80::2"} {
		p, err := s.client.Start(actor.Command("big", to, "8000"), lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil {
			t.Errorf("%s: %v: %s", to, err, p.Log)
		}
		seen := make(map[string]bool)
		for line := range strings.Lines(p.Log.String()) {
			name, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
			seen[name] = true
			if rest != from+" 8000" {
				t.Errorf("%s: %q", to, line)
			}
		}
		if len(seen) < 2 {
			t.Errorf("%s: only %v answered 10 sockets", to, slices.Collect(maps.Keys(seen)))
		}
	}
}
