package proxy

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/proxy/relay"
)

// What a configuration of ssh says of a host is what ssh would do.
func TestHops(t *testing.T) {
	t.Parallel()
	c, err := parseSSHConfig(strings.NewReader(`
Host inner
  HostName 10.0.0.5
  ProxyJump j1,u2@j2:2222
Host j1
  ProxyJump j0
Host j2
  HostName j2.example
  ProxyJump j1
Host loop
  ProxyJump pool
Host pool
  ProxyJump loop
Host none
  ProxyJump none
Host *
  User me
  Port 22
`))
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"inner":        "me@j0:22 me@j1:22 u2@j2.example:2222 me@10.0.0.5:22",
		"other":        "me@other:22",
		"other:2200":   "me@other:2200",
		"you@none":     "you@none:22",
		"[2001:db8::]": "me@[2001:db8::]:22",
		"loop":         "more than 8 hosts by ProxyJump: do they name each other?",
	} {
		hops, err := c.hops(host)
		var have []string
		for _, h := range hops {
			have = append(have, h.user+"@"+h.address())
		}
		text := strings.Join(have, " ")
		if err != nil {
			text = err.Error()
		}
		if text != want {
			t.Errorf("%s: %s, want %s", host, text, want)
		}
	}
}

// newKey makes a key of a host or a user, and its file.
func newKey(t *testing.T, dir, name, passphrase string) (ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if passphrase != "" {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(private, "", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return s, path
}

// Which key of a server is the right one.
func TestKnownHosts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old, _ := newKey(t, dir, "old", "")
	other, _ := newKey(t, dir, "other", "")
	line := knownhosts.Line([]string{"one.test"}, old.PublicKey()) // an editor has left it open
	path := filepath.Join(dir, "known_hosts")
	if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(host string, acceptNew bool, key ssh.PublicKey) error {
		t.Helper()
		l := &link{upstream: config.Upstream{KnownHosts: path, AcceptNew: acceptNew}}
		h := hop{host: host, port: 22}
		k, err := l.hostKeys(h)
		if err != nil {
			t.Fatal(err)
		}
		if k.algorithms != nil && !slices.Equal(k.algorithms, []string{ssh.KeyAlgoED25519}) {
			t.Errorf("%s is asked for keys of the types %v", host, k.algorithms)
		}
		return k.check(h.address(), &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 22}, key)
	}
	if err := check("one.test", false, old.PublicKey()); err != nil {
		t.Error(err)
	}
	if err := check("one.test", true, other.PublicKey()); err == nil || !strings.Contains(err.Error(), "shows another key") {
		t.Errorf("another key: %v", err)
	}
	if err := check("two.test", false, other.PublicKey()); err == nil || !strings.Contains(err.Error(), "add this line to "+path+": two.test ssh-ed25519 ") {
		t.Errorf("an unknown host: %v", err)
	}
	if err := check("two.test", true, other.PublicKey()); err != nil {
		t.Error(err)
	}
	for host, key := range map[string]ssh.PublicKey{"one.test": old.PublicKey(), "two.test": other.PublicKey()} {
		if err := check(host, false, key); err != nil {
			t.Errorf("%s, after a line was added: %v", host, err)
		}
	}
}

// Certificates are asked for where one is taken.
func TestCertificates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	authority, _ := newKey(t, dir, "ca", "")
	path := filepath.Join(dir, "known_hosts")
	if err := os.WriteFile(path, []byte("@cert-authority "+knownhosts.Line([]string{"*.test"}, authority.PublicKey())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	host, _ := newKey(t, dir, "host", "")
	certificate := &ssh.Certificate{Key: host.PublicKey(), CertType: ssh.HostCert, ValidPrincipals: []string{"one.test"}, ValidBefore: ssh.CertTimeInfinity}
	if err := certificate.SignCert(rand.Reader, authority); err != nil {
		t.Fatal(err)
	}
	h := hop{host: "one.test", port: 22}
	k, err := (&link{upstream: config.Upstream{KnownHosts: path}}).hostKeys(h)
	if err != nil {
		t.Fatal(err)
	}
	if len(k.algorithms) > 0 {
		t.Errorf("only %v are asked for", k.algorithms)
	}
	if err := k.check(h.address(), &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 22}, certificate); err != nil {
		t.Error(err)
	}
}

// How we prove who we are.
func TestAuthentication(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, plain := newKey(t, dir, "plain", "")
	_, locked := newKey(t, dir, "locked", "hunter2")
	_, loose := newKey(t, dir, "loose", "")
	if err := os.Chmod(loose, 0o644); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "agent")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ask := func(u config.Upstream, identities ...string) string {
		methods, done, err := (&link{upstream: u}).authentication(hop{identities: identities})
		done()
		if err != nil {
			return err.Error()
		}
		return fmt.Sprint(len(methods))
	}
	for _, c := range []struct {
		what       string
		upstream   config.Upstream
		identities []string
		want       string
	}{
		{"a key", config.Upstream{}, []string{plain}, "1"},
		{"one of two has a passphrase", config.Upstream{}, []string{locked, plain}, "1"},
		{"all have", config.Upstream{}, []string{locked}, "has a passphrase; an ssh-agent can hold it"},
		{"the agent may hold it", config.Upstream{Agent: socket, Identities: []string{locked}}, []string{locked}, "1"},
		{"it was named", config.Upstream{Identities: []string{locked}}, []string{locked}, "has a passphrase"},
		{"others can read it", config.Upstream{}, []string{loose}, "others may not have any right to it"},
		{"it is not there", config.Upstream{}, []string{filepath.Join(dir, "none")}, "no such file"},
		{"no agent", config.Upstream{Agent: filepath.Join(dir, "none")}, []string{plain}, "ssh-agent: "},
	} {
		if have := ask(c.upstream, c.identities...); !strings.Contains(have, c.want) {
			t.Errorf("%s: %s, want %s", c.what, have, c.want)
		}
	}
}

// Who waits for a link does not wait longer than he wants, and it is made once for all.
func TestLinkIsShared(t *testing.T) {
	t.Parallel()
	dials, release := 0, make(chan struct{})
	l := &link{upstream: config.Upstream{Address: "one.test", SSHConfig: "/nowhere"}, log: slog.New(slog.DiscardHandler)}
	l.before = func(ctx context.Context, _ target) (relay.Conn, error) {
		dials++
		<-release
		return nil, errors.New("nobody is there")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := l.get(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("who has no time meets with %v", err)
	}
	ended := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := l.get(t.Context())
			ended <- err
		}()
	}
	close(release)
	for range 2 {
		if err := <-ended; err == nil || !strings.Contains(err.Error(), "nobody is there") {
			t.Errorf("who waits meets with %v", err)
		}
	}
	l.close()
	if _, err := l.get(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after its end: %v", err)
	}
	if dials > 3 { // once each that did not find the attempt of another
		t.Errorf("it was tried %d times", dials)
	}
}
