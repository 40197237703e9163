package flow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Open returns the connections through VIPs that are open now, oldest first, with
// the processes that hold them. The error joins what could not be found out; the
// flows are good all the same.
func Open(ctx context.Context, pins string) ([]Flow, error) {
	connections, err := socket.Connections(pins)
	if err != nil {
		return nil, err
	}
	if len(connections) == 0 {
		return nil, nil
	}
	details, err := diagnose(ctx)
	owners := findOwners(details)
	flows := make([]Flow, len(connections))
	for i, c := range connections {
		d := details[c.Cookie]
		o := owners[d.inode]
		flows[i] = Flow{
			Event: "open", Time: c.Begun, Cookie: c.Cookie, PID: o.pid, Command: o.command, Service: c.Service,
			VIP: c.VIP, Backend: c.Backend, Protocol: c.Protocol, Outcome: "open", RTT: d.rtt, Duration: time.Since(c.Begun),
			Client: d.client, UID: d.uid, HasOwner: d.inode != 0, HasBytes: d.counted, Sent: d.sent, Received: d.received,
		}
		if o.pid != 0 {
			// It may have ended.
			flows[i].Cgroup, _ = cgroupOf(o.pid)
		}
		if !c.Established && c.Protocol != service.UDP {
			flows[i].Outcome = "connecting"
		}
	}
	slices.SortFunc(flows, func(a, b Flow) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.Cookie, b.Cookie))
	})
	return flows, err
}

// detail is what the kernel says of a socket (sock_diag(7)).
type detail struct {
	inode          uint32
	uid            uint32
	client         netip.AddrPort
	rtt            time.Duration
	counted        bool // sent and received are known
	sent, received uint64
}

func newDetail(s *netlink.Socket) detail {
	addr, _ := netip.AddrFromSlice(s.ID.Source)
	return detail{inode: s.INode, uid: s.UID, client: netip.AddrPortFrom(addr.Unmap(), s.ID.SourcePort)}
}

// diagnose asks every network namespace for its sockets, by cookie.
func diagnose(ctx context.Context) (map[uint64]detail, error) {
	found := make(map[uint64]detail)
	err := host.InNamespaces(ctx, func() error {
		var errs []error
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			tcp, err := netlink.SocketDiagTCPInfo(family)
			errs = append(errs, err)
			for _, s := range tcp {
				if s.InetDiagMsg == nil {
					continue
				}
				d := newDetail(s.InetDiagMsg)
				if i := s.TCPInfo; i != nil {
					d.rtt = time.Duration(i.Rtt) * time.Microsecond
					d.counted, d.sent, d.received = true, i.Bytes_sent, i.Bytes_received
				}
				found[cookie(s.InetDiagMsg)] = d
			}
			udp, err := netlink.SocketDiagUDP(family)
			errs = append(errs, err)
			for _, s := range udp {
				found[cookie(s)] = newDetail(s)
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		err = fmt.Errorf("not every process could be found: %w", err)
	}
	return found, err
}

func cookie(s *netlink.Socket) uint64 { return uint64(s.ID.Cookie[1])<<32 | uint64(s.ID.Cookie[0]) }

// owner is a process that holds a socket.
type owner struct {
	pid     int
	command string
}

// findOwners looks through the files of all processes. Of several that hold one
// socket it takes the first.
func findOwners(sockets map[uint64]detail) map[uint32]owner {
	wanted := make(map[uint32]bool, len(sockets))
	for _, d := range sockets {
		wanted[d.inode] = true
	}
	owners := make(map[uint32]owner)
	// The pattern is constant: Glob cannot fail.
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range processes {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil {
			continue
		}
		files, err := os.ReadDir(p + "/fd")
		if err != nil {
			continue // it has ended, or is not ours to look at
		}
		for _, f := range files {
			to, err := os.Readlink(p + "/fd/" + f.Name())
			inode, isSocket := strings.CutPrefix(to, "socket:[")
			if err != nil || !isSocket {
				continue
			}
			n, err := strconv.ParseUint(strings.TrimSuffix(inode, "]"), 10, 32)
			if err != nil || !wanted[uint32(n)] {
				continue
			}
			if _, known := owners[uint32(n)]; !known {
				owners[uint32(n)] = owner{pid, commandOf(pid)}
			}
		}
	}
	return owners
}

// commandOf returns the short name of a process.
func commandOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
