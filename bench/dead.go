package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/pentad/pentad/lab"
)

//go:embed haproxy-dead.cfg
var haproxyDead string

// The services of which one backend fails: one for each balance and size.
var (
	deadSizes    = []int{2, 4, 10}
	deadBalances = []string{"least-latency", "least-connections", "random", "source-hash"}
)

// deadBackend is the first backend of each of them.
var deadBackend = netip.MustParseAddrPort("10.0.0.11:8080")

// ailment is a way in which a backend fails while the others do well.
type ailment struct {
	name string
	fall func(s *site, healthy *lab.Process) error
	// latency tells that only a balance that measures it can notice.
	latency bool
}

var ailments = []ailment{
	{name: "refuses", fall: func(_ *site, healthy *lab.Process) error { healthy.Kill(); return nil }},
	{name: "resets what it accepts", fall: func(s *site, healthy *lab.Process) error { return s.instead(healthy, "slam") }},
	{name: "is silent", fall: func(s *site, _ *lab.Process) error { return s.CutOff(deadBackend.Addr()) }},
	{name: "is 200 ms late", latency: true, fall: func(s *site, healthy *lab.Process) error { return s.instead(healthy, "answer", "200ms") }},
}

// instead ends a server and starts another one at the first backend's address.
func (s *site) instead(server *lab.Process, role string, args ...string) error {
	server.Kill()
	if _, err := s.Start(exec.Command(s.b.self, append([]string{role, deadBackend.String()}, args...)...), lab.Outside); err != nil {
		return err
	}
	return s.listening(deadBackend.String())
}

// deadVIP is where the services of a balance and a size listen.
func deadVIP(balance, size int) string {
	return fmt.Sprintf("192.0.2.%d:80", 100+10*balance+size)
}

// toll is which part of the connects a failing backend takes: those that it answered,
// and those that nobody answered.
type toll struct{ First, After float64 }

// deadBackends shows which part of the connects goes to a backend that fails, where
// nothing is configured and the agent is dead.
func deadBackends(ctx context.Context, b *board) error {
	for _, a := range ailments {
		if err := a.measure(ctx, b); err != nil {
			return fmt.Errorf("a backend that %s: %w", a.name, err)
		}
	}
	return nil
}

func (a ailment) measure(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	first, err := s.namedServers()
	if err != nil {
		return err
	}
	if err := s.server("haproxy.cfg", haproxyDead, "10.0.0.2:8002", "haproxy", "-f", "haproxy.cfg"); err != nil {
		return err
	}
	if err := s.run(ctx, deadServices()); err != nil {
		return err
	}
	s.agent.Kill()
	for _, way := range deadWays() {
		// Each has met with the backend while that was well.
		if _, err := s.toll(ctx, way, "300ms"); err != nil {
			return err
		}
	}
	if err := a.fall(s, first); err != nil {
		return err
	}
	for n, size := range deadSizes {
		if err := a.rows(ctx, s, n, size); err != nil {
			return err
		}
	}
	return nil
}

// rows measures every balance of services of one size, and HAProxy.
func (a ailment) rows(ctx context.Context, s *site, n, size int) error {
	var worst toll
	var first, after []string
	for i, balance := range append(slices.Clone(deadBalances), "HAProxy") {
		way := haproxyWay(size)
		if i < len(deadBalances) {
			way = deadVIP(i, size)
		}
		t, err := s.toll(ctx, way, "3s")
		if err != nil {
			return err
		}
		if i < len(deadBalances) && (!a.latency || balance == "least-latency") {
			worst.First, worst.After = max(worst.First, t.First), max(worst.After, t.After)
		}
		first = append(first, fmt.Sprintf("%s %.1f", balance, t.First))
		after = append(after, fmt.Sprintf("%s %.1f", balance, t.After))
	}
	what := fmt.Sprintf("one of %d backends %s, agent dead: its share of the connects, first second", size, a.name)
	s.b.add(row{What: what, Value: worst.First, Unit: " %", Limit: 100 / float64(size), Below: true, Detail: strings.Join(first, ", ")})
	s.b.add(row{What: "the same, after it", Value: worst.After, Unit: " %", Limit: 2, Below: true, Detail: strings.Join(after, ", ")})
	return nil
}

// namedServers starts every backend and returns the first, the one that will fail.
func (s *site) namedServers() (*lab.Process, error) {
	var first *lab.Process
	for i := range slices.Max(deadSizes) {
		address := fmt.Sprintf("10.0.0.%d:8080", 11+i)
		p, err := s.Start(exec.Command(s.b.self, "answer", address, "0s"), lab.Outside)
		if err = errors.Join(err, s.listening(address)); err != nil {
			return nil, err
		}
		if i == 0 {
			first = p
		}
	}
	return first, nil
}

// deadServices says nothing of breakers, probes or time-outs.
func deadServices() string {
	var text strings.Builder
	text.WriteString("services:\n")
	for i, balance := range deadBalances {
		for _, size := range deadSizes {
			fmt.Fprintf(&text, "- name: %s-%d\n  listen: ['%s']\n  balance: %s\n  health: {probe: none}\n  backends:\n", balance, size, deadVIP(i, size), balance)
			for k := range size {
				fmt.Fprintf(&text, "  - 10.0.0.%d:8080\n", 11+k)
			}
		}
	}
	return text.String()
}

func haproxyWay(size int) string { return "10.0.0.2:" + strconv.Itoa(8000+size) }

// deadWays are all addresses at which the backends are reached.
func deadWays() []string {
	var all []string
	for _, size := range deadSizes {
		all = append(all, haproxyWay(size))
		for i := range deadBalances {
			all = append(all, deadVIP(i, size))
		}
	}
	return all
}

func (s *site) toll(ctx context.Context, way, lasts string) (toll, error) {
	var t toll
	out, err := s.Run(ctx, lab.Inside, s.b.self, "toll", way, lasts, deadBackend.String())
	if err != nil {
		return t, fmt.Errorf("toll %s: %w: %s", way, err, out)
	}
	return t, json.Unmarshal([]byte(out), &t)
}
