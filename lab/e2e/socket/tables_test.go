package socket_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

func TestAffinityAndSourceHash(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	for i, name := range []string{"one", "two", "three"} {
		w.Serve(name, fmt.Sprintf("10.0.0.%d:7000", i+1))
	}
	text := `services:
- name: sticky
  listen: [192.0.2.10:80]
  affinity: {timeout: 1h}
  health: {probe: none}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]
- name: short
  listen: [192.0.2.12:80]
  affinity: {timeout: 1s}
  health: {probe: none}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]
- name: hashed
  listen: [192.0.2.11:80]
  balance: source-hash
  health: {probe: none}
  backends: [%s]`
	w.RunAgent(fmt.Sprintf(text, "10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000"))
	sticky := w.Answers("192.0.2.10:80", 50)
	if len(sticky) != 1 {
		t.Errorf("one client with affinity was served by %v", sticky)
	}
	// The backend leaves the choice: the client moves, and stays there.
	who := onlyKey(sticky)
	w.MustPentad("backend", "drain", "sticky", "10.0.0."+map[string]string{"one": "1", "two": "2", "three": "3"}[who]+":7000")
	moved := w.Answers("192.0.2.10:80", 50)
	if len(moved) != 1 || moved[who] > 0 {
		t.Errorf("after the drain of %s one client was served by %v", who, moved)
	}
	// After the time-out a client is a new one: within many time-outs it
	// meets another backend.
	w.Eventually("affinity ends", func() error {
		first := onlyKey(w.Answers("192.0.2.12:80", 1))
		// Longer than the time-out: the client is idle for that long.
		time.Sleep(1200 * time.Millisecond)
		if next := onlyKey(w.Answers("192.0.2.12:80", 1)); next == first {
			return fmt.Errorf("still %s", first)
		}
		return nil
	})

	// One network namespace is one client, unless the socket bound an address.
	if hashed := w.Answers("192.0.2.11:80", 50); len(hashed) != 1 {
		t.Errorf("one client of source-hash was served by %v", hashed)
	}
	before := make(map[string]string)
	reached := make(map[string]int)
	for i := range 60 {
		from := fmt.Sprintf("127.0.1.%d:0", i+1)
		before[from] = onlyKey(w.Answers("192.0.2.11:80", 1, from))
		reached[before[from]]++
	}
	if len(reached) != 3 {
		t.Errorf("60 clients reached only %v", reached)
	}
	// One backend goes: only its clients move, but for the odd one (Maglev).
	w.Configure(fmt.Sprintf(text, "10.0.0.1:7000, 10.0.0.2:7000"))
	w.AwaitStates("hashed", service.Serving, service.Serving)
	moves := 0
	for from, was := range before {
		now := onlyKey(w.Answers("192.0.2.11:80", 1, from))
		if now == "three" {
			t.Errorf("%s still reaches a removed backend", from)
		}
		if was != "three" && now != was {
			moves++
		}
	}
	if moves > 10 {
		t.Errorf("%d clients moved without need", moves)
	}
}

func onlyKey(m map[string]int) string {
	for k := range m {
		return k
	}
	return ""
}

// More services than the maps were made for: the maps grow, and what sockets did
// before is not lost.
func TestGrowth(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	w.Serve("one", "10.0.0.1:7000")
	small := "services:\n- {name: web, listen: ['192.0.2.10:80'], health: {probe: none}, affinity: {timeout: 1h}, backends: ['10.0.0.1:7000', '10.0.0.2:7000']}\n"
	w.RunAgent(small)
	before := w.View().Memory["backends"]
	var big strings.Builder
	big.WriteString(small)
	for i := range 5000 {
		fmt.Fprintf(&big, "- {name: s%d, listen: ['192.0.3.%d:%d'], health: {probe: none}, backends: ['10.0.0.1:7000']}\n", i, i%256, 1000+i)
	}
	w.Configure(big.String())
	w.Eventually("all services are in the kernel", func() error {
		v, err := socket.Read(w.Pins)
		if err != nil {
			return err
		}
		if len(v.Services) != 5001 {
			return fmt.Errorf("there are %d", len(v.Services))
		}
		return nil
	})
	if have := w.Answers("192.0.3.200:1200", 3); have["one"] != 3 {
		t.Errorf("a new service answers %v", have)
	}
	if after := w.View().Memory["backends"]; after <= before {
		t.Errorf("the map backends has %d bytes, had %d", after, before)
	}
	if _, err := os.Stat(filepath.Join(w.Pins, "socket", "set-1")); !os.IsNotExist(err) {
		t.Errorf("the old set of maps is still there: %v", err)
	}
	w.Ready()
}

// When everything changes at once the old tables stand beside the new ones until
// the listeners are switched: there must be room for both.
func TestGrowthForBoth(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	text := func(services, backend int) string {
		var b strings.Builder
		b.WriteString("guard: off\nservices:\n")
		for i := range services {
			fmt.Fprintf(&b, "- {name: s%d, listen: ['192.0.2.%d:80'], balance: source-hash, health: {probe: none}, backends: ['10.0.%d.%d:80', '10.0.200.%d:80']}\n",
				i, i, i, backend, i)
		}
		return b.String()
	}
	w.RunAgent(text(2, 1))
	for backend, services := range []int{3, 4, 6, 9, 2, 20} {
		w.Configure(text(services, backend+2))
		w.Eventually("the change is in the kernel", func() error {
			v, err := socket.Read(w.Pins)
			if err != nil {
				return err
			}
			want := fmt.Sprintf("10.0.%d.%d:80", services-1, backend+2)
			s := (&service.Snapshot{Services: v.Services}).Find(fmt.Sprintf("s%d", services-1))
			if len(v.Services) != services || s == nil || s.Backends[0].Address.String() != want {
				return fmt.Errorf("%d services, want %d; the last is %+v, want %s", len(v.Services), services, s, want)
			}
			return nil
		})
		w.Ready()
	}
}
