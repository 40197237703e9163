package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/lab"
)

//go:embed haproxy.cfg
var haproxyConfig string

//go:embed nginx-stream.conf
var streamConfig string

//go:embed nginx-web.conf
var webConfig string

// site is a lab host with a running agent.
type site struct {
	*lab.Host
	b     *board
	agent *lab.Process
	api   *api.Client
}

// newSite makes a host whose whole network 10.0.0.0/8 is local to it, so that
// one server can be any number of backends.
func newSite(b *board) (*site, error) {
	h, err := lab.NewHost()
	if err != nil {
		return nil, err
	}
	s := &site{Host: h, b: b, api: api.NewClient(filepath.Join(h.Dir, "run"))}
	err = errors.Join(
		h.AddAddress("10.0.0.1/8", "10.0.0.2/8", "10.0.0.3/8"),
		// Ports for many short connections; settings of this namespace alone.
		s.sysctl("net/ipv4/ip_local_port_range", "1024 65535"),
		s.sysctl("net/ipv4/tcp_tw_reuse", "1"),
		s.sysctl("net/core/somaxconn", "4096"),
	)
	if err != nil {
		h.Close()
		return nil, err
	}
	return s, nil
}

func (s *site) sysctl(name, value string) error {
	return s.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) })
}

// launch starts an agent with the configuration in force.
func (s *site) launch() error {
	program, err := filepath.Abs(s.b.program)
	if err != nil {
		return err
	}
	s.agent, err = s.Start(exec.Command(program, "run", "-v", "-c", "pentad.yaml", "--pins", s.Pins, "--run-dir", s.Dir+"/run"), lab.Outside)
	return err
}

// ready waits until the agent says that all is in the kernel.
func (s *site) ready(ctx context.Context) error {
	return lab.Eventually(60*time.Second, func() error {
		st, err := s.api.Status(ctx)
		if err == nil && len(st.Problems) > 0 {
			err = errors.New(st.Problems[0])
		}
		select {
		case <-s.agent.Done():
			return fmt.Errorf("the agent ended: %s", s.agent.Log)
		default:
			return err
		}
	})
}

func (s *site) configure(text string) error {
	_, err := s.WriteFile("pentad.yaml", text+"scope: {cgroup: "+s.Scope()+"}\n")
	return err
}

func (s *site) run(ctx context.Context, text string) error {
	if err := s.configure(text); err != nil {
		return err
	}
	if err := s.launch(); err != nil {
		return err
	}
	return s.ready(ctx)
}

