package socks5

import (
	"bytes"
	"io"
	"net/netip"
	"testing"
	"time"
)

// conn is both directions of a connection of which everything was said already.
type conn struct {
	io.Reader
	bytes.Buffer
}

func (c *conn) Read(b []byte) (int, error) { return c.Reader.Read(b) }

// Whatever a client says: the server takes no more of it than its messages have, and
// answers something that a client understands.
func FuzzServer(f *testing.F) {
	f.Add([]byte("\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50hello"), false)
	f.Add([]byte("\x05\x02\x00\x02\x01\x05alice\x07hunter2\x05\x03\x00\x03\x04host\x01\xbb"), true)
	f.Add([]byte("\x05\x00"), false)
	f.Add([]byte("\x05\x01\x00\x05\x01\x00\x04"), false)
	f.Fuzz(func(t *testing.T, said []byte, locked bool) {
		in := bytes.NewReader(said)
		c := &conn{Reader: in}
		var check func(user, password string) bool
		if locked {
			check = func(user, password string) bool { return user == "alice" && password == "hunter2" }
		}
		user, err := Greet(c, check)
		if err != nil {
			return
		}
		if locked != (user == "alice") {
			t.Fatalf("user %q came in", user)
		}
		q, err := ReadRequest(c)
		if err != nil {
			return
		}
		if q.Command < Connect || q.Command > Associate || q.Address.Name == "" && !q.Address.IP.IsValid() || q.Address.IP.Is4In6() {
			t.Fatalf("a request for %+v", q)
		}
		// What a client would have said for it is what was read.
		again, err := ReadRequest(bytes.NewReader(appendAddress([]byte{5, byte(q.Command), 0}, q.Address)))
		if err != nil || again != q {
			t.Fatalf("%+v was read back as %+v (%v)", q, again, err)
		}
		if err := WriteReply(c, Succeeded, netip.MustParseAddrPort("192.0.2.1:80")); err != nil {
			t.Fatal(err)
		}
	})
}

// Whatever a server says: the client ends.
func FuzzClient(f *testing.F) {
	f.Add([]byte("\x05\x00\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50"))
	f.Add([]byte("\x05\x02\x01\x00\x05\x05\x00\x03\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, said []byte) {
		c := &conn{Reader: bytes.NewReader(said)}
		at, err := Ask(c, Login{"alice", "hunter2"}, Request{Connect, Address{Name: "host", Port: 80}})
		if err == nil && len(said) < 2+4 {
			t.Fatalf("%x was taken for an answer: %s", said, at)
		}
	})
}

// Whatever a datagram is: what is put together is what was sent, and never more than can
// be.
func FuzzDatagram(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x50hello"), []byte("\x00\x00\x81\x03\x04host\x00\x50hello"))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		var fragments Fragments
		now := time.Now()
		for i, b := range [][]byte{one, two, one, two} {
			d, err := ParseDatagram(b)
			if err != nil {
				continue
			}
			if len(d.Content) > len(b) {
				t.Fatalf("%d bytes of content in %d", len(d.Content), len(b))
			}
			whole, ok := fragments.Add(d, now.Add(time.Duration(i)*time.Second))
			if ok && len(whole.Content) > maxDatagram && d.Fragment != 0 {
				t.Fatalf("%d bytes were put together", len(whole.Content))
			}
			if d.Fragment == 0 && (!ok || !bytes.Equal(whole.Content, d.Content)) {
				t.Fatal("what is whole was not taken as it is")
			}
			head := AppendHeader(nil, d.Address)
			if again, err := ParseDatagram(append(head, d.Content...)); err != nil || again.Address != d.Address || !bytes.Equal(again.Content, d.Content) {
				t.Fatalf("%+v was read back as %+v (%v)", d, again, err)
			}
		}
	})
}
