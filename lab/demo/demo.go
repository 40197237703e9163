// Package demo shows pentad at work on a throw-away host: real clients, real
// servers, a server and the agent killed, and with the agent dead another server
// cut off. Every number that it prints was counted.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/pentad/pentad/lab"
)

const (
	vip        = "192.0.2.10:80"
	configText = `services:
- name: web
  listen: [` + vip + `]
  backends: [10.0.0.1:8080, 10.0.0.2:8080, 10.0.0.3:8080]
  health: {probe: http, path: /, interval: 200ms, timeout: 100ms, rise: 2, fall: 2}
  breaker: {failures: 3, ejection: 2s}
  connect: {timeout: 200ms}
scope: {cgroup: %s}
`
)

var names = []string{"web-1", "web-2", "web-3"}

// stage is the demo while it runs.
type stage struct {
	out     io.Writer
	host    *lab.Host
	program string
	began   time.Time
	servers map[string]*lab.Process
	agent   *lab.Process
	client  *lab.Process
	tally   *tally

	killed, cut int // requests that failed because of the kill of a server, and because of the cut
}

// Run plays the demo and cleans up after itself, whatever happens. It returns an
// error when something that it shows did not come true.
func Run(ctx context.Context, out io.Writer) (err error) {
	host, err := lab.NewHost()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	program, err := os.Executable()
	if err != nil {
		return err
	}
	s := &stage{out: out, host: host, program: program, began: time.Now(), servers: make(map[string]*lab.Process)}
	err = s.play(ctx)
	if ctx.Err() != nil {
		fmt.Fprintln(out, "\ninterrupted; cleaning up")
		return nil
	}
	return err
}

func (s *stage) play(ctx context.Context) error {
	for _, act := range []func(context.Context) error{
		s.build, s.balance, s.killServer, s.reviveServer, s.killAgent, s.cutOff, s.mend, s.summarize,
	} {
		if err := act(ctx); err != nil {
			return err
		}
	}
	return nil
}

