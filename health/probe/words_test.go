package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/pentad/pentad/service"
)

// People read what happened, not how a program calls it.
func TestWords(t *testing.T) {
	dial := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	for _, c := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{dial(os.NewSyscallError("connect", syscall.ECONNREFUSED)), "connection refused"},
		{&url.Error{Op: "Get", URL: "http://10.0.0.1:7002/", Err: context.DeadlineExceeded}, "no answer in time"},
		{fmt.Errorf("login: %w", dial(os.ErrDeadlineExceeded)), "no answer in time"},
		{status.Error(codes.Unavailable, "connection error"), "connection error"},
		{status.Error(codes.DeadlineExceeded, "context deadline exceeded"), "no answer in time"},
		{errors.New("status 500"), "status 500"},
	} {
		if have := Words(c.err); have != c.want {
			t.Errorf("%v: %q, want %q", c.err, have, c.want)
		}
	}
}

// A server that will not talk says why before it hangs up, and that is what people read.
func TestRedisProtectedMode(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "-DENIED Redis is running in protected mode because\r\n")
			c.Close()
		}
	}()
	f, err := New(service.Health{Probe: service.ProbeRedis}, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		ctx, stop := context.WithTimeout(t.Context(), 5*time.Second)
		err := f(ctx, netip.MustParseAddrPort(l.Addr().String()))
		stop()
		if err == nil || !strings.Contains(Words(err), "DENIED Redis is running in protected mode") {
			t.Fatalf("%v", err)
		}
	}
}
