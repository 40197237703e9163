package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// everythingOn is a service with all that the kernel can do for it by itself.
func everythingOn(s *service.Service) *service.Service {
	c := *s
	c.Balance = service.LeastLatency
	c.Breaker = service.Breaker{MaxConnections: 500, Failures: 3, Ejection: 10 * time.Second, MaxEjected: 50}
	c.ConnectTimeout = 200 * time.Millisecond
	c.Keepalive = service.Keepalive{Idle: 20 * time.Second, Interval: 5 * time.Second, Probes: 3}
	c.SlowStart = 10 * time.Second
	return &c
}

const everythingText = "services: [{name: web, listen: ['192.0.2.10:80'], health: {probe: none}, backends: ['10.0.0.1:8080'], " +
	"breaker: {maxConnections: 500, failures: 3}, connect: {timeout: 200ms}, keepalive: {idle: 20s, interval: 5s, probes: 3}, slowStart: 10s}]\n"

// lifePrograms run in the life of a TCP connection of a client.
var lifePrograms = []string{"connect4", "sock_ops", "sock_release"}

// watched is programs whose run times are added up.
type watched []*ebpf.Program

func (w watched) runtime() (time.Duration, error) {
	var sum time.Duration
	for _, p := range w {
		s, err := p.Stats()
		if err != nil {
			return 0, err
		}
		sum += s.Runtime
	}
	return sum, nil
}

func (w watched) close() {
	for _, p := range w {
		p.Close()
	}
}

// attached finds the programs of services that are attached through pinned links.
func attached(pins string, names ...string) (watched, error) {
	return attachedIn(filepath.Join(pins, "socket", "links"), names...)
}

// attachedIn finds programs that are attached through links that are pinned in a directory.
func attachedIn(dir string, names ...string) (watched, error) {
	var w watched
	for _, name := range names {
		l, err := link.LoadPinnedLink(filepath.Join(dir, name), nil)
		if err != nil {
			w.close()
			return nil, err
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			w.close()
			return nil, err
		}
		p, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			w.close()
			return nil, err
		}
		w = append(w, p)
	}
	return w, nil
}

// realDials is how many connections one measurement of a life makes.
const realDials = 30_000

// perConnection lets sockets connect to real servers and returns the run time of
// the programs for each, in nanoseconds.
func (w watched) perConnection(ctx context.Context, h *lab.Host, self string, services int, address string) (float64, error) {
	before, err := w.runtime()
	if err != nil {
		return 0, err
	}
	out, err := h.Run(ctx, lab.Inside, self, "dial-real", strconv.Itoa(services), strconv.Itoa(realDials), address)
	if err != nil {
		return 0, fmt.Errorf("dial-real: %w: %s", err, out)
	}
	after, err := w.runtime()
	return float64((after - before).Nanoseconds()) / realDials, err
}

// lives measures all programs over the whole life of connections: of services with
// everything on, against the reference, and of connections to no service.
func lives(ctx context.Context, b *board) error {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return err
	}
	defer stats.Close()
	services := largeServices(manyServices, manyBackends)
	for i, s := range services {
		services[i] = everythingOn(s)
	}
	ours, err := newSite(b)
	if err != nil {
		return err
	}
	defer ours.Close()
	theirs, err := newSite(b)
	if err != nil {
		return err
	}
	defer theirs.Close()
	for _, s := range []*site{ours, theirs} {
		if _, err := s.Start(exec.Command(b.self, "accept", "0.0.0.0:8080"), lab.Outside); err != nil {
			return err
		}
		if err := s.listening("10.0.0.1:8080"); err != nil {
			return err
		}
	}
	lock, err := host.Lock(ours.Pins)
	if err != nil {
		return err
	}
	defer lock.Close()
	p := socket.New(socket.Options{Pins: ours.Pins, Version: "bench"})
	defer p.Close()
	if err := p.Apply(ctx, socket.Want{Cgroup: ours.Scope(), Services: (&service.Snapshot{}).Next(services)}); err != nil {
		return err
	}
	reference, detach, err := attachReference(theirs.Host, services, "reference")
	if err != nil {
		return err
	}
	defer detach()
	all, err := attached(ours.Pins, lifePrograms...)
	if err != nil {
		return err
	}
	defer all.close()
	var hit, ref, miss, ratios []float64
	for range rounds {
		for _, m := range []struct {
			to       *[]float64
			programs watched
			at       *site
			services int
		}{{&hit, all, ours, manyServices}, {&ref, watched{reference}, theirs, manyServices}, {&miss, all, ours, 0}} {
			ns, err := m.programs.perConnection(ctx, m.at.Host, b.self, m.services, "10.0.0.1:8080")
			if err != nil {
				return err
			}
			*m.to = append(*m.to, ns)
		}
		ratios = append(ratios, hit[len(hit)-1]/ref[len(ref)-1])
	}
	b.add(row{What: "connect + sock_ops + release, everything on / reference's connect, 10,000 x 10, random", Value: median(ratios),
		Limit: 1.3, Below: true, Detail: fmt.Sprintf("%.0f ns against %.0f ns for each connection to a real server", median(hit), median(ref))})
	b.add(row{What: "the same programs, a connection to no service, whole life", Value: median(miss) / 1000, Unit: " µs", Limit: 0.6, Below: true,
		Detail: "each run counts about 50 ns for the statistics themselves"})
	return nil
}

