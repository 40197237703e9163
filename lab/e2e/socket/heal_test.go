package socket_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/plane/socket"
)

// healing is one service with three backends that only the kernel looks after.
const healing = `services:
- name: web
  listen: [192.0.2.10:80]
  health: {probe: none}
  breaker: {failures: 3, ejection: 1s}
  connect: {timeout: 200ms}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]`

// healingWorld has three servers behind healing; two is the second.
func healingWorld(t *testing.T, text string) (w *world, two *lab.Process) {
	t.Helper()
	w = newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	w.Serve("one", "10.0.0.1:7000")
	two = w.Serve("two", "10.0.0.2:7000")
	w.Serve("three", "10.0.0.3:7000")
	w.RunAgent(text)
	return w, two
}

func ejected(l socket.Load) bool { return l.Ejected }

func serving(l socket.Load) bool { return !l.Ejected }

// awaitTraffic waits until every backend has had connections.
func (w *world) awaitTraffic() {
	w.T.Helper()
	for _, a := range []string{"10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000"} {
		w.AwaitLoad("used", a, func(l socket.Load) bool { return l.Connections > 100 })
	}
}

// A backend that begins to refuse is left after failures and what was under way,
// by the kernel alone; then one connection tries it every now and then; when it
// answers, it is used again.
func TestRefusingBackend(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, agent := range []string{"alive", "dead"} {
		t.Run("agent-"+agent, func(t *testing.T) {
			t.Parallel()
			w, two := healingWorld(t, healing)
			if agent == "dead" {
				w.Agent.Kill()
			}
			const n = 64
			end := w.startStorm("192.0.2.10:80", n, 0)
			w.awaitTraffic()
			two.Kill()
			w.AwaitLoad("ejected", "10.0.0.2:7000", ejected)
			// Ejected again by a failed trial, for twice as long.
			w.AwaitLoad("ejected again", "10.0.0.2:7000", func(l socket.Load) bool { return l.Ejections >= 2 })
			l := w.Load("10.0.0.2:7000")
			w.Serve("two again", "10.0.0.2:7000")
			w.AwaitLoad("back", "10.0.0.2:7000", func(l socket.Load) bool { return !l.Ejected && l.InFlight > 0 })
			r := end()
			t.Log(r)
			trials := int(l.Ejections)
			if len(r.Failed) > 3+n+trials {
				t.Errorf("%d connects failed, want at most 3 + %d under way + %d trials", len(r.Failed), n, trials)
			}
			if r.Answers["two again"] == 0 {
				t.Errorf("the backend that came back got nothing")
			}
			w.atRest()
		})
	}
}

// A backend whose packets vanish is left one connect.timeout after the cut.
func TestCutOffBackend(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, agent := range []string{"alive", "dead"} {
		t.Run("agent-"+agent, func(t *testing.T) {
			t.Parallel()
			w, _ := healingWorld(t, healing)
			if agent == "dead" {
				w.Agent.Kill()
			}
			end := w.startStorm("192.0.2.10:80", 64, 0)
			w.awaitTraffic()
			if err := w.CutOff(netip.MustParseAddr("10.0.0.2")); err != nil {
				t.Fatal(err)
			}
			left := time.Now().Add(250 * time.Millisecond)
			w.AwaitLoad("ejected", "10.0.0.2:7000", func(l socket.Load) bool { return l.Ejections >= 1 })
			if now := time.Now(); now.After(left) {
				// The kernel's timers are late where the machine is busy.
				t.Logf("ejected %s later than it should be", now.Sub(left))
				left = now
			}
			w.AwaitLoad("ejected again", "10.0.0.2:7000", func(l socket.Load) bool { return l.Ejections >= 2 })
			trials := int(w.Load("10.0.0.2:7000").Ejections)
			if err := w.Mend(); err != nil {
				t.Fatal(err)
			}
			w.AwaitLoad("back", "10.0.0.2:7000", serving)
			r := end()
			t.Log(r)
			tooLate := 0
			for _, a := range r.Late {
				if a.Began.After(left) {
					tooLate++
				}
			}
			// A trial that is under way while the cable is mended is late and succeeds.
			if tooLate > trials+1 {
				t.Errorf("%d connects went to the backend after it was ejected, %d of them trials", tooLate, trials)
			}
			w.atRest()
		})
	}
}

func init() { clients["late web"] = lateWeb }

// lateWeb answers HTTP requests late.
func lateWeb(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(50 * time.Millisecond)
		fmt.Fprintln(w, "two")
	}))
}

