package proxy_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
)

var clients = map[string]actor.Role{"late reply": lateReply, "udp echo": udpEcho, "visit": visit, "fire": fire, "hear": hear, "hear datagrams": hearDatagrams, "ask at once": askAtOnce}

// lateReply serves at an address: it answers a connection when the other side has ended
// its sending, with what it has heard.
func lateReply(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			b, err := io.ReadAll(c)
			if err == nil {
				_, _ = c.Write(append([]byte("heard "), b...))
			}
		}()
	}
}

// fire makes connections, one after the other, each of which says something and ends at
// once.
func fire(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	for range n {
		c, err := net.Dial("tcp", args[0])
		if err != nil {
			return err
		}
		_, err = io.WriteString(c, "x")
		if err = errors.Join(err, c.Close()); err != nil {
			return err
		}
	}
	return nil
}

// hear prints what each connection says, a line each.
func hear(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			b, _ := io.ReadAll(c)
			fmt.Printf("heard %s\n", b)
		}()
	}
}

// hearDatagrams prints a line for each datagram.
func hearDatagrams(args []string) error {
	c, err := net.ListenPacket("udp4", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	b := make([]byte, 1500)
	for {
		if _, _, err := c.ReadFrom(b); err != nil {
			return err
		}
		fmt.Println("heard one")
	}
}

// askAtOnce asks a server that repeats by many sockets at once, each something else, and
// prints how many got answers of others.
func askAtOnce(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	sockets := make([]net.Conn, n)
	for i := range sockets {
		if sockets[i], err = net.Dial("udp", args[0]); err != nil {
			return err
		}
	}
	answered, wrong := make(map[int]bool), 0
	b := make([]byte, 100)
	// A datagram may be lost where many are: it is sent again, as a resolver does.
	for began := time.Now(); len(answered) < n && time.Since(began) < 15*time.Second; {
		for i, c := range sockets {
			if _, err := fmt.Fprint(c, i); err != nil && !answered[i] {
				return err
			}
		}
		deadline := time.Now().Add(time.Second)
		for i, c := range sockets {
			_ = c.SetReadDeadline(deadline)
			n, err := c.Read(b)
			if err != nil {
				continue
			}
			answered[i] = true
			if string(b[:n]) != fmt.Sprintf("heard %d", i) {
				wrong++
			}
		}
	}
	fmt.Printf("%d answered, %d wrong", len(answered), wrong)
	return nil
}

// visit asks a server for a page by a socket of a kind, and says what it got of whom.
func visit(args []string) error {
	kind, to := args[0], args[1]
	network := "tcp"
	d := net.Dialer{}
	d.SetMultipathTCP(kind == "mptcp")
	switch kind {
	case "tcp4", "tcp6":
		network = kind
	case "mapped":
		return visitMapped(to)
	case "again":
		// A connection that has ended leaves nothing for the next.
		c, err := d.Dial(network, to)
		if err != nil {
			return err
		}
		c.Close()
	}
	c, err := d.Dial(network, to)
	if err != nil {
		return err
	}
	return ask(c)
}

// visitMapped is of an IPv6 socket that connects to an address of IPv4.
func visitMapped(to string) error {
	at := netip.MustParseAddrPort(to)
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}); err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return err
	}
	return ask(c)
}

func ask(c net.Conn) error {
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	_, page, _ := strings.Cut(string(b), "\r\n\r\n")
	fmt.Printf("%s of %s", page, c.RemoteAddr())
	return nil
}

func udpEcho(args []string) error {
	c, err := net.ListenPacket("udp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	b := make([]byte, 70_000)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(append([]byte("heard "), b[:n]...), from); err != nil {
			return err
		}
	}
}

const proxies = `services: []
proxies:
- {name: open, protocol: [socks5, http], listen: ['0.0.0.0:1080', '[2001:db8::1]:1080'], allow: [10.0.0.0/8, '2001:db8::/32', 192.0.2.0/24],
   rules: [{destinations: [203.0.113.0/24], via: direct}, {via: direct}]} # addresses of this host, which others are not to reach otherwise
- name: locked
  protocol: [socks5, http]
  listen: 10.0.0.1:1081
  users: {file: users}
- {name: redirected, protocol: transparent, listen: '10.0.0.1:15001', open: true}
`

// start makes a host with proxies, and servers that clients want to reach.
func start(t *testing.T) *world {
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "203.0.113.9", "2001:db8::1", "2001:db8::9")
	path, err := w.WriteFile("users", hashOf(t, "alice", "hunter2"))
	if err != nil {
		t.Fatal(err)
	}
	w.RunAgent(strings.Replace(proxies, "file: users", "file: "+path, 1))
	w.ServeWeb("203.0.113.9:80", "hello over IPv4")
	w.ServeWeb("[2001:db8::9]:80", "hello over IPv6")
	w.StartServer(actor.Command("late reply", "203.0.113.9:7000"), "ready")
	w.StartServer(actor.Command("udp echo", "203.0.113.9:7001"), "ready")
	return w
}

