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
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// helperVar makes this program a client or a server on a host of the lab.
const helperVar = "PENTAD_BENCH_KUBE"

func runHelper() bool {
	role := os.Getenv(helperVar)
	if role == "" {
		return false
	}
	roles := map[string]func([]string) error{
		"serve": serve, "latency": latency, "rate": rate, "stream": stream, "watch": watch, "hammer": hammer,
	}
	if err := roles[role](os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
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
	_, _ = io.Copy(io.Discard, c)
}

// latency connects COUNT times to addresses drawn from those on standard input,
// and prints the median of connect(2), in nanoseconds.
func latency(args []string) error {
	count, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	var to []netip.AddrPort
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		a, err := netip.ParseAddrPort(lines.Text())
		if err != nil {
			return err
		}
		to = append(to, a)
	}
	took := make([]int64, 0, count)
	for range count {
		a := to[rand.IntN(len(to))]
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		began := time.Now()
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())})
		took = append(took, time.Since(began).Nanoseconds())
		if err != nil {
			return fmt.Errorf("%s: %w", a, err)
		}
		// No TIME_WAIT, which would use up the ports.
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(fd)
	}
	slices.Sort(took)
	fmt.Println(took[len(took)/2])
	return nil
}

// rate connects to ADDRESS from CLIENTS threads for a DURATION, reads the answer, and
// prints how many times it did in a second.
func rate(args []string) error {
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	clients, err1 := strconv.Atoi(args[1])
	lasts, err2 := time.ParseDuration(args[2])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	var done atomic.Int64
	var failed atomic.Value
	var all sync.WaitGroup
	end := time.Now().Add(lasts)
	for range clients {
		all.Go(func() {
			for time.Now().Before(end) {
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
		return err
	}
	fmt.Println(float64(done.Load()) / lasts.Seconds())
	return nil
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

// stream writes to ADDRESS for a DURATION and prints Gbit/s.
func stream(args []string) error {
	lasts, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	c, err := net.Dial("tcp", args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 256<<10)
	n, began := 0, time.Now()
	for time.Since(began) < lasts {
		k, err := c.Write(b)
		if err != nil {
			return err
		}
		n += k
	}
	fmt.Println(float64(n) * 8 / 1e9 / time.Since(began).Seconds())
	return nil
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
