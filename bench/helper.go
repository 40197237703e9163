package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
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

	"github.com/pentad/pentad/lab/actor"
)

// helpers are the processes that the benchmark starts from its own program: they
// run inside a lab host.
var helpers = map[string]actor.Role{
	"dial-many": dialMany,
	"dial-pair": dialPair,
	"dial-hard": dialHard,
	"accept":    accept,
	"dial-real": dialReal,
	"dial-udp":  dialUDP,
	"greet":     greet,
	"answer":    answer,
	"keep":      keep,
	"ask":       ask,
	"hold":      hold,
	"slam":      slam,
	"toll":      takeToll,
	"source":    source,
	"through":   through,
}

// vipOf is the VIP of the n-th of many services.
func vipOf(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96 + byte(n>>16), byte(n >> 8), byte(n)}), 80)
}

// dialMany connects a fresh TCP socket to a VIP drawn by lot from the first N,
// ROUNDS times, and closes it before anybody could answer; only the program is
// measured.
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
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
		unix.Close(fd)
		if err != unix.EINPROGRESS {
			return fmt.Errorf("connect to %s: %v, want one that is under way", to, err)
		}
	}
	return nil
}

// dialPair connects to two addresses in turn and closes, ROUNDS times each, and
// prints the medians in nanoseconds. Taking turns within one process, whatever
// happens on the machine happens to both.
func dialPair(args []string) error {
	rounds, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	var to [2]*unix.SockaddrInet4
	for i := range to {
		a, err := netip.ParseAddrPort(args[i])
		if err != nil {
			return err
		}
		to[i] = &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	times := [2][]int64{make([]int64, rounds), make([]int64, rounds)}
	for i := range 2 * rounds {
		// In fours: first, second, second, first. Neither always comes after the other.
		which := (i + i/2) % 2
		began := time.Now()
		if err := dialAndReset(to[which]); err != nil {
			return fmt.Errorf("connect to %s: %w", args[which], err)
		}
		times[which][i/2] = int64(time.Since(began))
	}
	for _, t := range times {
		slices.Sort(t)
	}
	fmt.Println(times[0][rounds/2], times[1][rounds/2])
	return nil
}

// dialAndReset connects and closes with a reset, which leaves no TIME_WAIT behind,
// so that ports do not run out.
func dialAndReset(to *unix.SockaddrInet4) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return err
	}
	return unix.Connect(fd, to)
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

// accept takes connections and closes each when its client has done so: who closes
// first, and without a word, is a server that has failed.
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
		go func() {
			_, _ = c.Read(make([]byte, 1))
			c.Close()
		}()
	}
}

// serve handles every connection to an address.
func serve(address string, handle func(net.Conn)) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go handle(c)
	}
}

// greet says something to whoever connects.
func greet(args []string) error {
	return serve(args[0], func(c net.Conn) {
		fmt.Fprintln(c, "hello")
		_, _ = io.Copy(io.Discard, c)
		c.Close()
	})
}

// keep keeps connections open.
func keep(args []string) error {
	return serve(args[0], func(c net.Conn) {
		_, _ = io.Copy(io.Discard, c)
		c.Close()
	})
}

// answer answers one request per connection after a delay, with the address at which
// it was asked.
func answer(args []string) error {
	delay, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	return serve(args[0], func(c net.Conn) {
		defer c.Close()
		if _, err := c.Read(make([]byte, 100)); err != nil {
			return
		}
		time.Sleep(delay)
		fmt.Fprint(c, args[0])
	})
}

// ask makes requests, one a connection, from N clients for a while, and prints the
// 99th percentile of their times in milliseconds. Clients pause, so that neither
// they nor a proxy run out of processor.
func ask(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	length, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var all []float64
	var failed error
	var tasks sync.WaitGroup
	end := time.Now().Add(length)
	for range n {
		tasks.Go(func() {
			for time.Now().Before(end) {
				time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
				began := time.Now()
				err := request(args[0])
				mu.Lock()
				all = append(all, float64(time.Since(began).Microseconds())/1000)
				failed = cmp.Or(failed, err)
				mu.Unlock()
			}
		})
	}
	tasks.Wait()
	if failed != nil {
		return failed
	}
	slices.Sort(all)
	fmt.Println(all[len(all)*99/100])
	return nil
}

