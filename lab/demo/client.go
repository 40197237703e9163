package demo

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Serve answers every request with the server's name. It prints "ready" once it
// listens.
func Serve(name, address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, name)
	}))
}

// The load of the demo's clients: enough to see shares, little enough to leave
// the machine alone.
const (
	clients = 4
	pause   = 4 * time.Millisecond
)

// Request requests the URL until the context ends, every time on a new
// connection, and writes one line for each: the answer, or "failed".
func Request(ctx context.Context, url string, out io.Writer) error {
	var mu sync.Mutex
	var tasks sync.WaitGroup
	client := &http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{Timeout: time.Second}).DialContext},
		Timeout:   5 * time.Second,
	}
	for range clients {
		tasks.Go(func() {
			for ctx.Err() == nil {
				line := get(client, url)
				mu.Lock()
				fmt.Fprintln(out, line)
				mu.Unlock()
				time.Sleep(pause)
			}
		})
	}
	tasks.Wait()
	return nil
}

const failed = "failed"

func get(client *http.Client, url string) string {
	resp, err := client.Get(url)
	if err != nil {
		return failed
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 100))
	if err != nil || resp.StatusCode != http.StatusOK {
		return failed
	}
	return strings.TrimSpace(string(body))
}

// counts is what clients saw.
type counts struct {
	answered map[string]int // by server
	failed   int
}

func (c counts) total() int {
	n := c.failed
	for _, a := range c.answered {
		n += a
	}
	return n
}

// since returns what came after an earlier count.
func (c counts) since(earlier counts) counts {
	d := counts{answered: make(map[string]int), failed: c.failed - earlier.failed}
	for name, n := range c.answered {
		d.answered[name] = n - earlier.answered[name]
	}
	return d
}

// String shows each server's share.
func (c counts) String() string {
	total := c.total()
	if total == 0 {
		return "no request"
	}
	var b strings.Builder
	for _, name := range names {
		share := float64(c.answered[name]) / float64(total)
		fmt.Fprintf(&b, "%s %-10s %3.0f%%   ", name, strings.Repeat("#", int(share*10+0.5)), 100*share)
	}
	fmt.Fprintf(&b, "%4d requests, %d failed", total, c.failed)
	return b.String()
}

// tally counts the lines of the client.
type tally struct {
	mu   sync.Mutex
	rest bytes.Buffer
	c    counts
}

func newTally() *tally { return &tally{c: counts{answered: make(map[string]int)}} }

// Write takes lines, whole or in parts.
func (t *tally) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rest.Write(p)
	for {
		line, err := bufio.NewReader(bytes.NewReader(t.rest.Bytes())).ReadString('\n')
		if err != nil {
			return len(p), nil
		}
		t.rest.Next(len(line))
		if name := strings.TrimSpace(line); name == failed {
			t.c.failed++
		} else {
			t.c.answered[name]++
		}
	}
}

func (t *tally) counts() counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	return counts{answered: maps.Clone(t.c.answered), failed: t.c.failed}
}
