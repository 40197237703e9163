package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// largeFile writes services as a configuration. Backends are not probed: the
// figures are about size.
func largeFile(services []*service.Service) string {
	var b bytes.Buffer
	b.WriteString("services:\n")
	for _, s := range services {
		fmt.Fprintf(&b, "- name: %s\n  listen:\n", s.Name)
		for _, l := range s.Listeners {
			fmt.Fprintf(&b, "  - %s\n", l)
		}
		b.WriteString("  health: {probe: none}\n  backends:\n")
		for _, x := range s.Backends {
			fmt.Fprintf(&b, "  - %s\n", x.Address)
		}
	}
	return b.String()
}

// sizes measures a file of 10,000 services with 10 backends each.
func sizes(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	services := largeServices(manyServices, manyBackends)
	text := largeFile(services)
	if err := s.configure(text); err != nil {
		return err
	}
	program, err := filepath.Abs(b.program)
	if err != nil {
		return err
	}
	var checks, starts []float64
	for range 5 {
		began := time.Now()
		if out, err := s.Run(ctx, lab.Outside, program, "check", "-c", "pentad.yaml"); err != nil {
			return fmt.Errorf("check: %w: %s", err, out)
		}
		checks = append(checks, time.Since(began).Seconds())
	}
	file := fmt.Sprintf("file of %.1f MB", float64(len(text))/1e6)
	b.add(row{What: "pentad check, 10,000 x 10", Value: median(checks), Unit: " s", Limit: 1, Below: true, Detail: file})

	for i := range 5 {
		if i > 0 {
			s.agent.Kill()
			if err := socket.Remove(s.Pins); err != nil {
				return err
			}
		}
		began := time.Now()
		if err := s.launch(); err != nil {
			return err
		}
		if err := s.ready(ctx); err != nil {
			return err
		}
		starts = append(starts, time.Since(began).Seconds())
	}
	b.add(row{What: "start to everything in the kernel, 10,000 x 10", Value: median(starts), Unit: " s", Limit: 2, Below: true,
		Detail: "process start to ready, nothing in the kernel before"})
	if err := s.change(ctx, services); err != nil {
		return err
	}
	return s.weigh()
}

var took = regexp.MustCompile(`msg=applied revision=\d+ services=\d+ took=(\S+)`)

// change measures how long one other backend in the file takes.
func (s *site) change(ctx context.Context, services []*service.Service) error {
	var live, writes []float64
	for i := range 7 {
		ms, err := s.changeOnce(ctx, services, manyServices/2, byte(i))
		if err != nil {
			return err
		}
		live = append(live, ms)
		// The agent says so when the last of its roles is done, which is after the
		// change is live.
		var all [][]string
		if err := lab.Eventually(10*time.Second, func() error {
			if all = took.FindAllStringSubmatch(s.agent.Log.String(), -1); len(all) <= i {
				return fmt.Errorf("the agent has said of %d changes of %d that they are applied", len(all), i+1)
			}
			return nil
		}); err != nil {
			return err
		}
		d, err := time.ParseDuration(all[len(all)-1][1])
		if err != nil {
			return err
		}
		writes = append(writes, float64(d.Microseconds())/1000)
	}
	s.b.add(row{What: "one backend of 100,000 changed in the file, until live", Value: median(live), Unit: " ms", Limit: 500, Below: true,
		Detail: "from writing the file, with parsing"})
	s.b.add(row{What: "the same, the kernel writes alone", Value: median(writes), Unit: " ms", Limit: 2, Below: true,
		Detail: "finding the difference, and its writes"})
	return nil
}

// weigh shows the memory of the agent and of the kernel.
func (s *site) weigh() error {
	rss, err := residentBytes(s.agent.Process.Pid)
	if err != nil {
		return err
	}
	v, err := socket.Read(s.Pins)
	if err != nil {
		return err
	}
	s.b.add(row{What: "resident memory of the agent, 10,000 x 10", Value: float64(rss) / 1e6, Unit: " MB", Limit: 150, Below: true,
		Detail: fmt.Sprintf("after seven changes of the file; kernel memory of the maps %.1f MB", float64(total(v.Memory))/1e6)})
	return nil
}

func total(sizes map[string]uint64) (n uint64) {
	for _, v := range sizes {
		n += v
	}
	return n
}

func residentBytes(pid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.Fields(v)[0])
			return n * 1024, err
		}
	}
	return 0, errors.New("no VmRSS")
}

// smallChange measures how long a change of a small file takes.
func smallChange(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	services := largeServices(20, 3)
	if err := s.run(ctx, largeFile(services)); err != nil {
		return err
	}
	var live []float64
	for i := range 21 {
		ms, err := s.changeOnce(ctx, services, 10, byte(i))
		if err != nil {
			return err
		}
		live = append(live, ms)
	}
	b.add(row{What: "one backend changed in a file of 20 services, until live", Value: slices.Max(live), Unit: " ms", Limit: 100, Below: true,
		Detail: fmt.Sprintf("the slowest of %d; median %.0f ms, 15 of them waiting whether the file still changes", len(live), median(live))})
	return nil
}

