package socket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/pentad/pentad/host"
)

// sweeper walks over the sockets of every network namespace: a socket knows its
// place in the maps, not the other way round. It closes connections to backends
// that are marked for it, and counts back those of sockets that are no more.
type sweeper struct {
	udp, tcp *link.Iter
	expire   *ebpf.Program
	walk     *ebpf.Variable // number of the walk
	clock    *host.Clock

	mu     sync.Mutex // held by who walks
	number uint32

	over context.Context // done when another one takes its place
	end  context.CancelFunc
}

// sweepPrograms are those that are run from here.
var sweepPrograms = []string{kernelProgResetUdp, kernelProgResetTcp, kernelProgExpire}

func newSweeper(programs map[string]*ebpf.Program, walk *ebpf.Variable, c *host.Clock) (*sweeper, error) {
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
	now, err := s.clock.Now()
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
	e := kernelExpiry{Before: uint32(now - s.clock.Jiffies(young))}
	if !onlyUDP {
		e.Tcp = 1
	}
	_, err = s.expire.Run(&ebpf.RunOptions{Context: &e, ContextOut: &e})
	return s.number, err
}

// visitAll lets iterators walk over the sockets of every network namespace.
func visitAll(ctx context.Context, iterators []*link.Iter) error {
	return host.InNamespaces(ctx, func() error { return visit(iterators) })
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
