package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	sshconfig "github.com/kevinburke/ssh_config"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/proxy/relay"
	"github.com/pentad/pentad/proxy/socks5"
)

// link is the connection to one SSH server, which all that goes through it shares. It is
// made when somebody needs it, and anew after it was lost.
type link struct {
	upstream config.Upstream
	chain    chain
	before   dialer // reaches the server
	log      *slog.Logger

	mu      sync.Mutex
	client  *ssh.Client   // nil: there is none
	gone    chan struct{} // closed when that is lost, and it is known why
	making  *attempt      // nil: nobody is making one
	changed time.Time     // when the client came or went
	err     error         // why there is none
	closed  bool
}

// attempt is one to make a connection, for which several may wait.
type attempt struct {
	done   chan struct{}
	client *ssh.Client
	err    error
}

// maxHandshake bounds an attempt.
const maxHandshake = 20 * time.Second

// get returns the connection, and makes it if need be.
func (l *link) get(ctx context.Context) (*ssh.Client, error) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, net.ErrClosed
	}
	if l.client != nil {
		defer l.mu.Unlock()
		return l.client, nil
	}
	a := l.making
	if a == nil {
		a = &attempt{done: make(chan struct{})}
		l.making = a
		go l.make(a)
	}
	l.mu.Unlock()
	select {
	case <-a.done:
		return a.client, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// make makes the connection. Whoever waits for it may go: others may come.
func (l *link) make(a *attempt) {
	ctx, cancel := context.WithTimeout(context.Background(), maxHandshake)
	defer cancel()
	a.client, a.err = l.connect(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.making = nil
	if a.err == nil && l.closed {
		a.client.Close()
		a.client, a.err = nil, net.ErrClosed
	}
	if a.err == nil {
		l.client, l.gone, l.err, l.changed = a.client, make(chan struct{}), nil, time.Now()
		go l.watch(a.client)
	} else {
		if l.err == nil {
			l.changed = time.Now()
		}
		l.err = a.err
	}
	close(a.done)
}

// watch asks the server whether it is there, and lets go of the connection when it is
// over.
func (l *link) watch(client *ssh.Client) {
	over := make(chan error, 1)
	go func() { over <- client.Wait() }()
	ask := time.NewTicker(l.upstream.Keepalive)
	defer ask.Stop()
	answered := make(chan struct{}, 1)
	for missed := 0; ; {
		select {
		case err := <-over:
			l.lost(client, err)
			return
		case <-answered:
			missed = 0
			continue
		case <-ask.C:
		}
		if missed++; missed > l.upstream.Missed {
			client.Close()
			<-over
			l.lost(client, fmt.Errorf("the server has not answered for %s", time.Duration(missed)*l.upstream.Keepalive))
			return
		}
		if missed > 1 {
			continue // one question waits for its answer
		}
		go func() {
			// Servers answer what they do not know with a failure: that is one, too.
			if _, _, err := client.SendRequest("keepalive@openssh.com", true, nil); err == nil {
				select {
				case answered <- struct{}{}:
				default:
				}
			}
		}()
	}
}

func (l *link) lost(client *ssh.Client, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.client != client {
		return
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = errors.New("the server, or what is before it, has closed the connection")
	}
	l.client, l.err, l.changed = nil, err, time.Now()
	close(l.gone)
	if !l.closed {
		l.log.Warn("connection to an SSH server is lost", "upstream", l.upstream.Name, "error", err)
	}
}

// lostOf returns a channel that is closed when a connection is lost, and it is known why.
func (l *link) lostOf(client *ssh.Client) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.client == client {
		return l.gone
	}
	gone := make(chan struct{})
	close(gone)
	return gone
}

// why returns why there is no connection.
func (l *link) why() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// tuneServer has the kernel ask at least once a second for what a server has not
// confirmed (TCP_RTO_MAX_MS, Linux 6.15): a path that is back is used at once. Older
// kernels ask ever later.
func tuneServer(c relay.Conn) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpRTOMax, 1000) })
}

// tcpRTOMax is TCP_RTO_MAX_MS of linux/tcp.h.
const tcpRTOMax = 44

// close ends the connection and lets nobody make another.
func (l *link) close() {
	l.mu.Lock()
	l.closed = true
	client := l.client
	l.mu.Unlock()
	if client != nil {
		client.Close()
	}
}

