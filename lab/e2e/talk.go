package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// repeat serves TCP and UDP at addresses: it answers each line, and each datagram, with
// its name and the address that it sees.
func repeat(args []string) error { return serveBoth(args[0], args[1:], repeatTCP, repeatUDP) }

func repeatTCP(l net.Listener, name string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			for lines := bufio.NewScanner(c); lines.Scan(); {
				if _, err := fmt.Fprintf(c, "%s %s\n", name, hostOf(c.RemoteAddr())); err != nil {
					return
				}
			}
		}()
	}
}

func repeatUDP(c net.PacketConn, name string) error {
	b := make([]byte, 65536)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(fmt.Appendf(nil, "%s %s %d", name, hostOf(from), n), from); err != nil {
			return err
		}
	}
}

const patience = 3 * time.Second

// talk has N connections to each address, on which it asks all the time, and says which
// of them broke, of whom.
func talk(args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	var first sync.WaitGroup
	for _, to := range args[1:] {
		for range n {
			first.Add(1)
			go talkTo(to, first.Done)
		}
	}
	first.Wait()
	fmt.Println("talking")
	select {}
}

func talkTo(to string, begun func()) {
	name := "nobody"
	var once sync.Once
	defer once.Do(begun)
	c, err := net.DialTimeout("tcp", to, patience)
	if err != nil {
		fmt.Printf("broken: %s: %v\n", name, err)
		return
	}
	defer c.Close()
	for answers := bufio.NewReader(c); ; time.Sleep(20 * time.Millisecond) {
		_ = c.SetDeadline(time.Now().Add(patience))
		_, err := io.WriteString(c, "?\n")
		if err == nil {
			var line string
			if line, err = answers.ReadString('\n'); err == nil {
				name, _, _ = strings.Cut(line, " ")
				once.Do(begun)
				continue
			}
		}
		fmt.Printf("broken: %s: %v\n", name, err)
		return
	}
}

// askOften asks an address N times, each by a connection or socket of its own, and
// prints the answers, a line each.
func askOften(args []string) error {
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	for range n {
		c, err := net.DialTimeout(args[0], args[1], patience)
		if err != nil {
			fmt.Println("failed:", err)
			continue
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(c, "?\n")
		b := make([]byte, 1500)
		n, err := c.Read(b)
		c.Close()
		if err != nil {
			fmt.Println("failed:", err)
			continue
		}
		fmt.Println(strings.TrimSpace(string(b[:n])))
	}
	return nil
}
