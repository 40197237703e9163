// Command web is what runs in the pods of the tests. Without an argument it holds
// the network of a pod and does nothing. With the argument serve it is a server: over
// TCP, port 8080, it reads a line and answers:
//
//	who             its name and the address of the client
//	ask ADDRESS     what the server at the address answers to who
//	unready         its name; from then on it is not ready
//
// Port 8081 takes connections while it is ready. Told to end (SIGTERM) it serves on
// until it is killed or three seconds have passed.
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		ended := make(chan os.Signal, 1)
		signal.Notify(ended, syscall.SIGTERM)
		<-ended
		return
	}
	name, err := os.Hostname()
	if err != nil {
		panic(err)
	}
	ready, err := net.Listen("tcp", ":8081")
	if err != nil {
		panic(err)
	}
	go serve(ready, func(net.Conn, string) string { return "ready" }, false)
	l, err := net.Listen("tcp", ":8080")
	if err != nil {
		panic(err)
	}
	go serve(l, func(c net.Conn, line string) string {
		verb, address, _ := strings.Cut(line, " ")
		switch verb {
		case "ask":
			return ask(address)
		case "unready":
			ready.Close()
		}
		return fmt.Sprint(name, " ", c.RemoteAddr().(*net.TCPAddr).IP)
	}, true)
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	<-ended
	time.Sleep(3 * time.Second)
}

func serve(l net.Listener, answer func(net.Conn, string) string, reads bool) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			line := ""
			if reads {
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				if line, err = bufio.NewReader(c).ReadString('\n'); err != nil {
					return
				}
			}
			fmt.Fprintln(c, answer(c, strings.TrimSpace(line)))
		}()
	}
}

func ask(address string) string {
	c, err := net.DialTimeout("tcp", address, 2*time.Second)
	if err != nil {
		return "error " + err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	fmt.Fprintln(c, "who")
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return "error " + err.Error()
	}
	return strings.TrimSpace(line)
}
