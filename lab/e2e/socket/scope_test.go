package socket_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
)

func init() { clients["restart"] = restart }

// restart makes a cgroup anew, as often as told, joins it each time, and prints how
// long it took until a VIP could be reached from there, in microseconds.
func restart(args []string) error {
	cgroup, outside, to := args[0], args[1], netip.MustParseAddrPort(args[2])
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	join := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o600)
	}
	for range n {
		if err := os.Remove(cgroup); err != nil {
			return err
		}
		if err := os.Mkdir(cgroup, 0o755); err != nil {
			return err
		}
		if err := join(cgroup); err != nil {
			return err
		}
		began := time.Now()
		for {
			fd, err := dial(unix.SOCK_STREAM, 0, to)
			unix.Close(fd)
			if err == nil {
				break
			}
			if time.Since(began) > 10*time.Second {
				return fmt.Errorf("not in 10 s: %w", err)
			}
			time.Sleep(time.Millisecond)
		}
		fmt.Println(time.Since(began).Microseconds())
		if err := join(outside); err != nil {
			return err
		}
	}
	return nil
}

// A scope that is made again, as that of a unit which is restarted, has its hooks
// before the next tick of the agent.
func TestScopeMadeAgain(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent("services: [{name: web, listen: [192.0.2.10:80], health: {probe: none}, backends: [10.0.0.1:7000]}]")
	root, err := host.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	scope := filepath.Join(root, w.Scope())
	p, err := w.Start(actor.Command("restart", scope, filepath.Join(filepath.Dir(scope), lab.Outside), "192.0.2.10:80", "6"), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Fatalf("%v: %s", err, p.Log)
	}
	// The agent looks each second: half of the time it would take longer than this.
	slow := 0
	for line := range strings.Lines(p.Log.String()) {
		micros, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		if micros > 300_000 {
			slow++
		}
	}
	t.Logf("microseconds: %s", p.Log)
	if slow > 1 {
		t.Errorf("%d of 6 took longer than 300 ms: %s", slow, p.Log)
	}
}