// Programs that speak SOCKS5 or HTTP get to their targets.
func TestClients(t *testing.T) {
	t.Parallel()
	lab.Need(t, "curl", "ncat", "proxychains4", "nginx")
	w := start(t)
	curl := func(args ...string) string {
		out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "curl", append([]string{"-sS", "--max-time", "10"}, args...)...)
		if err != nil {
			return fmt.Sprintf("%v: %s", err, out)
		}
		return out
	}
	const four, six = "http://203.0.113.9/", "http://[2001:db8::9]/"
	for _, c := range []struct {
		want string
		args []string
	}{
		{"hello over IPv4", []string{"--socks5", "10.0.0.1:1080", four}},
		{"hello over IPv4", []string{"--socks5-hostname", "10.0.0.1:1080", four}},
		{"hello over IPv6", []string{"--socks5", "10.0.0.1:1080", six}},
		{"hello over IPv6", []string{"--socks5", "[2001:db8::1]:1080", six}},
		{"hello over IPv4", []string{"--proxy", "http://10.0.0.1:1080", four}},
		{"hello over IPv6", []string{"--proxy", "http://10.0.0.1:1080", six}},
		{"hello over IPv4", []string{"--proxy", "http://10.0.0.1:1080", "--proxytunnel", four}},
		{"hello over IPv4", []string{"--socks5", "alice:hunter2@10.0.0.1:1081", four}},
		{"hello over IPv4", []string{"--proxy", "http://alice:hunter2@10.0.0.1:1081", four}},
		{"hello over IPv4", []string{"--proxy", "socks5h://alice:hunter2@10.0.0.1:1081", four}},
		{"97", []string{"--socks5", "alice:hunter3@10.0.0.1:1081", four}},
		{"97", []string{"--socks5", "10.0.0.1:1081", four}},
		{"who you are", []string{"--proxy", "http://10.0.0.1:1081", four}},
		{"(5)", []string{"--socks5", "10.0.0.1:1080", "http://203.0.113.9:81/"}},
		{"connection refused", []string{"--proxy", "http://10.0.0.1:1080", "http://203.0.113.9:81/"}},
		{"SOCKS4", []string{"--socks4", "10.0.0.1:1080", four}},
	} {
		if out := curl(c.args...); !strings.Contains(out, c.want) {
			t.Errorf("curl %s says %q, want %q", strings.Join(c.args, " "), out, c.want)
		}
	}
	for _, args := range [][]string{
		{"ncat", "--proxy-type", "socks5", "--proxy", "10.0.0.1:1080", "203.0.113.9", "7000"},
		{"ncat", "--proxy-type", "http", "--proxy", "10.0.0.1:1080", "203.0.113.9", "7000"},
		{"ncat", "--proxy-type", "socks5", "--proxy", "10.0.0.1:1081", "--proxy-auth", "alice:hunter2", "203.0.113.9", "7000"},
	} {
		if out := w.pipe(t, "a question", args...); out != "heard a question" {
			t.Errorf("%s says %q", strings.Join(args, " "), out)
		}
	}
	config, err := w.WriteFile("proxychains.conf", "strict_chain\n[ProxyList]\nsocks5 10.0.0.1 1080\nhttp 10.0.0.1 1081 alice hunter2\n")
	if err != nil {
		t.Fatal(err)
	}
	if out := w.pipe(t, "through two", "proxychains4", "-q", "-f", config, "ncat", "203.0.113.9", "7000"); out != "heard through two" {
		t.Errorf("proxychains4 says %q", out)
	}
	if out := w.MustPentad("proxy", "list"); !strings.Contains(out, "locked") || !strings.Contains(out, "10.0.0.1:1081") {
		t.Errorf("proxy list says %s", out)
	}
	metrics := w.Get("/metrics")
	if !strings.Contains(metrics, `pentad_proxy_connections_total{proxy="locked"}`) || strings.Contains(metrics, `pentad_proxy_bytes_total{direction="received",proxy="open"} 0`) {
		t.Errorf("the metrics say %s", metrics)
	}
	if strings.Contains(w.Agent.Log.String(), "hunter") {
		t.Error("the log shows a password")
	}
}

// pipe runs a client with something to say and returns what it has heard. When its input
// ends the client ends its sending, and waits for the answer.
func (w *world) pipe(t *testing.T, say string, args ...string) string {
	t.Helper()
	return w.pipeFrom(t, w.Host, say, args...)
}

