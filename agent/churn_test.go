package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"go.uber.org/goleak"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
)

// Everything that may happen to an agent at the same time happens: for the race
// detector, and nothing is left behind.
func TestChurn(t *testing.T) {
	lab.Need(t)
	defer goleak.VerifyNone(t)
	h, err := lab.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	metrics := free.Addr().String()
	free.Close()
	write := func(n int) error {
		var b strings.Builder
		fmt.Fprintf(&b, "scope: {cgroup: %s}\napi: {listen: %s}\nservices:\n", h.Scope(), metrics)
		for i := range 3 + n%5 {
			// Backends that nobody has, in another order each time.
			fmt.Fprintf(&b, "- {name: s%d, listen: ['127.0.9.%d:80', '127.0.9.%d:80/udp'], health: {interval: 100ms}, backends: ['127.0.10.%d:1', '127.0.10.9:1']}\n",
				i+n%2, i+1, i+1, 1+(i+n)%7)
		}
		_, err := h.WriteFile("pentad.yaml", b.String())
		return err
	}
	if err := write(0); err != nil {
		t.Fatal(err)
	}
	opts := Options{
		ConfigFile: filepath.Join(h.Dir, "pentad.yaml"), Pins: h.Pins, RunDir: filepath.Join(h.Dir, "run"),
		Version: "test", Log: slog.New(slog.DiscardHandler),
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, opts) }()
	client := api.NewClient(opts.RunDir)
	if err := lab.Eventually(20*time.Second, func() error {
		_, err := client.Status(t.Context())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	follower, err := socket.Follow(h.Pins)
	if err != nil {
		t.Fatal(err)
	}
	busy, rest := context.WithTimeout(t.Context(), 4*time.Second)
	var all sync.WaitGroup
	forever := func(pause time.Duration, do func(n int) error) {
		all.Go(func() {
			for n := 0; busy.Err() == nil; n++ {
				if err := do(n); err != nil && busy.Err() == nil {
					t.Error(err)
				}
				time.Sleep(pause)
			}
		})
	}
	forever(50*time.Millisecond, write)
	forever(5*time.Millisecond, func(int) error {
		_, err := client.Status(t.Context())
		return err
	})
	forever(20*time.Millisecond, func(n int) error {
		_, err := client.Drain(t.Context(), api.DrainRequest{
			Service: "s2", Address: netip.MustParseAddrPort("127.0.10.9:1"), Drained: n%2 == 0, Timeout: time.Duration(n%2) * time.Second,
		})
		if errors.Is(err, api.ErrNotFound) {
			return nil
		}
		return err
	})
	scraper := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	forever(30*time.Millisecond, func(int) error {
		answer, err := scraper.Get("http://" + metrics + "/metrics")
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		_, err = io.Copy(io.Discard, answer.Body)
		return err
	})
	forever(500*time.Millisecond, func(int) error {
		l, err := link.LoadPinnedLink(filepath.Join(h.Pins, "socket", "links", "connect4"), nil)
		if err != nil {
			return nil // it is being put back
		}
		defer l.Close()
		return l.(interface{ Detach() error }).Detach()
	})
	all.Go(func() {
		if err := follower.Run(busy, func(socket.Event) {}); err != nil && busy.Err() == nil {
			t.Error(err)
		}
	})
	all.Wait()
	rest()
	follower.Close()
	stop()
	if err := <-ended; err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	if err := Down(t.Context(), opts); err != nil {
		t.Error(err)
	}
}
