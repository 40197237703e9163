package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"
)

// askWho asks a VIP who serves it, a number of times, and prints the answers.
func askWho(args []string) error {
	var n int
	if _, err := fmt.Sscan(args[1], &n); err != nil {
		return err
	}
	d := net.Dialer{Timeout: 5 * time.Second}
	if len(args) > 2 {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(args[2]))
	}
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for range n {
		c, err := d.Dial("tcp", args[0])
		if err != nil {
			fmt.Fprintln(out, errors.Unwrap(errors.Unwrap(err)))
			continue
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		c.Close()
		if err != nil {
			return err
		}
		fmt.Fprint(out, line)
	}
	return nil
}

// watch makes N connections to each address and prints, for each that ends, the
// address that was named and the error.
func watch(args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	ended := make(chan string)
	for _, address := range args[1:] {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		for range n {
			c, err := net.Dial("tcp", to.String())
			if err != nil {
				return err
			}
			go func() { ended <- fmt.Sprintf("%s %s", to, endOf(c)) }()
		}
	}
	fmt.Println("watching")
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}()
	for line := range ended {
		fmt.Println(line)
	}
	return nil
}

// endOf waits for the end of a connection and returns how it has ended.
func endOf(c net.Conn) string {
	_, err := io.Copy(io.Discard, c)
	var errno syscall.Errno
	switch {
	case err == nil:
		return "closed"
	case errors.As(err, &errno):
		return errno.Error()
	}
	return err.Error()
}

// tell serves TCP and UDP at addresses: it tells each client its own name, and the
// address that it sees of it.
func tell(args []string) error { return serveBoth(args[0], args[1:], tellTCP, tellUDP) }

// serveBoth serves TCP and UDP at addresses.
func serveBoth(name string, addresses []string, tcp func(net.Listener, string) error, udp func(net.PacketConn, string) error) error {
	failed := make(chan error)
	for _, at := range addresses {
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		c, err := net.ListenPacket("udp", at)
		if err != nil {
			return err
		}
		go func() { failed <- tcp(l, name) }()
		go func() { failed <- udp(c, name) }()
	}
	fmt.Println("ready")
	return <-failed
}

func tellTCP(l net.Listener, name string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintf(c, "%s sees %s", name, hostOf(c.RemoteAddr()))
		c.Close()
	}
}

func tellUDP(c net.PacketConn, name string) error {
	b := make([]byte, 1500)
	for {
		_, from, err := c.ReadFrom(b)
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(fmt.Appendf(nil, "%s sees %s", name, hostOf(from)), from); err != nil {
			return err
		}
	}
}

func hostOf(a net.Addr) string {
	h, _, _ := net.SplitHostPort(a.String())
	return h
}

// beTold asks an address, over a network, by one socket that takes answers of nobody
// else, and prints what it is told.
func beTold(args []string) error {
	const patience = 5 * time.Second
	c, err := net.DialTimeout(args[0], args[1], patience)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if args[0] == "udp" {
		if _, err := io.WriteString(c, "who am I?"); err != nil {
			return err
		}
	}
	b := make([]byte, 1500)
	n, err := c.Read(b)
	if err != nil {
		return err
	}
	fmt.Print(string(b[:n]))
	return nil
}
