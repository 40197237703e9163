// Package host is what this machine is to every room that touches it: the directory of
// pins and its lock, cgroups, network namespaces, capabilities, the clock of the kernel,
// and the register of marks. It knows nothing of services, and holds no state but what
// its callers hold.
package host

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultPins is the directory of bpffs that holds everything of pentad.
const DefaultPins = "/sys/fs/bpf/pentad"

// WaitForReaders returns once every program that was running when it was called
// has ended: membarrier(2) with MEMBARRIER_CMD_GLOBAL waits for an RCU grace
// period (kernel/sched/membarrier.c), and programs run inside RCU read sections.
func WaitForReaders() {
	const cmdGlobal = 1
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, cmdGlobal, 0, 0); errno != 0 {
		// Nohz-full hosts refuse it. No program runs this long.
		time.Sleep(time.Second)
	}
}

// RemovePins removes the directory of pins if nothing is in it any more, and it is there.
func RemovePins(dir string) error {
	err := os.Remove(dir)
	if err == nil || errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EBUSY) {
		return nil
	}
	return fmt.Errorf("pin directory %s: %w", dir, err)
}
