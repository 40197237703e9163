package socket

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

// DefaultPins is the directory of bpffs that holds everything of pentad.
const DefaultPins = "/sys/fs/bpf/pentad"

// planeDir is this plane's part of the pin directory.
const planeDir = "socket"

// ErrCgroup says that a cgroup does not exist.
var ErrCgroup = errors.New("no such cgroup")

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

// CgroupRoot returns where the cgroup2 hierarchy is mounted. Hybrid hosts have
// it at /sys/fs/cgroup/unified.
func CgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	// "36 35 0:32 ROOT MOUNTPOINT OPTIONS [TAGS] - TYPE SOURCE OPTIONS", see proc_pid_mountinfo(5).
	for lines := bufio.NewScanner(f); lines.Scan(); {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	return "", errors.New("no cgroup2 hierarchy is mounted; mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
}

// cgroupPath returns the directory of a cgroup named as in the configuration.
func cgroupPath(cgroup string) (string, error) {
	root, err := CgroupRoot()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, cgroup)
	if st, err := os.Stat(path); err != nil || !st.IsDir() {
		return "", fmt.Errorf("%w: %s (looked for %s); create it or change scope.cgroup", ErrCgroup, cgroup, path)
	}
	return path, nil
}

// namespaceCookie returns the kernel's number for the network namespace of this
// process, which is the host's own.
func namespaceCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	return cookie, nil
}

// waitForReaders returns once every program that was running when it was called
// has ended: membarrier(2) with MEMBARRIER_CMD_GLOBAL waits for an RCU grace
// period (kernel/sched/membarrier.c), and programs run inside RCU read sections.
func waitForReaders() {
	const cmdGlobal = 1
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, cmdGlobal, 0, 0); errno != 0 {
		// Nohz-full hosts refuse it. No program runs this long.
		time.Sleep(time.Second)
	}
}

// Remove takes everything of this plane out of the kernel. It may be called in
// any state, also when there is nothing.
func Remove(dir string) error {
	plane := filepath.Join(dir, planeDir)
	if _, err := os.Stat(plane); errors.Is(err, os.ErrNotExist) {
		return removeEmpty(dir)
	}
	err := errors.Join(detachAll(plane), removeOtherSets(plane, -1), os.RemoveAll(plane))
	if err != nil {
		return fmt.Errorf("pins under %s: %w", plane, err)
	}
	return removeEmpty(dir)
}

func removeEmpty(dir string) error {
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("pin directory %s: %w", dir, err)
	}
	return nil
}
