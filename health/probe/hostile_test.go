package probe

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pentad/pentad/service"
)

// maxMemory is how much a probe may allocate, whatever a server announces.
const maxMemory = 8 << 20

// mysqlPacket has a header of its own length, or of the one announced.
func mysqlPacket(number byte, body string, announced ...int) string {
	n := len(body)
	if len(announced) > 0 {
		n = announced[0]
	}
	return string([]byte{byte(n), byte(n >> 8), byte(n >> 16), number}) + body
}

var mysqlGreeting = mysqlPacket(0, "\x0a8.0.1\x00"+"\x01\x00\x00\x00"+"abcdefgh\x00"+"\xff\xf7"+"\x21"+"\x02\x00"+"\xff\xff"+"\x15"+
	strings.Repeat("\x00", 10)+"abcdefghijkl\x00"+"mysql_native_password\x00")

const mysqlOK = "\x00\x00\x00\x02\x00\x00\x00"

// hostile are servers that announce more than they send. Each sends its answers one
// after the other, the first at once, and the next ones when it is spoken to.
var hostile = map[service.Probe][][]string{
	service.ProbeRedis: {
		{"*1048576000\r\n"}, {"+OK\r\n", "*1048576000\r\n"}, {"+OK\r\n%100000000\r\n"}, {"+OK\r\n~100000000\r\n"},
		{"+OK\r\n>100000000\r\n"}, {"+OK\r\n*4\r\n$1000000000\r\n"}, {"+OK\r\n*5\r\n$5\r\nslave\r\n$999999999\r\n"},
		{"+OK\r\n*2\r\n$-1\r\n"}, {"$1000000000\r\n"}, {"+" + strings.Repeat("a", 100_000)},
	},
	service.ProbePostgres: {
		{"R\x20\x00\x00\x00"}, {"S\x3f\xff\xff\xff"}, {"R\x00\x00\x00\x08\x00\x00\x00\x00S\x3f\xff\xff\xff"},
		{"R\x00\x00\x00\x08\x00\x00\x00\x00Z\x00\x00\x00\x05I", "T\x7f\xff\xff\xff"},
		{"R\x00\x00\x00\x08\x00\x00\x00\x00Z\x00\x00\x00\x05I", "T\x00\x00\x00\x06\xff\xff"},
	},
	service.ProbeMySQL: {
		{mysqlPacket(0, "", 0xffffff)}, {mysqlPacket(0, "\x0a", 0xfffffe)},
		{mysqlGreeting, mysqlPacket(2, "", 0xffffff)},
		{mysqlGreeting, mysqlPacket(2, mysqlOK), mysqlPacket(1, "\xfe\xff\xff\xff\x0f\x00\x00\x00\x00")},
		{mysqlGreeting, mysqlPacket(2, mysqlOK), mysqlPacket(1, "\xfe\xff\xff\xff\xff\xff\xff\xff\x7f")},
		{mysqlGreeting, mysqlPacket(2, mysqlOK), mysqlPacket(1, "\xfb/etc/passwd")},
	},
	service.ProbeHTTP: {{"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n"}, {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n"}},
	service.ProbeGRPC: {{"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x06\x7f\xff\xff\xff\xff\xff\xff\x01\x00\x00\x00\x00"}},
	service.ProbeTLS:  {{"\x16\x03\x03\xff\xff\x02\xff\xff\xff"}},
}

// say plays a server until the client hangs up.
func say(c net.Conn, answers []string) {
	b := make([]byte, 4096)
	for i, a := range answers {
		if i > 0 {
			if _, err := c.Read(b); err != nil {
				return
			}
		}
		if _, err := c.Write([]byte(a)); err != nil {
			return
		}
	}
	for {
		if _, err := c.Read(b); err != nil {
			return
		}
	}
}

// face lets a probe meet a server and returns what it allocated and what it said.
func face(t *testing.T, h service.Health, answers []string) (used uint64, err error) {
	t.Helper()
	addr, end := serve(t, func(c net.Conn) { say(c, answers) })
	defer end()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err = try(t, h, addr, 200*time.Millisecond)
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc, err
}

func hostileProbe(t testing.TB, p service.Probe) service.Health {
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	return service.Health{Probe: p, Path: "/", Expect: "200", User: "u", PasswordFile: password}
}

// What a server announces costs a probe nothing before it comes.
func TestHostileServers(t *testing.T) {
	for p, servers := range hostile {
		for _, answers := range servers {
			used, err := face(t, hostileProbe(t, p), answers)
			if used > maxMemory {
				t.Errorf("%s: %.60q: %d MiB were allocated", p, answers, used>>20)
			}
			if err == nil && p != service.ProbeHTTP {
				t.Errorf("%s: %.60q: counted as a success", p, answers)
			}
		}
	}
}

// Whatever a server sends: time and memory are bounded, and nothing panics.
func FuzzServer(f *testing.F) {
	kinds := []service.Probe{service.ProbeRedis, service.ProbePostgres, service.ProbeMySQL, service.ProbeHTTP, service.ProbeGRPC, service.ProbeTLS}
	for i, p := range kinds {
		for _, answers := range hostile[p] {
			f.Add(byte(i), answers[0], strings.Join(answers[1:], ""))
		}
	}
	f.Fuzz(func(t *testing.T, kind byte, first, rest string) {
		p := kinds[int(kind)%len(kinds)]
		began := time.Now()
		if used, _ := face(t, hostileProbe(t, p), []string{first, rest, rest}); used > maxMemory {
			t.Errorf("%s: %d MiB were allocated", p, used>>20)
		}
		if d := time.Since(began); d > patience {
			t.Errorf("%s: took %s", p, d)
		}
	})
}

// What the prober cannot do says nothing of the backend.
func TestOwnErrors(t *testing.T) {
	for _, p := range []service.Probe{service.ProbeTCP, service.ProbeTLS, service.ProbeHTTP, service.ProbeGRPC, service.ProbePostgres, service.ProbeMySQL, service.ProbeRedis} {
		h := hostileProbe(t, p)
		h.PasswordFile = ""
		for _, own := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EADDRNOTAVAIL, syscall.EPERM} {
			f, err := newFunc(h, failing(&net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("socket", own)}))
			if err != nil {
				t.Fatal(err)
			}
			if err := meet(t, f); !errors.Is(err, ErrOwn) || !strings.Contains(err.Error(), own.Error()) {
				t.Errorf("%s: %v: %v", p, own, err)
			}
		}
		for _, theirs := range []error{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ETIMEDOUT} {
			f, err := newFunc(h, failing(os.NewSyscallError("connect", theirs)))
			if err != nil {
				t.Fatal(err)
			}
			if err := meet(t, f); err == nil || errors.Is(err, ErrOwn) {
				t.Errorf("%s: %v is called the prober's own: %v", p, theirs, err)
			}
		}
	}
}

// failing is a dialFunc that fails.
func failing(err error) dialFunc {
	return func(context.Context, string, string) (net.Conn, error) { return nil, err }
}

// meet runs a probe against nobody.
func meet(t *testing.T, f Func) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	return judged(f)(ctx, netip.MustParseAddrPort("192.0.2.1:80"))
}
