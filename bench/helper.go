package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// helpers are the processes that the benchmark starts from its own program: they
// run inside a lab host.
var helpers = map[string]func(args []string) error{
	"dial-many": dialMany,
	"dial-one":  dialOne,
	"dial-hard": dialHard,
	"accept":    accept,
}

// vipOf is the VIP of the n-th of many services.
func vipOf(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96 + byte(n>>16), byte(n >> 8), byte(n)}), 80)
}

// dialMany connects a fresh TCP socket to a VIP drawn by lot from the first N,
// ROUNDS times. Nothing has a route, so that connect() ends after the program
// ran; only the program is measured.
func dialMany(args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	rounds, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	offset, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range rounds {
		to := vipOf(offset + random.IntN(n))
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
		unix.Close(fd)
		if err != unix.ENETUNREACH {
			return fmt.Errorf("connect to %s: %v, want no route", to, err)
		}
	}
	return nil
}

// dialOne connects to an address and closes, ROUNDS times, and prints the median
// in nanoseconds.
func dialOne(args []string) error {
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	rounds, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	sa := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	times := make([]int64, rounds)
	for i := range times {
		began := time.Now()
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		// A reset leaves no TIME_WAIT behind, so that ports do not run out.
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
		if err := unix.Connect(fd, sa); err != nil {
			return fmt.Errorf("connect to %s: %w", to, err)
		}
		unix.Close(fd)
		times[i] = int64(time.Since(began))
	}
	slices.Sort(times)
	fmt.Println(times[rounds/2])
	return nil
}

// dialHard connects on both cores until its standard input ends. It prints how
// many connections it made, how many failed, and how many were made but not to
// the VIP.
func dialHard(args []string) error {
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		close(done)
	}()
	var made, failed, untranslated atomic.Int64
	var tasks sync.WaitGroup
	for range 4 {
		tasks.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				made.Add(1)
				if named, err := dialNamed(to); err != nil {
					failed.Add(1)
				} else if !named {
					untranslated.Add(1)
				}
			}
		})
	}
	tasks.Wait()
	fmt.Println(made.Load(), failed.Load(), untranslated.Load())
	return nil
}

// dialNamed connects and reports whether the peer's name is what was dialled.
func dialNamed(to netip.AddrPort) (bool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return false, err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
		return false, err
	}
	sa, err := unix.Getpeername(fd)
	if err != nil {
		// The server has closed already; it was there.
		return err == unix.ENOTCONN, nil
	}
	peer := sa.(*unix.SockaddrInet4)
	return peer.Addr == to.Addr().As4() && peer.Port == int(to.Port()), nil
}

// accept takes connections and closes them.
func accept(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		c.Close()
	}
}

// runHelper runs the helper that the command line names, if it names one.
func runHelper() bool {
	if len(os.Args) < 2 || helpers[os.Args[1]] == nil {
		return false
	}
	if err := helpers[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}
