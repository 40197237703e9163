package director_test

import (
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/pentad/pentad/lab/actor"
)

var clients = map[string]actor.Role{"big": big}

const patience = 3 * time.Second

// big asks by datagrams of a size, from several ports.
func big(args []string) error {
	size, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	for range 10 {
		c, err := net.Dial("udp", args[0])
		if err != nil {
			return err
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write(make([]byte, size)); err != nil {
			return err
		}
		b := make([]byte, 1500)
		n, err := c.Read(b)
		if err != nil {
			return err
		}
		fmt.Println(string(b[:n]))
		c.Close()
	}
	return nil
}
