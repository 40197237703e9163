package guard

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"
)

func start(t *testing.T, most int, h http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := NewLimit(most).Server(h)
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

func ask(t *testing.T, addr, host string) (net.Conn, int) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	return c, r.StatusCode
}

func fine(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "fine") }

// Who holds connections and asks for nothing makes room for who asks.
func TestIdleMakeRoom(t *testing.T) {
	addr := start(t, 4, http.HandlerFunc(fine))
	first, _ := ask(t, addr, "localhost")
	for range 20 {
		if _, code := ask(t, addr, "localhost"); code != http.StatusOK {
			t.Fatalf("status %d", code)
		}
	}
	if n, err := first.Read(make([]byte, 1)); err != io.EOF && err == nil {
		t.Errorf("the first idle connection is still open: %d, %v", n, err)
	}
}

// Who waits for an answer is not closed for one that has just come.
func TestAskingStay(t *testing.T) {
	go1, asked := make(chan struct{}), make(chan struct{}, 8)
	addr := start(t, 2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-go1
		fine(w, r)
	}))
	codes := make(chan int, 2)
	for range 2 {
		go func() {
			r, err := http.Get("http://" + addr)
			if err != nil {
				codes <- 0
				return
			}
			r.Body.Close()
			codes <- r.StatusCode
		}()
		<-asked
	}
	for range 10 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
			t.Fatalf("a connection over the bound: %v", err)
		}
	}
	close(go1)
	for range 2 {
		if code := <-codes; code != http.StatusOK {
			t.Errorf("status %d", code)
		}
	}
}

func TestLocal(t *testing.T) {
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(Local(http.HandlerFunc(fine)))
	defer s.Close()
	for host, want := range map[string]int{
		"127.0.0.1:9464": 200, "[::1]:9464": 200, "localhost": 200, "LOCALHOST:1": 200, name: 200, "10.1.2.3": 200,
		"evil.example": 421, "evil.example:9464": 421, "127.0.0.1.evil.example": 421, "localhost.evil.example": 421,
	} {
		if _, code := ask(t, s.Listener.Addr().String(), host); code != want {
			t.Errorf("Host %s: %d, want %d", host, code, want)
		}
	}
}
