package probe

import (
	"context"
	"errors"
	"io"
	"net"
	"os"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Words says what a probe met with, without what whoever reads it knows already: which
// address was probed, and how programs call that.
func Words(err error) string {
	if err == nil {
		return ""
	}
	var op *net.OpError
	var call *os.SyscallError
	switch {
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded):
		return "no answer in time"
	case errors.As(err, &call):
		return call.Err.Error()
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return "it hung up"
	case status.Code(err) == codes.DeadlineExceeded:
		return "no answer in time"
	case status.Code(err) != codes.Unknown && status.Convert(err).Message() != "":
		return status.Convert(err).Message()
	case errors.As(err, &op):
		return op.Err.Error()
	}
	return err.Error()
}
