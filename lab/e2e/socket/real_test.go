package socket_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
)

// Clients and servers that nobody here wrote, through VIPs that lie on no
// interface.

func TestCurlAndNginx(t *testing.T) {
	t.Parallel()
	lab.Need(t, "curl", "nginx")
	w := newWorld(t, "10.0.0.1", "2001:db8::1")
	startNginx(w, "10.0.0.1:8080", "[2001:db8::1]:8080")
	w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80, "[2001:db8:f::10]:80"]
  backends: [10.0.0.1:8080, "[2001:db8::1]:8080"]`)

	for _, url := range []string{"http://192.0.2.10/", "http://[2001:db8:f::10]/"} {
		out := w.Must("curl", "-sS", "-v", "--max-time", "5", "--write-out", "\npeer=%{remote_ip}\n", url)
		ip := strings.Trim(url[len("http://"):len(url)-1], "[]")
		if !strings.Contains(out, "peer="+ip+"\n") || !strings.Contains(out, "hello from nginx") {
			t.Errorf("curl %s:\n%s", url, out)
		}
	}
	// A destination that is no listener is not touched: here, no route.
	if out, err := w.Inside("curl", "-sS", "--max-time", "5", "http://192.0.2.11/"); err == nil || !strings.Contains(out, "(7)") {
		t.Errorf("curl to no VIP: %v: %s", err, out)
	}
	// The same for a process outside the scope.
	if out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "curl", "-sS", "--max-time", "5", "http://192.0.2.10/"); err == nil {
		t.Errorf("curl outside the scope reached the VIP: %s", out)
	}
}

// startNginx serves "hello from nginx" on the addresses.
func startNginx(w *world, addresses ...string) {
	w.T.Helper()
	listen := ""
	for _, a := range addresses {
		listen += "listen " + a + ";"
	}
	conf, err := w.WriteFile("nginx.conf", fmt.Sprintf(`daemon off; pid %[1]s/nginx.pid; error_log stderr; worker_processes 1;
events { worker_connections 4096; }
http { access_log off; client_body_temp_path %[1]s/t1; proxy_temp_path %[1]s/t2; fastcgi_temp_path %[1]s/t3; uwsgi_temp_path %[1]s/t4; scgi_temp_path %[1]s/t5;
server { %[2]s location / { return 200 "hello from nginx\n"; } } }`, w.Dir, listen))
	if err != nil {
		w.T.Fatal(err)
	}
	if _, err := w.Start(exec.Command("nginx", "-c", conf, "-e", "stderr"), lab.Outside); err != nil {
		w.T.Fatal(err)
	}
	w.Listening(addresses[0])
}

func TestRedis(t *testing.T) {
	t.Parallel()
	lab.Need(t, "redis-server", "redis-cli")
	w := newWorld(t, "10.0.0.1")
	if _, err := w.Start(exec.Command("redis-server", "--bind", "10.0.0.1", "--port", "6379", "--save", "", "--protected-mode", "no"), lab.Outside); err != nil {
		t.Fatal(err)
	}
	w.Listening("10.0.0.1:6379")
	w.RunAgent(`services:
- name: cache
  listen: [192.0.2.20:6379]
  backends: [10.0.0.1:6379]`)
	if out := w.Must("redis-cli", "-h", "192.0.2.20", "SET", "key", "value"); !strings.Contains(out, "OK") {
		t.Errorf("SET: %s", out)
	}
	if out := w.Must("redis-cli", "-h", "192.0.2.20", "GET", "key"); !strings.Contains(out, "value") {
		t.Errorf("GET: %s", out)
	}
}

func TestPostgreSQL(t *testing.T) {
	t.Parallel()
	lab.Need(t, "psql", "runuser")
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(bins) == 0 {
		lab.Need(t, "initdb")
	}
	w := newWorld(t, "10.0.0.1")
	data := filepath.Join(w.Dir, "data")
	if err := os.Mkdir(data, 0o777); err != nil {
		t.Fatal(err)
	}
	// The umask may have taken what postgres needs.
	if err := os.Chmod(data, 0o777); err != nil {
		t.Fatal(err)
	}
	data = filepath.Join(data, "pg")
	bin := bins[len(bins)-1]
	if out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "runuser", "-u", "postgres", "--", bin+"/initdb", "-D", data, "-A", "trust", "--no-sync"); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	hba := filepath.Join(data, "pg_hba.conf")
	if err := os.WriteFile(hba, []byte("host all all all trust\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.StartServer(exec.Command("runuser", "-u", "postgres", "--", bin+"/postgres", "-D", data, "-h", "10.0.0.1", "-k", "", "-F"), "ready to accept connections")
	w.RunAgent(`services:
- name: orders-db
  listen: [192.0.2.30:5432]
  backends: [10.0.0.1:5432]`)
	out := w.Must("psql", "-h", "192.0.2.30", "-U", "postgres", "-Atc", "select 6*7, inet_server_addr()")
	if strings.TrimSpace(out) != "42|10.0.0.1" {
		t.Errorf("psql: %s", out)
	}
	// libpq shows the address that it connected to.
	out = w.Must("psql", "-h", "192.0.2.30", "-U", "postgres", "-c", `\conninfo`)
	if !strings.Contains(out, `host "192.0.2.30"`) {
		t.Errorf("conninfo: %s", out)
	}
}

// startDNS serves one name with an A and an AAAA record.
func startDNS(w *world, address string) {
	w.T.Helper()
	w.StartServer(exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--log-facility=-", "--user=root",
		"--pid-file=", "--bind-interfaces", "--listen-address="+address, "--host-record=both.example,198.51.100.7,2001:db8::7"), "started")
}

// The glibc resolver sends A and AAAA on one socket at once. Both must arrive,
// always, and at once: a lost one costs 5 seconds.
func TestGetaddrinfo(t *testing.T) {
	t.Parallel()
	lab.Need(t, "dnsmasq", "python3", "unshare")
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "2001:db8::1")
	startDNS(w, "10.0.0.1")
	startDNS(w, "10.0.0.2")
	startDNS(w, "2001:db8::1")
	w.RunAgent(`services:
- name: dns
  listen: [192.0.2.53:53/udp, 192.0.2.53:53, "[2001:db8:f::53]:53/udp"]
  backends: [10.0.0.1:53, 10.0.0.2:53, "[2001:db8::1]:53"]`)
	for _, server := range []string{"192.0.2.53", "2001:db8:f::53"} {
		for _, options := range []string{"timeout:5 attempts:1", "timeout:5 attempts:1 single-request"} {
			conf, err := w.WriteFile("resolv.conf", "nameserver "+server+"\noptions "+options+"\n")
			if err != nil {
				t.Fatal(err)
			}
			// A mount namespace of its own: nobody else sees this resolv.conf.
			out := w.Must("unshare", "-m", "sh", "-c", "mount --bind "+conf+" /etc/resolv.conf && exec python3 -c '"+`
import socket, time
slowest = 0
for i in range(300):
    began = time.monotonic()
    found = {a[4][0] for a in socket.getaddrinfo("both.example", 80, type=socket.SOCK_STREAM)}
    slowest = max(slowest, time.monotonic() - began)
    assert found == {"198.51.100.7", "2001:db8::7"}, found
assert slowest < 5, slowest
print("all resolved")'`)
			if !strings.Contains(out, "all resolved") {
				t.Errorf("server %s, %s: %s", server, options, out)
			}
		}
	}
}