func request(address string) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintln(c, "please"); err != nil {
		return err
	}
	_, err = io.ReadAll(c)
	return err
}

// hold makes N connections, says so, waits until all have ended, and prints when,
// in Unix nanoseconds.
func hold(args []string) error {
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	sa := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, sa); err != nil {
			return err
		}
		if err := unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(fd)}); err != nil {
			return err
		}
	}
	fmt.Println("holding")
	events := make([]unix.EpollEvent, 1024)
	for n > 0 {
		got, err := unix.EpollWait(poll, events, -1)
		if err != nil && err != unix.EINTR {
			return err
		}
		n -= max(0, got)
	}
	fmt.Println(time.Now().UnixNano())
	return nil
}

// dialReal connects fresh TCP sockets to VIPs drawn by lot from the first N, or
// with N 0 to the address given, ROUNDS times; a server answers each.
func dialReal(args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	rounds, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(3, 4))
	for range rounds {
		to := netip.MustParseAddrPort(args[2])
		if n > 0 {
			to = vipOf(random.IntN(n))
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
			return fmt.Errorf("connect to %s: %w", to, err)
		}
		unix.Close(fd)
	}
	return nil
}

// dialUDP connects and closes UDP sockets on N threads until its standard input
// ends, at a rate for each, or with 0 as fast as it can. It prints how many.
func dialUDP(args []string) error {
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	threads, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	rate, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		close(done)
	}()
	var made atomic.Int64
	var tasks sync.WaitGroup
	for range threads {
		tasks.Go(func() {
			sa := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
			began := time.Now()
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				if rate > 0 && i%32 == 0 {
					time.Sleep(time.Until(began.Add(time.Duration(i) * time.Second / time.Duration(rate))))
				}
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
				if err != nil {
					return
				}
				_ = unix.Connect(fd, sa)
				unix.Close(fd)
				made.Add(1)
			}
		})
	}
	tasks.Wait()
	fmt.Println(made.Load())
	return nil
}

// slam accepts and resets.
func slam(args []string) error {
	return serve(args[0], func(c net.Conn) {
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	})
}

// How a toll is taken: by so many clients, with pauses, so that neither they nor a
// proxy run out of processor; and how long each waits for an answer.
const (
	tollClients  = 16
	tollPause    = 20 * time.Millisecond
	tollPatience = 600 * time.Millisecond
)

// takeToll makes requests, one a connection, for a while, and prints which part of
// them went to one server, or was answered by none, in percent: of those that began
// in the first second, and of those after it.
func takeToll(args []string) error {
	length, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var tasks sync.WaitGroup
	var all, bad [2]int
	start := time.Now()
	for range tollClients {
		tasks.Go(func() {
			for time.Since(start) < length {
				time.Sleep(rand.N(tollPause))
				late := 0
				if time.Since(start) > time.Second {
					late = 1
				}
				who, err := whoAnswers(args[0])
				mu.Lock()
				all[late]++
				if err != nil || who == args[2] {
					bad[late]++
				}
				mu.Unlock()
			}
		})
	}
	tasks.Wait()
	return json.NewEncoder(os.Stdout).Encode(toll{
		First: 100 * float64(bad[0]) / float64(max(1, all[0])),
		After: 100 * float64(bad[1]) / float64(max(1, all[1])),
	})
}

// whoAnswers makes one request as a client that has an address by lot, and says what
// came.
func whoAnswers(address string) (string, error) {
	from := net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(rand.IntN(256)), byte(rand.IntN(256))}), 0))
	d := net.Dialer{LocalAddr: from, Timeout: tollPatience}
	c, err := d.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(tollPatience)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprint(c, "who?"); err != nil {
		return "", err
	}
	who, err := io.ReadAll(c)
	if err == nil && len(who) == 0 {
		err = io.ErrUnexpectedEOF
	}
	return string(who), err
}
