package socket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// EventKind is what happened.
type EventKind uint8

// The kinds of events.
const (
	Connect     = EventKind(kernelEventKindEVENT_CONNECT)     // a backend was chosen
	Refused     = EventKind(kernelEventKindEVENT_REFUSED)     // none could be
	Established = EventKind(kernelEventKindEVENT_ESTABLISHED) // the handshake is complete
	Failed      = EventKind(kernelEventKindEVENT_FAILED)      // the connect failed
	Closed      = EventKind(kernelEventKindEVENT_CLOSED)      // the connection is over
	Ejected     = EventKind(kernelEventKindEVENT_EJECTED)     // the backend gets nothing for a while
	Readmitted  = EventKind(kernelEventKindEVENT_READMITTED)  // the backend is used again
)

var eventKinds = []string{"connect", "refused", "established", "failed", "closed", "ejected", "readmitted"}

// String returns the kind in lower case.
func (k EventKind) String() string {
	if int(k) < len(eventKinds) {
		return eventKinds[k]
	}
	return fmt.Sprintf("event %d", uint8(k))
}

// Event is something that happened to a connection or to the backend that it was
// for.
type Event struct {
	Kind     EventKind
	Time     time.Time
	Cookie   uint64 // of the socket; 0 for Refused
	Service  string // empty when the service is gone
	VIP      netip.AddrPort
	Backend  netip.AddrPort // not valid for Refused
	Protocol service.Protocol
	PID      int    // of Connect, Refused and most of Closed; else 0
	Command  string // of the same
	Error    syscall.Errno
	RTT      time.Duration // of Established: the handshake's; of Closed: smoothed
	Duration time.Duration // since connect(), to a tick of the kernel
	Sent     uint64        // bytes, of TCP
	Received uint64
}

// ErrFollowers says that as many processes as can be follow flows already.
var ErrFollowers = fmt.Errorf("%d processes follow flows already", followerPlaces)

const (
	followerPlaces = int(kernelLimitFOLLOWERS)
	ringSize       = 8 << 20 // bytes: 50,000 events
	leaseTime      = 2 * time.Second
	leaseEvery     = 500 * time.Millisecond
	lookEvery      = 10 * time.Millisecond
	nameFor        = time.Second // how long the name of a service is believed
)

// Follower is told of the connections of all services. It works with and without
// an agent. A follower that dies is forgotten within seconds.
type Follower struct {
	set    *mapSet
	clock  *host.Clock
	place  uint32
	placed bool // place is this follower's
	ring   *ebpf.Map
	reader *ringbuf.Reader
	dir    string
	missed uint64 // in the place before this follower had it
	before uint64 // events missed in places that it had before
	lapsed time.Duration
	booted time.Time
	names  map[uint32]knownName
}

type knownName struct {
	name  string
	until time.Time
}

// Follow begins to follow what is pinned under dir. The error is
// ErrNothingInstalled, ErrNewer or ErrFollowers, or says what failed.
func Follow(dir string) (*Follower, error) {
	dir = filepath.Join(dir, planeDir)
	set, _, err := openAndTell(dir, false)
	if err != nil {
		return nil, err
	}
	f := &Follower{set: set, dir: dir, names: make(map[uint32]knownName)}
	if err := f.begin(); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (f *Follower) begin() error {
	var err error
	if f.clock, err = host.NewClock(); err != nil {
		return err
	}
	var monotonic unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &monotonic); err != nil {
		return err
	}
	f.booted = time.Now().Add(-time.Duration(monotonic.Nano()))
	f.ring, err = ebpf.NewMap(&ebpf.MapSpec{Name: "flows_ring", Type: ebpf.RingBuf, MaxEntries: ringSize})
	if err != nil {
		return fmt.Errorf("ring buffer: %w", err)
	}
	if f.reader, err = ringbuf.NewReader(f.ring); err != nil {
		return fmt.Errorf("ring buffer: %w", err)
	}
	return f.claim()
}

// claim takes a free place. Followers agree among themselves who gets which.
func (f *Follower) claim() error {
	lock, err := os.Open(f.dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock on %s: %w", f.dir, err)
	}
	now, err := f.clock.Now()
	if err != nil {
		return err
	}
	untils, err := f.untils()
	if err != nil {
		return err
	}
	// The place that it had, if it is free, so that nothing is left there.
	for i := range uint32(len(untils)) {
		place := (f.place + i) % uint32(len(untils))
		if untils[place] > now {
			continue
		}
		if err := f.set.maps[kernelMapLost].Lookup(place, &f.missed); err != nil {
			return err
		}
		if err := f.set.maps[kernelMapFlows].Put(place, f.ring); err != nil {
			return err
		}
		f.place, f.placed = place, true
		return f.renew()
	}
	return ErrFollowers
}

