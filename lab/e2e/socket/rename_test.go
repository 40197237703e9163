package socket_test

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/service"
)

func init() { clients["hold one"] = holdOne }

// holdOne holds a connection until it is told to end, and says whether it still is
// one.
func holdOne(args []string) error {
	fd, err := dial(unix.SOCK_STREAM, 0, netip.MustParseAddrPort(args[0]))
	if err != nil {
		return err
	}
	fmt.Println("holds", firstLine(fd))
	_, _ = io.Copy(io.Discard, os.Stdin)
	pending, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil || pending != 0 {
		return fmt.Errorf("the connection has ended: %d, %v", pending, err)
	}
	_, err = unix.Write(fd, []byte("x"))
	return err
}

// A name is for people: with another one a service keeps its connections, and its
// backends are what they were, with the agent alive and when another one starts.
func TestRename(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, agent := range []string{"alive", "restarted"} {
		t.Run("agent-"+agent, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
			w.Serve("one", "10.0.0.1:7000")
			w.Serve("three", "10.0.0.3:7000")
			text := func(a, b string) string {
				return "services:\n- {name: " + a + `, listen: [192.0.2.10:80], health: {interval: 1s, timeout: 500ms}, backends: [10.0.0.1:7000, 10.0.0.2:7000]}
- {name: ` + b + `, listen: [192.0.2.11:80], health: {interval: 1s, timeout: 500ms}, backends: [10.0.0.3:7000]}`
			}
			w.RunAgent(text("a", "b"))
			w.AwaitStates("a", service.Serving, service.Down)
			cmd := actor.Command("hold one", "192.0.2.10:80")
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			p, err := w.Start(cmd, lab.Inside)
			if err != nil {
				t.Fatal(err)
			}
			w.Eventually("a connection is there", func() error {
				if !strings.Contains(p.Log.String(), "holds one") {
					return errors.New("not yet")
				}
				return nil
			})
			// Another name, then the names of both change.
			for _, names := range [][2]string{{"orders", "b"}, {"b", "orders"}} {
				if agent == "restarted" {
					w.Agent.Kill()
				}
				w.Configure(text(names[0], names[1]))
				if agent == "restarted" {
					w.Agent = w.Launch()
				}
				w.Eventually("the new name", func() error {
					s := (&service.Snapshot{Services: w.View().Services}).Find(names[0])
					if s == nil || s.Listeners[0].Address.String() != "192.0.2.10:80" {
						return fmt.Errorf("services are %v", w.View().Services)
					}
					return nil
				})
				// At once: what is down is known to be.
				if a := w.Answers("192.0.2.10:80", 50); a["one"] != 50 {
					t.Errorf("answers %v", a)
				}
				w.AwaitStates(names[0], service.Serving, service.Down)
			}
			stdin.Close()
			if err := p.Wait(); err != nil {
				t.Errorf("%v: %s", err, p.Log)
			}
			if n := w.View().Counters.Reset; n != 0 {
				t.Errorf("%d connections were reset", n)
			}
			w.atRest()
		})
	}
}