// dial connects to a target by way of the server.
func (l *link) dial(ctx context.Context, to target) (relay.Conn, error) {
	client, err := l.get(ctx)
	if err != nil {
		return nil, fmt.Errorf("upstream %s: %w", l.upstream.Name, err)
	}
	c, err := client.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, fmt.Errorf("upstream %s: %w", l.upstream.Name, err)
	}
	return c.(relay.Conn), nil
}

// connect makes a connection to the server, through those that its configuration names.
func (l *link) connect(ctx context.Context) (*ssh.Client, error) {
	hops, err := l.hops()
	if err != nil {
		return nil, err
	}
	dial := l.before
	var client *ssh.Client
	for _, h := range hops {
		at, err := socks5.ParseAddress(h.host, h.port)
		if err != nil {
			return nil, closeAll(client, err)
		}
		c, err := dial(ctx, at)
		if err != nil {
			return nil, closeAll(client, err)
		}
		next, err := l.handshake(ctx, c, h)
		if err != nil {
			c.Close()
			return nil, closeAll(client, fmt.Errorf("%s: %w", at, err))
		}
		if before := client; before != nil {
			go func() {
				_ = next.Wait()
				before.Close()
			}()
		}
		client = next
		dial = func(ctx context.Context, to target) (relay.Conn, error) {
			c, err := next.DialContext(ctx, "tcp", to.String())
			if err != nil {
				return nil, err
			}
			return c.(relay.Conn), nil
		}
	}
	return client, nil
}

func closeAll(client *ssh.Client, err error) error {
	if client != nil {
		client.Close()
	}
	return err
}

// handshake authenticates both sides. The context bounds it.
func (l *link) handshake(ctx context.Context, c relay.Conn, h hop) (*ssh.Client, error) {
	keys, err := l.hostKeys(h)
	if err != nil {
		return nil, err
	}
	auth, done, err := l.authentication(h)
	if err != nil {
		return nil, err
	}
	defer done()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	conn, channels, requests, err := ssh.NewClientConn(c, h.address(), &ssh.ClientConfig{
		User: h.user, Auth: auth, HostKeyCallback: keys.check, HostKeyAlgorithms: keys.algorithms,
	})
	if !stop() && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	var broken net.Error
	if err != nil && !errors.Is(err, io.EOF) && !errors.As(err, &broken) {
		return nil, fmt.Errorf("%w: %w", errRejected, err)
	}
	if err != nil {
		return nil, err
	}
	return ssh.NewClient(conn, channels, requests), nil
}

// errRejected says that server and client talk to each other, and one does not want the
// other: that it is tried again soon makes it no better.
var errRejected = errors.New("the server and we do not accept each other")

// hop is one SSH server on the way.
type hop struct {
	host       string
	port       uint16
	user       string
	identities []string
}

func (h hop) address() string { return net.JoinHostPort(h.host, strconv.Itoa(int(h.port))) }

const sshPort = 22

// maxJumps bounds a chain of ProxyJump.
const maxJumps = 8

// hops returns the servers to go through, the last is the one that is meant. Those before
// it are what the configuration of ssh names for it (ssh_config(5), ProxyJump).
func (l *link) hops() ([]hop, error) {
	settings, err := readSSHConfig(l.upstream.SSHConfig)
	if err != nil {
		return nil, err
	}
	hops, err := settings.hops(l.upstream.Address)
	if err != nil {
		return nil, err
	}
	last := &hops[len(hops)-1]
	if l.upstream.User != "" {
		last.user = l.upstream.User
	}
	if len(l.upstream.Identities) > 0 {
		last.identities = l.upstream.Identities
	}
	return hops, nil
}

// hops returns a server after the jump hosts before it. Of several that are named at once
// only the first has jump hosts of its own: for the others ssh is told (ssh(1), -J).
func (c sshConfig) hops(host string) ([]hop, error) { return c.hopsWithin(host, maxJumps) }

func (c sshConfig) hopsWithin(host string, most int) ([]hop, error) {
	h, jumps, err := c.find(host)
	if err != nil || len(jumps) == 0 && most > 0 {
		return []hop{h}, err
	}
	if len(jumps) >= most {
		return nil, fmt.Errorf("more than %d hosts by ProxyJump: do they name each other?", maxJumps)
	}
	hops, err := c.hopsWithin(jumps[0], most-len(jumps))
	if err != nil {
		return nil, err
	}
	for _, text := range jumps[1:] {
		j, _, err := c.find(text)
		if err != nil {
			return nil, err
		}
		hops = append(hops, j)
	}
	return append(hops, h), nil
}

