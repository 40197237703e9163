package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// many is a request of many questions at once.
type many struct {
	Verb  string
	What  []string      // "tcp ADDRESS:PORT", "udp ADDRESS:PORT", "http ADDRESS:PORT"
	Times int           // how often each is asked
	Wait  time.Duration // for each answer
}

// heard is what a client got for one question: whom it reached and as whom that one
// saw it ("a1 10.0.0.11"), or how it failed ("refused"), and how often.
type heard map[string]int

// The failures that a client tells apart.
const (
	refused = "refused"
	nothing = "nothing" // no answer in time, or no route
)

// asker is a client that asks many questions at once and keeps sockets between
// requests: connections ("hold", then "alive", "drop") and one UDP socket a question
// that sends from the same port each time ("steady").
type asker struct {
	mu     sync.Mutex
	held   map[string]net.Conn
	steady map[string]*net.UDPConn
	slots  chan struct{}
}

func newAsker() *asker {
	return &asker{held: make(map[string]net.Conn), steady: make(map[string]*net.UDPConn), slots: make(chan struct{}, 128)}
}

// many answers a request with a line of JSON: what was heard for each question.
func (a *asker) many(line string) (string, error) {
	var m many
	if err := json.Unmarshal([]byte(line), &m); err != nil {
		return "", err
	}
	answers := make([]heard, len(m.What))
	var all sync.WaitGroup
	for i, what := range m.What {
		a.slots <- struct{}{}
		all.Go(func() {
			defer func() { <-a.slots }()
			answers[i] = a.one(m, what)
		})
	}
	all.Wait()
	out, err := json.Marshal(answers)
	return string(out), err
}

func (a *asker) one(m many, what string) heard {
	h := make(heard)
	for range max(m.Times, 1) {
		answer, err := a.act(m, what)
		if err != nil {
			answer = kindOf(err)
		}
		h[strings.TrimSpace(answer)]++
		if answer == nothing {
			break // as it will be the next time, and that takes long
		}
	}
	return h
}

func (a *asker) act(m many, what string) (string, error) {
	network, address, _ := strings.Cut(what, " ")
	switch m.Verb {
	case "hold":
		c, answer, err := hold(address, quickly)
		if err != nil {
			return "", err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if old := a.held[what]; old != nil {
			old.Close()
		}
		a.held[what] = c
		return answer, nil
	case "alive":
		a.mu.Lock()
		c := a.held[what]
		a.mu.Unlock()
		return isAlive(c)
	case "drop":
		a.mu.Lock()
		defer a.mu.Unlock()
		for _, c := range a.held {
			c.Close()
		}
		for _, c := range a.steady {
			c.Close()
		}
		clear(a.held)
		clear(a.steady)
		return "dropped", nil
	case "steady":
		return a.askSteady(address, m.Wait)
	}
	if network == "http" {
		return askHTTP(address, m.Wait)
	}
	return askWithin(m.Wait, network, address)
}

// askSteady asks by UDP from the port that it had before.
func (a *asker) askSteady(address string, wait time.Duration) (string, error) {
	to, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		return "", err
	}
	a.mu.Lock()
	c := a.steady[address]
	if c == nil {
		network := "udp6"
		if to.IP.To4() != nil {
			network = "udp4"
		}
		if c, err = net.ListenUDP(network, nil); err == nil {
			a.steady[address] = c
		}
	}
	a.mu.Unlock()
	if err != nil {
		return "", err
	}
	if _, err := c.WriteTo([]byte("?\n"), to); err != nil {
		return "", err
	}
	if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	b := make([]byte, 100)
	n, _, err := c.ReadFrom(b)
	return string(b[:n]), err
}

func askWithin(wait time.Duration, network, address string) (string, error) {
	d := net.Dialer{Timeout: wait}
	d.SetMultipathTCP(false)
	c, err := d.Dial(network, address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	if network == "udp" {
		if _, err := c.Write([]byte("?\n")); err != nil {
			return "", err
		}
	}
	return bufio.NewReader(c).ReadString('\n')
}

// askHTTP returns the status and how many endpoints a health check names.
func askHTTP(address string, wait time.Duration) (string, error) {
	ctx, stop := context.WithTimeout(context.Background(), wait)
	defer stop()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		return "", err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 4096))
	if err != nil {
		return "", err
	}
	var said struct{ LocalEndpoints int }
	if err := json.Unmarshal(body, &said); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d with %d", answer.StatusCode, said.LocalEndpoints), nil
}

func kindOf(err error) string {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EPERM): // by ICMP, or by the own host's filter
		return refused
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return nothing
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return nothing
	}
	return "error: " + err.Error()
}

// many asks a place.
func (p *place) many(m many) ([]heard, error) {
	if len(m.What) == 0 {
		return nil, nil
	}
	request, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, err := fmt.Fprintf(p.in, "many %s\n", request); err != nil {
		return nil, err
	}
	line, err := p.answers.ReadString('\n')
	if err != nil {
		return nil, err
	}
	var answers []heard
	if err := json.Unmarshal([]byte(line), &answers); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", p.name, err, line)
	}
	return answers, nil
}