// Three nginx: one is killed, or cut off, or answers late, with the agent alive and
// dead. What the others answer goes on.
func TestThreeNginx(t *testing.T) {
	t.Parallel()
	lab.Need(t, "nginx")
	for _, agent := range []string{"alive", "dead"} {
		for _, fault := range []string{"killed", "cut off", "late"} {
			t.Run(strings.ReplaceAll(fault, " ", "-")+"-agent-"+agent, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
				w.ServeWeb("10.0.0.1:7000", "one")
				var two *lab.Process
				if fault == "late" {
					w.StartServer(actor.Command("late web", "127.0.0.1:9100"), "ready")
					two = w.Nginx("server { listen 10.0.0.2:7000; location / { proxy_pass http://127.0.0.1:9100; } }", "10.0.0.2:7000")
				} else {
					two = w.ServeWeb("10.0.0.2:7000", "two")
				}
				w.ServeWeb("10.0.0.3:7000", "three")
				w.RunAgent(healing)
				if agent == "dead" {
					w.Agent.Kill()
				}
				const n = 8
				end := w.startStorm("192.0.2.10:80", n, time.Millisecond)
				w.AwaitLoad("used", "10.0.0.2:7000", func(l socket.Load) bool { return l.Connections > 5 })
				switch fault {
				case "killed":
					two.Kill()
					w.AwaitLoad("ejected", "10.0.0.2:7000", ejected)
				case "cut off":
					if err := w.CutOff(netip.MustParseAddr("10.0.0.2")); err != nil {
						t.Fatal(err)
					}
					w.AwaitLoad("ejected", "10.0.0.2:7000", ejected)
				case "late":
					w.AwaitLoad("known to be late", "10.0.0.2:7000", func(l socket.Load) bool { return l.Response > 10*time.Millisecond })
				}
				end()
				// From here on it gets next to nothing.
				ejections := w.Load("10.0.0.2:7000").Ejections
				others := w.Load("10.0.0.1:7000").Connections
				end = w.startStorm("192.0.2.10:80", n, time.Millisecond)
				w.AwaitLoad("used", "10.0.0.1:7000", func(l socket.Load) bool { return l.Connections > others+500 })
				r := end()
				t.Log(r)
				trials := int(w.Load("10.0.0.2:7000").Ejections-ejections) + 1
				if len(r.Failed) > trials || r.Share("two") > 0.1 || r.Share("one") < 0.25 || r.Share("three") < 0.25 {
					t.Errorf("%d failed in %d trials: %v", len(r.Failed), trials, r)
				}
				w.atRest()
			})
		}
	}
}

// atRest fails the test unless, with all clients gone, nothing is in flight.
func (w *world) atRest() {
	w.T.Helper()
	w.Eventually("nothing is in flight", func() error {
		v := w.View()
		for name, loads := range v.Loads {
			for addr, l := range loads {
				if l.InFlight != 0 {
					return fmt.Errorf("%s %s has %d connections", name, addr, l.InFlight)
				}
			}
		}
		if v.Leaving != 0 {
			return fmt.Errorf("backends that are gone have %d connections", v.Leaving)
		}
		return nil
	})
}

// A backend that answers late gets little, whether many ask or one; the others
// share the rest. A backend that is fast again gets its share again.
func TestLeastLatency(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, clients := range []int{1, 20} {
		t.Run(fmt.Sprintf("clients-%d", clients), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
			w.Serve("one", "10.0.0.1:7000")
			slow := w.StartServer(actor.Command("who", "-echo", "-mptcp", "-delay", "50ms", "two", "10.0.0.2:7000"), "ready")
			w.Serve("three", "10.0.0.3:7000")
			w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80]
  health: {probe: none}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]`)
			end := w.startStorm("192.0.2.10:80", clients, time.Millisecond)
			w.AwaitLoad("measured", "10.0.0.2:7000", func(l socket.Load) bool { return l.Response > 20*time.Millisecond })
			w.AwaitLoad("used", "10.0.0.1:7000", func(l socket.Load) bool { return l.Connections > 500 })
			w.AwaitLoad("used", "10.0.0.3:7000", func(l socket.Load) bool { return l.Connections > 500 })
			if r := end(); len(r.Failed) > 0 || r.Share("two") > 0.05 || r.Share("one") < 0.2 || r.Share("three") < 0.2 {
				t.Errorf("with a late backend two: %v", r)
			} else {
				t.Log(r)
			}
			slow.Kill()
			w.Serve("two", "10.0.0.2:7000")
			before := w.Load("10.0.0.2:7000").Connections
			end = w.startStorm("192.0.2.10:80", clients, time.Millisecond)
			w.AwaitLoad("used again", "10.0.0.2:7000", func(l socket.Load) bool { return l.Connections > before+200 })
			end()
			w.atRest()
		})
	}
}

// With nothing to tell backends apart, connections follow the weights, also when
// there is one at a time.
func TestWeightsAtRest(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, balance := range []string{"least-latency", "least-connections", "random"} {
		t.Run(balance, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
			// One process, because of several a busy host runs one later than another for
			// a while, which least-latency sees.
			w.Serve("", "10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000")
			w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80]
  balance: ` + balance + `
  health: {probe: none}
  backends: [{address: '10.0.0.1:7000', weight: 50}, {address: '10.0.0.2:7000', weight: 100}, {address: '10.0.0.3:7000', weight: 100}]`)
			w.Eventually("connections follow the weights", func() error {
				answers := w.Answers("192.0.2.10:80", 2000)
				for who, want := range map[string]float64{"10.0.0.1:7000": 0.2, "10.0.0.2:7000": 0.4, "10.0.0.3:7000": 0.4} {
					if have := float64(answers[who]) / 2000; have < want-0.07 || have > want+0.07 {
						return fmt.Errorf("%s got %.3f of them, want %.1f: %v", who, have, want, answers)
					}
				}
				return nil
			})
		})
	}
}

