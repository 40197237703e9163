package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/pentad/pentad/bench/report"
	"github.com/pentad/pentad/lab"
)

// deadFor is how long clients connect to a Service of which one endpoint refuses.
const deadFor = 3 * time.Second

// deadEndpoints shows which part of a pod's connects fails when one endpoint of a
// Service without annotations refuses, and its slice does not say so.
func deadEndpoints(ctx context.Context, b *bench) error {
	if err := b.ready(ctx, true); err != nil {
		return err
	}
	for _, size := range []int{2, 4, 10} {
		ip, err := b.withDeadEndpoint(ctx, size)
		if err != nil {
			return err
		}
		var percent [2]float64
		for i, n := range []*node{b.ours, b.theirs} {
			if percent[i], err = n.failing(ip); err != nil {
				return err
			}
		}
		b.table.Add(report.Row{
			What:  fmt.Sprintf("one of %d endpoints refuses: failed connects of a pod in %.0f s", size, deadFor.Seconds()),
			Value: percent[0], Unit: " %", Limit: 2, Below: true,
			Detail: fmt.Sprintf("kube-proxy: %.1f %%", percent[1]),
		})
	}
	return nil
}

// withDeadEndpoint makes a Service whose first endpoint refuses and waits until both
// nodes translate its address.
func (b *bench) withDeadEndpoint(ctx context.Context, size int) (ip string, err error) {
	addresses := make([]string, size)
	for i := range addresses {
		addresses[i] = netip.AddrFrom4([4]byte{10, 244, 242, byte(10*size + i)}).String()
		if i == 0 {
			continue
		}
		if _, err := b.servers.say(fmt.Sprintf("open %s:%d", addresses[i], podPort)); err != nil {
			return "", err
		}
	}
	name := fmt.Sprintf("dead-%d", size)
	ip = netip.AddrFrom4([4]byte{10, 96, 8, byte(100 + size)}).String()
	if err := b.ensureService(ctx, name, ip, addresses[1]); err != nil {
		return "", err
	}
	if _, err := b.setSlice(ctx, sliceOf(name, podPort, addresses...)); err != nil {
		return "", err
	}
	for _, n := range []*node{b.ours, b.theirs} {
		w, err := startTalk(n.pod, n.Host, lab.Inside, "watch")
		if err != nil {
			return "", err
		}
		if _, err := w.say(ip + ":80 " + addresses[size-1]); err != nil {
			return "", err
		}
		w.in.Close()
	}
	return ip, nil
}

// failing returns which part of a pod's connects fails, in percent.
func (n *node) failing(ip string) (float64, error) {
	h, err := startTalk(n.pod, n.Host, lab.Inside, "hammer", ip+":80")
	if err != nil {
		return 0, err
	}
	time.Sleep(deadFor)
	line, err := h.end()
	if err != nil {
		return 0, err
	}
	var count, failed int
	if _, err := fmt.Sscan(line, &count, &failed); err != nil {
		return 0, fmt.Errorf("%q: %w", line, err)
	}
	return 100 * float64(failed) / float64(max(1, count)), nil
}
