package actor

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"time"
)

// Server answers connections and datagrams with who it is.
type Server struct {
	Name  string        // empty: the address that was asked
	Delay time.Duration // of an answer over TCP
	Sees  bool          // the client's address follows the name
	Echo  bool          // over UDP what was sent follows it
	MPTCP bool          // is spoken, too
	Hangs bool          // up, without waiting for the client to do so
}

// who is the role of a server: NAME ADDRESS...
func who(args []string) error {
	var s Server
	flags := flag.NewFlagSet("who", flag.ContinueOnError)
	flags.DurationVar(&s.Delay, "delay", 0, "")
	flags.BoolVar(&s.Sees, "sees", false, "")
	flags.BoolVar(&s.Echo, "echo", false, "")
	flags.BoolVar(&s.MPTCP, "mptcp", false, "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	s.Name = flags.Arg(0)
	if _, err := s.Listen(flags.Args()[1:]...); err != nil {
		return err
	}
	fmt.Println("ready")
	select {}
}

// Listen serves at addresses, in goroutines, until what it returns is closed.
func (s Server) Listen(addresses ...string) (open []io.Closer, err error) {
	var config net.ListenConfig
	config.SetMultipathTCP(s.MPTCP)
	for _, a := range addresses {
		l, err := config.Listen(context.Background(), "tcp", a)
		if err != nil {
			return open, err
		}
		open = append(open, l)
		go s.serveTCP(l, cmp.Or(s.Name, a))
		u, err := net.ListenPacket("udp", a)
		if err != nil {
			return open, err
		}
		open = append(open, u)
		go s.serveUDP(u, cmp.Or(s.Name, a))
	}
	return open, nil
}

func (s Server) serveTCP(l net.Listener, name string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			time.Sleep(s.Delay)
			text := name
			if s.Sees {
				text += " " + c.RemoteAddr().(*net.TCPAddr).IP.String()
			}
			fmt.Fprintln(c, text)
			if !s.Hangs {
				// Until the client ends: it may look at the connection.
				_, _ = io.Copy(io.Discard, c)
			}
		}()
	}
}

func (s Server) serveUDP(u net.PacketConn, name string) {
	b := make([]byte, 1500)
	for {
		n, from, err := u.ReadFrom(b)
		if err != nil {
			return
		}
		text := name
		switch {
		case s.Sees:
			text += " " + from.(*net.UDPAddr).IP.String() + "\n"
		case s.Echo:
			text += " " + string(b[:n])
		}
		_, _ = u.WriteTo([]byte(text), from)
	}
}