func (w *world) pipeFrom(t *testing.T, at *lab.Host, say string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = bytes.NewBufferString(say)
	p, err := at.Start(cmd, lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Errorf("%s: %v", strings.Join(args, " "), err)
	}
	return p.Log.String()
}

// libdsocks has any program use CONNECT and UDP ASSOCIATE. It runs on a host that has no
// other way to the targets.
func TestDante(t *testing.T) {
	t.Parallel()
	lab.Need(t, "socksify", "ncat", "python3", "nginx")
	w := start(t)
	there := w.another()
	if _, _, err := lab.Wire(w.Host, []string{"192.0.2.1/24"}, there, []string{"192.0.2.2/24"}); err != nil {
		t.Fatal(err)
	}
	config, err := w.WriteFile("socks.conf", "logoutput: stderr\nroute { from: 0.0.0.0/0 to: 0.0.0.0/0 via: 192.0.2.1 port = 1080\n protocol: tcp udp\n proxyprotocol: socks_v5\n command: connect udpassociate\n method: none }\n")
	if err != nil {
		t.Fatal(err)
	}
	const datagram = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)\n" +
		"s.sendto(b'a question', ('203.0.113.9', 7001)); print(*s.recvfrom(100))"
	for _, c := range []struct {
		what, want string
		args       []string
	}{
		{"TCP", "heard a question", []string{"ncat", "203.0.113.9", "7000"}},
		{"UDP", "b'heard a question' ('203.0.113.9', 7001)", []string{"python3", "-c", datagram}},
	} {
		if out := w.pipeFrom(t, there, "a question", append([]string{"env", "SOCKS_CONF=" + config, "socksify"}, c.args...)...); !strings.Contains(out, c.want) {
			t.Errorf("over %s it says %q", c.what, out)
		}
	}
}

// Servers of others are upstreams of ours.
func TestUpstreams(t *testing.T) {
	t.Parallel()
	lab.Need(t, "danted", "microsocks", "curl", "nginx")
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3", "203.0.113.9")
	w.ServeWeb("203.0.113.9:80", "hello")
	dante, err := w.WriteFile("danted.conf", "logoutput: stderr\ninternal: 10.0.0.2 port = 1080\nexternal: 10.0.0.2\nsocksmethod: none\nclientmethod: none\nuser.privileged: root\nuser.unprivileged: nobody\n"+
		"client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\nsocks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"danted", "-f", dante}, {"microsocks", "-i", "10.0.0.3", "-p", "1080", "-u", "alice", "-P", "hunter2"}} {
		if _, err := w.Start(exec.Command(args[0], args[1:]...), lab.Outside); err != nil {
			t.Fatal(err)
		}
	}
	w.Listening("10.0.0.2:1080")
	w.Listening("10.0.0.3:1080")
	password := w.Password()
	if err := os.Chmod(password, 0o600); err != nil {
		t.Fatal(err)
	}
	w.RunAgent(`services: []
proxies:
- {name: dante, protocol: socks5, listen: '10.0.0.1:1', open: true, rules: [{via: dante}]}
- {name: micro, protocol: socks5, listen: '10.0.0.1:2', open: true, rules: [{via: micro}]}
- {name: both, protocol: http, listen: '10.0.0.1:3', open: true, rules: [{via: [dante, micro]}]}
upstreams:
- {name: dante, socks5: {address: '10.0.0.2:1080'}}
- {name: micro, socks5: {address: '10.0.0.3:1080', user: alice, passwordFile: ` + password + `}}
`)
	for _, proxy := range []string{"socks5h://10.0.0.1:1", "socks5h://10.0.0.1:2", "http://10.0.0.1:3"} {
		out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "curl", "-sS", "--max-time", "10", "--proxytunnel", "--proxy", proxy, "http://203.0.113.9/")
		if err != nil || out != "hello" {
			t.Errorf("through %s: %v: %s", proxy, err, out)
		}
	}
	follower, err := w.Start(exec.Command(e2e.Program(), w.Args("flow", "-f", "--proxy", "both")...), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	w.Eventually("the flow is shown", func() error {
		if _, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "curl", "-sS", "--max-time", "10", "--proxytunnel", "--proxy", "http://10.0.0.1:3", "http://203.0.113.9/"); err != nil {
			return err
		}
		if text := follower.Log.String(); !strings.Contains(text, "dante, micro") || !strings.Contains(text, "203.0.113.9:80") {
			return errors.New(text)
		}
		return nil
	})
}

// hashOf is a line of a file of users.
func hashOf(t *testing.T, user, password string) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return user + ":" + string(hash) + "\n"
}
