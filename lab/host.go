// Package lab makes throw-away hosts on one machine: a network namespace with
// no way out, a cgroup, a directory of pins, and the processes inside. The demo
// and every test in the real kernel live on it.
//
// A lab host reaches nothing but itself: its only interface is its loopback,
// and an address that nobody translates has no route. Whatever happens, Close
// ends every process of the host and removes what it made.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/socket"
)

// Host is one throw-away host.
type Host struct {
	Dir  string // for files, on disk
	Pins string // for pentad's pins, on bpffs; not made yet

	ns     netns.NsHandle
	handle *netlink.Handle
	root   string // of the cgroup2 hierarchy
	cgroup string // of this host, below root, begins with a slash

	mu        sync.Mutex
	processes []*Process
}

// NewHost makes a host. It needs root.
func NewHost() (*Host, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab host needs root: network namespaces and cgroups are made")
	}
	dir, err := os.MkdirTemp("", "pentad-lab-")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	h := &Host{
		Dir: dir, ns: netns.None(),
		Pins: filepath.Join("/sys/fs/bpf", filepath.Base(dir)),
	}
	if err := h.build(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

func (h *Host) build() error {
	var err error
	if h.root, err = host.CgroupRoot(); err != nil {
		return err
	}
	h.cgroup = "/" + filepath.Base(h.Dir)
	for _, c := range []string{"", Inside, Outside} {
		if err := os.Mkdir(filepath.Join(h.root, h.cgroup, c), 0o755); err != nil {
			return err
		}
	}
	if h.ns, err = newNamespace(); err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	if h.handle, err = netlink.NewHandleAt(h.ns); err != nil {
		return err
	}
	lo, err := h.handle.LinkByName("lo")
	if err != nil {
		return err
	}
	return h.handle.LinkSetUp(lo)
}

// newNamespace makes a network namespace without leaving the current one.
func newNamespace() (netns.NsHandle, error) {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return netns.None(), err
	}
	defer home.Close()
	ns, err := netns.New()
	if err != nil {
		runtime.UnlockOSThread()
		return netns.None(), err
	}
	return ns, goHome(home)
}

// goHome puts the thread back. A thread that cannot go back stays locked and
// ends with its goroutine.
func goHome(home netns.NsHandle) error {
	if err := netns.Set(home); err != nil {
		return err
	}
	runtime.UnlockOSThread()
	return nil
}

// AddAddress gives the loopback of the host an address such as "10.0.0.1/32".
func (h *Host) AddAddress(cidrs ...string) error {
	lo, err := h.handle.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, cidr := range cidrs {
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		// No duplicate address detection: the address is usable at once.
		a.Flags = unix.IFA_F_NODAD
		if err := h.handle.AddrAdd(lo, a); err != nil {
			return fmt.Errorf("address %s: %w", cidr, err)
		}
	}
	return nil
}

// Do runs a function whose sockets belong to the host's network namespace. They
// do not belong to its cgroup.
func (h *Host) Do(f func() error) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := netns.Set(h.ns); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	return errors.Join(f(), goHome(home))
}

// The two cgroups of a host: pentad translates for processes in Inside.
const (
	Inside  = "inside"
	Outside = "outside"
)

// Scope is the cgroup of the processes that pentad translates for, as
// scope.cgroup names it.
func (h *Host) Scope() string { return h.cgroup + "/" + Inside }

// Process is a process of a host.
type Process struct {
	*exec.Cmd
	Log  *Log // what it printed
	done chan struct{}
	err  error
}

// Log keeps what a process prints. It is safe for use by several goroutines.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write appends.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String returns all that was printed.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Start starts a command on the host, in one of its cgroups. Standard output
// and error go to the process's log unless cmd says otherwise.
func (h *Host) Start(cmd *exec.Cmd, cgroup string) (*Process, error) {
	return h.StartPod(cmd, h, cgroup)
}

// StartPod starts a command with the network of this host in a cgroup of
// another: what a pod is to its node.
func (h *Host) StartPod(cmd *exec.Cmd, node *Host, cgroup string) (*Process, error) {
	return h.start(cmd, node, cgroup, nil)
}

