package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/proxy/relay"
)

// closes fails the test unless a plane is closed soon.
func closes(t *testing.T, p *Plane) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		p.Close()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("it does not close")
	}
}

// A proxy ends whatever its clients wait for.
func TestCloses(t *testing.T) {
	t.Parallel()
	silent := listen(t, "127.0.0.1", func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	t.Run("BIND", func(t *testing.T) {
		p, at := start(t, config.Proxy{})
		asked(t, at, 5, 2, 0, netip.MustParseAddrPort("127.0.0.1:21")).take(10)
		closes(t, p)
	})
	t.Run("CONNECT, UDP ASSOCIATE, HTTP", func(t *testing.T) {
		p, at := start(t, config.Proxy{})
		asked(t, at, 5, 1, 0, silent).take(10)
		asked(t, at, 5, 3, 0, nowhere).take(10)
		asked(t, at, 5, 1, 0, named("slow.test", 80))
		c := dial(t, at)
		fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", silent)
		within(t, "all are there", func() bool { return len(p.Flows()) == 4 })
		closes(t, p)
	})
	t.Run("while sessions ask about listeners", func(t *testing.T) {
		p, _ := start(t, config.Proxy{})
		s := p.servers["test"]
		// A session that waits for the rest, as one does that is sniffed.
		asking := make(chan struct{})
		s.tasks.Go(func() {
			close(asking)
			<-s.ctx.Done()
			p.isOwn(target{IP: netip.MustParseAddr("127.0.0.1"), Port: 1}, false)
		})
		<-asking
		closes(t, p)
	})
}

// Who is in the middle of something when the agent ends may finish it.
func TestDrain(t *testing.T) {
	t.Parallel()
	p, at := start(t, config.Proxy{Drain: patience})
	to := listen(t, "127.0.0.1", echo)
	c := asked(t, at, 5, 1, 0, to, "half, ")
	c.take(10)
	done := make(chan struct{})
	go func() {
		p.Close()
		close(done)
	}()
	within(t, "nobody new is let in", func() bool {
		n, err := net.Dial("tcp", at)
		if err == nil {
			n.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	c.say("and whole")
	_ = c.CloseWrite()
	c.hear("half, and whole")
	c.ended()
	select {
	case <-done:
	case <-time.After(patience / 2):
		t.Error("it waits for nobody")
	}
}

// A client of elsewhere does not come from here by way of the proxy itself.
func TestOwnListeners(t *testing.T) {
	t.Parallel()
	p, at := start(t, config.Proxy{})
	s := &session{server: p.servers["test"], settings: &settings{}, client: netip.MustParseAddrPort("192.0.2.7:1")}
	to, err := hostTarget(at)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.mayReach(to, answer{rule: -1}); !errors.Is(err, errOwn) {
		t.Errorf("somebody of elsewhere and the proxy: %v", err)
	}
	s.client = netip.MustParseAddrPort("127.0.0.1:1")
	if err := s.mayReach(to, answer{rule: -1}); err != nil {
		t.Errorf("somebody of this host and the proxy: %v", err)
	}
}

// Replies have a time of their own: what a client may take to ask has nothing to do with
// what its target may take to answer.
func TestReplyAfterHandshake(t *testing.T) {
	t.Parallel()
	p, at := start(t, config.Proxy{Handshake: 200 * time.Millisecond, Connect: 600 * time.Millisecond})
	asked(t, at, 5, 1, 0, named("slow.test", 80)).hear(5, 4, 0, nowhere)
	to := listen(t, "127.0.0.1", echo)
	p.resolve = func(ctx context.Context, x target) ([]netip.AddrPort, error) {
		sleep(ctx, 400*time.Millisecond)
		return []netip.AddrPort{to}, nil
	}
	c := asked(t, at, 5, 1, 0, named("late.test", to.Port()), "hello")
	_ = c.CloseWrite()
	c.hear(5, 0, 0)
	c.take(7)
	c.hear("hello")
}

// Idle is who sends nothing, not who is slow.
func TestSlowIsNotIdle(t *testing.T) {
	t.Parallel()
	const idle = 500 * time.Millisecond
	_, at := start(t, config.Proxy{Idle: idle})
	const size = 3 << 20
	to := listen(t, "127.0.0.1", func(c *net.TCPConn) { _, _ = c.Write(make([]byte, size)) })
	c := asked(t, at, 5, 1, 0, to)
	_ = c.SetReadBuffer(4 << 10)
	c.take(10)
	got := 0
	for began := time.Now(); time.Since(began) < 3*idle; time.Sleep(idle / 10) {
		n, err := c.Read(make([]byte, 8<<10))
		got += n
		if err != nil {
			t.Fatalf("after %d bytes and %s: %v", got, time.Since(began), err)
		}
	}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprint(w, len(b))
	}))
	defer web.Close()
	h := dial(t, at)
	fmt.Fprintf(h, "POST %s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n", web.URL)
	for range 12 {
		time.Sleep(idle / 6)
		h.say("x")
	}
	r, err := http.ReadResponse(bufio.NewReader(h), nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(r.Body); r.StatusCode != 200 || string(b) != "12" {
		t.Errorf("an upload that takes twice as long as idle: %s %s", r.Status, b)
	}
}

// HTTP: what breaks off, hangs or is aborted leaves nothing behind.
func TestHTTPEnds(t *testing.T) {
	t.Parallel()
	p, at := start(t, config.Proxy{Idle: 400 * time.Millisecond})
	none := func(t *testing.T) {
		t.Helper()
		within(t, "no flow is left", func() bool { return len(p.Flows()) == 0 })
	}
	ask := func(t *testing.T, to netip.AddrPort) *client {
		t.Helper()
		c := dial(t, at)
		fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", to)
		return c
	}
	t.Run("the answer breaks off", func(t *testing.T) {
		to := listen(t, "127.0.0.1", func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 1000))
			fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
		})
		c := ask(t, to)
		b, _ := io.ReadAll(c)
		if !strings.HasSuffix(string(b), "half") {
			t.Errorf("heard %q", b)
		}
		none(t)
	})
	t.Run("the answer stalls", func(t *testing.T) {
		to := listen(t, "127.0.0.1", func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 1000))
			fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
			_, _ = io.Copy(io.Discard, c)
		})
		c := ask(t, to)
		began := time.Now()
		in := bufio.NewReader(c)
		r, err := http.ReadResponse(in, nil)
		if err != nil || time.Since(began) > 300*time.Millisecond {
			t.Errorf("the head came after %s (%v)", time.Since(began), err)
		}
		_, _ = io.ReadAll(r.Body)
		none(t)
	})
	t.Run("the client aborts", func(t *testing.T) {
		long, at := start(t, config.Proxy{Idle: time.Hour})
		closed := make(chan struct{})
		to := listen(t, "127.0.0.1", func(c *net.TCPConn) {
			_, _ = io.Copy(io.Discard, c)
			close(closed)
		})
		c := dial(t, at)
		fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", to)
		within(t, "it is asked", func() bool { return len(long.Flows()) == 1 })
		_ = c.SetLinger(0)
		c.Close()
		select {
		case <-closed:
		case <-time.After(patience):
			t.Error("the target still waits")
		}
	})
	t.Run("behind a CONNECT that failed", func(t *testing.T) {
		web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { t.Error("what was for the tunnel was asked for") }))
		defer web.Close()
		c := dial(t, at)
		fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\nGET %s/ HTTP/1.1\r\nHost: x\r\n\r\n", closedPort(t), web.URL)
		b, _ := io.ReadAll(c)
		if n := strings.Count(string(b), "HTTP/1.1 "); n != 1 {
			t.Errorf("%d answers: %s", n, b)
		}
	})
	t.Run("who is not let in", func(t *testing.T) {
		c := withUsers(t)
		c.Handshake = 300 * time.Millisecond
		_, at := start(t, c)
		for _, text := range []string{
			"GET http://x.test/ HTTP/1.1\r\nHost: x\r\n\r\n", "POST http://x.test/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", "GET http",
		} {
			c := dial(t, at)
			c.say(text)
			began := time.Now()
			if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("after %q it is still there after %s", text, time.Since(began))
			}
		}
	})
	t.Run("long names", func(t *testing.T) {
		c := dial(t, at)
		fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", strings.Repeat("x", 5000))
		if b, _ := io.ReadAll(c); !bytes.Contains(b, []byte(" 400 ")) {
			t.Errorf("heard %s", b)
		}
	})
}