// sshConfig is a configuration of ssh; nil: there is none.
type sshConfig struct{ *sshconfig.Config }

func readSSHConfig(path string) (sshConfig, error) {
	f, err := os.Open(home(path))
	// The unit of systemd keeps homes away.
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) && path == config.DefaultSSHConfig {
		return sshConfig{}, nil
	}
	if err != nil {
		return sshConfig{}, err
	}
	defer f.Close()
	c, err := parseSSHConfig(f)
	if err != nil {
		return sshConfig{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func parseSSHConfig(r io.Reader) (sshConfig, error) {
	c, err := sshconfig.Decode(r)
	return sshConfig{c}, err
}

func (c sshConfig) get(alias, key string) string {
	if c.Config == nil {
		return ""
	}
	v, err := c.Get(alias, key)
	if err != nil || strings.EqualFold(v, "none") {
		return ""
	}
	return v
}

// find returns the server that [USER@]HOST[:PORT] means, and the jump hosts before it.
func (c sshConfig) find(text string) (h hop, jumps []string, err error) {
	alias := text
	if name, rest, ok := strings.Cut(alias, "@"); ok {
		h.user, alias = name, rest
	}
	port := ""
	if host, p, err := net.SplitHostPort(alias); err == nil {
		alias, port = host, p
	}
	alias = strings.Trim(alias, "[]")
	h.host = alias
	if name := c.get(alias, "HostName"); name != "" {
		h.host = strings.ReplaceAll(name, "%h", alias)
	}
	if port == "" {
		port = c.get(alias, "Port")
	}
	if port == "" {
		port = strconv.Itoa(sshPort)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return h, nil, fmt.Errorf("%s: %q is no port", text, port)
	}
	h.port = uint16(n)
	if h.user == "" {
		h.user = c.get(alias, "User")
	}
	if h.user == "" {
		if u, err := user.Current(); err == nil {
			h.user = u.Username
		}
	}
	if c.Config != nil {
		if all, err := c.GetAll(alias, "IdentityFile"); err == nil {
			h.identities = all
		}
	}
	if jump := c.get(alias, "ProxyJump"); jump != "" {
		for j := range strings.SplitSeq(jump, ",") {
			jumps = append(jumps, strings.TrimSpace(j))
		}
	}
	return h, jumps, nil
}

// home puts the home of the agent's user in place of a leading ~.
func home(path string) string {
	rest, ok := strings.CutPrefix(path, "~/")
	if !ok {
		return path
	}
	dir, err := os.UserHomeDir()
	if err != nil {
		// A service manager need not say it.
		u, err := user.Current()
		if err != nil {
			return path
		}
		dir = u.HomeDir
	}
	return filepath.Join(dir, rest)
}

var defaultIdentities = []string{"~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa"}

// authentication returns how we prove who we are, and what ends that.
func (l *link) authentication(h hop) (methods []ssh.AuthMethod, done func(), err error) {
	done = func() {}
	paths, must := h.identities, true
	if len(paths) == 0 {
		paths, must = defaultIdentities, false
	}
	var signers []ssh.Signer
	var locked error
	for _, path := range paths {
		s, err := readKey(home(path))
		if errors.Is(err, fs.ErrNotExist) && !must {
			continue
		}
		if errors.Is(err, errLocked) && (l.upstream.Agent != "" || len(l.upstream.Identities) == 0) {
			locked = err // the agent may hold it, or another one may do
			continue
		}
		if err != nil {
			return nil, done, err
		}
		signers = append(signers, s)
	}
	if len(signers) > 0 {
		methods = append(methods, ssh.PublicKeys(signers...))
	}
	if l.upstream.Agent != "" {
		c, err := net.DialTimeout("unix", home(l.upstream.Agent), agentWait)
		if err != nil {
			return nil, done, fmt.Errorf("ssh-agent: %w", err)
		}
		_ = c.SetDeadline(time.Now().Add(agentWait))
		done = func() { c.Close() }
		methods = append(methods, ssh.PublicKeysCallback(agent.NewClient(c).Signers))
	}
	if l.upstream.PasswordFile != "" {
		password, err := host.ReadPassword(l.upstream.PasswordFile)
		if err != nil {
			return nil, done, err
		}
		methods = append(methods, ssh.Password(password))
	}
	if len(methods) == 0 && locked != nil {
		return nil, done, locked
	}
	if len(methods) == 0 {
		return nil, done, errors.New("there is no key and no password: name one by identity, agent or passwordFile")
	}
	return methods, done, nil
}

// errLocked is a key that cannot be read without a passphrase.
var errLocked = errors.New("has a passphrase; an ssh-agent can hold it (agent: SOCKET)")

// agentWait bounds what an ssh-agent may take for all that it is asked.
const agentWait = 10 * time.Second

func readKey(path string) (ssh.Signer, error) {
	raw, err := host.ReadSecret(path)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	s, err := ssh.ParsePrivateKey(raw)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return nil, fmt.Errorf("private key %s %w", path, errLocked)
	}
	if err != nil {
		return nil, fmt.Errorf("private key %s: %w", path, err)
	}
	return s, nil
}

// hostKeys says which key of a server is the right one.
type hostKeys struct {
	known      ssh.HostKeyCallback
	path       string
	acceptNew  bool
	algorithms []string // of the keys that are known; nil: none is
}

// probe is a key that no server has.
type probe struct{ ssh.PublicKey }

func (probe) Type() string    { return "ssh-ed25519" }
func (probe) Marshal() []byte { return []byte("none") }

// hostKeys reads the keys that are known.
func (l *link) hostKeys(h hop) (*hostKeys, error) {
	k := &hostKeys{path: home(l.upstream.KnownHosts), acceptNew: l.upstream.AcceptNew}
	paths := []string{k.path}
	if _, err := os.Stat(systemKnownHosts); err == nil {
		paths = append(paths, systemKnownHosts)
	}
	if _, err := os.Stat(k.path); errors.Is(err, fs.ErrNotExist) {
		paths = paths[1:]
	}
	var err error
	if k.known, err = knownhosts.New(paths...); err != nil {
		return nil, err
	}
	if k.hasAuthority(paths) {
		return k, nil // servers show certificates, of whatever type
	}
	// A server with several keys shows the one that it is asked for: ask for what is known.
	var wrong *knownhosts.KeyError
	if errors.As(k.known(h.address(), &net.TCPAddr{IP: net.IPv4zero}, probe{}), &wrong) {
		for _, w := range wrong.Want {
			k.algorithms = append(k.algorithms, algorithmsOf(w.Key.Type())...)
		}
	}
	return k, nil
}

// hasAuthority reports whether certificates are taken (sshd(8), @cert-authority).
func (*hostKeys) hasAuthority(paths []string) bool {
	return slices.ContainsFunc(paths, func(path string) bool {
		text, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(text), "@cert-authority")
	})
}

