package proxy

import (
	"bytes"
	"strings"
	"testing"
)

// Whatever the first words of a client are: a name that is found in them is one.
func FuzzSniff(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: www.corp.test:8080\r\n\r\n"))
	f.Add([]byte("\x16\x03\x01\x00\x05hello"))
	f.Fuzz(func(t *testing.T, said []byte) {
		for _, name := range []string{serverName(bytes.NewReader(said)), httpHost(bytes.NewReader(said))} {
			if checkHost(name) && (strings.ContainsAny(name, " \r\n\x00") || len(name) > 255) {
				t.Fatalf("%q was taken for a name", name)
			}
		}
	})
}

// Whatever a configuration of ssh says: looking for a host ends.
func FuzzSSHConfig(f *testing.F) {
	f.Add("Host a\n HostName b\n Port 22\n ProxyJump u@c:2,d\n", "a")
	f.Add("Host *\n ProxyJump a\n", "a")
	f.Fuzz(func(t *testing.T, text, host string) {
		c, err := parseSSHConfig(strings.NewReader(text))
		if err != nil {
			return
		}
		if hops, err := c.hops(host); err == nil && (len(hops) == 0 || len(hops) > maxJumps) {
			t.Fatalf("%d hops", len(hops))
		}
	})
}