// What a request says of its path and of those before us goes through as it is.
func TestHTTPIsNotRewritten(t *testing.T) {
	t.Parallel()
	_, at := start(t, config.Proxy{})
	to := listen(t, "127.0.0.1", func(c *net.TCPConn) {
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", n, b[:n])
	})
	for _, c := range []struct{ request, line string }{
		{"GET http://%s/a|b/[c]^?x=\"1\"&y HTTP/1.1", "GET /a|b/[c]^?x=\"1\"&y HTTP/1.1"},
		{"GET http://%s HTTP/1.1", "GET / HTTP/1.1"},
		{"GET http://%s/%%2f%%7e HTTP/1.1", "GET /%2f%7e HTTP/1.1"},
		{"OPTIONS http://%s HTTP/1.1", "OPTIONS * HTTP/1.1"},
	} {
		conn := dial(t, at)
		fmt.Fprintf(conn, c.request+"\r\nHost: other\r\nX-Forwarded-For: 192.0.2.1\r\nMax-Forwards: 3\r\nProxy-Connection: close\r\n\r\n", to)
		r, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(r.Body)
		for _, want := range []string{c.line + "\r\n", "Host: " + to.String() + "\r\n", "X-Forwarded-For: 192.0.2.1\r\n", "Via: 1.1 pentad\r\n"} {
			if !strings.Contains(string(b), want) {
				t.Errorf("%s: no %q in %s", c.request, want, b)
			}
		}
		if r.Header.Get("Via") != via || strings.Contains(string(b), "Proxy-Connection") {
			t.Errorf("%s: %v, %s", c.request, r.Header, b)
		}
	}
	c := dial(t, at)
	fmt.Fprintf(c, "OPTIONS http://%s/ HTTP/1.1\r\nHost: x\r\nMax-Forwards: 0\r\nConnection: close\r\n\r\n", to)
	if b, _ := io.ReadAll(c); !bytes.Contains(b, []byte("Allow: CONNECT")) {
		t.Errorf("for the last proxy: %s", b)
	}
}

