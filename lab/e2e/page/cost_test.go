package page_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
)

// Ten browsers cost one look, whatever there is to see.
func TestManyServices(t *testing.T) {
	t.Parallel()
	for _, n := range []int{100, 10_000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			measureBrowsers(t, n)
		})
	}
}

func measureBrowsers(t *testing.T, services int) {
	lab.Need(t)
	w := world{e2e.New(t, "10.0.0.1")}
	var text strings.Builder
	text.WriteString("services:\n")
	for i := range services {
		fmt.Fprintf(&text, "- {name: s%d, listen: ['192.0.%d.%d:%d'], health: {probe: none}, backends: ['10.0.0.1:8080', '10.0.0.1:8081']}\n", i, i>>8&3, i&255, 1000+i>>10)
	}
	w.RunAgent(text.String())
	before := w.memory()
	var open []*bufio.Reader
	for range 10 {
		if err := w.Do(func() error {
			c, err := net.Dial("tcp", "127.0.0.1:9464")
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			_, err = fmt.Fprint(c, "GET /v1/page/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
			open = append(open, bufio.NewReaderSize(c, 1<<20))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	for i, r := range open {
		var looks, rows int
		for looks < 3 {
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatalf("browser %d: %v", i, err)
			}
			if strings.HasPrefix(line, "data: {\"whole\"") {
				looks++
				rows += strings.Count(line, `{"service":`)
			}
		}
		if rows != services {
			t.Errorf("browser %d was sent %d rows, want each once", i, rows)
		}
	}
	began, had := time.Now(), w.processorTime()
	time.Sleep(3 * time.Second) // it is a rate that is measured
	share := (w.processorTime() - had).Seconds() / time.Since(began).Seconds()
	after := w.memory()
	t.Logf("%d services, 10 browsers: %.1f MB more, %.0f %% of a processor", services, float64(after-before)/(1<<20), 100*share)
	if share > 0.5 {
		t.Errorf("looks take %.0f %% of a processor", 100*share)
	}
}

// memory returns what the agent has resident, in bytes.
func (w world) memory() int {
	w.T.Helper()
	return w.field("/statm", 1) * os.Getpagesize()
}

// processorTime returns what the agent has used, at 100 ticks a second (proc(5)).
func (w world) processorTime() time.Duration {
	w.T.Helper()
	return time.Duration(w.field("/stat", 13)+w.field("/stat", 14)) * 10 * time.Millisecond
}

func (w world) field(file string, n int) int {
	w.T.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d%s", w.Agent.Process.Pid, file))
	if err != nil {
		w.T.Fatal(err)
	}
	v, err := strconv.Atoi(strings.Fields(string(raw))[n])
	if err != nil {
		w.T.Fatal(err)
	}
	return v
}
