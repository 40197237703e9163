package migrate

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What is read here is in HAProxy's configuration manual, chapters 2 (format), 4 (proxies)
// and 5 (bind and server options).

// section is one section of haproxy.cfg.
type section struct {
	kind, name string
	head       *statement
	all        []*statement
	defaults   *section // that hold for it; nil: none
}

// find returns the last statement that begins with words, of the section or else of its
// defaults: the one that holds.
func (s *section) find(words ...string) *statement {
	for at := s; at != nil; at = at.defaults {
		for _, x := range slices.Backward(at.all) {
			if len(x.words) >= len(words) && slices.Equal(x.words[:len(words)], words) {
				return x
			}
		}
	}
	return nil
}

// each calls do for the statements of the section itself that begin with a word.
func (s *section) each(word string, do func(*statement)) {
	for _, x := range s.all {
		if x.words[0] == word {
			do(x)
		}
	}
}

var haproxySections = []string{"global", "defaults", "frontend", "backend", "listen", "userlist", "peers", "resolvers", "mailers", "cache", "program", "ring", "http-errors", "crt-store", "traces"}

// splitHAProxy returns the sections of a text.
func splitHAProxy(text []byte) (all []*section, lines []*statement) {
	var now, defaults *section
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		words := haproxyWords(line)
		if len(words) == 0 {
			continue
		}
		s := &statement{line: n, words: words}
		lines = append(lines, s)
		if slices.Contains(haproxySections, words[0]) {
			now = &section{kind: words[0], name: s.word(1), head: s, defaults: defaults}
			if now.kind == "defaults" {
				now.defaults, defaults = nil, now
			}
			all = append(all, now)
			continue
		}
		if now == nil {
			s.leave("it stands before the first section")
			continue
		}
		now.all = append(now.all, s)
	}
	return all, lines
}

// haproxyWords splits a line: quotes, backslashes, comments.
func haproxyWords(line string) (words []string) {
	var word strings.Builder
	has, quote, escaped := false, rune(0), false
	end := func() {
		if has {
			words = append(words, word.String())
		}
		word.Reset()
		has = false
	}
	for _, r := range strings.TrimRight(line, "\r\n") {
		switch {
		case escaped:
			word.WriteRune(r)
			has, escaped = true, false
		case r == '\\' && quote != '\'':
			escaped = true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '"' || r == '\'':
			quote, has = r, true
		case r == '#':
			end()
			return words
		case r == ' ' || r == '\t':
			end()
		default:
			word.WriteRune(r)
			has = true
		}
	}
	end()
	return words
}

// haproxy is what is made of a text.
type haproxy struct {
	options  Options
	result   *Result
	backends map[string]*section
	used     map[string]bool
}

func readHAProxy(text []byte, o Options) *Result {
	all, lines := splitHAProxy(text)
	h := &haproxy{options: o, result: &Result{}, backends: make(map[string]*section), used: make(map[string]bool)}
	for _, s := range all {
		if s.kind == "backend" {
			h.backends[s.name] = s
		}
	}
	served := make(map[*section]bool)
	for _, s := range all {
		s.head.take()
		switch s.kind {
		case "global":
			for _, x := range s.all {
				x.leave("it is about the process of HAProxy; pentad has none in the path")
			}
		case "defaults", "backend":
		case "frontend":
			served[h.frontend(s)] = true
		case "listen":
			h.service(s, s)
		default:
			s.head.taken = false
			s.head.leave("a section of this kind has no counterpart")
			for _, x := range s.all {
				x.leave("it belongs to the section %s", s.kind)
			}
		}
	}
	for _, s := range all {
		if s.kind == "backend" && !served[s] {
			s.head.taken = false
			s.head.leave("no frontend has it as its default_backend")
			for _, x := range s.all {
				x.leave("its backend is not used")
			}
		}
	}
	for _, s := range all {
		for _, x := range s.all {
			h.explain(x)
		}
	}
	h.result.Notes = append(h.result.Notes, notes(lines)...)
	return h.result
}

