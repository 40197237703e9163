package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab/actor"
)

// helpers make this program a client or a server on a host of the lab.
var helpers = map[string]actor.Role{
	"serve": serve, "latency": latency, "rate": rate, "stream": stream, "watch": watch, "hammer": hammer,
}

// The ports of the servers.
const (
	whoPort  = 8080 // says which address was reached
	sinkPort = 8081 // takes all that it gets
	podPort  = 8082 // of servers that come and go
)

// serve answers at every address of the host, and at others that are opened and
// closed by lines on standard input.
func serve([]string) error {
	for port, handle := range map[int]func(net.Conn){whoPort: sayWho, sinkPort: sink} {
		l, err := listen(fmt.Sprintf("0.0.0.0:%d", port))
		if err != nil {
			return err
		}
		go accept(l, handle)
	}
	fmt.Println("ready")
	open := make(map[string]net.Listener)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		verb, address, _ := strings.Cut(lines.Text(), " ")
		if verb == "close" {
			open[address].Close()
			delete(open, address)
		} else {
			l, err := listen(address)
			if err != nil {
				return err
			}
			open[address] = l
			go accept(l, sayWho)
		}
		fmt.Println(verb, address)
	}
	return nil
}

func listen(address string) (net.Listener, error) {
	var c net.ListenConfig
	c.SetMultipathTCP(false)
	return c.Listen(context.Background(), "tcp", address)
}

func accept(l net.Listener, handle func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go handle(c)
	}
}

func sayWho(c net.Conn) {
	defer c.Close()
	fmt.Fprintln(c, c.LocalAddr().(*net.TCPAddr).IP)
}

func sink(c net.Conn) {
	defer c.Close()
	if err := pin(receiverCPU); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	_, _ = io.Copy(io.Discard, c)
}

// latency reads addresses up to an empty line, and then, for every line with a
// COUNT, connects so many times to addresses drawn by lot and prints the median of
// connect(2), in nanoseconds.
func latency([]string) error {
	var to []netip.AddrPort
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() && lines.Text() != "" {
		a, err := netip.ParseAddrPort(lines.Text())
		if err != nil {
			return err
		}
		to = append(to, a)
	}
	for lines.Scan() {
		count, err := strconv.Atoi(lines.Text())
		if err != nil {
			return err
		}
		took := make([]int64, count)
		for i := range took {
			if took[i], err = timed(to[rand.IntN(len(to))]); err != nil {
				return err
			}
		}
		slices.Sort(took)
		fmt.Println(took[len(took)/2])
	}
	return nil
}

// timed connects once and returns how long connect(2) took, in nanoseconds.
func timed(to netip.AddrPort) (int64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	began := time.Now()
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", to, err)
	}
	// No TIME_WAIT, which would use up the ports.
	return took.Nanoseconds(), unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// rate reads lines "ADDRESS CLIENTS DURATION", connects to ADDRESS from CLIENTS threads
// for a DURATION, reads each answer, and prints how many times it did in a second.
func rate([]string) error {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		words := strings.Fields(lines.Text())
		to, err1 := netip.ParseAddrPort(words[0])
		clients, err2 := strconv.Atoi(words[1])
		lasts, err3 := time.ParseDuration(words[2])
		if err := errors.Join(err1, err2, err3); err != nil {
			return err
		}
		v, err := rateOf(to, clients, lasts)
		if err != nil {
			return err
		}
		fmt.Println(v)
	}
	return nil
}

func rateOf(to netip.AddrPort, clients int, lasts time.Duration) (float64, error) {
	var done atomic.Int64
	var failed atomic.Value
	var all sync.WaitGroup
	began := time.Now()
	for range clients {
		all.Go(func() {
			for time.Since(began) < lasts {
				if err := once(to); err != nil {
					failed.Store(err)
					return
				}
				done.Add(1)
			}
		})
	}
	all.Wait()
	if err, ok := failed.Load().(error); ok {
		return 0, err
	}
	return float64(done.Load()) / time.Since(began).Seconds(), nil
}

func once(to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
		return err
	}
	var b [64]byte
	if _, err := unix.Read(fd, b[:]); err != nil {
		return err
	}
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// Sender and receiver of a stream have a processor each, if there are two: where the
// scheduler puts them decides about more than what is measured.
const (
	senderCPU   = 0
	receiverCPU = 1
)

// pin keeps the goroutine on one processor, for as long as it lives.
func pin(cpu int) error {
	if runtime.NumCPU() < 2 {
		return nil
	}
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}

// stream reads lines "ADDRESS DURATION", writes to ADDRESS for a DURATION and prints
// Gbit/s, from the first byte until the server has taken the last.
func stream([]string) error {
	if err := pin(senderCPU); err != nil {
		return err
	}
	b := make([]byte, 256<<10)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		address, text, _ := strings.Cut(lines.Text(), " ")
		lasts, err := time.ParseDuration(text)
		if err != nil {
			return err
		}
		v, err := streamTo(address, lasts, b)
		if err != nil {
			return err
		}
		fmt.Println(v)
	}
	return nil
}

func streamTo(address string, lasts time.Duration, b []byte) (float64, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", address)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	n, began := 0, time.Now()
	for time.Since(began) < lasts {
		k, err := c.Write(b)
		if err != nil {
			return 0, err
		}
		n += k
	}
	// The server closes when it has read everything.
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return 0, err
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		return 0, err
	}
	return float64(n) * 8 / 1e9 / time.Since(began).Seconds(), nil
}

// watch reads "ADDRESS:PORT SERVER" and prints when SERVER first answered there, in
// Unix nanoseconds.
func watch([]string) error {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		address, server, _ := strings.Cut(lines.Text(), " ")
		for {
			who, err := ask(address)
			if err == nil && (who == server || server == "*") {
				break
			}
			// The clients must leave a processor to what they wait for.
			time.Sleep(500 * time.Microsecond)
		}
		fmt.Println(time.Now().UnixNano())
	}
	return nil
}

func ask(address string) (string, error) {
	d := net.Dialer{Timeout: time.Second}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.SetDeadline(time.Now().Add(time.Second))
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}

// hammer connects to ADDRESS without a pause until standard input ends, and prints
// how many connections there were, how many failed, when the last failure began, in
// Unix nanoseconds, and why.
func hammer(args []string) error {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	count, failed, last, why := 0, 0, int64(0), "-"
	for {
		select {
		case <-ended:
			fmt.Println(count, failed, last, strings.ReplaceAll(why, " ", "_"))
			return nil
		default:
		}
		began := time.Now()
		_, err := ask(args[0])
		count++
		if err != nil && !errors.Is(err, io.EOF) {
			failed++
			last, why = began.UnixNano(), err.Error()
		}
	}
}