// When group 0 cannot be used, the very connect() that would fail next goes to
// group 1, with the agent dead; and back when group 0 answers again.
func TestFailoverInKernel(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, balance := range []string{"least-latency", "random", "source-hash"} {
		t.Run(balance, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
			one := w.Serve("one", "10.0.0.1:7000")
			two := w.Serve("two", "10.0.0.2:7000")
			w.Serve("three", "10.0.0.3:7000")
			w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80]
  balance: ` + balance + `
  health: {probe: none}
  breaker: {failures: 1, ejection: 1s}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, {address: '10.0.0.3:7000', group: 1}]`)
			w.Agent.Kill()
			one.Kill()
			two.Kill()
			answers := w.Answers("192.0.2.10:80", 40)
			// Each of the two is found out by one connect, and by one trial a second.
			if answers["three"] < 30 || answers["three"] == 40 {
				t.Errorf("answers %v", answers)
			}
			w.Serve("one", "10.0.0.1:7000")
			w.Serve("two", "10.0.0.2:7000")
			w.Eventually("group 0 serves again", func() error {
				if a := w.Answers("192.0.2.10:80", 20); a["three"] > 0 || a["error"] > 0 {
					return fmt.Errorf("answers %v", a)
				}
				return nil
			})
		})
	}
}

// When more is ejected than may be, and no other group can serve, all are used.
func TestPanic(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	w.Serve("three", "10.0.0.3:7000")
	text := `services:
- name: web
  listen: [192.0.2.10:80]
  health: {probe: none}
  breaker: {failures: 1, ejection: 1h, maxEjected: %s}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]`
	w.RunAgent(fmt.Sprintf(text, "50%"))
	w.Agent.Kill()
	answers := w.Answers("192.0.2.10:80", 200)
	if answers["three"] < 30 || answers["three"] > 150 {
		t.Errorf("two of three ejected, at most half allowed: %v", answers)
	}
	if v := w.View(); v.Counters.Panics == 0 {
		t.Errorf("no panic was counted: %+v", v.Counters)
	}
	// Two thirds may be ejected: then only the good one is used.
	w.Configure(fmt.Sprintf(text, "67%"))
	w.Agent = w.Launch()
	w.Ready()
	w.Answers("192.0.2.10:80", 10)
	if answers := w.Answers("192.0.2.10:80", 100); answers["three"] != 100 {
		t.Errorf("two of three ejected, that many allowed: %v", answers)
	}
}

// The connection after the last place goes elsewhere; when there is none, it is
// refused; what ends makes room.
func TestMaxConnections(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	w.Serve("two", "10.0.0.2:7000")
	w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80]
  health: {probe: none}
  breaker: {maxConnections: 5}
  backends: [10.0.0.1:7000, {address: '10.0.0.2:7000', group: 1}]`)
	out := w.Client("fill", "192.0.2.10:80", "14")
	if want := "5 one, 5 two, 4 refused; after one was closed: one"; out != want {
		t.Errorf("%q, want %q", out, want)
	}
	// Many at once: never one too many.
	end := w.startStorm("192.0.2.10:80", 64, 0)
	for range 100 {
		if l := w.Load("10.0.0.1:7000"); l.InFlight > 5+64 {
			t.Errorf("in flight %d", l.InFlight)
		}
	}
	r := end()
	if r.Answers["one"] == 0 || r.Answers["two"] == 0 {
		t.Errorf("%v", r)
	}
	w.atRest()
}

