package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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
