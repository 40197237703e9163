package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/ipam"
)

// A plugin reads which blocks there are and makes a device a moment later. Whoever gives a
// block back has to know that there is no plugin between the two: plugins hold a lock
// together, and the agent holds it alone.

// lockEvery is how often it is tried to get the lock.
const lockEvery = 5 * time.Millisecond

func openLock(network string) (*os.File, error) {
	return os.OpenFile(network+".lock", os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
}

// ReadLocked reads the network that was written last. Until done is called no block of it
// is given back.
func ReadLocked(ctx context.Context, path string) (n Network, done func(), err error) {
	if _, err := os.Stat(path); err != nil {
		n, err = Read(path)
		return n, func() {}, err
	}
	lock, err := openLock(path)
	if err != nil {
		return n, func() {}, fmt.Errorf("the pod network cannot be locked: %w", err)
	}
	done = func() { _ = lock.Close() }
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		if err == nil {
			break
		}
		select {
		case <-ctx.Done():
			done()
			return n, func() {}, fmt.Errorf("the pod network cannot be locked: %w", errors.Join(err, ctx.Err()))
		case <-time.After(lockEvery):
		}
	}
	n, err = Read(path)
	return n, done, err
}

// IsClosed reports whether a block has no pod and will have none: plugins were told of the
// decision that has the mark, and none of them knows the block from before. When a plugin
// is at work it cannot be known, and is false.
func IsClosed(path string, b ipam.Block, mark string) (bool, error) {
	lock, err := openLock(path)
	if err != nil {
		return false, err
	}
	defer lock.Close()
	switch err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return false, nil
	case err != nil:
		return false, err
	}
	n, err := Read(path)
	if err != nil || n.Closed[b.Name()] != mark {
		return false, err
	}
	for _, o := range n.Blocks {
		if b.Overlaps(ipam.Block(o)) {
			return false, nil
		}
	}
	links, err := Links()
	if err != nil {
		return false, err
	}
	for _, l := range links {
		if !strings.HasPrefix(l.Attrs().Name, DevicePrefix) || !isOurs(l) {
			continue
		}
		// A device that does not say what it has may have anything.
		a, ok := parseAlias(l.Attrs().Alias)
		if !ok || b.Contains(a.V4) || b.Contains(a.V6) {
			return false, nil
		}
	}
	return true, nil
}