// reasons are why statements are left, by how they begin.
var haproxyReasons = []struct{ begins, why string }{
	{"use_backend", "pentad balances connections and does not read them: a service has one list of backends"},
	{"acl", "pentad balances connections and does not read them; who may connect is for a firewall to say"},
	{"http-", "pentad does not read HTTP"},
	{"redirect", "pentad does not read HTTP"},
	{"rspadd", "pentad does not read HTTP"},
	{"reqadd", "pentad does not read HTTP"},
	{"compression", "pentad does not read HTTP"},
	{"cookie", "pentad does not read HTTP; affinity remembers clients by their address"},
	{"option httplog", "pentad flow shows connections"},
	{"option http", "pentad does not read HTTP"},
	{"option forwardfor", "backends see the client's own address"},
	{"option tcplog", "pentad flow shows connections"},
	{"option dontlognull", "pentad flow shows connections"},
	{"log", "pentad flow shows connections"},
	{"stats", "pentad has metrics at api.listen, and pentad top"},
	{"stick", "affinity remembers clients by their address, for a time"},
	{"tcp-request", "pentad does not hold connections up"},
	{"maxconn", "what a backend has at most is breaker.maxConnections"},
	{"timeout connect", "a SYN that is not answered is sent to another backend after connect.timeout, 1s by default"},
	{"timeout", "nothing is in the path of a connection that could end it"},
	{"retries", "the kernel sends a failed connect to another backend"},
	{"option redispatch", "the kernel sends a failed connect to another backend by itself"},
	{"errorfile", "pentad does not read HTTP"},
	{"option tcpka", "see keepalive: it needs an idle time"},
	{"option clitcpka", "there is one connection, of the client to the backend: keepalive"},
	{"option srvtcpka", "see keepalive: it needs an idle time"},
	{"bind-process", "it is about the process of HAProxy; pentad has none in the path"},
	{"source", "clients connect themselves, from their own address"},
	{"email-alert", "alert on pentad's metrics"},
}

func (h *haproxy) explain(x *statement) {
	if x.taken || x.why != "" {
		return
	}
	text := strings.Join(x.words, " ")
	for _, r := range haproxyReasons {
		if strings.HasPrefix(text, r.begins) {
			x.leave("%s", r.why)
			return
		}
	}
}

// frontend makes a service of a frontend and its default backend, and returns that.
func (h *haproxy) frontend(s *section) *section {
	d := s.find("default_backend")
	if d == nil {
		s.head.leave("it has no default_backend")
		return nil
	}
	b := h.backends[d.word(1)]
	if b == nil {
		d.leave("there is no such backend")
		return nil
	}
	d.take()
	h.service(s, b)
	return b
}

// service makes a service: front has its addresses, back its servers.
func (h *haproxy) service(front, back *section) {
	if !slices.ContainsFunc(back.all, func(x *statement) bool { return x.words[0] == "server" || x.words[0] == "server-template" }) {
		front.head.leave("it has no servers")
		return
	}
	out := &Service{OnDown: "keep"}
	for _, s := range []*section{front, back} {
		if m := s.find("mode"); m != nil && m.word(1) == "http" {
			m.take()
			h.note(s.head, "mode http: connections are balanced, not requests: clients that keep one open stay at a backend")
		} else if m != nil {
			m.take()
		}
	}
	front.each("bind", func(x *statement) { h.bind(x, out) })
	if front.kind == "listen" && front.head.word(2) != "" {
		h.bindAddress(front.head, front.head.word(2), out)
	}
	if len(out.Listen) == 0 {
		front.head.leave("none of its addresses can be had, so that there is no service %s", front.name)
		return
	}
	out.Name = name(front.name, h.used)
	h.balance(back, out)
	check := h.check(back, out)
	var all []*serverOptions
	back.each("server", func(x *statement) { all = append(all, h.server(x, back, out)) })
	h.result.Services = append(h.result.Services, out)
	all = slices.DeleteFunc(all, func(o *serverOptions) bool { return o == nil })
	h.together(all, check, out)
}

// note says something of a statement that was translated all the same.
func (h *haproxy) note(x *statement, why string) {
	h.result.Notes = append(h.result.Notes, Note{x.line, x.shown(), why})
}

// bind reads `bind [ADDRESS]:PORT[,...] [options]`.
func (h *haproxy) bind(x *statement, out *Service) {
	for _, option := range x.words[min(2, len(x.words)):] {
		switch option {
		case "ssl", "accept-proxy":
			x.leave("%s: pentad does not end connections; let the backends do this", option)
			return
		case "transparent", "tfo", "v4v6", "defer-accept":
		default:
			if _, err := strconv.Atoi(option); err != nil && !slices.Contains([]string{"interface", "process", "thread", "name", "maxconn", "mode", "backlog", "shards"}, option) {
				h.note(x, "the option "+option+" is left out")
			}
		}
	}
	for _, address := range strings.Split(x.word(1), ",") {
		h.bindAddress(x, address, out)
	}
}

