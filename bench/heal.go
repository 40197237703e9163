package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

//go:embed haproxy-late.cfg
var haproxyLate string

//go:embed nginx-late.conf
var nginxLate string

// The service of the healing figures.
const (
	healers     = 64 // clients that connect without pause
	healFailing = 3  // breaker.failures
	healing     = `services:
- name: web
  listen: ['192.0.2.10:80']
  health: {probe: none}
  breaker: {failures: 3, ejection: 1s}
  connect: {timeout: 200ms}
  backends: ['10.0.0.11:8080', '10.0.0.12:8080', '10.0.0.13:8080']
`
)

var victim = netip.MustParseAddrPort("10.0.0.12:8080")

// heals shows how fast a backend is left that begins to refuse, or whose packets
// vanish, with the agent alive and dead.
func heals(ctx context.Context, b *board) error {
	for _, agent := range []string{"alive", "dead"} {
		if err := refusing(ctx, b, agent); err != nil {
			return fmt.Errorf("refusing: %w", err)
		}
		if err := cutOff(ctx, b, agent); err != nil {
			return fmt.Errorf("cut off: %w", err)
		}
	}
	return nil
}

// healingSite has three servers behind the service; the process returned is the
// victim's.
func healingSite(ctx context.Context, b *board, agent string) (*site, *lab.Process, error) {
	s, err := newSite(b)
	if err != nil {
		return nil, nil, err
	}
	var second *lab.Process
	for i, a := range []string{"10.0.0.11:8080", "10.0.0.12:8080", "10.0.0.13:8080"} {
		p, err := s.Start(exec.Command(b.self, "greet", a), lab.Outside)
		if err == nil {
			err = s.listening(a)
		}
		if err != nil {
			s.Close()
			return nil, nil, err
		}
		if i == 1 {
			second = p
		}
	}
	if err := s.run(ctx, healing); err != nil {
		s.Close()
		return nil, nil, err
	}
	if agent == "dead" {
		s.agent.Kill()
	}
	return s, second, nil
}

// startStorm lets clients connect without pause; the function returned ends that.
func (s *site) startStorm(clients int) (func() (actor.StormReport, error), error) {
	cmd := exec.Command(s.b.self, "storm", "192.0.2.10:80", strconv.Itoa(clients), "0s")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	p, err := s.Start(cmd, lab.Inside)
	if err != nil {
		return nil, err
	}
	return func() (actor.StormReport, error) {
		var r actor.StormReport
		stdin.Close()
		if err := p.Wait(); err != nil {
			return r, fmt.Errorf("storm: %w: %s", err, p.Log)
		}
		return r, json.NewDecoder(strings.NewReader(p.Log.String())).Decode(&r)
	}, nil
}

func (s *site) load() (socket.Load, error) {
	v, err := socket.Read(s.Pins)
	if err != nil {
		return socket.Load{}, err
	}
	return v.Loads["web"][victim], nil
}

// awaitLoad waits until what the kernel knows of the victim is as wanted.
func (s *site) awaitLoad(what string, holds func(socket.Load) bool) (socket.Load, error) {
	var l socket.Load
	err := lab.Eventually(20*time.Second, func() error {
		var err error
		if l, err = s.load(); err == nil && !holds(l) {
			err = fmt.Errorf("the backend is not %s: %+v", what, l)
		}
		return err
	})
	return l, err
}

func refusing(ctx context.Context, b *board, agent string) error {
	s, server, err := healingSite(ctx, b, agent)
	if err != nil {
		return err
	}
	defer s.Close()
	end, err := s.startStorm(healers)
	if err != nil {
		return err
	}
	if _, err := s.awaitLoad("used", func(l socket.Load) bool { return l.Connections > 500 }); err != nil {
		return err
	}
	server.Kill()
	if _, err := s.awaitLoad("ejected", func(l socket.Load) bool { return l.Ejected }); err != nil {
		return err
	}
	left := time.Now()
	l, err := s.awaitLoad("ejected for the third time", func(l socket.Load) bool { return l.Ejections >= 3 })
	if err != nil {
		return err
	}
	r, err := end()
	if err != nil {
		return err
	}
	early, late := 0, 0
	for _, a := range r.Failed {
		if a.Began.Before(left) {
			early++
		} else {
			late++
		}
	}
	trials := int(l.Ejections) - 1
	b.add(row{What: "a backend begins to refuse, agent " + agent + ": failed connects", Value: float64(early), Limit: healFailing + healers, Below: true,
		Detail: fmt.Sprintf("of %d by %d clients without pause", r.Attempts, healers)})
	b.add(row{What: "the same, afterwards, beyond one a trial", Value: float64(max(0, late-trials)), Below: true,
		Detail: fmt.Sprintf("%d failed in %d trials", late, trials)})
	return nil
}

func cutOff(ctx context.Context, b *board, agent string) error {
	s, _, err := healingSite(ctx, b, agent)
	if err != nil {
		return err
	}
	defer s.Close()
	end, err := s.startStorm(healers)
	if err != nil {
		return err
	}
	if _, err := s.awaitLoad("used", func(l socket.Load) bool { return l.Connections > 500 }); err != nil {
		return err
	}
	if err := s.CutOff(victim.Addr()); err != nil {
		return err
	}
	cut := time.Now()
	l, err := s.awaitLoad("ejected for the third time", func(l socket.Load) bool { return l.Ejections >= 3 })
	if err != nil {
		return err
	}
	r, err := end()
	if err != nil {
		return err
	}
	tooLate, last := 0, time.Duration(0)
	for _, a := range r.Late {
		if after := a.Began.Sub(cut); after > 250*time.Millisecond {
			tooLate++
		} else {
			last = max(last, after)
		}
	}
	// The latest trial may be under way at the end.
	trials := int(l.Ejections)
	b.add(row{What: "a backend is cut off, agent " + agent + ": connects to it later than 250 ms, beyond trials", Value: float64(max(0, tooLate-trials)),
		Below: true, Detail: fmt.Sprintf("connect.timeout 200ms; the last one before began after %d ms; %d trials", last.Milliseconds(), tooLate)})
	return nil
}