// say prints a line of the story.
func (s *stage) say(format string, args ...any) {
	fmt.Fprintf(s.out, "%5.1fs  %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, args...))
}

func (s *stage) build(ctx context.Context) error {
	fmt.Fprintf(s.out, "A throw-away host: its own network namespace with no way out, its own cgroup.\n\n")
	if err := s.host.AddAddress("10.0.0.1/32", "10.0.0.2/32", "10.0.0.3/32"); err != nil {
		return err
	}
	for _, name := range names {
		if err := s.startServer(ctx, name); err != nil {
			return err
		}
	}
	s.say("three HTTP servers run on 10.0.0.1, 10.0.0.2 and 10.0.0.3, port 8080")
	if _, err := s.host.WriteFile("pentad.yaml", fmt.Sprintf(configText, s.host.Scope())); err != nil {
		return err
	}
	var err error
	s.agent, err = s.host.Start(exec.Command(s.program, s.pentad("run", "-c", "pentad.yaml")...), lab.Outside)
	if err != nil {
		return err
	}
	if err := s.until(ctx, 10*time.Second, "the agent is ready", func() error {
		_, err := s.run(ctx, "status")
		return err
	}); err != nil {
		return fmt.Errorf("%w; its log:\n%s", err, lab.Indent(s.agent.Log.String()))
	}
	s.say("pentad maps the address %s, which lies on no interface, to all three", vip)
	s.tally = newTally()
	client := exec.Command(s.program, "demo", "client", "http://"+vip+"/")
	client.Stdout = s.tally
	if s.client, err = s.host.Start(client, lab.Inside); err != nil {
		return err
	}
	s.say("clients request http://%s/ without pause, every request on a new connection", vip)
	return nil
}

func address(name string) string {
	return fmt.Sprintf("10.0.0.%s:8080", strings.TrimPrefix(name, "web-"))
}

// startServer starts a server and waits until it answers.
func (s *stage) startServer(ctx context.Context, name string) error {
	p, err := s.host.Start(exec.Command(s.program, "demo", "server", name, address(name)), lab.Outside)
	if err != nil {
		return err
	}
	s.servers[name] = p
	return s.until(ctx, 5*time.Second, name+" listens", func() error {
		if !strings.Contains(p.Log.String(), "ready") {
			return errors.New("it does not")
		}
		return nil
	})
}

// pentad returns the arguments of a command on this host.
func (s *stage) pentad(args ...string) []string {
	return append(args, "--pins", s.host.Pins, "--run-dir", s.host.Dir+"/run")
}

func (s *stage) run(ctx context.Context, args ...string) (string, error) {
	return s.host.Run(ctx, lab.Outside, s.program, s.pentad(args...)...)
}

// until waits for a condition.
func (s *stage) until(ctx context.Context, within time.Duration, what string, condition func() error) error {
	err := lab.Eventually(within, func() error {
		if ctx.Err() != nil {
			return nil
		}
		return condition()
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("waiting until %s: %w", what, err)
	}
	return nil
}

// settle waits until requests that were under way have ended and are counted.
func (s *stage) settle(ctx context.Context) error {
	last := -1
	return s.until(ctx, 5*time.Second, "requests under way have ended", func() error {
		failed := s.tally.counts().failed
		if failed == last {
			return nil
		}
		last = failed
		time.Sleep(100 * time.Millisecond)
		return errors.New("some still fail")
	})
}

// watch shows for a while what the clients see.
func (s *stage) watch(ctx context.Context, seconds int) error {
	for range seconds {
		before := s.tally.counts()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		s.say("   %s", s.tally.counts().since(before))
	}
	return nil
}

func (s *stage) balance(ctx context.Context) error {
	fmt.Fprintln(s.out)
	return s.watch(ctx, 3)
}

func (s *stage) killServer(ctx context.Context) error {
	fmt.Fprintln(s.out)
	before := s.tally.counts()
	killed := time.Now()
	s.servers["web-2"].Kill()
	s.say("web-2 is killed (SIGKILL)")
	err := s.until(ctx, 10*time.Second, "the kernel has left web-2", func() error { return s.stateOf(ctx, "10.0.0.2:8080", "ejected", "down") })
	if err != nil {
		return err
	}
	after := time.Since(killed)
	if err := s.settle(ctx); err != nil {
		return err
	}
	s.killed = s.tally.counts().failed - before.failed
	s.say("%d requests failed; the kernel saw it and left web-2, %d ms after the kill", s.killed, after.Milliseconds())
	if err := s.until(ctx, 10*time.Second, "the probe has noticed", func() error { return s.stateOf(ctx, "10.0.0.2:8080", "down") }); err != nil {
		return err
	}
	s.say("its probe failed twice: web-2 is down until its probe succeeds")
	return s.watch(ctx, 2)
}

func (s *stage) reviveServer(ctx context.Context) error {
	fmt.Fprintln(s.out)
	if err := s.startServer(ctx, "web-2"); err != nil {
		return err
	}
	s.say("web-2 is started again")
	if err := s.until(ctx, 10*time.Second, "web-2 serves", func() error { return s.stateOf(ctx, "10.0.0.2:8080", "serving") }); err != nil {
		return err
	}
	s.say("its probe succeeded twice: it has its share again")
	return s.watch(ctx, 3)
}

func (s *stage) killAgent(ctx context.Context) error {
	fmt.Fprintln(s.out)
	before := s.tally.counts()
	s.agent.Kill()
	s.say("the agent is killed (SIGKILL)")
	if err := s.watch(ctx, 3); err != nil {
		return err
	}
	during := s.tally.counts().since(before)
	s.say("clients noticed nothing: %d requests, %d failed. `pentad service list` reads the kernel:", during.total(), during.failed)
	list, err := s.run(ctx, "service", "list")
	if err != nil {
		return fmt.Errorf("service list: %w: %s", err, list)
	}
	fmt.Fprintf(s.out, "\n%s\n", lab.Indent(list))
	if during.failed > 0 {
		return fmt.Errorf("%d requests failed while the agent was dead", during.failed)
	}
	return nil
}

// cutOff is the second act: nobody but the kernel is left to notice.
func (s *stage) cutOff(ctx context.Context) error {
	fmt.Fprintln(s.out)
	before := s.tally.counts()
	if err := s.host.CutOff(netip.MustParseAddr("10.0.0.3")); err != nil {
		return err
	}
	cut := time.Now()
	s.say("the agent is still dead, and now the cable of web-3 is cut: its packets vanish, nothing is refused")
	if err := s.until(ctx, 10*time.Second, "the kernel has left web-3", func() error { return s.stateOf(ctx, "10.0.0.3:8080", "ejected") }); err != nil {
		return err
	}
	s.say("three connects had no answer within 200 ms: the kernel left web-3 by itself, %d ms after the cut", time.Since(cut).Milliseconds())
	if err := s.watch(ctx, 3); err != nil {
		return err
	}
	list, err := s.run(ctx, "backend", "list")
	if err != nil {
		return fmt.Errorf("backend list: %w: %s", err, list)
	}
	s.say("`pentad backend list` says why:")
	fmt.Fprintf(s.out, "\n%s\n", lab.Indent(list))
	s.cut = s.tally.counts().failed - before.failed
	return nil
}

// mend ends the cut: the next trial succeeds.
func (s *stage) mend(ctx context.Context) error {
	fmt.Fprintln(s.out)
	before := s.tally.counts()
	if err := s.host.Mend(); err != nil {
		return err
	}
	s.say("the cable is mended")
	if err := s.until(ctx, 30*time.Second, "web-3 is used again", func() error { return s.stateOf(ctx, "10.0.0.3:8080", "serving") }); err != nil {
		return err
	}
	s.say("one connection tried web-3 and succeeded: it has its share again, with no agent")
	// A trial may have begun before the cable was mended.
	s.cut += s.tally.counts().failed - before.failed
	return s.watch(ctx, 2)
}

// stateOf returns nil when the kernel has a backend in one of these states.
func (s *stage) stateOf(ctx context.Context, backend string, states ...string) error {
	list, err := s.run(ctx, "backend", "list")
	if err != nil {
		return err
	}
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); len(f) > 2 && f[1] == backend && slices.Contains(states, f[2]) {
			return nil
		}
	}
	return fmt.Errorf("backend %s is not %s", backend, strings.Join(states, " or "))
}

func (s *stage) summarize(ctx context.Context) error {
	s.client.Kill()
	if out, err := s.run(ctx, "down"); err != nil {
		return fmt.Errorf("down: %w: %s", err, out)
	}
	c := s.tally.counts()
	other := c.failed - s.killed - s.cut
	fmt.Fprintf(s.out, "\nIn %.0f seconds clients made %d requests on as many connections: %d answered, %d failed,\n"+
		"%d of those when web-2 was killed, %d when web-3 was cut off or tried, %d at any other time.\n",
		time.Since(s.began).Seconds(), c.total(), c.total()-c.failed, c.failed, s.killed, s.cut, other)
	for _, name := range names {
		fmt.Fprintf(s.out, "  %s answered %d\n", name, c.answered[name])
	}
	fmt.Fprintln(s.out, "`pentad down` has removed everything. Nothing is left on this machine.")
	if other != 0 {
		return fmt.Errorf("%d requests failed without a reason", other)
	}
	return nil
}
