package socket_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
)

const socketServices = `services:
- name: tcp
  listen: [192.0.2.1:80, "[2001:db8:f::1]:80"]
  backends: [10.0.0.1:7000, "[2001:db8::1]:7000"]
- name: udp
  listen: [192.0.2.1:53/udp, "[2001:db8:f::1]:53/udp"]
  backends: [10.0.0.1:7000, "[2001:db8::1]:7000"]
- name: udp-2
  listen: [192.0.2.2:53/udp]
  backends: [10.0.0.2:7000]
- name: udp-twice
  listen: [192.0.2.3:53/udp]
  backends: [10.0.0.1:7000]
- name: empty
  listen: [192.0.2.4:80, 192.0.2.4:53/udp]
  backends: []
- name: shut
  listen: [192.0.2.5:80]
  health: {probe: none}
  backends: [10.0.0.1:7]
- name: several
  listen: [192.0.2.6:53/udp]
  backends: [10.0.0.1:7000, 10.0.0.2:7000, 10.0.0.3:7000]`

// What an application sees of its sockets, call by call.
func TestSockets(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::1")
	w.Serve("one", "10.0.0.1:7000", "[2001:db8::1]:7000")
	w.Serve("two", "10.0.0.2:7000")
	w.Serve("three", "10.0.0.3:7000")
	text := socketServices
	var names []string
	for i := range 100 {
		vip := fmt.Sprintf("192.0.2.%d:53", 100+i)
		names = append(names, vip)
		text += fmt.Sprintf("\n- {name: more-%d, listen: [%s/udp], backends: [10.0.0.2:7000]}", i, vip)
	}
	w.RunAgent(text)
	for _, name := range []string{
		"tcp names", "refused at once", "tcp reconnect", "udp disconnect", "udp connected", "udp many names at once",
		"udp A and AAAA", "udp two names", "udp direct after VIP", "udp mapped", "mptcp", "fast open", "crowd",
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			w := &world{&e2e.World{Host: w.Host, T: t}}
			if out := w.Client(name); out != "" {
				t.Log(out)
			}
		})
	}
	w.Client("udp sticks", "192.0.2.6:53")
	w.Client("udp more names", names...)
	if v := w.View(); v.Counters.Untracked != 0 {
		t.Errorf("%d sockets were not tracked", v.Counters.Untracked)
	}
}