// flowRate finds how many events one `pentad flow -f` can take without loss.
func flowRate(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.run(ctx, "services: [{name: web, listen: ['192.0.2.10:53/udp'], health: {probe: none}, backends: ['10.0.0.1:53']}]\n"); err != nil {
		return err
	}
	best, detail := 0.0, ""
	// Connects a second of each of two threads; a connect and its end are two events.
	for _, rate := range []int{10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 75_000, 100_000, 0} {
		events, lost, err := s.flowOnce(ctx, rate)
		if err != nil {
			return err
		}
		if lost > 0 {
			detail = fmt.Sprintf("at %.0f events/s %.1f %% were lost", events, 100*float64(lost)/(events*flowFor.Seconds()))
			break
		}
		best = max(best, events)
		detail = "as fast as two threads can connect and close UDP sockets on the cores that they share with the follower"
	}
	b.add(row{What: "flow events a second with one follower, none lost", Value: best, Unit: "/s", Limit: 200_000, Detail: detail})
	return nil
}

// flowFor is how long the rate is kept up.
const flowFor = 4 * time.Second

var lostEvents = regexp.MustCompile(`(\d+) events were lost`)

func (s *site) flowOnce(ctx context.Context, rate int) (events float64, lost int, err error) {
	program, err := filepath.Abs(s.b.program)
	if err != nil {
		return 0, 0, err
	}
	follow := exec.Command(program, "flow", "-f", "--pins", s.Pins)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return 0, 0, err
	}
	defer null.Close()
	follow.Stdout = null
	f, err := s.Start(follow, lab.Outside)
	if err != nil {
		return 0, 0, err
	}
	if err := lab.Eventually(10*time.Second, func() error {
		n, err := socket.Followers(s.Pins)
		if err == nil && n == 0 {
			err = errors.New("nobody follows yet")
		}
		return err
	}); err != nil {
		return 0, 0, err
	}
	cmd := exec.Command(s.b.self, "dial-udp", "192.0.2.10:53", "2", strconv.Itoa(rate))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	p, err := s.Start(cmd, lab.Inside)
	if err != nil {
		return 0, 0, err
	}
	select {
	case <-time.After(flowFor):
	case <-ctx.Done():
		return 0, 0, ctx.Err()
	}
	stdin.Close()
	if err := p.Wait(); err != nil {
		return 0, 0, fmt.Errorf("dial-udp: %w: %s", err, p.Log)
	}
	took := time.Since(began)
	made, err := strconv.Atoi(strings.TrimSpace(p.Log.String()))
	if err != nil {
		return 0, 0, err
	}
	if err := f.Interrupt(); err != nil {
		return 0, 0, fmt.Errorf("flow: %w: %s", err, f.Log)
	}
	for _, m := range lostEvents.FindAllStringSubmatch(f.Log.String(), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			return 0, 0, err
		}
		lost += n
	}
	return float64(2*made) / took.Seconds(), lost, nil
}
