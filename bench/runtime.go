package main

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// The size of the large configuration, and how often things are repeated.
const (
	manyServices = 10_000
	manyBackends = 10
	rounds       = 7 // of every measurement, alternating between the peers
	dials        = 100_000
)

// largeServices makes services whose backends are anywhere in 10.128.0.0/9.
func largeServices(n, backends int) []*service.Service {
	all := make([]*service.Service, n)
	for i := range all {
		s := &service.Service{
			Name:      fmt.Sprintf("service-%05d", i),
			Listeners: []service.Listener{{Address: vipOf(i), Protocol: service.TCP}},
		}
		for b := range backends {
			k := i*backends + b
			addr := netip.AddrFrom4([4]byte{10, 128 + byte(k>>16), byte(k >> 8), byte(k)})
			s.Backends = append(s.Backends, service.Backend{Address: netip.AddrPortFrom(addr, 8080), Weight: service.DefaultWeight})
		}
		all[i] = s
	}
	return all
}

// contender is one program whose run time is measured.
type contender struct {
	name string
	host *lab.Host
	prog *ebpf.Program
	end  func()
	ns   []float64
}

// measure lets fresh TCP sockets connect on the contender's host and returns the
// program's mean run time in nanoseconds, by the kernel's own statistics.
func (c *contender) measure(ctx context.Context, self string, services, offset int) error {
	before, err := c.prog.Stats()
	if err != nil {
		return err
	}
	out, err := c.host.Run(ctx, lab.Inside, self, "dial-many", strconv.Itoa(services), strconv.Itoa(dials), strconv.Itoa(offset))
	if err != nil {
		return fmt.Errorf("%s: %w: %s", c.name, err, out)
	}
	after, err := c.prog.Stats()
	if err != nil {
		return err
	}
	runs := after.RunCount - before.RunCount
	if runs < dials {
		return fmt.Errorf("%s ran %d times, want %d", c.name, runs, dials)
	}
	c.ns = append(c.ns, float64((after.Runtime-before.Runtime).Nanoseconds())/float64(runs))
	return nil
}

// newVoid makes a host from which a SYN to any backend leaves, and is lost. A connect
// that found no way, or a refusal, would be a failure that the programs have to note.
func newVoid() (*lab.Host, error) {
	h, err := lab.NewHost()
	if err != nil {
		return nil, err
	}
	if err := h.Void("10.0.0.1/8"); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// newPentad installs services with pentad on a host of its own.
func newPentad(ctx context.Context, services []*service.Service) (*contender, error) {
	h, err := newVoid()
	if err != nil {
		return nil, err
	}
	lock, err := host.Lock(h.Pins)
	if err != nil {
		return nil, err
	}
	p := socket.New(socket.Options{Pins: h.Pins, Version: "bench"})
	end := func() { p.Close(); lock.Close(); h.Close() }
	if err := p.Apply(ctx, socket.Want{Cgroup: h.Scope(), Services: (&service.Snapshot{}).Next(services)}); err != nil {
		end()
		return nil, err
	}
	l, err := link.LoadPinnedLink(filepath.Join(h.Pins, "socket", "links", "connect4"), nil)
	if err != nil {
		end()
		return nil, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		end()
		return nil, err
	}
	prog, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		end()
		return nil, err
	}
	return &contender{name: "pentad", host: h, prog: prog, end: end}, nil
}

// newReference installs a program of bench/bpf on a host of its own.
func newReference(services []*service.Service, name string) (*contender, error) {
	h, err := newVoid()
	if err != nil {
		return nil, err
	}
	prog, detach, err := attachReference(h, services, name)
	if err != nil {
		h.Close()
		return nil, err
	}
	return &contender{name: name, host: h, prog: prog, end: func() { detach(); h.Close() }}, nil
}

// runTimes measures the connect program beside the reference and the empty
// program, with one service and with many, and what a miss costs.
func runTimes(ctx context.Context, b *board) error {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return err
	}
	defer stats.Close()
	for _, size := range []struct {
		services    int
		label       string
		hit, miss   float64
		hitN, missN string
	}{
		{manyServices, "10,000 listeners x 10 backends, random", 0.5, 1, "connect program / reference", "miss / reference's miss"},
		{1, "1 listener x 10 backends, hot", 1, 1, "connect program / reference", "miss / reference's miss"},
	} {
		hit, miss, err := contest(ctx, b.self, size.services)
		if err != nil {
			return err
		}
		b.add(row{
			What: size.hitN + ", " + size.label, Value: hit.pentad / hit.reference, Limit: size.hit, Below: true,
			Detail: fmt.Sprintf("%.0f ns against %.0f ns; an empty program %.0f ns", hit.pentad, hit.reference, hit.empty),
		})
		b.add(row{
			What: size.missN + ", " + size.label, Value: miss.pentad / miss.reference, Limit: size.miss, Below: true,
			Detail: fmt.Sprintf("%.0f ns against %.0f ns; an empty program %.0f ns", miss.pentad, miss.reference, miss.empty),
		})
	}
	return nil
}

// times are medians of run times in nanoseconds.
type times struct{ pentad, reference, empty float64 }

func contest(ctx context.Context, self string, n int) (hit, miss times, err error) {
	services := largeServices(n, manyBackends)
	all := make([]*contender, 0, 3)
	defer func() {
		for _, c := range all {
			c.end()
		}
	}()
	for _, make := range []func() (*contender, error){
		func() (*contender, error) { return newPentad(ctx, services) },
		func() (*contender, error) { return newReference(services, "reference") },
		func() (*contender, error) { return newReference(services, "empty") },
	} {
		c, err := make()
		if err != nil {
			return hit, miss, err
		}
		all = append(all, c)
	}
	medians := func(offset int) (times, error) {
		for _, c := range all {
			c.ns = nil
		}
		for range rounds {
			for _, c := range all {
				if err := c.measure(ctx, self, n, offset); err != nil {
					return times{}, err
				}
			}
		}
		return times{median(all[0].ns), median(all[1].ns), median(all[2].ns)}, nil
	}
	if hit, err = medians(0); err != nil {
		return hit, miss, err
	}
	// The same number of addresses, none of them a VIP.
	miss, err = medians(manyServices)
	return hit, miss, err
}

func median(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	if len(v)%2 == 1 {
		return v[len(v)/2]
	}
	return (v[len(v)/2-1] + v[len(v)/2]) / 2
}