const lateServices = `services:
- name: least-latency
  listen: ['192.0.2.10:80']
  health: {probe: none}
  backends: ['10.0.0.11:8080', '10.0.0.12:8080', '10.0.0.13:8080']
- name: random
  listen: ['192.0.2.11:80']
  balance: random
  health: {probe: none}
  backends: ['10.0.0.11:8080', '10.0.0.12:8080', '10.0.0.13:8080']
`

// lateBackend compares the 99th percentile of request times when one of three
// servers answers 50 ms late.
func lateBackend(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	for a, delay := range map[string]string{"10.0.0.11:8080": "0s", "10.0.0.12:8080": "50ms", "10.0.0.13:8080": "0s"} {
		if _, err := s.Start(exec.Command(b.self, "answer", a, delay), lab.Outside); err != nil {
			return err
		}
		if err := s.listening(a); err != nil {
			return err
		}
	}
	if err := s.server("haproxy.cfg", haproxyLate, "10.0.0.2:8080", "haproxy", "-f", "haproxy.cfg"); err != nil {
		return err
	}
	if err := s.server("nginx.conf", nginxLate, "10.0.0.3:8080", "nginx", "-p", s.Dir, "-c", "nginx.conf", "-e", "stderr"); err != nil {
		return err
	}
	if err := s.run(ctx, lateServices); err != nil {
		return err
	}
	ways := []struct{ name, address string }{
		{"least-latency", "192.0.2.10:80"}, {"random", "192.0.2.11:80"}, {"HAProxy leastconn", "10.0.0.2:8080"}, {"nginx least_conn", "10.0.0.3:8080"},
	}
	p99 := make(map[string][]float64)
	for range 5 {
		for _, w := range ways {
			out, err := s.Run(ctx, lab.Inside, b.self, "ask", w.address, "32", "3s")
			if err != nil {
				return fmt.Errorf("%s: %w: %s", w.name, err, out)
			}
			ms, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
			if err != nil {
				return err
			}
			p99[w.name] = append(p99[w.name], ms)
		}
	}
	ours := median(p99["least-latency"])
	for _, w := range ways[1:] {
		theirs := median(p99[w.name])
		b.add(row{What: "one of three backends 50 ms late: p99 of requests, least-latency / " + w.name, Value: ours / theirs, Limit: 0.999, Below: true,
			Detail: fmt.Sprintf("%.2f ms against %.2f ms", ours, theirs)})
	}
	return nil
}

// resets measures how long it takes to close 10,000 connections to a backend of
// which a probe said that it is down.
func resets(ctx context.Context, b *board) error {
	const connections = 10_000
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.Start(exec.Command(b.self, "keep", "10.0.0.11:8080"), lab.Outside); err != nil {
		return err
	}
	if err := s.listening("10.0.0.11:8080"); err != nil {
		return err
	}
	lock, err := host.Lock(s.Pins)
	if err != nil {
		return err
	}
	defer lock.Close()
	p := socket.New(socket.Options{Pins: s.Pins, Version: "bench"})
	defer p.Close()
	chores, end := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { p.Run(chores) })
	defer running.Wait()
	defer end()
	// Two snapshots that differ in what the probe says.
	web := func(down bool) []*service.Service {
		return []*service.Service{{
			Name: "web", Balance: service.LeastLatency,
			Listeners: []service.Listener{{Address: netip.MustParseAddrPort("192.0.2.10:80"), Protocol: service.TCP}},
			Backends:  []service.Backend{{Address: netip.MustParseAddrPort("10.0.0.11:8080"), Weight: service.DefaultWeight, Down: down}},
		}}
	}
	snap := &service.Snapshot{}
	var took []float64
	for range 5 {
		snap = snap.Next(web(false))
		if err := p.Apply(ctx, socket.Want{Cgroup: s.Scope(), Services: snap}); err != nil {
			return err
		}
		client, err := s.Start(exec.Command(b.self, "hold", "192.0.2.10:80", strconv.Itoa(connections)), lab.Inside)
		if err != nil {
			return err
		}
		if err := lab.Eventually(30*time.Second, func() error {
			if !strings.HasPrefix(client.Log.String(), "holding\n") {
				return fmt.Errorf("not all connections are there: %s", client.Log)
			}
			return nil
		}); err != nil {
			return err
		}
		verdict := time.Now()
		snap = snap.Next(web(true))
		if err := p.Apply(ctx, socket.Want{Cgroup: s.Scope(), Services: snap}); err != nil {
			return err
		}
		if err := client.Wait(); err != nil {
			return fmt.Errorf("hold: %w: %s", err, client.Log)
		}
		ns, err := strconv.ParseInt(strings.TrimSpace(strings.TrimPrefix(client.Log.String(), "holding\n")), 10, 64)
		if err != nil {
			return err
		}
		took = append(took, float64(time.Unix(0, ns).Sub(verdict).Microseconds())/1000)
	}
	b.add(row{What: "10,000 established connections closed after a probe's verdict", Value: median(took), Unit: " ms", Limit: 200, Below: true,
		Detail: "until the client has seen the last one end"})
	return nil
}