// A backend that joins gets its share little by little, and so does one that
// comes back; a new service begins at once.
func TestSlowStart(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	w.Serve("two", "10.0.0.2:7000")
	text := `services:
- name: web
  listen: [192.0.2.10:80]
  health: {probe: none}
  balance: random
  slowStart: 1h
  backends: [10.0.0.1:7000%s]`
	w.RunAgent(fmt.Sprintf(text, ""))
	if a := w.Answers("192.0.2.10:80", 50); a["one"] != 50 {
		t.Errorf("the first backend: %v", a)
	}
	w.Configure(fmt.Sprintf(text, ", 10.0.0.2:7000"))
	w.Eventually("two joins", func() error {
		if a := w.Answers("192.0.2.10:80", 50); a["two"] == 0 {
			return fmt.Errorf("%v", a)
		}
		return nil
	})
	// A tenth of a half.
	if a := w.Answers("192.0.2.10:80", 1000); a["two"] < 10 || a["two"] > 150 {
		t.Errorf("a backend that joined a moment ago: %v", a)
	}
	// One that comes back from the operator is new, too; the other now takes the rest.
	w.MustPentad("backend", "drain", "web", "10.0.0.1:7000")
	if a := w.Answers("192.0.2.10:80", 50); a["two"] != 50 {
		t.Errorf("while one is drained: %v", a)
	}
	w.Configure(strings.Replace(fmt.Sprintf(text, ", 10.0.0.2:7000"), "slowStart: 1h", "slowStart: 500ms", 1))
	w.MustPentad("backend", "enable", "web", "10.0.0.1:7000")
	w.Eventually("both have their share after slow start", func() error {
		if a := w.Answers("192.0.2.10:80", 300); a["one"] < 110 || a["two"] < 110 {
			return fmt.Errorf("%v", a)
		}
		return nil
	})
}

// Each ejection in a row lasts twice as long, up to ten times the first.
func TestEjectionGrows(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80]
  health: {probe: none}
  breaker: {failures: 1, ejection: 400ms}
  backends: [10.0.0.1:7000, 10.0.0.2:7000]`)
	const clients = 4
	end := w.startStorm("192.0.2.10:80", clients, time.Millisecond)
	for i, want := range []time.Duration{400, 800, 1600, 3200, 4000, 4000} {
		want *= time.Millisecond
		var l socket.Load
		w.AwaitLoad("ejected", "10.0.0.2:7000", func(now socket.Load) bool { l = now; return int(now.Ejections) == i+1 })
		// It is seen some time after it began, but not as late as half of it.
		if l.For > want || l.For < want/2 {
			t.Errorf("ejection %d lasts another %s, want %s", i+1, l.For, want)
		}
	}
	r := end()
	// Whoever was on his way there when the first one failed fails, too; from then on it is
	// one a trial.
	atFirst := 0
	for _, a := range r.Failed {
		if a.Began.Sub(r.Failed[0].Began).Abs() < 200*time.Millisecond {
			atFirst++
		}
	}
	if trials := len(r.Failed) - atFirst; atFirst > clients || trials != 5 {
		t.Errorf("%d connects failed at first and %d in five trials: %v", atFirst, trials, r)
	}
}

// A hundred clients and a backend that comes and goes: ejections are bounded, the
// others share evenly, and each time it is back it is used.
func TestFlapping(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w, two := healingWorld(t, `services:
- name: web
  listen: [192.0.2.10:80]
  health: {probe: none}
  breaker: {failures: 3, ejection: 200ms}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]`)
	end := w.startStorm("192.0.2.10:80", 100, 5*time.Millisecond)
	w.awaitTraffic()
	const flaps = 4
	began := time.Now()
	for range flaps {
		two.Kill()
		w.AwaitLoad("ejected", "10.0.0.2:7000", ejected)
		two = w.Serve("two", "10.0.0.2:7000")
		w.AwaitLoad("back", "10.0.0.2:7000", serving)
		used := w.Load("10.0.0.2:7000").Connections
		w.AwaitLoad("used", "10.0.0.2:7000", func(l socket.Load) bool { return l.Connections > used+200 })
	}
	took := time.Since(began)
	l := w.Load("10.0.0.2:7000")
	r := end()
	t.Logf("%v; %d ejections within %s", r, l.Ejections, took)
	// One ejection a flap, and at most one for each 200 ms of being away.
	if most := flaps + int(took/(200*time.Millisecond)); int(l.Ejections) > most || l.Ejections < flaps {
		t.Errorf("%d ejections in %d flaps within %s, want at most %d", l.Ejections, flaps, took, most)
	}
	if one, three := r.Share("one"), r.Share("three"); one/three < 0.7 || three/one < 0.7 {
		t.Errorf("shares of the steady backends: %.3f and %.3f", one, three)
	}
	w.atRest()
}
