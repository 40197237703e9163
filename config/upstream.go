package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// Upstream is a proxy of somebody else that ours can go through.
type Upstream struct {
	Name         string
	Protocol     ProxyProtocol // SOCKS5, HTTP or SSH
	Address      string        // HOST:PORT; of SSH also a Host of its configuration
	User         string
	PasswordFile string
	TLS          bool // HTTP only

	// Of SSH only.
	Identities []string // paths of private keys; a leading ~ is the home of the agent's user
	Agent      string   // path of the socket of an ssh-agent
	KnownHosts string   // path
	AcceptNew  bool     // keys of hosts that are not known yet are taken, and noted
	SSHConfig  string   // path
	Keepalive  time.Duration
	Missed     int // keepalives without an answer that end the connection
}

var upstreamSchema = schema[Upstream]{what: "an upstream", fields: []field[Upstream]{
	nameField(func(to *Upstream, v string) { to.Name = v }, "corp"),
	section("socks5", "A SOCKS5 server.", &socks5UpstreamSchema, func(u *Upstream) *Upstream {
		u.Protocol = SOCKS5
		return u
	}),
	section("http", "An HTTP proxy that knows CONNECT.", &httpUpstreamSchema, func(u *Upstream) *Upstream {
		u.Protocol = HTTP
		return u
	}),
	section("ssh", "An SSH server. All connections share one to it, which is made anew when it is lost.", &sshSchema, func(u *Upstream) *Upstream {
		u.Protocol, u.KnownHosts, u.SSHConfig = SSH, defaultKnownHosts, DefaultSSHConfig
		u.Keepalive, u.Missed = defaultSSHKeepalive, defaultSSHMissed
		return u
	}),
}}

const (
	defaultKnownHosts   = "~/.ssh/known_hosts"
	DefaultSSHConfig    = "~/.ssh/config" // may be missing, or where the agent may not look
	defaultSSHKeepalive = 5 * time.Second
	defaultSSHMissed    = 3
)

var sshSchema = schema[Upstream]{what: "ssh", fields: []field[Upstream]{
	{
		key: "host", kind: "HOST[:PORT]", required: true,
		doc: "Where it is, or a Host of the file `config`, whose HostName, User, Port, IdentityFile and ProxyJump hold for it.",
		set: func(d *decoder, n *yaml.Node, to *Upstream) {
			v, ok := d.text(n, "a host such as jump.example or jump.example:2222")
			if ok && (strings.ContainsAny(v, "@/ ") || strings.Count(v, ":") > 1 && !strings.HasPrefix(v, "[")) {
				d.errorf(n, "want a host such as jump.example or jump.example:2222, found %q%s", shorten(v), sshHostHint(v))
			}
			to.Address = v
		},
	},
	text("user", "name", "Who we are to it; by default what `config` says, else the user that the agent runs as.", "a user", func(to *Upstream, v string) { to.User = v }),
	{
		key: "identity", kind: "path, or list of paths",
		doc: "Private keys, without a passphrase. By default those that `config` names, else `~/.ssh/id_ed25519`, `id_ecdsa` and `id_rsa`, as far as they are there.",
		set: func(d *decoder, n *yaml.Node, to *Upstream) {
			d.oneOrMore(n, func(e *yaml.Node) {
				if v, ok := d.text(e, "the path of a private key"); ok {
					to.Identities = append(to.Identities, v)
				}
			})
		},
	},
	text("passwordFile", "path", "Its first line is the password. Nobody but its owner may read or write it.", "the path of a file",
		func(to *Upstream, v string) { to.PasswordFile = v }),
	text("agent", "path", "The socket of an ssh-agent whose keys may be used.", "the path of a socket", func(to *Upstream, v string) { to.Agent = v }),
	text("knownHosts", "path", "The keys of servers that are known. One that is not in it is refused, and the line to add is shown.", "the path of a file",
		func(to *Upstream, v string) { to.KnownHosts = v }).or(defaultKnownHosts),
	truth("acceptNew", "The key of a server that is not known yet is taken, and added to `knownHosts`. One that has changed is refused all the same.",
		func(to *Upstream, v bool) { to.AcceptNew = v }).or("false"),
	text("config", "path", "A configuration of ssh. It may be missing.", "the path of a file", func(to *Upstream, v string) { to.SSHConfig = v }).or(DefaultSSHConfig),
	span("keepalive", "How often the server is asked whether it is there.", 100*time.Millisecond, time.Hour, time.Millisecond,
		func(to *Upstream, v time.Duration) { to.Keepalive = v }).or(Duration(defaultSSHKeepalive)),
	number("missed", "1 to 100", "How many questions without an answer end the connection.", 1, 100,
		func(to *Upstream, v int) { to.Missed = v }).or(strconv.Itoa(defaultSSHMissed)),
}}

