package socket_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// The mapping of every service is switched as fast as the kernel takes it, so
// that map elements pass from listener to listener under the eyes of running
// programs. No connection may end at another service, and none may fail.
func TestSwitches(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	var addresses []string
	for n := 1; n <= churners; n++ {
		for i := 1; i <= 4; i++ {
			addresses = append(addresses, strings.TrimSuffix(churnBackend(n, i), ":7000"))
		}
	}
	w := newWorld(t, addresses...)
	for n := 1; n <= churners; n++ {
		var all []string
		for i := 1; i <= 4; i++ {
			all = append(all, churnBackend(n, i))
		}
		w.Serve(fmt.Sprintf("service-%d", n), all...)
	}
	lock, err := host.Lock(w.Pins)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	p := socket.New(socket.Options{Pins: w.Pins, Version: "test"})
	defer p.Close()
	snap := &service.Snapshot{}
	apply := func() {
		t.Helper()
		snap = snap.Next(drawServices())
		if err := p.Apply(t.Context(), socket.Want{Cgroup: w.Scope(), Services: snap}); err != nil {
			t.Fatal(err)
		}
	}
	apply()
	client := actor.Command("churn")
	stdin, err := client.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	c, err := w.Start(client, lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		apply()
	}
	stdin.Close()
	if err := c.Wait(); err != nil {
		t.Fatalf("client: %v: %s", err, c.Log)
	}
	if report := c.Log.String(); strings.Count(report, "\n") != 1 || !strings.Contains(report, "failures=0\n") {
		t.Errorf("after %d switches:\n%s", snap.Revision, e2e.FirstLines(report, 20))
	} else {
		t.Logf("%d switches, %s", snap.Revision, strings.TrimSpace(report))
	}
}

// drawServices draws the backends of every service of the churn test by lot.
func drawServices() []*service.Service {
	var all []*service.Service
	for n := 1; n <= churners; n++ {
		s := &service.Service{
			Name: fmt.Sprintf("service-%d", n), OnDown: service.Keep, Balance: []service.Balance{service.Random, service.LeastLatency}[n%2],
		}
		if n%3 == 0 {
			s.Affinity = 10 * time.Second
		}
		for _, protocol := range []service.Protocol{service.TCP, service.UDP} {
			s.Listeners = append(s.Listeners, service.Listener{Address: churnVIP(n), Protocol: protocol})
		}
		for _, i := range rand.Perm(4)[:1+rand.IntN(4)] {
			s.Backends = append(s.Backends, service.Backend{Address: netip.MustParseAddrPort(churnBackend(n, i+1)), Weight: service.DefaultWeight})
		}
		all = append(all, s)
	}
	return all
}
