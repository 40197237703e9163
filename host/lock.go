package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// LockedError says that another process owns the pin directory.
type LockedError struct {
	Dir     string
	PID     int    // 0 when the kernel does not tell
	Command string // of the process, may be empty
}

// Error names the holder.
func (e *LockedError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("another pentad holds the lock on %s", e.Dir)
	}
	return fmt.Sprintf("another pentad, process %d (%s), holds the lock on %s", e.PID, e.Command, e.Dir)
}

// Lock makes the pin directory if need be, mounting bpffs, and locks it for as
// long as the returned file is open. The error is a *LockedError when somebody
// else has it.
func Lock(dir string) (*os.File, error) {
	if err := ensureBPFFS(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("pin directory %s: %w", dir, err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			pid := Holder(dir)
			return nil, &LockedError{Dir: dir, PID: pid, Command: commandOf(pid)}
		}
		return nil, fmt.Errorf("lock on %s: %w", dir, err)
	}
	return f, nil
}

// LockWithin is Lock, but while the holder is going, or the kernel does not tell
// who it is, it tries again: a process that was killed holds its files a moment
// longer than it can be seen.
func LockWithin(ctx context.Context, dir string, patience time.Duration) (*os.File, error) {
	for deadline := time.Now().Add(patience); ; {
		f, err := Lock(dir)
		var held *LockedError
		if !errors.As(err, &held) || !isGoing(held.PID) || time.Now().After(deadline) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// isGoing reports whether a process is gone, or about to be: a zombie, or with a
// SIGKILL that it has not died of yet (proc_pid_status(5)).
func isGoing(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if pid == 0 || err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "SigPnd", "ShdPnd":
			pending, _ := strconv.ParseUint(value, 16, 64)
			if pending>>(unix.SIGKILL-1)&1 != 0 {
				return true
			}
		}
	}
	return false
}

// Holder returns the process that holds the lock on the pin directory, or 0.
func Holder(dir string) int {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return 0
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return 0
	}
	defer f.Close()
	// "1: FLOCK  ADVISORY  WRITE 4711 00:1d:42 0 EOF", see proc_locks(5).
	suffix := fmt.Sprintf(":%d", st.Ino)
	device := fmt.Sprintf("%02x:%02x", unix.Major(st.Dev), unix.Minor(st.Dev))
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) >= 6 && fields[1] == "FLOCK" && fields[5] == device+suffix {
			pid, _ := strconv.Atoi(fields[4])
			return pid
		}
	}
	return 0
}

func commandOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

// ensureBPFFS mounts a bpf filesystem at /sys/fs/bpf when dir lies there and
// nothing is mounted.
func ensureBPFFS(dir string) error {
	const standard = "/sys/fs/bpf"
	existing := dir
	for {
		var st unix.Statfs_t
		err := unix.Statfs(existing, &st)
		if err == nil {
			if st.Type == unix.BPF_FS_MAGIC {
				return nil
			}
			break
		}
		if !errors.Is(err, unix.ENOENT) || existing == "/" {
			return fmt.Errorf("pin directory %s: %w", dir, err)
		}
		existing = filepath.Dir(existing)
	}
	if dir != standard && !strings.HasPrefix(dir, standard+"/") {
		return fmt.Errorf("%s does not lie on a bpf filesystem; mount one there: mount -t bpf bpf %s", dir, existing)
	}
	if err := unix.Mount("bpf", standard, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("no bpf filesystem at %s and it cannot be mounted: %w; mount it: mount -t bpf bpf %s",
			standard, err, standard)
	}
	return nil
}