// listening waits until an address accepts.
func (s *site) listening(address string) error {
	return lab.Eventually(10*time.Second, func() error {
		return s.Do(func() error {
			c, err := net.DialTimeout("tcp", address, time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
	})
}

// server starts a program whose configuration file lies in the host's directory.
func (s *site) server(file, config, address, name string, args ...string) error {
	if _, err := s.WriteFile(file, config); err != nil {
		return err
	}
	p, err := s.Start(exec.Command(name, args...), lab.Outside)
	if err != nil {
		return err
	}
	if err := s.listening(address); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, p.Log)
	}
	return nil
}

const oneService = "services: [{name: web, listen: ['192.0.2.10:80'], health: {probe: none}, backends: ['10.0.0.1:8080']}]\n"

// connectTimes compares a connection through a VIP with a direct one: with a
// service that says nothing, and with everything on.
func connectTimes(ctx context.Context, b *board) error {
	if err := connectTime(ctx, b, "VIP / direct", oneService, 1.05); err != nil {
		return err
	}
	return connectTime(ctx, b, "VIP with everything on / direct", everythingText, 1.08)
}

func connectTime(ctx context.Context, b *board, what, text string, limit float64) error {
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
	if err := s.run(ctx, text); err != nil {
		return err
	}
	var ratios, vip, direct []float64
	for range 11 {
		out, err := s.Run(ctx, lab.Inside, b.self, "dial-pair", "192.0.2.10:80", "10.0.0.1:8080", "10000")
		if err != nil {
			return fmt.Errorf("dial-pair: %w: %s", err, out)
		}
		var pair [2]float64
		if _, err := fmt.Sscan(out, &pair[0], &pair[1]); err != nil {
			return err
		}
		vip, direct = append(vip, pair[0]), append(direct, pair[1])
		ratios = append(ratios, pair[0]/pair[1])
	}
	b.add(row{
		What: "TCP connect+close, " + what, Value: median(ratios), Limit: limit, Below: true,
		Detail: fmt.Sprintf("%.1f µs against %.1f µs", median(vip)/1000, median(direct)/1000),
	})
	return nil
}

// load is one way to use wrk.
type load struct {
	name, unit string
	args       []string
	path       string
	result     *regexp.Regexp
}

var (
	perSecond = regexp.MustCompile(`Requests/sec:\s+([\d.]+)`)
	transfer  = regexp.MustCompile(`Transfer/sec:\s+([\d.]+)(KB|MB|GB)`)
	loads     = []load{
		{"requests/s, keep-alive", "requests/s", nil, "/", perSecond},
		{"requests/s, connection per request", "requests/s", []string{"-H", "Connection: close"}, "/", perSecond},
		{"throughput, keep-alive, 1 MiB each", "MB/s", nil, "/big", transfer},
	}
)

// wrk compares the VIP with a direct connection, HAProxy and nginx.
func wrk(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.WriteFile("big", strings.Repeat("x", 1<<20)); err != nil {
		return err
	}
	err = errors.Join(
		s.server("nginx-web.conf", webConfig, "10.0.0.1:8080", "nginx", "-p", s.Dir, "-c", "nginx-web.conf", "-e", "stderr"),
		s.server("haproxy.cfg", haproxyConfig, "10.0.0.2:8080", "haproxy", "-f", "haproxy.cfg"),
		s.server("nginx-stream.conf", streamConfig, "10.0.0.3:8080", "nginx", "-p", s.Dir, "-c", "nginx-stream.conf", "-e", "stderr"),
		s.run(ctx, oneService),
	)
	if err != nil {
		return err
	}
	for _, l := range loads {
		if err := s.compare(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// peer is another way to the server than the VIP.
type peer struct {
	name, address string
	limit         float64 // what VIP / peer must reach
	pairs         int
}

// Nothing stands between VIP and server, so that a difference is noise: many
// pairs are needed to show that there is none.
var peers = []peer{
	{"direct", "10.0.0.1:8080", 0.98, 25},
	{"HAProxy", "10.0.0.2:8080", 1, 5},
	{"nginx stream", "10.0.0.3:8080", 1, 5},
}

// compare measures the VIP and each peer in turn, in pairs whose order changes,
// and adds a row for each peer.
func (s *site) compare(ctx context.Context, l load) error {
	for _, p := range peers {
		var ratios, vip, other []float64
		for i := range p.pairs {
			var got [2]float64
			for k := range 2 {
				w := (i + k) % 2
				var err error
				if got[w], err = s.wrkOnce(ctx, l, []string{"192.0.2.10:80", p.address}[w]); err != nil {
					return err
				}
			}
			vip, other = append(vip, got[0]), append(other, got[1])
			ratios = append(ratios, got[0]/got[1])
		}
		s.b.add(row{
			What: l.name + ", VIP / " + p.name, Value: median(ratios), Limit: p.limit,
			Detail: fmt.Sprintf("%.0f against %.0f %s", median(vip), median(other), l.unit),
		})
	}
	return nil
}

func (s *site) wrkOnce(ctx context.Context, l load, way string) (float64, error) {
	// The server has the first core, the client the last; proxies run where they like.
	args := append([]string{"-c", strconv.Itoa(runtime.NumCPU() - 1), "wrk", "-t1", "-c32", "-d1s"}, l.args...)
	out, err := s.Run(ctx, lab.Inside, "taskset", append(args, "http://"+way+l.path)...)
	if err != nil {
		return 0, fmt.Errorf("wrk: %w: %s", err, out)
	}
	m := l.result.FindStringSubmatch(out)
	if m == nil || strings.Contains(out, "Socket errors") || strings.Contains(out, "Non-2xx") {
		return 0, fmt.Errorf("wrk to %s: %s", way, out)
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return 0, err
	}
	if len(m) > 2 {
		v *= map[string]float64{"KB": 1.0 / 1024, "MB": 1, "GB": 1024}[m[2]]
	}
	return v, nil
}
