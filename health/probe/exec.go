package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/pentad/pentad/service"
)

// maxOutput is how much of what a program prints is kept for the log.
const maxOutput = 200

// newExec returns a probe that runs a program; exit code 0 is a success.
func newExec(h service.Health) Func {
	argv := h.Command.Args()
	return func(ctx context.Context, addr netip.AddrPort) error {
		var out head
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Env = []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"PENTAD_ADDRESS=" + addr.Addr().String(), fmt.Sprintf("PENTAD_PORT=%d", addr.Port()),
		}
		cmd.Stdout, cmd.Stderr = &out, &out
		// A process group of its own, so that its children go with it.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		// A child that left the group may hold the output open.
		cmd.WaitDelay = 100 * time.Millisecond
		err := cmd.Run()
		if cmd.Process != nil {
			// Children of a program that has ended; there are none as a rule.
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("%s: killed at the time-out", argv[0])
		case errors.Is(err, exec.ErrWaitDelay):
			// It has ended with 0; a child of it holds the output open.
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w: %s", argv[0], err, out.line())
		}
		return nil
	}
}

// head keeps the beginning of what is written to it.
type head struct{ b bytes.Buffer }

// Write takes all and keeps some.
func (h *head) Write(p []byte) (int, error) {
	h.b.Write(p[:min(len(p), maxOutput-h.b.Len())])
	return len(p), nil
}

func (h *head) line() string {
	line, _, _ := strings.Cut(strings.TrimSpace(h.b.String()), "\n")
	return line
}
