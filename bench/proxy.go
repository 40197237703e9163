package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/proxy/socks5"
)

// forwarder is somebody who forwards connections to 10.0.0.1:8080.
type forwarder struct {
	name    string
	address string // empty: the target itself
	socks   bool   // it has to be asked
	process *lab.Process
}

const proxyTarget = "10.0.0.1:8080"

const proxyText = `services: []
proxies: [{name: socks, protocol: socks5, listen: '10.0.0.2:1080', open: true, maxPerClient: 20000}]
forwards: [{name: plain, listen: '127.0.0.1:1081', to: '10.0.0.1:8080', via: direct}]
`

const danteConfig = `logoutput: /dev/null
internal: 10.0.0.2 port = 1090
external: 10.0.0.2
socksmethod: none
clientmethod: none
user.privileged: root
user.unprivileged: root
client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
`

// proxies compares what forwards in user space.
func proxies(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.Start(exec.Command(b.self, "source", proxyTarget), lab.Outside); err != nil {
		return err
	}
	if err := s.listening(proxyTarget); err != nil {
		return err
	}
	if err := s.run(ctx, proxyText); err != nil {
		return err
	}
	peers, err := s.forwarders()
	if err != nil {
		return err
	}
	if err := s.compareThroughput(ctx, peers); err != nil {
		return err
	}
	if err := s.compareConnects(ctx, peers); err != nil {
		return err
	}
	return s.weighIdle(ctx, peers)
}

// forwarders starts the peers.
func (s *site) forwarders() ([]*forwarder, error) {
	all := []*forwarder{
		{name: "direct"},
		{name: "pentad SOCKS5", address: "10.0.0.2:1080", socks: true, process: s.agent},
		{name: "pentad forward", address: "127.0.0.1:1081", process: s.agent},
	}
	dante, err := s.WriteFile("danted.conf", danteConfig)
	if err != nil {
		return nil, err
	}
	proxy, err := s.WriteFile("haproxy.cfg", haproxyConfig)
	if err != nil {
		return nil, err
	}
	for _, p := range []struct {
		forwarder
		args []string
	}{
		{forwarder{name: "danted", address: "10.0.0.2:1090", socks: true}, []string{"danted", "-f", dante}},
		{forwarder{name: "microsocks", address: "10.0.0.2:1091", socks: true}, []string{"microsocks", "-i", "10.0.0.2", "-p", "1091"}},
		{forwarder{name: "HAProxy", address: "10.0.0.2:8080"}, []string{"haproxy", "-f", proxy}},
	} {
		f := p.forwarder
		if f.process, err = s.Start(exec.Command(p.args[0], p.args[1:]...), lab.Outside); err != nil {
			return nil, err
		}
		if err := s.listening(f.address); err != nil {
			return nil, fmt.Errorf("%s: %w: %s", f.name, err, f.process.Log)
		}
		all = append(all, &f)
	}
	return all, nil
}

// perRound is how many bytes go through a connection in one round.
const perRound = 1 << 30

// compareThroughput has each forward one long answer, in turns, and looks at what that
// takes of processors.
func (s *site) compareThroughput(ctx context.Context, peers []*forwarder) error {
	rates, cpu := make(map[string][]float64), make(map[string][]float64)
	for range 5 {
		for _, f := range peers {
			before := f.cpu()
			out, err := s.Run(ctx, lab.Outside, s.b.self, "through", f.address, strconv.FormatBool(f.socks), "bytes", strconv.Itoa(perRound))
			if err != nil {
				return fmt.Errorf("%s: %w: %s", f.name, err, out)
			}
			seconds, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
			if err != nil {
				return err
			}
			rates[f.name] = append(rates[f.name], perRound/1e6/seconds)
			cpu[f.name] = append(cpu[f.name], (f.cpu()-before).Seconds()*1e9/perRound)
		}
	}
	rate := func(name string) float64 { return median(rates[name]) }
	show := func(what string, ours, theirs string, limit float64) {
		s.b.add(row{What: "throughput, " + what, Value: rate(ours) / rate(theirs), Limit: limit,
			Detail: fmt.Sprintf("%.0f against %.0f MB/s", rate(ours), rate(theirs))})
	}
	show("SOCKS5 / direct", "pentad SOCKS5", "direct", 0.95)
	show("SOCKS5 / danted", "pentad SOCKS5", "danted", 1)
	show("SOCKS5 / microsocks", "pentad SOCKS5", "microsocks", 1)
	show("forward / HAProxy", "pentad forward", "HAProxy", 1)
	for _, peer := range []string{"danted", "microsocks"} {
		s.b.add(row{What: "CPU per GB, SOCKS5 / " + peer, Value: median(cpu["pentad SOCKS5"]) / median(cpu[peer]), Limit: 1, Below: true,
			Detail: fmt.Sprintf("%.2f against %.2f s of a processor", median(cpu["pentad SOCKS5"]), median(cpu[peer]))})
	}
	s.b.add(row{What: "CPU per GB, forward / HAProxy", Value: median(cpu["pentad forward"]) / median(cpu["HAProxy"]), Limit: 1, Below: true,
		Detail: fmt.Sprintf("%.2f against %.2f s of a processor", median(cpu["pentad forward"]), median(cpu["HAProxy"]))})
	return nil
}

