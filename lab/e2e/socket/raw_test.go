package socket_test

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// What x/sys/unix has no call for.

const unsafeSize = unsafe.Sizeof(unix.RawSockaddr{})

func rawPointer(sa *unix.RawSockaddr) unsafe.Pointer { return unsafe.Pointer(sa) }

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	header unix.Msghdr
	length uint32
	_      [4]byte
}

// sendmmsg sends two datagrams in one call; to is nil on a connected socket.
func sendmmsg(fd int, to unix.Sockaddr, texts ...string) error {
	messages := make([]mmsghdr, len(texts))
	for i, text := range texts {
		data := []byte(text)
		iov := &unix.Iovec{Base: &data[0]}
		iov.SetLen(len(data))
		messages[i].header.Iov = iov
		messages[i].header.SetIovlen(1)
		if sa, ok := to.(*unix.SockaddrInet4); ok {
			raw := &unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: sa.Addr}
			port := (*[2]byte)(unsafe.Pointer(&raw.Port))
			port[0], port[1] = byte(sa.Port>>8), byte(sa.Port)
			messages[i].header.Name = (*byte)(unsafe.Pointer(raw))
			messages[i].header.Namelen = unix.SizeofSockaddrInet4
		}
	}
	_, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
