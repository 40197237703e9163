package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
)

// An agent in this process, over and over: no goroutine stays behind, and what
// does not fit is named while everything else works.
func TestRun(t *testing.T) {
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
	write := func(services int) {
		t.Helper()
		var b strings.Builder
		b.WriteString("services:\n")
		for i := range services {
			fmt.Fprintf(&b, "- {name: s%d, listen: ['192.0.2.%d:80'], health: {probe: none}, backends: ['10.0.%d.1:80', '10.0.%d.2:80']}\n", i, i, i, i)
		}
		if _, err := h.WriteFile("pentad.yaml", b.String()+"scope: {cgroup: "+h.Scope()+"}\napi: {listen: 127.0.0.1:1}\n"); err != nil {
			t.Fatal(err)
		}
	}
	opts := Options{
		ConfigFile: filepath.Join(h.Dir, "pentad.yaml"), Pins: h.Pins, RunDir: filepath.Join(h.Dir, "run"),
		Version: "test", MaxBackends: 10, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	client := api.NewClient(opts.RunDir)
	problems := func(want string) error {
		return lab.Eventually(10*time.Second, func() error {
			s, err := client.Status(t.Context())
			if err != nil {
				return err
			}
			if have := strings.Join(s.Problems, "\n"); want == "" && have != "" || !strings.Contains(have, want) {
				return fmt.Errorf("problems are %q, want %q", have, want)
			}
			return nil
		})
	}
	for round := range 2 {
		write(5)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- Run(ctx, opts) }()
		if err := problems(""); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		// Seven services with two backends do not fit where ten are allowed.
		write(7)
		if err := problems("no room in the kernel for 2 services (s5, s6): the limit on backends is reached"); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		v, err := socket.Read(h.Pins)
		if err != nil || len(v.Services) != 5 {
			t.Errorf("round %d: the kernel has %d services: %v", round, len(v.Services), err)
		}
		if _, err := client.Drain(t.Context(), api.DrainRequest{Service: "s1", Address: netip.MustParseAddrPort("10.0.1.1:80"), Drained: true}); err != nil {
			t.Errorf("round %d: drain: %v", round, err)
		}
		// Two go: the two that did not fit take their places.
		write(5)
		if err := problems(""); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		stop()
		if err := <-ended; err != nil {
			t.Errorf("round %d: the agent ended with %v", round, err)
		}
	}
	if _, err := client.Status(t.Context()); !errors.Is(err, api.ErrNoAgent) {
		t.Errorf("without an agent: %v", err)
	}
	if err := Down(t.Context(), opts); err != nil {
		t.Error(err)
	}
}
