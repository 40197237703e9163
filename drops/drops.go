// Package drops tells which packets the kernel drops, and why: by the reasons that it
// gives itself (enum skb_drop_reason, Linux 5.17), read of its type information, so that
// those of newer kernels have their names, too.
//
// Nothing runs while nobody looks.
package drops

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// ErrNotSupported says that this kernel does not tell why it drops packets.
var ErrNotSupported = errors.New("this kernel does not say why it drops packets: that takes Linux 5.17, with type information (BTF)")

// Drop is packets that were dropped for the same reason on the same way.
type Drop struct {
	Reason    string     // as the kernel calls it, without its prefix: "no_socket"
	Words     string     // what that means; empty: the name says it, or nobody knows
	From, To  netip.Addr // not valid: no packet of IP
	Port      uint16     // of the destination; 0: none
	Protocol  uint8      // of IP (IANA); 0: not known
	Interface uint32     // index in its network namespace; 0: none
	Namespace uint32     // inode of the network namespace; 0: not known
	Packets   uint64
	Bytes     uint64
	Last      time.Time
}

// Counter counts drops from Open to Close.
type Counter struct {
	objects kernelObjects
	link    link.Link
	reasons map[uint32]string
	booted  time.Time
}

// Open begins to count drops of packets that come from, or go to, one of some addresses;
// with everybody, of all packets.
func Open(addresses []netip.Addr, everybody bool) (*Counter, error) {
	reasons, err := readReasons()
	if err != nil {
		return nil, err
	}
	spec, err := loadKernel()
	if err != nil {
		return nil, err
	}
	if err := spec.Variables["everybody"].Set(everybody); err != nil {
		return nil, err
	}
	for value, name := range reasons {
		if name == "consumed" {
			if err := spec.Variables["consumed"].Set(int32(value)); err != nil {
				return nil, err
			}
		}
	}
	c := &Counter{reasons: reasons, booted: bootTime()}
	if err := spec.LoadAndAssign(&c.objects, nil); err != nil {
		return nil, fmt.Errorf("the program that counts drops: %w", err)
	}
	if err := c.begin(addresses); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Counter) begin(addresses []netip.Addr) (err error) {
	for _, a := range addresses {
		if err := c.objects.Ours.Put(toKernel(a), uint8(1)); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	c.link, err = link.AttachTracing(link.TracingOptions{Program: c.objects.OnDrop})
	if err != nil {
		return fmt.Errorf("drops cannot be counted: %w", err)
	}
	return nil
}

// Close ends it.
func (c *Counter) Close() {
	if c.link != nil {
		c.link.Close()
	}
	c.objects.Close()
}

// Read returns what was dropped since Open, most packets first.
func (c *Counter) Read() ([]Drop, error) {
	var all []Drop
	var what kernelWhat
	var n kernelCount
	entries := c.objects.Counts.Iterate()
	for entries.Next(&what, &n) {
		all = append(all, c.drop(&what, &n))
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("drops: %w", err)
	}
	slices.SortStableFunc(all, func(a, b Drop) int {
		switch {
		case a.Packets > b.Packets:
			return -1
		case a.Packets < b.Packets:
			return 1
		}
		return strings.Compare(a.Reason, b.Reason)
	})
	return all, nil
}

// Totals returns how many packets were dropped for each reason, by the name of the reason,
// and of how many the addresses are not known because there were too many.
func (c *Counter) Totals() (byReason map[string]uint64, others uint64, err error) {
	byReason = make(map[string]uint64)
	for i := range c.objects.Totals.MaxEntries() {
		n, err := sum(c.objects.Totals, i)
		if err != nil {
			return nil, 0, err
		}
		if n > 0 {
			byReason[c.name(i)] += n
		}
	}
	others, err = sum(c.objects.Homeless, 0)
	return byReason, others, err
}

func sum(m *ebpf.Map, at uint32) (n uint64, err error) {
	var each []uint64
	if err := m.Lookup(at, &each); err != nil {
		return 0, fmt.Errorf("drops: %w", err)
	}
	for _, x := range each {
		n += x
	}
	return n, nil
}

func (c *Counter) drop(w *kernelWhat, n *kernelCount) Drop {
	d := Drop{
		Reason: c.name(w.Reason), Port: w.Port>>8 | w.Port<<8, Protocol: w.Protocol, Interface: w.Interface, Namespace: w.Namespace,
		Packets: n.Packets, Bytes: n.Bytes, Last: c.booted.Add(time.Duration(n.Last)),
	}
	d.Words = words[d.Reason]
	if w.Family != 0 {
		d.From, d.To = fromKernel(w.From), fromKernel(w.To)
	}
	return d
}

func (c *Counter) name(reason uint32) string {
	if name, known := c.reasons[reason]; known {
		return name
	}
	// The upper half is the subsystem that has reasons of its own (net/dropreason-core.h).
	return fmt.Sprintf("reason %d of subsystem %d", reason&0xffff, reason>>16)
}

// readReasons reads the kernel's names of its reasons.
func readReasons() (map[uint32]string, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	var enum *btf.Enum
	if err := spec.TypeByName("skb_drop_reason", &enum); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	names := make(map[uint32]string, len(enum.Values))
	for _, v := range enum.Values {
		name, isDrop := strings.CutPrefix(v.Name, "SKB_DROP_REASON_")
		if !isDrop {
			name = strings.TrimPrefix(name, "SKB_") // SKB_CONSUMED
		}
		names[uint32(v.Value)] = strings.ToLower(name)
	}
	return names, nil
}

func bootTime() time.Time {
	var now unix.Timespec
	// CLOCK_BOOTTIME is one of every kernel.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	return time.Now().Add(-time.Duration(now.Nano()))
}

// toKernel and fromKernel write IPv4 as ::ffff:a.b.c.d.
func toKernel(a netip.Addr) [16]byte { return a.As16() }

func fromKernel(a kernelAddress) netip.Addr {
	var raw [16]byte
	for i, w := range a.Word {
		raw[4*i], raw[4*i+1], raw[4*i+2], raw[4*i+3] = byte(w), byte(w>>8), byte(w>>16), byte(w>>24)
	}
	return netip.AddrFrom16(raw).Unmap()
}
