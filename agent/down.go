package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/host"
)

// How long Down waits for an agent after asking it to end, and after killing it; and
// Run for one that is going.
const downPatience = 5 * time.Second

// Down removes everything of pentad from the kernel, whatever state it is in: a
// running agent is ended first, because it would put everything back.
func Down(ctx context.Context, opts Options) error {
	pins, runDir := opts.Pins, opts.RunDir
	if _, err := os.Stat(pins); errors.Is(err, fs.ErrNotExist) {
		return errors.Join(leaveAll(opts), forgetState(opts), removeRunDir(runDir))
	}
	lock, err := host.Lock(pins)
	var held *host.LockedError
	if errors.As(err, &held) {
		withdraw(ctx, runDir)
		lock, err = evict(ctx, pins, held)
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	return errors.Join(leaveAll(opts), host.RemovePins(pins), forgetState(opts), removeRunDir(runDir))
}

// withdraw has a running agent take back what it has told the network, also where that
// is to outlive it: from now on nothing is forwarded here.
func withdraw(ctx context.Context, runDir string) {
	ctx, stop := context.WithTimeout(ctx, downPatience)
	defer stop()
	_ = api.NewClient(runDir).Withdraw(ctx) // one that does not answer is ended all the same
}

// leaveAll takes every role out of the kernel, in the opposite order of the table.
func leaveAll(opts Options) error {
	var errs []error
	for _, r := range slices.Backward(roles) {
		errs = append(errs, r.leave(opts))
	}
	return errors.Join(errs...)
}

// evict ends the agent that holds the lock and takes the lock.
func evict(ctx context.Context, pins string, held *host.LockedError) (*os.File, error) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		// Of one that is just going the kernel does not tell who it is.
		if held.PID == 0 {
			return host.LockWithin(ctx, pins, downPatience)
		}
		if err := syscall.Kill(held.PID, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return nil, fmt.Errorf("ending the agent, process %d: %w", held.PID, err)
		}
		for deadline := time.Now().Add(downPatience); time.Now().Before(deadline); {
			lock, err := host.Lock(pins)
			if err == nil || !errors.As(err, &held) {
				return lock, err
			}
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return nil, held
}

func removeRunDir(dir string) error {
	if err := os.Remove(filepath.Join(dir, api.SocketName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := os.Remove(dir)
	// It may have something of others in it, or be where something is mounted.
	for _, fine := range []error{fs.ErrNotExist, syscall.ENOTEMPTY, syscall.EBUSY} {
		if errors.Is(err, fine) {
			return nil
		}
	}
	return err
}