// compareConnects has each forward many short connections.
func (s *site) compareConnects(ctx context.Context, peers []*forwarder) error {
	const connections = 10_000
	rates := make(map[string][]float64)
	for range 5 {
		for _, f := range peers {
			out, err := s.Run(ctx, lab.Outside, s.b.self, "through", f.address, strconv.FormatBool(f.socks), "connections", strconv.Itoa(connections))
			if err != nil {
				return fmt.Errorf("%s: %w: %s", f.name, err, out)
			}
			seconds, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
			if err != nil {
				return err
			}
			rates[f.name] = append(rates[f.name], connections/seconds)
		}
	}
	for _, p := range []struct{ what, ours, theirs string }{
		{"SOCKS5 / danted", "pentad SOCKS5", "danted"}, {"SOCKS5 / microsocks", "pentad SOCKS5", "microsocks"}, {"forward / HAProxy", "pentad forward", "HAProxy"},
	} {
		s.b.add(row{What: "connections/s, " + p.what, Value: median(rates[p.ours]) / median(rates[p.theirs]), Limit: 1,
			Detail: fmt.Sprintf("%.0f against %.0f connections/s", median(rates[p.ours]), median(rates[p.theirs]))})
	}
	return nil
}

// idleConnections is as many as a process with 20,000 files can forward.
const idleConnections = 9_000

// weighIdle looks at what silent connections take of memory. Two buffers of 32 KiB each,
// as io.Copy has them where it cannot splice, would be 64 KiB a connection.
func (s *site) weighIdle(ctx context.Context, peers []*forwarder) error {
	for _, f := range peers {
		if f.name != "pentad SOCKS5" && f.name != "microsocks" {
			continue
		}
		before := f.memory()
		cmd := exec.Command(s.b.self, "through", f.address, strconv.FormatBool(f.socks), "idle", strconv.Itoa(idleConnections))
		in, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		p, err := s.Start(cmd, lab.Outside)
		if err != nil {
			return err
		}
		err = lab.Eventually(time.Minute, func() error {
			if !strings.Contains(p.Log.String(), "held") {
				return errors.New(p.Log.String())
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		each := float64(f.memory()-before) / idleConnections / 1024
		in.Close()
		_ = p.Wait()
		r := row{What: "memory of a silent connection, " + f.name, Value: each, Unit: " KiB", Detail: fmt.Sprintf("of %d; PSS of all its processes", idleConnections)}
		if f.name == "pentad SOCKS5" {
			r.Limit, r.Below = 64.0/3, true
		}
		s.b.add(r)
	}
	return nil
}

// tree returns a process and all that it has started.
func tree(pid int) []int {
	all := []int{pid}
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", pid))
	for child := range strings.FieldsSeq(string(children)) {
		if n, err := strconv.Atoi(child); err == nil {
			all = append(all, tree(n)...)
		}
	}
	return all
}

// ticksPerSecond is USER_HZ, which is 100 wherever Go runs.
const ticksPerSecond = 100

// cpu returns what its processes have used of processors so far.
func (f *forwarder) cpu() time.Duration {
	if f.process == nil {
		return 0
	}
	ticks := 0
	for _, pid := range tree(f.process.Process.Pid) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// Behind the name: utime and stime are the fields 14 and 15 (proc_pid_stat(5)).
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		for _, text := range fields[11:13] {
			n, _ := strconv.Atoi(text)
			ticks += n
		}
	}
	return time.Duration(ticks) * time.Second / ticksPerSecond
}

// memory returns what its processes take, in bytes.
func (f *forwarder) memory() int {
	total := 0
	for _, pid := range tree(f.process.Process.Pid) {
		file, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			continue
		}
		for lines := bufio.NewScanner(file); lines.Scan(); {
			if v, ok := strings.CutPrefix(lines.Text(), "Pss:"); ok {
				n, _ := strconv.Atoi(strings.Fields(v)[0])
				total += n * 1024
			}
		}
		file.Close()
	}
	return total
}

// source answers a connection that says a number with so many bytes; 0 is answered by
// one.
func source(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	zeros := make([]byte, 64<<10)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			var n uint64
			if binary.Read(c, binary.BigEndian, &n) != nil {
				return
			}
			for left := max(n, 1); left > 0; {
				got, err := c.Write(zeros[:min(left, uint64(len(zeros)))])
				if err != nil {
					return
				}
				left -= uint64(got)
			}
		}()
	}
}

// through makes connections to the source, by way of somebody or directly, and prints how
// many seconds that took.
func through(args []string) error {
	address, socks, what := args[0], args[1] == "true", args[2]
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	began := time.Now()
	switch what {
	case "bytes":
		err = throughOnce(address, socks, uint64(n))
	case "connections":
		err = throughMany(address, socks, n)
	case "idle":
		return holdIdle(address, socks, n)
	}
	if err == nil {
		fmt.Println(time.Since(began).Seconds())
	}
	return err
}

func dialThrough(address string, socks bool) (net.Conn, error) {
	if address == "" {
		address = proxyTarget
	}
	c, err := net.Dial("tcp", address)
	if err != nil || !socks {
		return c, err
	}
	to, err := socks5.ParseAddress("10.0.0.1", 8080)
	if err == nil {
		_, err = socks5.Ask(c, socks5.Login{}, socks5.Request{Command: socks5.Connect, Address: to})
	}
	return c, err
}

func throughOnce(address string, socks bool, n uint64) error {
	c, err := dialThrough(address, socks)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := binary.Write(c, binary.BigEndian, n); err != nil {
		return err
	}
	b := make([]byte, 256<<10)
	got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, b)
	if err == nil && uint64(got) != max(n, 1) {
		err = fmt.Errorf("%d bytes came of %d", got, n)
	}
	return err
}

func throughMany(address string, socks bool, n int) error {
	const clients = 8
	var all sync.WaitGroup
	errs := make(chan error, clients)
	for range clients {
		all.Go(func() {
			for range n / clients {
				if err := throughOnce(address, socks, 0); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	all.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

func holdIdle(address string, socks bool, n int) error {
	for range n {
		if _, err := dialThrough(address, socks); err != nil {
			return err
		}
	}
	time.Sleep(2 * time.Second) // what is given back late is given back
	fmt.Println("held")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
