package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// try probes an address once.
func try(t *testing.T, h service.Health, addr string, timeout time.Duration) error {
	t.Helper()
	f, err := New(h, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	return f(ctx, netip.MustParseAddrPort(addr))
}

const patience = 10 * time.Second

// serve answers connections, each of which is closed when it was answered, until end
// is called, which waits for all.
func serve(t *testing.T, answer func(net.Conn)) (addr string, end func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			served.Go(func() {
				defer c.Close()
				answer(c)
			})
		}
	})
	return l.Addr().String(), func() {
		l.Close()
		served.Wait()
	}
}

func TestTLS(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "fine") }))
	s.Config.ErrorLog = nil
	defer s.Close()
	addr := s.Listener.Addr().String()
	for _, c := range []struct {
		h    service.Health
		want string
	}{
		{service.Health{Probe: service.ProbeTLS}, ""},
		{service.Health{Probe: service.ProbeTLS, Host: "shop.example"}, "certificate"},
		{service.Health{Probe: service.ProbeHTTP, TLS: true, Path: "/", Expect: "200"}, ""},
		{service.Health{Probe: service.ProbeHTTP, TLS: true, Host: "shop.example", Path: "/", Expect: "200"}, "certificate"},
	} {
		if err := try(t, c.h, addr, patience); c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%+v: %v, want %q", c.h, err, c.want)
		}
	}
}

func TestGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, state := grpc.NewServer(), health.NewServer()
	grpc_health_v1.RegisterHealthServer(s, state)
	go s.Serve(l)
	defer s.Stop()
	addr := l.Addr().String()
	state.SetServingStatus("shop", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	for path, want := range map[string]string{"": "", "shop": "NOT_SERVING", "nothing": "unknown service"} {
		err := try(t, service.Health{Probe: service.ProbeGRPC, Path: path}, addr, patience)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("service %q: %v, want %q", path, err, want)
		}
	}
}

func TestExec(t *testing.T) {
	run := func(script string, timeout time.Duration) error {
		return try(t, service.Health{Probe: service.ProbeExec, Command: service.NewCommand([]string{"/bin/sh", "-c", script})}, "192.0.2.1:80", timeout)
	}
	if err := run(`[ "$PENTAD_ADDRESS:$PENTAD_PORT" = 192.0.2.1:80 ]`, patience); err != nil {
		t.Errorf("the program does not know its backend: %v", err)
	}
	if err := run("echo no good >&2; echo more; exit 3", patience); err == nil || !strings.HasSuffix(err.Error(), "exit status 3: no good") {
		t.Errorf("a program that fails: %v", err)
	}
	if err := run("yes | head -c 10000000", patience); err != nil {
		t.Errorf("a program that talks: %v", err)
	}
	// One that hangs is killed with its children, and one that has left
	// children behind leaves them no longer.
	pids := filepath.Join(t.TempDir(), "pids")
	hang := "sleep 1000 & echo $! >> " + pids + "; "
	if err := run(hang+"wait", 200*time.Millisecond); err == nil || !strings.Contains(err.Error(), "killed at the time-out") {
		t.Errorf("a program that hangs: %v", err)
	}
	if err := run(hang+"exit 0", patience); err != nil {
		t.Errorf("a program that leaves a child: %v", err)
	}
	all, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range strings.Fields(string(all)) {
		var pid int
		fmt.Sscan(text, &pid)
		for deadline := time.Now().Add(patience); alive(pid); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("child %d still runs", pid)
			}
		}
	}
}

// alive reports whether a process runs; a zombie does not.
func alive(pid int) bool {
	if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !bytes.Contains(stat, []byte(") Z "))
}

func TestPasswordFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(path, []byte("secret word\nmore\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := host.ReadPassword(path); err != nil || p != "secret word" {
		t.Errorf("password %q, %v", p, err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	_, err := host.ReadPassword(path)
	if err == nil || !strings.Contains(err.Error(), "chmod 600") || strings.Contains(err.Error(), "secret") {
		t.Errorf("a file that others can read: %v", err)
	}
	if _, err := host.ReadPassword(path + "-none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// The body of a good answer may be endless: it is cut, and is a success.
func TestEndlessBody(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := fmt.Fprintln(w, strings.Repeat("a", 1000)); err != nil {
				return
			}
		}
	}))
	defer s.Close()
	h := service.Health{Probe: service.ProbeHTTP, Path: "/", Expect: "200"}
	if err := try(t, h, s.Listener.Addr().String(), patience); err != nil {
		t.Error(err)
	}
}

// Whatever a server sends, a probe ends in time, reads no more than its bound,
// fails, and does not show the password.
func TestBadServers(t *testing.T) {
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	probes := []service.Health{
		{Probe: service.ProbeTLS},
		{Probe: service.ProbeHTTP, Path: "/", Expect: "200"},
		{Probe: service.ProbeGRPC},
		{Probe: service.ProbePostgres, User: "u", PasswordFile: password},
		{Probe: service.ProbeMySQL, User: "u", PasswordFile: password},
		{Probe: service.ProbeRedis, User: "u", PasswordFile: password},
	}
	for name, answer := range map[string]func(net.Conn) int{
		"garbage": func(c net.Conn) int { n, _ := io.WriteString(c, "\x00\xff\x00\x7f\n\n-\x80\x01\x02"); return n },
		"endless": func(c net.Conn) int {
			total, block := 0, bytes.Repeat([]byte("+A:*9999999\r\n"), 1000)
			for {
				n, err := c.Write(block)
				if total += n; err != nil || total > 64<<20 {
					return total
				}
			}
		},
		"zeros": func(c net.Conn) int {
			total := 0
			for {
				n, err := c.Write(make([]byte, 4096))
				if total += n; err != nil || total > 64<<20 {
					return total
				}
			}
		},
		"silence":  func(c net.Conn) int { io.Copy(io.Discard, c); return 0 },
		"hangs up": func(net.Conn) int { return 0 },
	} {
		for _, h := range probes {
			addr, end := serve(t, func(c net.Conn) {
				// What the kernel buffers was sent but not read.
				if n := answer(c); n > maxRead+16<<20 {
					t.Errorf("%s, %s: the server could send %d bytes", h.Probe, name, n)
				}
			})
			began := time.Now()
			err := try(t, h, addr, 300*time.Millisecond)
			if err == nil {
				t.Errorf("%s, %s: counted as a success", h.Probe, name)
			} else if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s, %s: shows the password: %v", h.Probe, name, err)
			}
			if d := time.Since(began); d > patience {
				t.Errorf("%s, %s: took %s", h.Probe, name, d)
			}
			end()
		}
	}
}
