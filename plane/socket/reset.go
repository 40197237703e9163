package socket

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// sweeper walks over the sockets of every network namespace: a socket knows its
// place in the maps, not the other way round. It closes connections to backends
// that are marked for it, and counts back those of sockets that are no more.
type sweeper struct {
	udp, tcp *link.Iter
	expire   *ebpf.Program
	walk     *ebpf.Variable // number of the walk
	clock    *clock

	mu     sync.Mutex // held by who walks
	number uint32

	over context.Context // done when another one takes its place
	end  context.CancelFunc
}

// sweepPrograms are those that are run from here.
var sweepPrograms = []string{kernelProgResetUdp, kernelProgResetTcp, kernelProgExpire}

func newSweeper(programs map[string]*ebpf.Program, walk *ebpf.Variable, c *clock) (*sweeper, error) {
	udp, err := link.AttachIter(link.IterOptions{Program: programs[kernelProgResetUdp]})
	if err != nil {
		return nil, fmt.Errorf("iterator over UDP sockets: %w", err)
	}
	tcp, err := link.AttachIter(link.IterOptions{Program: programs[kernelProgResetTcp]})
	if err != nil {
		udp.Close()
		return nil, fmt.Errorf("iterator over TCP sockets: %w", err)
	}
	expire, err := programs[kernelProgExpire].Clone()
	if err != nil {
		udp.Close()
		tcp.Close()
		return nil, err
	}
	over, end := context.WithCancel(context.Background())
	return &sweeper{udp: udp, tcp: tcp, expire: expire, walk: walk, clock: c, over: over, end: end}, nil
}

// close ends a walk that goes on, at the next network namespace, and lets go of the
// programs. Who walked on would judge by maps that are others' by then.
func (s *sweeper) close() {
	if s == nil {
		return
	}
	s.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.udp.Close()
	s.tcp.Close()
	s.expire.Close()
}

// young is how old an entry must be for its socket to be missed: between
// connect() and the kernel's tables it is in neither.
const young = 2 * time.Second

// errEnded says that other programs have taken a sweeper's place.
var errEnded = errors.New("the programs were replaced")

// sweep walks over all sockets, or those of UDP alone, and returns the number of the
// walk.
func (s *sweeper) sweep(ctx context.Context, onlyUDP bool) (uint32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over.Err() != nil {
		return 0, errEnded
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(s.over, stop)()
	now, err := s.clock.now()
	if err != nil {
		return 0, err
	}
	s.number++
	if err := s.walk.Set(s.number); err != nil {
		return 0, err
	}
	iterators := []*link.Iter{s.udp, s.tcp}
	if onlyUDP {
		iterators = iterators[:1]
	}
	if err := visitAll(ctx, iterators); err != nil {
		if s.over.Err() != nil {
			err = errEnded
		}
		// Who was not visited must not be taken for gone.
		return 0, err
	}
	e := kernelExpiry{Before: uint32(now - s.clock.jiffies(young))}
	if !onlyUDP {
		e.Tcp = 1
	}
	_, err = s.expire.Run(&ebpf.RunOptions{Context: &e, ContextOut: &e})
	return s.number, err
}

// visitAll lets iterators walk over the sockets of every network namespace.
func visitAll(ctx context.Context, iterators []*link.Iter) error {
	return InNamespaces(ctx, func() error { return visit(iterators) })
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

// visit lets iterators walk over the sockets of the calling thread's network
// namespace.
func visit(iterators []*link.Iter) error {
	for _, it := range iterators {
		r, err := it.Open()
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r)
		r.Close()
		if err != nil {
			return err
		}
	}
	return nil
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