const systemKnownHosts = "/etc/ssh/ssh_known_hosts"

// algorithmsOf returns by which algorithms a key of a type signs (RFC 8332).
func algorithmsOf(keyType string) []string {
	if keyType == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{keyType}
}

// check is asked for the key that a server has shown.
func (k *hostKeys) check(host string, remote net.Addr, key ssh.PublicKey) error {
	err := k.known(host, remote, key)
	var wrong *knownhosts.KeyError
	if !errors.As(err, &wrong) {
		return err
	}
	line := knownhosts.Line([]string{knownhosts.Normalize(host)}, key)
	switch {
	case len(wrong.Want) > 0:
		return fmt.Errorf("the server shows another key than %s has in line %d: somebody may be in between; if it has a new one, this line belongs there instead: %s",
			wrong.Want[0].Filename, wrong.Want[0].Line, line)
	case k.acceptNew:
		return k.add(line)
	}
	return fmt.Errorf("the server's key is not known; if it is the right one (ask whoever runs it: %s), add this line to %s: %s", ssh.FingerprintSHA256(key), k.path, line)
}

func (k *hostKeys) add(line string) error {
	if err := os.MkdirAll(filepath.Dir(k.path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(k.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if text, err := os.ReadFile(k.path); err == nil && len(text) > 0 && text[len(text)-1] != '\n' {
		line = "\n" + line // an editor has left the last line open
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}