func sshHostHint(text string) string {
	if user, _, ok := strings.Cut(text, "@"); ok {
		return fmt.Sprintf("; the user is a key of its own: \"user: %s\"", shorten(user))
	}
	return ""
}

var socks5UpstreamSchema = schema[Upstream]{what: "socks5", fields: loginFields("192.0.2.5:1080")}

var httpUpstreamSchema = schema[Upstream]{what: "http", fields: append(loginFields("192.0.2.5:3128"),
	truth("tls", "Whether the connection to the proxy is encrypted.", func(to *Upstream, v bool) { to.TLS = v }).or("false"))}

func loginFields(example string) []field[Upstream] {
	return []field[Upstream]{
		{
			key: "address", kind: "HOST:PORT", required: true, doc: "Where it is. A name is resolved each time.",
			set: func(d *decoder, n *yaml.Node, to *Upstream) { to.Address = d.hostPort(n, example) },
		},
		text("user", "name", "Who we are to it.", "a user", func(to *Upstream, v string) { to.User = v }),
		text("passwordFile", "path", "Its first line is the password. Nobody but its owner may read or write it.", "the path of a file",
			func(to *Upstream, v string) { to.PasswordFile = v }),
	}
}

// hostPort reads HOST:PORT, where the host is a name or an address.
func (d *decoder) hostPort(n *yaml.Node, example string) string {
	want := "HOST:PORT such as " + example
	text, ok := d.text(n, want)
	if !ok {
		return ""
	}
	if ap, err := netip.ParseAddrPort(text); err == nil && ap.Port() != 0 {
		return text
	}
	host, port, ok := strings.Cut(text, ":")
	p, err := strconv.ParseUint(port, 10, 16)
	if _, notName := netip.ParseAddr(host); !ok || err != nil || p == 0 || notName == nil || host == "" || strings.ContainsAny(host, "/ @[]") {
		d.errorf(n, "want %s, found %q%s", want, shorten(text), hostPortHint(text))
	}
	return text
}

func hostPortHint(text string) string {
	if strings.Contains(text, "://") {
		return "; write the address without what stands before ://"
	}
	if hint := bracketHint(text); hint != "" {
		return hint
	}
	if !strings.Contains(text, ":") {
		return "; the port is missing"
	}
	return ""
}

func (d *decoder) upstreams(n *yaml.Node, to *Config) {
	d.list(n, "a list of upstreams", func(e *yaml.Node) {
		var u Upstream
		seen := upstreamSchema.decode(d, e, &u)
		if seen == nil {
			return
		}
		switch {
		case u.Name == Direct || u.Name == Refuse:
			d.errorf(seen["name"], "%s is no name for an upstream: it is a way without one", u.Name)
		case slices.ContainsFunc(to.Upstreams, func(o Upstream) bool { return o.Name == u.Name && u.Name != "" }):
			d.errorf(seen["name"], "upstream %s is already defined; names are unique", u.Name)
		}
		kinds := 0
		for _, key := range []string{"socks5", "http", "ssh"} {
			if seen[key] != nil {
				kinds++
			}
		}
		if kinds != 1 {
			d.errorf(e, "upstream %s: want one of the keys \"socks5\", \"http\" and \"ssh\"", u.Name)
		}
		if u.Protocol != SSH && (u.User == "") != (u.PasswordFile == "") {
			d.errorf(e, "upstream %s: user and passwordFile go together", u.Name)
		}
		if len(u.User) > 255 {
			d.errorf(e, "upstream %s: a user has at most 255 bytes", u.Name)
		}
		to.Upstreams = append(to.Upstreams, u)
		d.upstreamNodes = append(d.upstreamNodes, e)
	})
}