// start starts a command. If there is something to prepare, the command is traced by
// this thread until it is prepared.
func (h *Host) start(cmd *exec.Cmd, node *Host, cgroup string, prepare func(pid int) error) (*Process, error) {
	fd, err := unix.Open(filepath.Join(node.root, node.cgroup, cgroup), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	p := &Process{Cmd: cmd, Log: &Log{}, done: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = p.Log
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.Log
	}
	if cmd.Dir == "" {
		cmd.Dir = h.Dir
	}
	// Not the parent's process group: Ctrl-C is for the parent to handle.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: fd, Setpgid: true, Pdeathsig: syscall.SIGKILL, Ptrace: prepare != nil,
	}
	cmd.WaitDelay = 2 * time.Second
	var prepared error
	if err := h.Do(func() error {
		if err := cmd.Start(); err != nil || prepare == nil {
			return err
		}
		if prepared = prepare(cmd.Process.Pid); prepared != nil {
			_ = cmd.Process.Kill()
		}
		return nil
	}); err != nil {
		return nil, err
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	// The host whose cgroup it is in ends it.
	node.mu.Lock()
	node.processes = append(node.processes, p)
	node.mu.Unlock()
	return p, prepared
}

// Run runs a command to its end and returns what it printed.
func (h *Host) Run(ctx context.Context, cgroup, name string, args ...string) (string, error) {
	p, err := h.Start(exec.CommandContext(ctx, name, args...), cgroup)
	if err != nil {
		return "", err
	}
	err = p.Wait()
	return p.Log.String(), err
}

// Wait waits for the end of the process.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Kill ends the process at once (SIGKILL) and waits for it.
func (p *Process) Kill() {
	// It may have ended by itself.
	_ = p.Process.Kill()
	<-p.done
}

// Stop asks the process to end (SIGTERM) and waits for it.
func (p *Process) Stop() error {
	_ = p.Process.Signal(syscall.SIGTERM)
	return p.Wait()
}

// Interrupt asks the process to end as Ctrl-C does (SIGINT) and waits for it.
func (p *Process) Interrupt() error {
	_ = p.Process.Signal(syscall.SIGINT)
	return p.Wait()
}

// Close ends all processes of the host and removes what it made. It may be
// called more than once.
func (h *Host) Close() error {
	var errs []error
	dir := filepath.Join(h.root, h.cgroup)
	if h.cgroup != "" {
		errs = append(errs, ignoreMissing(os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)))
	}
	h.mu.Lock()
	for _, p := range h.processes {
		<-p.done
	}
	h.processes = nil
	h.mu.Unlock()
	// Whatever plane has pinned something: what is unpinned is detached.
	errs = append(errs, socket.Remove(h.Pins), os.RemoveAll(h.Pins))
	if h.cgroup != "" {
		errs = append(errs, removeCgroup(dir))
	}
	if h.handle != nil {
		h.handle.Close()
		h.handle = nil
	}
	if h.ns.IsOpen() {
		errs = append(errs, h.ns.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(h.Dir))...)
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// removeCgroup removes a cgroup and those below once their processes are gone.
func removeCgroup(dir string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := errors.Join(
			ignoreMissing(os.Remove(filepath.Join(dir, Inside))),
			ignoreMissing(os.Remove(filepath.Join(dir, Outside))),
			ignoreMissing(os.Remove(dir)),
		)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// WriteFile writes a file into the host's directory by renaming it into place,
// and returns its path.
func (h *Host) WriteFile(name, text string) (string, error) {
	path := filepath.Join(h.Dir, name)
	next := path + ".next"
	if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
		return "", err
	}
	return path, os.Rename(next, path)
}

// Eventually polls a condition until it holds or the deadline passes, and
// returns the last reason why it did not hold.
func Eventually(within time.Duration, condition func() error) error {
	deadline := time.Now().Add(within)
	for {
		err := condition()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s: %w", within, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// Indent puts a log into an error message.
func Indent(log string) string {
	return "\t" + strings.ReplaceAll(strings.TrimSpace(log), "\n", "\n\t")
}
