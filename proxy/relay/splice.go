package relay

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// chunk is what one splice moves at most, and a pipe holds.
const chunk = 256 << 10

const flags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK

// errNoPipe says that there is no file descriptor left for one. Bytes can go another way.
var errNoPipe = errors.New("no pipe")

// splice copies between sockets inside the kernel.
func (r *relay) splice(to, from *net.TCPConn, n *atomic.Uint64) error {
	in, err := from.SyscallConn()
	if err != nil {
		return err
	}
	out, err := to.SyscallConn()
	if err != nil {
		return err
	}
	for {
		p, got, err := fill(in)
		if errors.Is(err, errNoPipe) {
			return r.through(to, from, n)
		}
		if err != nil || got == 0 {
			return err
		}
		r.touch()
		if err := r.empty(p, out, got, n); err != nil {
			p.close() // with what is left in it
			return err
		}
		p.free()
	}
}

// fill waits until a socket has something and moves it to a pipe. 0 is the end. No pipe
// is held while it waits.
func fill(from syscall.RawConn) (p pipe, got int, err error) {
	held := false
	var failed error
	err = from.Read(func(fd uintptr) bool {
		if !held {
			if p, failed = takePipe(); failed != nil {
				return true
			}
			held = true
		}
		for {
			n, err := unix.Splice(int(fd), nil, p.w, nil, chunk, flags)
			switch err {
			case nil:
				got = int(n)
				return true
			case unix.EINTR:
				continue
			case unix.EAGAIN:
				p.free()
				held = false
				return false
			}
			failed = os.NewSyscallError("splice", err)
			return true
		}
	})
	if err == nil {
		err = failed
	}
	if held && (err != nil || got == 0) {
		p.free()
	}
	return p, got, err
}

// empty moves what is in the pipe to a socket.
func (r *relay) empty(p pipe, to syscall.RawConn, left int, n *atomic.Uint64) error {
	for left > 0 {
		var failed error
		err := to.Write(func(fd uintptr) bool {
			moved, err := unix.Splice(p.r, nil, int(fd), nil, left, flags)
			switch err {
			case nil:
				left -= int(moved)
				n.Add(uint64(moved))
				r.touch()
				return true
			case unix.EINTR:
				return true
			case unix.EAGAIN:
				return false
			}
			failed = os.NewSyscallError("splice", err)
			return true
		})
		if err == nil {
			err = failed
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// pipe is a pipe of the kernel, empty while nobody has it.
type pipe struct{ r, w int }

// free are pipes that wait for the next user.
var free = make(chan pipe, 64)

func takePipe() (pipe, error) {
	select {
	case p := <-free:
		return p, nil
	default:
	}
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return pipe{}, errNoPipe
	}
	// Without the right to have it so large it is smaller.
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, chunk)
	return pipe{fds[0], fds[1]}, nil
}

func (p pipe) free() {
	select {
	case free <- p:
	default:
		p.close()
	}
}

func (p pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}
