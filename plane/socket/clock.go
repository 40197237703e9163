package socket

import (
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// clock tells the time as the programs do: in jiffies.
type clock struct {
	hz        uint32
	low, high *ebpf.Program // return the halves of jiffies
}

// newClock loads two programs of three instructions. The tick is what
// CLOCK_MONOTONIC_COARSE resolves (clock_getres(2)).
func newClock() (*clock, error) {
	var tick unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil {
		return nil, fmt.Errorf("length of a jiffy: %w", err)
	}
	c := &clock{hz: uint32((int64(time.Second) + tick.Nano()/2) / tick.Nano())}
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

func (c *clock) close() {
	if c == nil {
		return
	}
	c.low.Close()
	c.high.Close()
}

// now returns the kernel's jiffies.
func (c *clock) now() (uint64, error) {
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

// duration turns jiffies into time.
func (c *clock) duration(jiffies uint64) time.Duration {
	return time.Duration(jiffies) * time.Second / time.Duration(c.hz)
}

// jiffies turns time into jiffies.
func (c *clock) jiffies(d time.Duration) uint64 {
	return uint64(d) * uint64(c.hz) / uint64(time.Second)
}