// Names that nobody answers for cost an association little.
func TestNameFlood(t *testing.T) {
	t.Parallel()
	_, at := start(t, config.Proxy{})
	c := asked(t, at, 5, 3, 0, nowhere)
	relayAt := c.bound()
	u := udp(t, "127.0.0.1:0")
	before := runtime.NumGoroutine()
	for i := range 2000 {
		u.send(relayAt, 0, 0, 0, named("slow.test", 80), make([]byte, 1000))
		u.send(relayAt, 0, 0, 0, named(fmt.Sprintf("slow.test.%d", i), 80))
	}
	to, _ := udpEcho(t, "127.0.0.1:0")
	within(t, "others are relayed", func() bool {
		u.send(relayAt, 0, 0, 0, to, "hello")
		_ = u.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err := u.Read(make([]byte, 100))
		return err == nil
	})
	if n := runtime.NumGoroutine() - before; n > 200 {
		t.Errorf("%d goroutines more", n)
	}
}

// The first address of a name that a datagram may go to.
func TestDatagramsOfSeveralAddresses(t *testing.T) {
	t.Parallel()
	p, at := start(t, config.Proxy{Rules: []config.ProxyRule{
		{Destinations: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}, Via: []string{config.Refuse}}, {Via: []string{config.Direct}},
	}})
	to, _ := udpEcho(t, "127.0.0.1:0")
	p.resolve = func(context.Context, target) ([]netip.AddrPort, error) {
		return []netip.AddrPort{netip.MustParseAddrPort("224.0.0.1:1"), netip.MustParseAddrPort("127.0.0.2:1"), netip.MustParseAddrPort("127.0.0.1:1")}, nil
	}
	c := asked(t, at, 5, 3, 0, nowhere)
	u := udp(t, "127.0.0.1:0")
	u.send(c.bound(), 0, 0, 0, named("three.test", to.Port()), "hello")
	u.hear(0, 0, 0, to, "hello")
}

// BIND: who has said something and goes is noticed, too.
func TestBindIsWatched(t *testing.T) {
	t.Parallel()
	p, at := start(t, config.Proxy{})
	c := asked(t, at, 5, 2, 0, netip.MustParseAddrPort("127.0.0.1:21"), "early")
	c.take(10)
	c.Close()
	within(t, "it is over", func() bool { return len(p.Flows()) == 0 })
}

