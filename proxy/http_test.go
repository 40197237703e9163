package proxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/config"
)

// HTTP: CONNECT, and requests with an absolute URI.
func TestHTTP(t *testing.T) {
	t.Parallel()
	plane, at := start(t, config.Proxy{Rules: []config.ProxyRule{
		{Domains: []string{".evil.test"}, Via: []string{config.Refuse}}, {Via: []string{config.Direct}},
	}})
	_, locked := start(t, withUsers(t))
	to := listen(t, "127.0.0.1", echo)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s %q %v", r.Method, r.Host, r.URL, b, r.Header["Proxy-Authorization"])
	}))
	t.Cleanup(web.Close)
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "secret") }))
	t.Cleanup(secure.Close)
	through := func(proxy string, s *httptest.Server) *http.Client {
		u, err := url.Parse(proxy)
		if err != nil {
			t.Fatal(err)
		}
		c := s.Client()
		c.Transport = c.Transport.(*http.Transport).Clone()
		c.Transport.(*http.Transport).Proxy = http.ProxyURL(u)
		return c
	}
	get := func(t *testing.T, c *http.Client, target string) (int, string) {
		t.Helper()
		r, err := c.Get(target)
		if err != nil {
			return 0, err.Error()
		}
		defer c.CloseIdleConnections()
		defer r.Body.Close()
		b, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(b)
	}
	host := strings.TrimPrefix(web.URL, "http://")
	t.Run("a request", func(t *testing.T) {
		if code, text := get(t, through("http://"+at, web), web.URL+"/path?q=1"); code != 200 || text != "GET "+host+" /path?q=1 \"\" []" {
			t.Errorf("%d %s", code, text)
		}
	})
	t.Run("several on one connection", func(t *testing.T) {
		c := dial(t, at)
		in := bufio.NewReader(c)
		for i := range 3 {
			fmt.Fprintf(c, "POST http://%s/%d HTTP/1.1\r\nHost: other.test\r\nContent-Length: 2\r\n\r\nab", host, i)
			r, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(r.Body)
			if want := fmt.Sprintf("POST %s /%d \"ab\" []", host, i); string(b) != want {
				t.Errorf("%s, want %s", b, want)
			}
		}
	})
	t.Run("TLS by CONNECT", func(t *testing.T) {
		if code, text := get(t, through("http://"+at, secure), secure.URL); code != 200 || text != "secret" {
			t.Errorf("%d %s", code, text)
		}
	})
	t.Run("what follows CONNECT is not lost", func(t *testing.T) {
		c := dial(t, at)
		fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\nhello", to, to)
		_ = c.CloseWrite()
		c.hear("HTTP/1.1 200 Connection established\r\n\r\nhello")
		c.ended()
	})
	answers := func(name, request string, want ...string) {
		t.Run(name, func(t *testing.T) {
			c := dial(t, at)
			fmt.Fprint(c, request)
			_ = c.CloseWrite()
			b, _ := io.ReadAll(c)
			for _, text := range want {
				if !strings.Contains(string(b), text) {
					t.Errorf("%q is not in %s", text, b)
				}
			}
		})
	}
	answers("refused by the rules", "CONNECT www.evil.test:443 HTTP/1.1\r\nHost: x\r\n\r\n", "403 Forbidden", "refused by the rules")
	answers("and as a request", "GET http://evil.test/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "403 Forbidden", "refused by the rules")
	answers("nobody there", fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", closedPort(t)), "502 Bad Gateway", "connection refused")
	answers("no such host", "CONNECT nobody.test:80 HTTP/1.1\r\nHost: x\r\n\r\n", "502", "no such host nobody.test")
	answers("no proxy request", "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "400", "this is a proxy")
	answers("no port", "CONNECT here.test HTTP/1.1\r\nHost: x\r\n\r\n", "400")
	t.Run("users", func(t *testing.T) {
		if code, _ := get(t, through("http://"+locked, web), web.URL); code != http.StatusProxyAuthRequired {
			t.Errorf("without a password: %d", code)
		}
		if code, _ := get(t, through("http://alice:wrong@"+locked, web), web.URL); code != http.StatusProxyAuthRequired {
			t.Errorf("with a wrong one: %d", code)
		}
		if code, text := get(t, through("http://alice:hunter2@"+locked, web), web.URL); code != 200 || !strings.HasSuffix(text, "[]") {
			t.Errorf("with the right one: %d %s", code, text)
		}
		if code, text := get(t, through("http://alice:hunter2@"+locked, secure), secure.URL); code != 200 {
			t.Errorf("with the right one, by CONNECT: %d %s", code, text)
		}
	})
	within(t, "no flow is left", func() bool { return len(plane.Flows()) == 0 })
}

// Chains of upstreams: ours are as good as any.
func TestUpstreams(t *testing.T) {
	t.Parallel()
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	to := listen(t, "127.0.0.1", echo)
	far, farAt := start(t, withUsers(t))
	_, nearAt := start(t, config.Proxy{Protocols: []config.ProxyProtocol{config.HTTP}})
	upstreams := []config.Upstream{
		{Name: "near", Protocol: config.HTTP, Address: nearAt},
		{Name: "far", Protocol: config.SOCKS5, Address: farAt, User: "alice", PasswordFile: password},
		{Name: "far-http", Protocol: config.HTTP, Address: farAt, User: "alice", PasswordFile: password},
		{Name: "wrong", Protocol: config.SOCKS5, Address: farAt},
		{Name: "dead", Protocol: config.SOCKS5, Address: closedPort(t).String()},
	}
	via := func(names ...string) string {
		_, at := start(t, config.Proxy{Rules: []config.ProxyRule{{Via: names}}}, upstreams...)
		return at
	}
	for _, names := range [][]string{{"near"}, {"far"}, {"far-http"}, {"near", "far"}, {"far", "near"}} {
		t.Run(strings.Join(names, ", "), func(t *testing.T) {
			c := asked(t, via(names...), 5, 1, 0, named("here.test", to.Port()), "hello")
			_ = c.CloseWrite()
			c.hear(5, 0, 0)
			c.take(7)
			c.hear("hello")
			c.ended()
		})
	}
	if totals, _ := far.Totals(); totals["test"].Connections != 4 {
		t.Errorf("the far one had %d connections, want 4", totals["test"].Connections)
	}
	asked(t, via("wrong"), 5, 1, 0, to).hear(5, 1, 0, nowhere)
	asked(t, via("dead"), 5, 1, 0, to).hear(5, 5, 0, nowhere)
	// One that is the proxy itself would go on without end.
	p, at := start(t, config.Proxy{Rules: []config.ProxyRule{{Via: []string{"self"}}}})
	p.servers["test"].set(p.servers["test"].now.Load().Proxy, map[string]config.Upstream{"self": {Name: "self", Protocol: config.SOCKS5, Address: at}})
	asked(t, at, 5, 1, 0, to).hear(5, 2, 0, nowhere)
	// What the last of a chain answers is what the client is told.
	asked(t, via("near", "far"), 5, 1, 0, closedPort(t)).hear(5, 5, 0, nowhere)
	if err := os.Chmod(password, 0o644); err != nil {
		t.Fatal(err)
	}
	asked(t, via("far"), 5, 1, 0, to).hear(5, 1, 0, nowhere)
}

// The first words of a client that knows of no proxy say which name it means.
func TestSniff(t *testing.T) {
	t.Parallel()
	p, _ := start(t, config.Proxy{})
	server := p.servers["test"]
	sniffed := func(t *testing.T, speak func(net.Conn)) (name string, sent []byte) {
		t.Helper()
		done := make(chan struct{})
		at := listen(t, "127.0.0.1", func(c *net.TCPConn) {
			s := &session{server: server, conn: c, settings: &settings{Proxy: config.Proxy{Rules: []config.ProxyRule{{Domains: []string{".test"}}}}}}
			name, _ = s.sniff()
			b, _ := s.in.Peek(s.in.Buffered())
			sent = append(s.sent, b...)
			close(done)
		})
		c, err := net.Dial("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go speak(c)
		<-done
		return name, sent
	}
	t.Run("TLS", func(t *testing.T) {
		name, sent := sniffed(t, func(c net.Conn) {
			_ = tls.Client(c, &tls.Config{ServerName: "www.corp.test"}).Handshake() // it fails
		})
		if name != "www.corp.test" || len(sent) < 100 || sent[0] != recordHandshake {
			t.Errorf("%q, % x", name, sent[:min(len(sent), 20)])
		}
	})
	t.Run("HTTP", func(t *testing.T) {
		const text = "GET / HTTP/1.1\r\nHost: www.corp.test:8080\r\n\r\nbody"
		if name, sent := sniffed(t, func(c net.Conn) { fmt.Fprint(c, text) }); name != "www.corp.test" || string(sent) != text {
			t.Errorf("%q, %q", name, sent)
		}
	})
	for what, text := range map[string]string{
		"an address": "GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n", "SSH": "SSH-2.0-OpenSSH_9.2\r\n", "nothing": "", "bytes": "\x16\x03\x01\x00\x05hello",
		"a name with blanks": "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
	} {
		t.Run(what, func(t *testing.T) {
			began := time.Now()
			if name, sent := sniffed(t, func(c net.Conn) { fmt.Fprint(c, text) }); name != "" || string(sent) != text || time.Since(began) > patience/2 {
				t.Errorf("%q, %q after %s", name, sent, time.Since(began))
			}
		})
	}
}

// The way of a connection.
func TestChoose(t *testing.T) {
	t.Parallel()
	prefix := netip.MustParsePrefix
	rules := []config.ProxyRule{
		{Users: []string{"bob"}, Via: []string{"for-bob"}},
		{Domains: []string{".corp.example", "one.example"}, Ports: []config.PortRange{{First: 443, Last: 443}, {First: 8000, Last: 8999}}, Via: []string{"corp"}},
		{Clients: []netip.Prefix{prefix("10.0.0.0/8")}, Destinations: []netip.Prefix{prefix("192.0.2.0/24")}, Via: []string{"lab"}},
		{Destinations: []netip.Prefix{prefix("2001:db8::/32")}, Via: []string{config.Direct}},
	}
	for _, c := range []struct {
		client, user, to string
		via              string
		needs            bool
	}{
		{"10.0.0.1", "bob", "any.example:1", "for-bob", false},
		{"10.0.0.1", "", "corp.example:443", "corp", false},
		{"10.0.0.1", "", "WWW.Corp.Example.:8500", "corp", false},
		{"10.0.0.1", "", "one.example:443", "corp", false},
		{"192.0.2.9", "", "www.one.example:443", "", true},
		{"192.0.2.9", "", "notcorp.example:443", "", true},
		{"192.0.2.9", "", "corp.example:80", "", true},
		{"10.0.0.1", "", "192.0.2.7:80", "lab", false},
		{"172.16.0.1", "", "192.0.2.7:80", config.Refuse, false},
		{"172.16.0.1", "", "[2001:db8::1]:80", config.Direct, false},
	} {
		to, err := hostTarget(c.to)
		if err != nil {
			t.Fatal(err)
		}
		a, needs := choose(rules, question{netip.MustParseAddr(c.client), c.user, to})
		via := ""
		if len(a.via) > 0 {
			via = a.via[0]
		}
		if via != c.via || needs != c.needs {
			t.Errorf("%s %s %s goes via %q (needs an address: %v), want %q (%v)", c.client, c.user, c.to, via, needs, c.via, c.needs)
		}
	}
	if a, _ := choose(nil, question{}); a.via[0] != config.Direct {
		t.Errorf("without rules it goes via %v", a.via)
	}
}

// What is only this host's is not for clients of elsewhere.
func TestHostIsNobodyElses(t *testing.T) {
	t.Parallel()
	plane := New(nil)
	plane.local.read = time.Now().Add(time.Hour)
	plane.local.all = map[netip.Addr]bool{netip.MustParseAddr("192.0.2.1"): true, netip.MustParseAddr("10.9.9.9"): true}
	named := answer{rule: 0}
	prefix := netip.MustParsePrefix
	s := &session{server: &server{plane: plane}, settings: &settings{Proxy: config.Proxy{Rules: []config.ProxyRule{
		{Destinations: []netip.Prefix{prefix("127.0.0.0/8"), prefix("169.254.0.0/16"), prefix("10.0.0.0/8")}}, {},
		{Destinations: []netip.Prefix{prefix("0.0.0.0/0"), prefix("::/0")}}, {Destinations: []netip.Prefix{prefix("64.0.0.0/2")}},
	}}}}
	all, most := answer{rule: 2}, answer{rule: 3}
	for _, c := range []struct {
		client, to string
		rule       answer
		may        bool
	}{
		{"192.0.2.7:1", "198.51.100.1:80", answer{rule: -1}, true},
		{"192.0.2.7:1", "127.0.0.1:80", answer{rule: -1}, false},
		{"192.0.2.7:1", "127.0.0.1:80", answer{rule: 1}, false},
		{"192.0.2.7:1", "127.0.0.1:80", named, true},
		{"192.0.2.7:1", "169.254.169.254:80", named, true},
		{"192.0.2.7:1", "127.0.0.1:80", all, false}, // who writes that thinks of others
		{"192.0.2.7:1", "[::1]:80", all, false},
		{"192.0.2.7:1", "169.254.169.254:80", all, false},
		{"192.0.2.7:1", "127.0.0.1:80", most, false},
		{"192.0.2.7:1", "10.9.9.9:80", answer{rule: -1}, false}, // another address of the host
		{"192.0.2.7:1", "10.9.9.9:80", all, false},
		{"192.0.2.7:1", "10.9.9.9:80", named, true},
		{"192.0.2.7:1", "192.0.2.1:80", answer{rule: -1}, false},
		{"192.0.2.7:1", "10.9.9.8:80", answer{rule: -1}, true},
		{"10.9.9.9:1", "169.254.169.254:80", answer{rule: -1}, true}, // a process of the host, led here
		{"192.0.2.7:1", "0.0.0.0:80", answer{rule: -1}, false},
		{"192.0.2.7:1", "[::1]:80", answer{rule: -1}, false},
		{"192.0.2.7:1", "[::]:80", answer{rule: -1}, false},
		{"192.0.2.7:1", "169.254.169.254:80", answer{rule: -1}, false},
		{"127.0.0.1:1", "127.0.0.1:80", answer{rule: -1}, true},
		{"192.0.2.1:1", "127.0.0.1:80", answer{rule: -1}, true},
	} {
		s.client = netip.MustParseAddrPort(c.client)
		to, err := hostTarget(c.to)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.mayReach(to, c.rule); (err == nil) != c.may {
			t.Errorf("%s to %s by rule %d: %v", c.client, c.to, c.rule.rule, err)
		}
	}
}
