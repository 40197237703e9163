package main

import (
	"bufio"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pentad/pentad/lab"
)

//go:embed haproxy-postgres.cfg
var haproxyPostgres string

// The check interval of both peers is 500 ms, one failure decides.
const postgresService = `services:
- name: orders-db
  listen: ['192.0.2.10:5432']
  backends: ['10.0.0.11:5432', '10.0.0.12:5432']
  health: {probe: postgres, user: postgres, role: primary, interval: 500ms, timeout: 400ms, rise: 1, fall: 1}
  breaker: {failures: 3, ejection: 200ms}
`

// failover kills a PostgreSQL primary with kill -9 under pgbench, whose clients
// connect anew for every transaction, and promotes its replica: how long no
// transaction succeeds, and how many clients were sent home with an error, through
// a VIP and through HAProxy.
func failover(ctx context.Context, b *board) error {
	gap, errs := make(map[string][]float64), make(map[string][]float64)
	const vip, haproxy = "192.0.2.10", "10.0.0.2"
	for range 3 {
		for _, way := range []string{vip, haproxy} {
			seconds, failed, err := failoverOnce(ctx, b, way)
			if err != nil {
				return err
			}
			gap[way], errs[way] = append(gap[way], seconds), append(errs[way], float64(failed))
		}
	}
	b.add(row{What: "PostgreSQL primary killed, replica promoted: time without a transaction", Value: median(gap[vip]), Unit: " s",
		Detail: fmt.Sprintf("HAProxy with the same check interval: %.2f s", median(gap[haproxy]))})
	b.add(row{What: "the same: clients of pgbench that ended with an error", Value: median(errs[vip]),
		Detail: fmt.Sprintf("HAProxy: %.0f", median(errs[haproxy]))})
	return nil
}

// postgres is a primary and a streaming replica on a site.
type postgres struct {
	*site
	bin     string
	primary *lab.Process
}

func newPostgres(ctx context.Context, s *site) (*postgres, error) {
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bins) == 0 {
		return nil, fmt.Errorf("no PostgreSQL under /usr/lib/postgresql: %w", err)
	}
	p := &postgres{site: s, bin: bins[len(bins)-1]}
	data := filepath.Join(s.Dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		return nil, err
	}
	if out, err := s.Run(ctx, lab.Outside, "chown", "postgres", data); err != nil {
		return nil, fmt.Errorf("chown: %w: %s", err, out)
	}
	one, two := filepath.Join(data, "one"), filepath.Join(data, "two")
	if err := p.tool(ctx, "initdb", "-D", one, "-A", "trust", "--no-sync"); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(one, "pg_hba.conf"), []byte("host all,replication all all trust\n"), 0o644); err != nil {
		return nil, err
	}
	if p.primary, err = p.start(one, "10.0.0.11"); err != nil {
		return nil, err
	}
	if err := p.tool(ctx, "psql", "-h", "10.0.0.11", "-U", "postgres", "-c", "create table t (x int)"); err != nil {
		return nil, err
	}
	if err := p.tool(ctx, "pg_basebackup", "-h", "10.0.0.11", "-U", "postgres", "-D", two, "-R", "--no-sync", "-c", "fast"); err != nil {
		return nil, err
	}
	_, err = p.start(two, "10.0.0.12")
	return p, err
}

// tool runs a program of PostgreSQL as its user.
func (p *postgres) tool(ctx context.Context, name string, args ...string) error {
	if out, err := p.Run(ctx, lab.Outside, "runuser", append([]string{"-u", "postgres", "--", p.bin + "/" + name}, args...)...); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

func (p *postgres) start(dir, address string) (*lab.Process, error) {
	server, err := p.Start(exec.Command("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", p.bin+"/postgres", "-D", dir,
		"-h", address, "-k", "", "-F", "-c", "hot_standby=on"), lab.Outside)
	if err != nil {
		return nil, err
	}
	return server, p.listening(address + ":5432")
}

func failoverOnce(ctx context.Context, b *board, way string) (seconds float64, failed int, err error) {
	s, err := newSite(b)
	if err != nil {
		return 0, 0, err
	}
	defer s.Close()
	p, err := newPostgres(ctx, s)
	if err != nil {
		return 0, 0, err
	}
	if way == "192.0.2.10" {
		err = s.run(ctx, postgresService)
	} else {
		err = s.server("haproxy.cfg", haproxyPostgres, "10.0.0.2:5432", "haproxy", "-f", "haproxy.cfg")
	}
	if err != nil {
		return 0, 0, err
	}
	if _, err := s.WriteFile("insert.sql", "insert into t values (1);\n"); err != nil {
		return 0, 0, err
	}
	// pgbench gives a client up at its first error; the shell starts all of them again.
	script := fmt.Sprintf(`i=0; while [ ! -e %[1]s/stop ]; do i=$((i+1)); %[2]s/pgbench -n -C -c 4 -j 2 -T 60 -f %[1]s/insert.sql -l --log-prefix=%[1]s/log.$i `+
		`-h %[3]s -U postgres postgres; sleep 0.01; done`, s.Dir, p.bin, way)
	load, err := s.Start(exec.Command("sh", "-c", script), lab.Inside)
	if err != nil {
		return 0, 0, err
	}
	pause := func(d time.Duration) { time.Sleep(d) }
	pause(2 * time.Second)
	if err := s.killPostgres(p.primary); err != nil {
		return 0, 0, err
	}
	if err := p.tool(ctx, "pg_ctl", "promote", "-D", filepath.Join(s.Dir, "data", "two")); err != nil {
		return 0, 0, err
	}
	pause(4 * time.Second)
	if _, err := s.WriteFile("stop", ""); err != nil {
		return 0, 0, err
	}
	text := load.Log.String()
	times, err := transactions(filepath.Join(s.Dir, "log.*"))
	if err != nil {
		return 0, 0, err
	}
	if len(times) < 100 {
		return 0, 0, fmt.Errorf("%d transactions through %s: %s", len(times), way, text)
	}
	longest := 0.0
	for i := 1; i < len(times); i++ {
		longest = max(longest, times[i]-times[i-1])
	}
	return longest, strings.Count(text, "aborted") + strings.Count(text, "connection to server"), nil
}

// killPostgres kills the postmaster and, as an unplugged machine does, all of its
// processes.
func (s *site) killPostgres(primary *lab.Process) error {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", primary.Process.Pid, primary.Process.Pid))
	if err != nil {
		return err
	}
	primary.Kill()
	for _, field := range strings.Fields(string(children)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return err
		}
		if p, err := os.FindProcess(pid); err == nil {
			// It may have ended with its parent.
			_ = p.Kill()
		}
	}
	return nil
}

// transactions reads when transactions ended, in Unix seconds, from pgbench's logs:
// "client transaction time script epoch microseconds".
func transactions(pattern string) ([]float64, error) {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return nil, err
	}
	var times []float64
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			fields := strings.Fields(lines.Text())
			if len(fields) < 6 || fields[2] == "failed" {
				continue
			}
			seconds, err1 := strconv.ParseFloat(fields[4], 64)
			micros, err2 := strconv.ParseFloat(fields[5], 64)
			if err1 == nil && err2 == nil {
				times = append(times, seconds+micros/1e6)
			}
		}
		f.Close()
	}
	slices.Sort(times)
	return times, nil
}
