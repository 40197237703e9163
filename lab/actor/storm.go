package actor

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Attempt is one connect() that failed or took long.
type Attempt struct {
	Began time.Time
	Took  time.Duration
	Error string `json:",omitempty"`
}

// StormReport is what a storm saw.
type StormReport struct {
	Attempts int
	Answers  map[string]int // connections by who answered
	Failed   []Attempt
	Late     []Attempt // longer than LateAfter, however they ended
}

// LateAfter is when a connect() counts as late: on one host they take microseconds.
const LateAfter = 150 * time.Millisecond

// Storm lets n clients connect without pause, or with one, until done is closed.
// It must run in a process of the host: its sockets are the process's.
func Storm(to netip.AddrPort, n int, pause time.Duration, done <-chan struct{}) StormReport {
	report := StormReport{Answers: make(map[string]int)}
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
				a, who := try(to)
				mu.Lock()
				report.note(a, who)
				mu.Unlock()
			}
		})
	}
	tasks.Wait()
	return report
}

func (r *StormReport) note(a Attempt, who string) {
	r.Attempts++
	if a.Error != "" {
		r.Failed = append(r.Failed, a)
	} else {
		r.Answers[who]++
	}
	if a.Took > LateAfter {
		r.Late = append(r.Late, a)
	}
}

// Share returns the part of the connections that a server answered.
func (r StormReport) Share(who string) float64 {
	total := 0
	for _, n := range r.Answers {
		total += n
	}
	return float64(r.Answers[who]) / float64(max(1, total))
}

// String returns the figures and the first failures.
func (r StormReport) String() string {
	text := fmt.Sprintf("%d connects, %d failed, %d late, answers %v", r.Attempts, len(r.Failed), len(r.Late), r.Answers)
	for i, a := range r.Failed {
		if i == 5 {
			break
		}
		text += fmt.Sprintf("\n%s after %s: %s", a.Began.Format("15:04:05.000"), a.Took, a.Error)
	}
	return text
}

// storm is a role: it lets CLIENTS connect to ADDRESS without a pause, or with PAUSE,
// until standard input ends, and prints what they saw.
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
	return json.NewEncoder(os.Stdout).Encode(Storm(to, n, pause, done))
}

// try makes one connection and asks who answers.
func try(to netip.AddrPort) (Attempt, string) {
	a := Attempt{Began: time.Now()}
	sa := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		a.Error = err.Error()
		return a, ""
	}
	defer unix.Close(fd)
	// Not for ever when packets vanish: SO_SNDTIMEO bounds connect(), too (socket(7)).
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 600_000}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
	)
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	for err == unix.EINTR || err == unix.EALREADY {
		err = unix.Connect(fd, sa)
	}
	if err == unix.EISCONN {
		err = nil
	}
	a.Took = time.Since(a.Began)
	if err != nil {
		a.Error = err.Error()
		return a, ""
	}
	return a, answer(fd)
}

// answer asks in HTTP and returns what is said, be it in HTTP or not.
func answer(fd int) string {
	if _, err := unix.Write(fd, []byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		return ""
	}
	b := make([]byte, 1000)
	n, err := unix.Read(fd, b)
	for err == unix.EINTR {
		n, err = unix.Read(fd, b)
	}
	text := string(b[:max(0, n)])
	if _, body, ok := strings.Cut(text, "\r\n\r\n"); ok && strings.HasPrefix(text, "HTTP/1.1 200") {
		text = body
	}
	return strings.TrimSpace(text)
}