func (h *haproxy) bindAddress(x *statement, text string, out *Service) {
	text = strings.TrimPrefix(strings.TrimPrefix(strings.TrimPrefix(text, "ipv4@"), "ipv6@"), "tcp@")
	i := strings.LastIndexByte(text, ':')
	if i < 0 || strings.HasPrefix(text, "/") || strings.Contains(text, "unix@") {
		x.leave("%s is not an address with a port", text)
		return
	}
	host, port := strings.Trim(text[:i], "[]"), text[i+1:]
	first, last, isRange := strings.Cut(port, "-")
	if !isRange {
		last = first
	}
	from, err1 := strconv.ParseUint(first, 10, 16)
	to, err2 := strconv.ParseUint(last, 10, 16)
	if err1 != nil || err2 != nil || from == 0 || to < from {
		x.leave("%s is no port", port)
		return
	}
	a, err := netip.ParseAddr(host)
	if host == "" || host == "*" || err == nil && a.IsUnspecified() {
		if !h.options.Wildcard.IsValid() {
			x.leave("it listens on every address of the host, and a virtual address is one: say which with --address")
			return
		}
		a, err = h.options.Wildcard, nil
	}
	if err != nil {
		x.leave("%s is not an address", host)
		return
	}
	if to-from > 63 {
		x.leave("%d ports: a service has a listener for each", to-from+1)
		return
	}
	for p := from; p <= to; p++ {
		out.listen(x, listener(netip.AddrPortFrom(a, uint16(p)), false))
	}
	x.take()
}

// balance reads `balance ALGORITHM`.
func (h *haproxy) balance(s *section, out *Service) {
	x := s.find("balance")
	if x == nil {
		out.Balance = "random" // the default is roundrobin
		return
	}
	x.take()
	switch x.word(1) {
	case "roundrobin", "static-rr", "random":
		out.Balance = "random"
	case "leastconn":
		out.Balance = "least-connections"
	case "source":
		out.Balance = "source-hash"
	case "first":
		x.leave("pentad does not fill one backend before the next; breaker.maxConnections bounds each")
	default:
		x.leave("pentad does not read what is in a connection: what is left is by the least latency")
	}
}

// check reads how the servers of a backend are checked; nil: by a connect.
func (h *haproxy) check(s *section, out *Service) *Health {
	c := &Health{Probe: "tcp"}
	if x := s.find("option", "httpchk"); x != nil {
		x.take()
		c.Probe, c.Path = "http", "/"
		switch words := x.words[2:]; {
		case len(words) == 1:
			c.Path = words[0]
		case len(words) > 1:
			c.Path = words[1]
			if words[0] != "GET" {
				h.note(x, "the check is sent with GET, not "+words[0])
			}
			if i := slices.IndexFunc(words, func(w string) bool { return strings.Contains(strings.ToLower(w), "host:") }); i >= 0 {
				_, host, _ := strings.Cut(strings.ReplaceAll(strings.Join(words[i:], " "), "\\r\\n", " "), "ost:")
				c.Host = strings.TrimSpace(host)
			}
		}
	}
	if x := s.find("http-check", "send"); x != nil && c.Probe == "http" {
		x.take()
		for i := 2; i+1 < len(x.words); i++ {
			switch x.words[i] {
			case "uri":
				c.Path = x.words[i+1]
			case "hdr":
				if strings.EqualFold(x.words[i+1], "host") {
					c.Host = x.word(i + 2)
				} else {
					h.note(x, "the header "+x.words[i+1]+" is left out")
				}
			}
		}
	}
	if x := s.find("http-check", "expect"); x != nil && c.Probe == "http" {
		if x.word(2) == "status" {
			x.take()
			c.Expect = x.word(3)
		} else {
			x.leave("a check looks at the status code alone")
		}
	}
	for option, probe := range map[string]string{"ssl-hello-chk": "tls", "mysql-check": "mysql", "pgsql-check": "postgres", "redis-check": "redis", "tcp-check": "tcp"} {
		x := s.find("option", option)
		if x == nil {
			continue
		}
		x.take()
		c.Probe = probe
		if i := slices.Index(x.words, "user"); i > 0 {
			c.User = x.word(i + 1)
		}
		if probe == "mysql" && c.User == "" || probe == "postgres" && c.User == "" {
			x.leave("without a user: health.user; a connect is tried instead")
			c.Probe = "tcp"
		}
	}
	return c
}

// serverOptions are those of one server.
type serverOptions struct {
	check, ssl     bool
	inter          time.Duration
	rise, fall     int
	port, maxconn  int
	shutdown       bool
	slowstart      time.Duration
	statement      *statement
	weight, backup int
}

