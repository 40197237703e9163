package socket_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
)

func init() {
	clients["fill"] = fill
}

// fill makes N connections and holds them all, says who answered, then closes one
// of the first backend and connects again.
func fill(args []string) error {
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	var mine []int
	who := make(map[string]int)
	for range n {
		fd, err := dial(unix.SOCK_STREAM, 0, to)
		if err == unix.ECONNREFUSED {
			who["refused"]++
			continue
		}
		if err != nil {
			return err
		}
		name := firstLine(fd)
		who[name]++
		if name == "one" {
			mine = append(mine, fd)
		}
	}
	unix.Close(mine[0])
	fd, err := dial(unix.SOCK_STREAM, 0, to)
	if err != nil {
		return err
	}
	fmt.Printf("%d one, %d two, %d refused; after one was closed: %s\n", who["one"], who["two"], who["refused"], firstLine(fd))
	return nil
}

// startStorm starts a storm; the function returned ends it and returns what it saw.
func (w *world) startStorm(vip string, n int, pause time.Duration) func() actor.StormReport {
	w.T.Helper()
	cmd := actor.Command("storm", vip, strconv.Itoa(n), pause.String())
	stdin, err := cmd.StdinPipe()
	if err != nil {
		w.T.Fatal(err)
	}
	p, err := w.Start(cmd, lab.Inside)
	if err != nil {
		w.T.Fatal(err)
	}
	return func() actor.StormReport {
		w.T.Helper()
		stdin.Close()
		if err := p.Wait(); err != nil {
			w.T.Fatalf("storm: %v: %s", err, p.Log)
		}
		var r actor.StormReport
		if err := json.NewDecoder(strings.NewReader(p.Log.String())).Decode(&r); err != nil && err != io.EOF {
			w.T.Fatalf("storm: %v: %s", err, p.Log)
		}
		return r
	}
}
