package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// NamespaceCookie returns the kernel's number for the network namespace of this
// process, which is the host's own.
func NamespaceCookie() (uint64, error) {
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

// InNamespaces calls f once in every network namespace that a process lives in or
// that is kept by a mount, on a thread that belongs to it. It goes on past those
// that it cannot enter and returns why.
func InNamespaces(ctx context.Context, f func() error) error {
	all, err := openNamespaces()
	errs := []error{err}
	for _, ns := range all {
		if ctx.Err() == nil {
			if err := inNamespace(ns, f); err != nil {
				errs = append(errs, fmt.Errorf("network namespace %s: %w", ns.Name(), err))
			}
		}
		ns.Close()
	}
	return errors.Join(append(errs, ctx.Err())...)
}

const ownNamespace = "/proc/thread-self/ns/net"

// openNamespaces opens every network namespace that a process lives in or that is
// kept by a mount. They are held open because processes end while others are
// looked at, and a namespace that was overlooked would seem to have no sockets.
func openNamespaces() ([]*os.File, error) {
	paths, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return nil, err
	}
	mounts, err := namespaceMounts()
	if err != nil {
		return nil, err
	}
	found := make(map[uint64]bool)
	tables := make(map[uint64]bool) // /proc/PID/net/dev of namespaces that are open
	var forbidden []string
	var all []*os.File
	for _, path := range slices.Concat([]string{ownNamespace}, paths, mounts) {
		if ino, ok := inode(path); ok && found[ino] {
			continue
		}
		f, err := os.Open(path)
		if errors.Is(err, os.ErrPermission) && !isGone(path) {
			forbidden = append(forbidden, path)
		}
		if err != nil {
			continue // processes end while they are looked at
		}
		ino, ok := inode(path)
		if !ok || found[ino] {
			f.Close()
			continue
		}
		found[ino] = true
		all = append(all, f)
		if ino, ok := inode(deviceTable(path)); ok {
			tables[ino] = true
		}
	}
	// A process may hide its namespace, but not whether it is one of those.
	hidden := 0
	for _, path := range forbidden {
		if ino, ok := inode(deviceTable(path)); ok && !tables[ino] {
			hidden++
		}
	}
	if hidden > 0 {
		return all, fmt.Errorf("the network namespaces of %d processes are hidden; the agent needs CAP_SYS_PTRACE to find them and CAP_SYS_ADMIN to enter them", hidden)
	}
	return all, nil
}

func inode(path string) (uint64, bool) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return st.Ino, err == nil
}

// deviceTable returns the file of a process, of whose namespace the path is, that
// lists the devices of that namespace. Namespaces have each their own.
func deviceTable(path string) string { return filepath.Join(filepath.Dir(path), "../net/dev") }

// isGone reports whether the process that a path below /proc belongs to has ended.
// The namespace of a process that is just ending is not missing but forbidden
// (fs/proc/namespaces.c).
func isGone(path string) bool {
	_, there := inode(filepath.Dir(path))
	return !there
}

// namespaceMounts returns where network namespaces are kept by a mount, as
// `ip netns` and container runtimes do.
func namespaceMounts() ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var mounts []string
	// "36 35 0:4 net:[4026532000] MOUNTPOINT OPTIONS - nsfs nsfs rw", see proc_pid_mountinfo(5).
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[3], "net:[") {
			mounts = append(mounts, fields[4])
		}
	}
	return mounts, lines.Err()
}

// inNamespace calls f with the calling thread in a network namespace.
func inNamespace(ns *os.File, f func() error) error {
	if ns.Name() == ownNamespace {
		return f()
	}
	runtime.LockOSThread()
	home, err := os.Open(ownNamespace)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	err = f()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread stays locked and ends with its goroutine.
		return errors.Join(err, back)
	}
	runtime.UnlockOSThread()
	return err
}
