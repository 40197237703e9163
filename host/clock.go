package host

import (
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Clock tells the time as programs of eBPF do: in jiffies. Its methods may be called
// from several goroutines.
type Clock struct {
	Hz        uint32        // jiffies in a second
	low, high *ebpf.Program // return the halves of jiffies
}

// NewClock loads two programs of three instructions. The tick is what
// CLOCK_MONOTONIC_COARSE resolves (clock_getres(2)).
func NewClock() (*Clock, error) {
	var tick unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil {
		return nil, fmt.Errorf("length of a jiffy: %w", err)
	}
	c := &Clock{Hz: uint32((int64(time.Second) + tick.Nano()/2) / tick.Nano())}
	var err error
	if c.low, err = jiffiesProgram(0); err != nil {
		return nil, err
	}
	if c.high, err = jiffiesProgram(32); err != nil {
		c.low.Close()
		return nil, err
	}
	return c, nil
}

func jiffiesProgram(shift int32) (*ebpf.Program, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "jiffies", Type: ebpf.SocketFilter, License: "GPL",
		Instructions: asm.Instructions{asm.FnJiffies64.Call(), asm.RSh.Imm(asm.R0, shift), asm.Return()},
	})
	if err != nil {
		return nil, fmt.Errorf("program that reads jiffies: %w", err)
	}
	return p, nil
}

// Close lets go of the kernel; it may be called for nil.
func (c *Clock) Close() {
	if c == nil {
		return
	}
	c.low.Close()
	c.high.Close()
}

// Now returns the kernel's jiffies.
func (c *Clock) Now() (uint64, error) {
	for {
		before, err := run(c.high)
		if err != nil {
			return 0, err
		}
		low, err := run(c.low)
		if err != nil {
			return 0, err
		}
		after, err := run(c.high)
		if err != nil || before == after {
			return uint64(after)<<32 | uint64(low), err
		}
	}
}

func run(p *ebpf.Program) (uint32, error) {
	packet := make([]byte, 14) // the kernel wants an Ethernet header
	n, err := p.Run(&ebpf.RunOptions{Data: packet})
	if err != nil {
		return 0, fmt.Errorf("reading jiffies: %w", err)
	}
	return n, nil
}

// Duration turns jiffies into time.
func (c *Clock) Duration(jiffies uint64) time.Duration {
	return time.Duration(jiffies) * time.Second / time.Duration(c.Hz)
}

// Jiffies turns time into jiffies.
func (c *Clock) Jiffies(d time.Duration) uint64 {
	return uint64(d) * uint64(c.Hz) / uint64(time.Second)
}
