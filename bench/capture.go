package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
)

// The targets that are captured in connect(), by a REDIRECT, and not at all.
const (
	inConnectTarget  = "10.0.0.1:8080"
	redirectedTarget = "10.0.0.2:8080"
	freeTarget       = "10.0.0.3:8080"
)

const captureText = `services: []
proxies: [{name: captured, protocol: transparent, listen: '127.0.0.1:15001', maxPerClient: 20000}]
capture:
- {name: in-connect, match: {cgroup: %[1]s, destinations: [10.0.0.1/32]}, mode: ebpf, to: captured}
- {name: redirected, match: {cgroup: %[1]s, destinations: [10.0.0.2/32]}, mode: redirect, to: captured}
`

// captures compares the ways to capture, and measures what a connection pays that none
// takes.
func captures(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	for _, at := range []string{inConnectTarget, redirectedTarget, freeTarget} {
		if _, err := s.Start(exec.Command(b.self, "source", at), lab.Outside); err != nil {
			return err
		}
		if err := s.listening(at); err != nil {
			return err
		}
	}
	if err := s.run(ctx, fmt.Sprintf(captureText, s.Scope())); err != nil {
		return err
	}
	const connections = 10_000
	rates := make(map[string][]float64)
	for range 5 {
		for _, at := range []string{inConnectTarget, redirectedTarget, freeTarget} {
			out, err := s.Run(ctx, lab.Inside, b.self, "through", at, "false", "connections", strconv.Itoa(connections))
			if err != nil {
				return fmt.Errorf("%s: %w: %s", at, err, out)
			}
			seconds, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
			if err != nil {
				return err
			}
			rates[at] = append(rates[at], connections/seconds)
		}
	}
	b.add(row{What: "connections/s, captured by ebpf / by redirect", Value: median(rates[inConnectTarget]) / median(rates[redirectedTarget]), Limit: 1,
		Detail: fmt.Sprintf("%.0f against %.0f connections/s; %.0f are not captured", median(rates[inConnectTarget]), median(rates[redirectedTarget]), median(rates[freeTarget]))})
	return s.weighUncaptured(ctx)
}

// weighUncaptured measures the programs of a connection that no capture takes, beside as
// many empty ones.
func (s *site) weighUncaptured(ctx context.Context) error {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return err
	}
	defer stats.Close()
	dirs, err := filepath.Glob(filepath.Join(s.Pins, "capture", "processes-*"))
	if err != nil || len(dirs) != 1 {
		return fmt.Errorf("programs of captures: %q, %w", dirs, err)
	}
	programs, err := attachedIn(dirs[0], "connect4", "sock_ops")
	if err != nil {
		return err
	}
	defer programs.close()
	const connections = 20_000
	var each []float64
	for range 5 {
		before, err := programs.runtime()
		if err != nil {
			return err
		}
		if out, err := s.Run(ctx, lab.Inside, s.b.self, "through", freeTarget, "false", "connections", strconv.Itoa(connections)); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		after, err := programs.runtime()
		if err != nil {
			return err
		}
		each = append(each, float64((after-before).Nanoseconds())/connections)
	}
	s.b.add(row{What: "programs of captures, a connection that none takes", Value: median(each), Unit: " ns",
		Detail: "all runs of connect4 and sock_ops in its life; see above what an empty program takes for one"})
	return nil
}