func (f *Follower) untils() ([]uint64, error) {
	all, err := dump[uint32, uint64](f.set.maps[kernelMapFollowers])
	return all.values, err
}

// renew says that this follower is still there.
func (f *Follower) renew() error {
	now, err := f.clock.Now()
	if err != nil {
		return err
	}
	until := now + f.clock.Jiffies(leaseTime)
	if err := f.set.maps[kernelMapFollowers].Put(f.place, until); err != nil {
		return err
	}
	return f.set.maps[kernelMapFollowed].Put(uint32(0), until)
}

// Followers returns how many processes follow what is pinned under dir.
func Followers(dir string) (int, error) {
	set, err := openCurrent(dir)
	if err != nil {
		return 0, err
	}
	defer set.close()
	c, err := host.NewClock()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	now, err := c.Now()
	if err != nil {
		return 0, err
	}
	all, err := dump[uint32, uint64](set.maps[kernelMapFollowers])
	if err != nil {
		return 0, err
	}
	n := 0
	for _, until := range all.values {
		if until > now {
			n++
		}
	}
	return n, nil
}

// Close ends following. Others go on.
func (f *Follower) Close() {
	if f.placed {
		// Whatever fails here is over when the lease is.
		_ = f.set.maps[kernelMapFollowers].Put(f.place, uint64(0))
		_ = f.set.maps[kernelMapFlows].Delete(f.place)
		if untils, err := f.untils(); err == nil {
			_ = f.set.maps[kernelMapFollowed].Put(uint32(0), slices.Max(untils))
		}
	}
	if f.reader != nil {
		f.reader.Close()
	}
	if f.ring != nil {
		f.ring.Close()
	}
	f.clock.Close()
	f.set.close()
}

// Lost returns how many events this follower missed because it was too slow.
func (f *Follower) Lost() uint64 {
	var n uint64
	if err := f.set.maps[kernelMapLost].Lookup(f.place, &n); err != nil {
		return 0
	}
	return f.before + n - f.missed
}

// Lapsed returns for how long this follower did not say that it is there, so that
// it was told nothing: because it was stopped, or got no processor.
func (f *Follower) Lapsed() time.Duration { return f.lapsed }

// comeBack follows again after the lease has lapsed: its place may be another's.
func (f *Follower) comeBack(gap time.Duration) error {
	f.lapsed += gap
	f.before, f.placed = f.Lost(), false
	return f.claim()
}

// Run calls each for every event until the context ends.
func (f *Follower) Run(ctx context.Context, each func(Event)) error {
	var record ringbuf.Record
	renewed := time.Now()
	for ctx.Err() == nil {
		if time.Since(renewed) > leaseEvery {
			if gap := time.Since(renewed) - leaseTime; gap > 0 {
				if err := f.comeBack(gap); err != nil {
					return err
				}
			} else if err := f.renew(); err != nil {
				return err
			}
			if !f.set.pinned() {
				return ErrNothingInstalled
			}
			renewed = time.Now()
		}
		f.reader.SetDeadline(time.Now().Add(lookEvery))
		for n := 0; n < ringSize/256; n++ {
			err := f.reader.ReadInto(&record)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("ring buffer: %w", err)
			}
			if len(record.RawSample) >= int(unsafe.Sizeof(kernelEvent{})) {
				each(f.event((*kernelEvent)(unsafe.Pointer(&record.RawSample[0]))))
			}
		}
	}
	return nil
}

func (f *Follower) event(e *kernelEvent) Event {
	return Event{
		Kind: EventKind(e.Kind), Time: f.booted.Add(time.Duration(e.Time)), Cookie: e.Cookie,
		Service:  f.name(e.Service),
		VIP:      netip.AddrPortFrom(address(e.Vip), bigEndian(e.VipPort)),
		Backend:  backendOf(e),
		Protocol: service.Protocol(e.Protocol), PID: int(e.Pid), Command: text(e.Command[:]), Error: syscall.Errno(e.Error),
		RTT: time.Duration(e.Rtt) * time.Microsecond, Duration: time.Duration(e.Duration) * time.Millisecond,
		Sent: e.Sent, Received: e.Received,
	}
}

func backendOf(e *kernelEvent) netip.AddrPort {
	if e.Port == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(address(e.Addr), bigEndian(e.Port))
}

// name returns the name of a service by its index.
func (f *Follower) name(index uint32) string {
	if index == 0 {
		return ""
	}
	now := time.Now()
	if known := f.names[index]; now.Before(known.until) {
		return known.name
	}
	raw, err := f.set.maps[kernelMapServices].LookupBytes(index)
	if err != nil || raw == nil {
		return ""
	}
	var info kernelServiceInfo
	name := raw[unsafe.Offsetof(info.Name):][:len(info.Name)]
	name, _, _ = bytes.Cut(name, []byte{0})
	f.names[index] = knownName{string(name), now.Add(nameFor)}
	return string(name)
}
