package host

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrCgroup says that a cgroup does not exist.
var ErrCgroup = errors.New("no such cgroup")

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

// CgroupPath returns the directory of a cgroup named as in the configuration. The
// error is ErrCgroup when there is none.
func CgroupPath(cgroup string) (string, error) {
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

// CgroupID returns the kernel's id of a cgroup: its inode number.
func CgroupID(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("cgroup %s: %w", path, err)
	}
	return st.Ino, nil
}

// CgroupOf returns the cgroup (v2) of a process, as a path below the root. The error is
// fs.ErrNotExist when there is no such process.
func CgroupOf(pid int) (string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	defer f.Close()
	// The line of version 2 is "0::/path", see cgroups(7).
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if path, ok := strings.CutPrefix(lines.Text(), "0::"); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("process %d is in no cgroup of version 2", pid)
}
