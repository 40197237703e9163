package socket_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/service"
)

// The services of the churn test, by their VIP 192.0.2.N. Each has servers of its
// own, which answer its name, so that a wrong turn cannot go unnoticed.
const (
	steady   = 1 // its servers live; its list of backends changes
	flapping = 2 // its servers die and come back; probes find out
	fleeting = 3 // this one and the next six come and go
	churners = 9
)

const churnFor = time.Minute

func churnVIP(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 80)
}

func churnBackend(n, i int) string { return fmt.Sprintf("10.0.%d.%d:7000", n, i) }

// churn connects to every VIP without pause until its standard input ends, and
// prints what the configuration does not explain.
func churn([]string) error {
	done := make(chan struct{})
	go func() {
		b := make([]byte, 1)
		_, _ = os.Stdin.Read(b)
		close(done)
	}()
	var tries, failures atomic.Int64
	var tasks sync.WaitGroup
	var mu sync.Mutex
	for n := 1; n <= churners; n++ {
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
			tasks.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
					}
					tries.Add(1)
					failed, err := churnOnce(n, kind)
					if failed {
						failures.Add(1)
						time.Sleep(time.Millisecond)
					}
					if err != nil {
						mu.Lock()
						fmt.Printf("%s service %d, kind %d: %v\n", time.Now().Format("15:04:05.000"), n, kind, err)
						mu.Unlock()
					}
				}
			})
		}
	}
	tasks.Wait()
	fmt.Printf("tries=%d failures=%d\n", tries.Load(), failures.Load())
	return nil
}

// churnOnce makes one connection. failed says that there was none, err that this
// or what was seen has no explanation.
func churnOnce(n, kind int) (failed bool, err error) {
	vip := churnVIP(n)
	fd, err := dial(kind, 0, vip)
	defer unix.Close(fd)
	if err != nil {
		switch {
		case n == flapping && errors.Is(err, unix.ECONNREFUSED): // its server just died
		case n >= fleeting && errors.Is(err, unix.ENETUNREACH): // it is not configured
		default:
			return true, err
		}
		return true, nil
	}
	if err := peerIs(fd, vip); errors.Is(err, unix.ENOTCONN) {
		return true, nil // closed meanwhile: its backend was removed, or died
	} else if err != nil {
		return false, err
	}
	question := ""
	if kind == unix.SOCK_DGRAM {
		question = fmt.Sprintf("%d-%d", n, rand.Uint64())
		if _, err := unix.Write(fd, []byte(question)); errors.Is(err, unix.ECONNABORTED) {
			return true, nil
		} else if err != nil {
			return false, err
		}
		if n == flapping {
			return false, nil // the datagram may meet nobody
		}
	}
	who, err := answerTo(fd, question)
	if err != nil && n == flapping || errors.Is(err, unix.ECONNABORTED) {
		return true, nil // its server was killed while it spoke, or removed
	}
	if want := fmt.Sprintf("service-%d", n); who != want && !(n == flapping && who == "") {
		return false, fmt.Errorf("%q answered: %v", who, err)
	}
	return false, nil
}

// answerTo reads who answers the question. A UDP socket has its port before it
// has its peer, and in between it takes what was meant for an earlier owner of
// the port: answers to other questions are not ours.
func answerTo(fd int, question string) (string, error) {
	b := make([]byte, 100)
	for {
		n, err := read(fd, b)
		if err != nil {
			return "", err
		}
		who, about, _ := strings.Cut(strings.TrimSpace(string(b[:n])), " ")
		if about == question {
			return who, nil
		}
	}
}