// server reads `server NAME ADDRESS[:PORT] [options]`, after those of default-server.
func (h *haproxy) server(x *statement, s *section, out *Service) *serverOptions {
	o := &serverOptions{statement: x, weight: -1}
	b := Backend{}
	address := x.word(2)
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		var alone netip.Addr
		if alone, err = netip.ParseAddr(strings.Trim(address, "[]")); err == nil {
			first, _ := netip.ParseAddrPort(out.Listen[0])
			a = netip.AddrPortFrom(alone, first.Port())
		}
	}
	if err != nil {
		x.leave("%s is not an address with a port; names are not resolved", address)
		return nil
	}
	x.take()
	b.Address = a.String()
	for at := s; at != nil; at = at.defaults {
		at.each("default-server", func(d *statement) {
			d.take()
			h.serverOptions(d, d.words[1:], o, &b)
		})
	}
	h.serverOptions(x, x.words[min(3, len(x.words)):], o, &b)
	if o.weight >= 0 {
		b.Weight = &o.weight
	}
	b.Group = o.backup
	out.Backends = append(out.Backends, b)
	return o
}

// serverOptions reads the options of a server.
func (h *haproxy) serverOptions(x *statement, words []string, o *serverOptions, b *Backend) {
	number := func(text string) int {
		n, err := strconv.Atoi(text)
		if err != nil {
			h.note(x, text+" is no number")
		}
		return n
	}
	for i := 0; i < len(words); i++ {
		value := ""
		if i+1 < len(words) {
			value = words[i+1]
		}
		used := true
		switch words[i] {
		case "check":
			o.check = true
			used = false
		case "no-check":
			o.check, used = false, false
		case "backup":
			o.backup, used = 1, false
		case "disabled":
			b.Disabled, used = true, false
		case "weight":
			o.weight = number(value)
		case "inter":
			o.inter = haproxyTime(value)
		case "fastinter", "downinter":
		case "rise":
			o.rise = number(value)
		case "fall":
			o.fall = number(value)
		case "port":
			o.port = number(value)
		case "maxconn":
			o.maxconn = number(value)
		case "slowstart":
			o.slowstart = haproxyTime(value)
		case "on-marked-down":
			o.shutdown = value == "shutdown-sessions"
		case "check-ssl":
			o.ssl, used = true, false
		case "verify", "ca-file", "sni", "check-sni", "minconn", "maxqueue", "id", "init-addr", "resolvers", "resolve-prefer", "on-marked-up", "observe", "error-limit", "on-error", "alpn", "proto":
			h.note(x, words[i]+" "+value+" is left out")
		case "cookie":
			h.note(x, "cookie "+value+": pentad does not read HTTP; affinity remembers clients by their address")
		case "ssl":
			used = false
			h.note(x, "ssl: pentad passes on what the client sends, which has to speak TLS itself then")
		case "send-proxy", "send-proxy-v2", "check-send-proxy", "send-proxy-v2-ssl":
			used = false
			h.note(x, words[i]+": backends see the client's own address; they must not expect the PROXY protocol")
		default:
			used = false
			h.note(x, words[i]+" is left out")
		}
		if used {
			i++
		}
	}
}

// haproxyTime reads a time, whose unit is milliseconds where it has none.
func haproxyTime(text string) time.Duration {
	if n, err := strconv.Atoi(text); err == nil {
		return time.Duration(n) * time.Millisecond
	}
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, _ := strconv.Atoi(days)
		return time.Duration(n) * 24 * time.Hour
	}
	d, _ := time.ParseDuration(text)
	return d
}

// The bounds of health.
const (
	leastInterval = 100 * time.Millisecond
	mostInterval  = time.Hour
)

// together makes of the options of servers those of the service, and says which of them
// differ.
func (h *haproxy) together(all []*serverOptions, c *Health, out *Service) {
	if len(all) == 0 {
		return
	}
	first := all[0]
	for _, o := range all[1:] {
		if o.check != first.check || o.inter != first.inter || o.rise != first.rise || o.fall != first.fall || o.port != first.port || o.maxconn != first.maxconn {
			h.note(o.statement, "its check or maxconn is another than that of the first server, which holds for all")
		}
	}
	if slices.ContainsFunc(all, func(o *serverOptions) bool { return o.shutdown }) {
		out.OnDown = ""
	}
	if first.maxconn > 0 {
		out.Breaker = &Breaker{first.maxconn}
	}
	if first.slowstart >= leastInterval {
		out.SlowStart = span(first.slowstart)
	}
	out.Health = c
	if !first.check {
		out.Health = &Health{Probe: "none"}
		return
	}
	// HAProxy's own defaults are 2s, 2 and 3.
	c.Rise, c.Fall, c.Port, c.TLS = first.rise, first.fall, first.port, first.ssl && c.Probe != "tcp" && c.Probe != "tls"
	if first.ssl && c.Probe == "tcp" {
		c.Probe = "tls"
	}
	if c.Fall == 0 {
		c.Fall = 3
	}
	if first.inter > 0 {
		d := min(max(first.inter, leastInterval), mostInterval)
		c.Interval = span(d)
	}
}