// An abort stays one, also through TLS: what was cut off must not look complete.
func TestAbortThroughTLS(t *testing.T) {
	t.Parallel()
	web := httptest.NewUnstartedServer(nil)
	web.StartTLS()
	defer web.Close()
	config := web.TLS.Clone()
	ended := make(chan error, 1)
	server := listen(t, "127.0.0.1", func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, tls.Server(c, config))
		ended <- err
	})
	c, err := net.Dial("tcp", server.String())
	if err != nil {
		t.Fatal(err)
	}
	secure := tls.Client(c, &tls.Config{InsecureSkipVerify: true})
	if _, err := secure.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	relay.Abort(secure)
	if err := <-ended; err == nil {
		t.Error("the other end believes that all was said")
	}
}

// An idle listener takes no place.
func TestSeveralListeners(t *testing.T) {
	t.Parallel()
	p, _ := start(t, config.Proxy{Listen: []netip.AddrPort{loopback, netip.MustParseAddrPort("127.0.0.2:0")}, MaxConnections: 1, MaxPerClient: 1})
	to := listen(t, "127.0.0.1", echo)
	for _, l := range p.servers["test"].listeners {
		c := asked(t, l.Addr().String(), 5, 1, 0, to)
		c.take(10)
		_ = c.CloseWrite()
		c.ended()
		within(t, "it is over", func() bool { return len(p.Flows()) == 0 })
	}
}

// The file of users.
func TestUsersFile(t *testing.T) {
	t.Parallel()
	hash := func(password string, cost int) string {
		h, err := bcrypt.GenerateFromPassword([]byte(password), cost)
		if err != nil {
			t.Fatal(err)
		}
		return string(h)
	}
	path := filepath.Join(t.TempDir(), "users")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		next := path + ".next"
		if err := os.WriteFile(next, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Chmod(next, mode), os.Rename(next, path)); err != nil {
			t.Fatal(err)
		}
	}
	u := newUsers(path)
	check := func(user, password string) string {
		u.looked = time.Time{} // now, and not within a second
		ok, err := u.check(t.Context(), user, password)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprint(ok)
	}
	salt := []byte("somesalt")
	argon := "$argon2id$v=19$m=64,t=1,p=1$" + base64.RawStdEncoding.EncodeToString(salt) + "$" +
		base64.RawStdEncoding.EncodeToString(argon2.IDKey([]byte("hunter2"), salt, 1, 64, 1, 32))
	cheap, costly := hash("hunter2", bcrypt.MinCost), hash("hunter3", bcrypt.MinCost+1)
	write("alice:"+cheap+"\nadmin:"+costly+"\n", 0o600)
	for _, c := range []struct{ user, password, want string }{
		{"alice", "hunter2", "true"}, {"alice", "hunter2", "true"}, {"alice", "hunter3", "false"}, {"admin", "hunter3", "true"}, {"nobody", "hunter3", "false"}, {"", "", "false"},
	} {
		if have := check(c.user, c.password); have != c.want {
			t.Errorf("%s with %s: %s, want %s", c.user, c.password, have, c.want)
		}
	}
	if u.costly != costly {
		t.Error("for strangers not the hash that takes longest is computed")
	}
	for _, c := range []struct{ what, text, want string }{
		{"another password", "alice:" + hash("other", bcrypt.MinCost), "false"},
		{"no hash", "alice:hunter2", "line 1 is not USER:HASH"},
		{"too costly", "alice:$2a$31$2g1ZtKRnkXhJ7hCjW7pzGOzFQvJjQ1PBY3qYQd1Hi2dYkqFC7v0mS", "line 1 is not USER:HASH"},
		{"too long", "# " + strings.Repeat("x", 1<<17) + "\nalice:" + cheap, "line 1"},
		{"argon2id of too much", "alice:" + strings.Replace(argon, "m=64", "m=99999999", 1), "line 1 is not USER:HASH"},
		{"argon2id", "alice:" + argon, "true"},
		{"argon2id of another", "alice:" + strings.Replace(argon, "t=1", "t=2", 1), "false"},
		{"the old one", "alice:" + cheap, "true"},
	} {
		write(c.text, 0o600)
		if have := check("alice", "hunter2"); !strings.Contains(have, c.want) {
			t.Errorf("%s: %s, want %s", c.what, have, c.want)
		}
	}
	write("alice:"+cheap, 0o666)
	if have := check("alice", "hunter2"); !strings.Contains(have, "others than its owner can write it") {
		t.Errorf("a file that everybody may write: %s", have)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if have := check("alice", "hunter2"); !strings.Contains(have, syscall.ENOENT.Error()) {
		t.Errorf("a file that is gone: %s", have)
	}
}
