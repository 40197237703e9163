package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
)

func init() {
	clients["storm"] = storm
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

// attempt is one connect() that failed or took long.
type attempt struct {
	Began time.Time
	Took  time.Duration
	Error string `json:",omitempty"`
}

// stormReport is what a storm saw.
type stormReport struct {
	Attempts int
	Answers  map[string]int // connections by who answered
	Failed   []attempt
	Late     []attempt // longer than lateAfter, however they ended
}

// lateAfter is when a connect() counts as late: on one host they take microseconds.
const lateAfter = 150 * time.Millisecond

// storm lets a number of clients connect without pause until standard input ends,
// and prints what they saw.
func storm(args []string) error {
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	pause, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		close(done)
	}()
	report := stormReport{Answers: make(map[string]int)}
	var mu sync.Mutex
	var tasks sync.WaitGroup
	for range n {
		tasks.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(pause):
				}
				a, who := stormOnce(to)
				mu.Lock()
				report.note(a, who)
				mu.Unlock()
			}
		})
	}
	tasks.Wait()
	return json.NewEncoder(os.Stdout).Encode(report)
}

func (r *stormReport) note(a attempt, who string) {
	r.Attempts++
	if a.Error != "" {
		r.Failed = append(r.Failed, a)
	} else {
		r.Answers[who]++
	}
	if a.Took > lateAfter {
		r.Late = append(r.Late, a)
	}
}

// stormOnce makes one connection and asks who answers.
func stormOnce(to netip.AddrPort) (attempt, string) {
	a := attempt{Began: time.Now()}
	fd, err := unix.Socket(familyOf(to), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		a.Error = err.Error()
		return a, ""
	}
	defer unix.Close(fd)
	// Not for ever when packets vanish: SO_SNDTIMEO bounds connect(), too (socket(7)).
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 600_000})
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	err = unix.Connect(fd, sockaddr(to))
	for err == unix.EINTR || err == unix.EALREADY {
		err = unix.Connect(fd, sockaddr(to))
	}
	if err == unix.EISCONN {
		err = nil
	}
	a.Took = time.Since(a.Began)
	if err != nil {
		a.Error = err.Error()
		return a, ""
	}
	return a, firstLine(fd)
}

// startStorm starts a storm; the function returned ends it and returns what it saw.
func (w *world) startStorm(vip string, n int, pause time.Duration) func() stormReport {
	w.t.Helper()
	cmd := role("storm", vip, strconv.Itoa(n), pause.String())
	stdin, err := cmd.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	p, err := w.Start(cmd, lab.Inside)
	if err != nil {
		w.t.Fatal(err)
	}
	return func() stormReport {
		w.t.Helper()
		stdin.Close()
		if err := p.Wait(); err != nil {
			w.t.Fatalf("storm: %v: %s", err, p.Log)
		}
		var r stormReport
		if err := json.NewDecoder(strings.NewReader(p.Log.String())).Decode(&r); err != nil && err != io.EOF {
			w.t.Fatalf("storm: %v: %s", err, p.Log)
		}
		return r
	}
}

func (r stormReport) String() string {
	text := fmt.Sprintf("%d connects, %d failed, %d late, answers %v", r.Attempts, len(r.Failed), len(r.Late), r.Answers)
	for i, a := range r.Failed {
		if i == 5 {
			break
		}
		text += fmt.Sprintf("\n%s after %s: %s", a.Began.Format("15:04:05.000"), a.Took, a.Error)
	}
	return text
}