// changeOnce gives a service another backend and returns the milliseconds until
// that is in the kernel.
func (s *site) changeOnce(ctx context.Context, services []*service.Service, which int, number byte) (float64, error) {
	changed := *services[which]
	changed.Backends = append([]service.Backend{{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 200, 0, number}), 80)}}, changed.Backends[1:]...)
	services[which] = &changed
	before, err := s.api.Status(ctx)
	if err != nil {
		return 0, err
	}
	text := largeFile(services)
	began := time.Now()
	if err := s.configure(text); err != nil {
		return 0, err
	}
	err = lab.Eventually(10*time.Second, func() error {
		now, err := s.api.Status(ctx)
		if err == nil && now.Revision == before.Revision {
			err = errors.New("no new revision")
		}
		return err
	})
	return float64(time.Since(began).Microseconds()) / 1000, err
}

// capacity loads what is far beyond any one host.
func capacity(ctx context.Context, b *board) error {
	const services, backends = 100_000, 10
	h, err := lab.NewHost()
	if err != nil {
		return err
	}
	defer h.Close()
	lock, err := host.Lock(h.Pins)
	if err != nil {
		return err
	}
	defer lock.Close()
	p := socket.New(socket.Options{Pins: h.Pins, Version: "bench"})
	defer p.Close()
	snap := (&service.Snapshot{}).Next(largeServices(services, backends))
	began := time.Now()
	if err := p.Apply(ctx, socket.Want{Cgroup: h.Scope(), Services: snap}); err != nil {
		return err
	}
	d := time.Since(began)
	u, err := p.Usage()
	if err != nil {
		return err
	}
	b.add(row{What: "100,000 listeners and 1,000,000 backends into the kernel", Value: d.Seconds(), Unit: " s",
		Detail: fmt.Sprintf("kernel memory of the maps %.0f MB", float64(total(u.Memory))/1e6)})
	return nil
}

// probes measures what probing 10,000 backends every 5 seconds costs.
func probes(ctx context.Context, b *board) error {
	const services, backends, interval = 1000, 10, 5
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.Start(exec.Command(b.self, "accept", "0.0.0.0:8080"), lab.Outside); err != nil {
		return err
	}
	if err := s.listening("10.0.0.1:8080"); err != nil {
		return err
	}
	text := strings.ReplaceAll(largeFile(largeServices(services, backends)), "{probe: none}", fmt.Sprintf("{probe: tcp, interval: %ds}", interval))
	if err := s.run(ctx, text); err != nil {
		return err
	}
	// Every backend was probed once: what follows is the steady state.
	if err := lab.Eventually(60*time.Second, func() error {
		st, err := s.api.Status(ctx)
		if err == nil && st.Probes.Done < services*backends {
			err = fmt.Errorf("%d probes done", st.Probes.Done)
		}
		return err
	}); err != nil {
		return err
	}
	first, err := s.api.Status(ctx)
	if err != nil {
		return err
	}
	cpu, began := cpuTime(s.agent.Process.Pid), time.Now()
	time.Sleep(4 * interval * time.Second)
	used, span := cpuTime(s.agent.Process.Pid)-cpu, time.Since(began)
	last, err := s.api.Status(ctx)
	if err != nil {
		return err
	}
	v, err := socket.Read(s.Pins)
	if err != nil {
		return err
	}
	down := 0
	for _, x := range v.Services {
		for _, st := range x.States() {
			if st != service.Serving {
				down++
			}
		}
	}
	rate := float64(last.Probes.Done-first.Probes.Done) / span.Seconds()
	b.add(row{What: "probing 10,000 backends every 5 s, of one core", Value: 100 * used.Seconds() / span.Seconds(), Unit: " %", Limit: 20, Below: true,
		Detail: fmt.Sprintf("%.0f probes/s, %.0f µs each, %d backends not serving", rate, 1e6*used.Seconds()/span.Seconds()/rate, down)})
	return nil
}

// cpuTime returns the time that a process has run, from /proc/PID/stat.
func cpuTime(pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// Fields are counted from behind the name, which may hold spaces.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+2:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	// USER_HZ is 100 on every Linux that matters here (time(7)).
	return time.Duration(user+system) * 10 * time.Millisecond
}

// kills ends the agent 50 times under full load.
func kills(ctx context.Context, b *board) error {
	const times = 50
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.Start(exec.Command(b.self, "accept", "10.0.0.1:8080"), lab.Outside); err != nil {
		return err
	}
	if err := s.listening("10.0.0.1:8080"); err != nil {
		return err
	}
	if err := s.run(ctx, oneService); err != nil {
		return err
	}
	client := exec.Command(b.self, "dial-hard", "192.0.2.10:80")
	stop, err := client.StdinPipe()
	if err != nil {
		return err
	}
	load, err := s.Start(client, lab.Inside)
	if err != nil {
		return err
	}
	for range times {
		s.agent.Kill()
		if err := s.launch(); err != nil {
			return err
		}
		if err := s.ready(ctx); err != nil {
			return err
		}
	}
	stop.Close()
	if err := load.Wait(); err != nil {
		return fmt.Errorf("dial-hard: %w: %s", err, load.Log)
	}
	var made, failed, untranslated int
	if _, err := fmt.Sscan(load.Log.String(), &made, &failed, &untranslated); err != nil {
		return fmt.Errorf("dial-hard: %w: %s", err, load.Log)
	}
	b.add(row{What: "kill -9 and new start, 50 times: connections failed or untranslated", Value: float64(failed + untranslated), Unit: "",
		Limit: 0, Below: true, Detail: fmt.Sprintf("%d connections, %d failed, %d untranslated", made, failed, untranslated)})
	return nil
}