// Java's sockets are IPv6 sockets that use IPv4-mapped addresses.
func TestJava(t *testing.T) {
	t.Parallel()
	lab.Need(t, "java")
	w := newWorld(t, "10.0.0.1")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent(`services:
- name: app
  listen: [192.0.2.40:7, 192.0.2.40:7/udp]
  backends: [10.0.0.1:7000]`)
	source, err := w.WriteFile("Client.java", `
import java.io.*; import java.net.*;
public class Client {
    public static void main(String[] a) throws Exception {
        try (Socket s = new Socket("192.0.2.40", 7)) {
            String who = new BufferedReader(new InputStreamReader(s.getInputStream())).readLine();
            System.out.println("tcp " + who + " " + s.getRemoteSocketAddress());
        }
        try (DatagramSocket s = new DatagramSocket()) {
            s.setSoTimeout(5000);
            byte[] b = "hi".getBytes();
            s.send(new DatagramPacket(b, b.length, InetAddress.getByName("192.0.2.40"), 7));
            DatagramPacket p = new DatagramPacket(new byte[100], 100);
            s.receive(p);
            System.out.println("udp " + new String(p.getData(), 0, p.getLength()) + " " + p.getSocketAddress());
        }
    }
}`)
	if err != nil {
		t.Fatal(err)
	}
	out := w.Must("java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", source)
	for _, want := range []string{"tcp one /192.0.2.40:7", "udp one hi /192.0.2.40:7"} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in:\n%s", want, out)
		}
	}
}

func TestPython(t *testing.T) {
	t.Parallel()
	lab.Need(t, "python3")
	w := newWorld(t, "10.0.0.1", "2001:db8::1")
	w.Serve("one", "10.0.0.1:7000", "[2001:db8::1]:7000")
	w.RunAgent(`services:
- name: app
  listen: [192.0.2.40:7, "[2001:db8:f::40]:7"]
  backends: [10.0.0.1:7000, "[2001:db8::1]:7000"]`)
	out := w.Must("python3", "-c", `
import asyncio, socket
for vip in ("192.0.2.40", "2001:db8:f::40", "::ffff:192.0.2.40"):
    s = socket.create_connection((vip, 7), timeout=5)
    assert s.getpeername()[:2] == (vip, 7), s.getpeername()
    assert s.recv(10) == b"one\n"
async def main():
    reader, writer = await asyncio.open_connection("192.0.2.40", 7)
    assert writer.get_extra_info("peername") == ("192.0.2.40", 7)
    assert await reader.readline() == b"one\n"
asyncio.run(main())
print("fine")`)
	if !strings.Contains(out, "fine") {
		t.Error(out)
	}
}

// A static program has no libc that something could have been preloaded into.
func TestStaticGo(t *testing.T) {
	t.Parallel()
	lab.Need(t, "go")
	w := newWorld(t, "10.0.0.1")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent(`services:
- name: app
  listen: [192.0.2.40:7]
  backends: [10.0.0.1:7000]`)
	source, err := w.WriteFile("main.go", `package main
import ("bufio"; "fmt"; "net")
func main() {
	c, err := net.Dial("tcp", "192.0.2.40:7")
	if err != nil { panic(err) }
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil { panic(err) }
	fmt.Print(c.RemoteAddr(), " ", line)
}`)
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(w.Dir, "client")
	build := exec.Command("go", "build", "-o", bin, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out := w.Must(bin); strings.TrimSpace(out) != "192.0.2.40:7 one" {
		t.Error(out)
	}
}

func TestWrk(t *testing.T) {
	t.Parallel()
	lab.Need(t, "wrk", "nginx")
	w := newWorld(t, "10.0.0.1")
	startNginx(w, "10.0.0.1:8080")
	w.RunAgent(`services:
- name: web
  listen: [192.0.2.10:80]
  backends: [10.0.0.1:8080]`)
	for _, header := range []string{"X-Mode: keep-alive", "Connection: close"} {
		out := w.Must("wrk", "-t1", "-c16", "-d1s", "-H", header, "http://192.0.2.10/")
		if !regexp.MustCompile(`[1-9]\d* requests in`).MatchString(out) || strings.Contains(out, "Socket errors") || strings.Contains(out, "Non-2xx") {
			t.Errorf("%s:\n%s", header, out)
		}
	}
}