func TestChurn(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	length := churnFor
	if testing.Short() {
		length = 5 * time.Second
	}
	var addresses []string
	for n := 1; n <= churners; n++ {
		for i := 1; i <= 4; i++ {
			addresses = append(addresses, strings.TrimSuffix(churnBackend(n, i), ":7000"))
		}
	}
	w := newWorld(t, addresses...)
	random := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	var flappers [5]*lab.Process
	for n := 1; n <= churners; n++ {
		var all []string
		for i := 1; i <= 4; i++ {
			all = append(all, churnBackend(n, i))
		}
		if n != flapping {
			w.Serve(fmt.Sprintf("service-%d", n), all...)
			continue
		}
		for i := 1; i <= 4; i++ {
			flappers[i] = w.Serve("service-2", all[i-1])
		}
	}
	w.RunAgent(churnConfig(random))
	ids := objectIDs(t, w)
	agentAtStart := usage(t, w)

	client := actor.Command("churn")
	stdin, err := client.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.Start(client, lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	kills, changes := 0, 0
	for end := time.Now().Add(length); time.Now().Before(end); {
		switch random.IntN(10) {
		default:
			w.Configure(churnConfig(random))
			changes++
		case 0:
			i := 2 + random.IntN(3)
			flappers[i].Kill()
			flappers[i] = w.Serve("service-2", churnBackend(flapping, i))
		case 1:
			w.Agent.Kill()
			w.Agent = w.Launch()
			w.Ready()
			kills++
		}
		time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
	}
	stdin.Close()
	if err := p.Wait(); err != nil {
		t.Fatalf("client: %v: %s", err, p.Log)
	}
	report := p.Log.String()
	found := regexp.MustCompile(`tries=(\d+) failures=(\d+)\n$`).FindStringSubmatch(report)
	if found == nil || strings.Count(report, "\n") != 1 {
		t.Errorf("not explained by the configuration:\n%s", e2e.FirstLines(report, 20))
	}
	t.Logf("%d changes of the file, %d kills of the agent: %v", changes, kills, found)

	w.Ready()
	if v := w.View(); v.Counters.Untracked != 0 {
		t.Errorf("%d sockets were not tracked", v.Counters.Untracked)
	}
	w.atRest()
	// A process that looks at another's files holds them for a moment longer.
	w.Eventually("no socket is remembered", func() error {
		if n := remembered(t, w); n != 0 {
			return fmt.Errorf("%d are, though all are closed", n)
		}
		return nil
	})
	w.Eventually("the agent is as small as at its start", func() error {
		now := usage(t, w)
		if now.fds > agentAtStart.fds+2 || now.goroutines > agentAtStart.goroutines+5 {
			return fmt.Errorf("it has %+v, had %+v", now, agentAtStart)
		}
		return nil
	})
	ids = append(ids, objectIDs(t, w)...)
	w.MustPentad("down")
	w.Eventually("every map is gone", func() error {
		for _, id := range ids {
			if m, err := ebpf.NewMapFromID(id); err == nil {
				defer m.Close()
				return fmt.Errorf("map %d is there: %s", id, m)
			}
		}
		return nil
	})
}

// churnConfig is a configuration drawn by lot. The first backend of a service
// that must serve is always there.
func churnConfig(random *rand.Rand) string {
	var b strings.Builder
	// Services that come and go by lot would be held back now and then.
	b.WriteString("guard: off\nservices:\n")
	for n := 1; n <= churners; n++ {
		if n >= fleeting && random.IntN(3) == 0 {
			continue
		}
		health := "{probe: none}"
		if n == flapping {
			health = "{interval: 100ms, timeout: 50ms}"
		}
		balance := service.Balances[random.IntN(len(service.Balances))]
		extra := ""
		for _, key := range []string{
			"affinity: {timeout: 10s}", "breaker: {failures: 3, ejection: 20ms, maxConnections: 1000}", "connect: {timeout: 50ms}",
			"keepalive: {idle: 10s}", "onDown: keep", "flows: false",
		} {
			if random.IntN(3) == 0 {
				extra += ", " + key
			}
		}
		if balance != "source-hash" && random.IntN(3) == 0 {
			extra += ", slowStart: 100ms"
		}
		fmt.Fprintf(&b, "- {name: service-%d, listen: ['%s', '%s/udp'], balance: %s%s, health: %s, backends: [", n, churnVIP(n), churnVIP(n), balance, extra, health)
		for i := 1; i <= 4; i++ {
			if i == 1 || random.IntN(2) == 0 {
				group := 0
				if i > 1 {
					group = random.IntN(2)
				}
				fmt.Fprintf(&b, "{address: '%s', weight: %d, group: %d}, ", churnBackend(n, i), 1+random.IntN(200), group)
			}
		}
		b.WriteString("]}\n")
	}
	return b.String()
}

// objectIDs returns the ids of the maps that are pinned on the host.
func objectIDs(t *testing.T, w *world) []ebpf.MapID {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(w.Pins, "socket", "set-*", "*"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no maps: %v", err)
	}
	var ids []ebpf.MapID
	for _, path := range paths {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		ids = append(ids, id)
		m.Close()
	}
	return ids
}

// remembered counts the sockets that the kernel keeps a name for.
func remembered(t *testing.T, w *world) int {
	t.Helper()
	n := 0
	for _, name := range []string{"sockets", "sockets_more"} {
		paths, _ := filepath.Glob(filepath.Join(w.Pins, "socket", "set-*", name))
		if len(paths) != 1 {
			t.Fatalf("maps %v", paths)
		}
		m, err := ebpf.LoadPinnedMap(paths[0], nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		var key, value []byte
		for all := m.Iterate(); all.Next(&key, &value); {
			if binary.NativeEndian.Uint64(value) != 0 {
				n++
			}
		}
	}
	return n
}

// footprint is what an agent holds.
type footprint struct{ fds, goroutines int }

func usage(t *testing.T, w *world) footprint {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.Agent.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	f := footprint{fds: len(fds)}
	for lines := bufio.NewScanner(strings.NewReader(w.Get("/metrics"))); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			f.goroutines, _ = strconv.Atoi(v)
		}
	}
	return f
}
