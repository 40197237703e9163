package migrate

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What is read here is in keepalived.conf(5).

// block is a statement with those in its braces.
type block struct {
	*statement
	in []*block
}

// find returns the first statement of a word below a block.
func (b *block) find(word string) *block {
	i := slices.IndexFunc(b.in, func(x *block) bool { return strings.EqualFold(x.word(0), word) })
	if i < 0 {
		return nil
	}
	return b.in[i]
}

// parseKeepalived reads blocks. A brace may stand on a line of its own.
func parseKeepalived(text []byte) (top []*block, lines []*statement, err error) {
	root := &block{statement: &statement{}}
	stack := []*block{root}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line = strings.NewReplacer("{", " { ", "}", " } ").Replace(cutComment(line))
		var words []string
		end := func() {
			if len(words) == 0 {
				return
			}
			s := &block{statement: &statement{line: n, words: words}}
			lines = append(lines, s.statement)
			at := stack[len(stack)-1]
			at.in = append(at.in, s)
			words = nil
		}
		for _, w := range strings.Fields(line) {
			switch w {
			case "{":
				end()
				at := stack[len(stack)-1]
				if len(at.in) == 0 {
					return nil, nil, fmt.Errorf("line %d: a brace that opens nothing", n)
				}
				stack = append(stack, at.in[len(at.in)-1])
			case "}":
				end()
				if len(stack) == 1 {
					return nil, nil, fmt.Errorf("line %d: a brace that closes nothing", n)
				}
				stack = stack[:len(stack)-1]
			default:
				words = append(words, strings.Trim(w, `"`))
			}
		}
		end()
	}
	if len(stack) > 1 {
		return nil, nil, fmt.Errorf("line %d: what begins here does not end", stack[len(stack)-1].line)
	}
	return root.in, lines, nil
}

func cutComment(line string) string {
	if i := strings.IndexAny(line, "#!"); i >= 0 {
		return line[:i]
	}
	return line
}

// keepalived is what is made of a text.
type keepalived struct {
	options Options
	result  *Result
	groups  map[string]*block
	used    map[string]bool
}

func readKeepalived(text []byte, o Options) (*Result, error) {
	top, lines, err := parseKeepalived(text)
	if err != nil {
		return nil, err
	}
	k := &keepalived{options: o, result: &Result{}, groups: make(map[string]*block), used: make(map[string]bool)}
	for _, b := range top {
		if b.word(0) == "virtual_server_group" {
			k.groups[b.word(1)] = b
		}
	}
	for _, b := range top {
		switch b.word(0) {
		case "virtual_server":
			k.virtualServer(b)
		case "virtual_server_group":
			b.take()
		case "vrrp_instance":
			k.vrrp(b)
		case "global_defs":
			leaveAll(b, "it is about the process of keepalived")
		default:
			leaveAll(b, "pentad has nothing of the kind")
		}
	}
	for _, g := range k.groups {
		for _, x := range g.in {
			if !x.taken {
				x.leave("no virtual_server has this group, or it is no address")
			}
		}
	}
	slices.Sort(k.result.Interfaces)
	k.result.Interfaces = slices.Compact(k.result.Interfaces)
	k.result.Notes = append(k.result.Notes, notes(lines)...)
	return k.result, nil
}

func leaveAll(b *block, why string) {
	b.leave("%s", why)
	for _, x := range b.in {
		leaveAll(x, why)
	}
}

func (k *keepalived) note(x *block, why string) {
	k.result.Notes = append(k.result.Notes, Note{x.line, x.shown(), why})
}

// vrrp reads who has which addresses.
func (k *keepalived) vrrp(b *block) {
	b.take()
	for _, x := range b.in {
		switch x.word(0) {
		case "interface":
			x.take()
			k.result.Interfaces = append(k.result.Interfaces, x.word(1))
		case "virtual_ipaddress", "virtual_ipaddress_excluded":
			x.take()
			for _, a := range x.in {
				a.take() // the services say which addresses there are
			}
		case "state", "priority", "nopreempt", "preempt_delay", "advert_int":
			x.leave("announcers find out among themselves who has which address, evenly")
		case "virtual_router_id":
			x.leave("announcers know each other by announce.l2.key")
		case "authentication":
			leaveAll(x, "announcers know each other by announce.l2.key, with which they sign")
		case "track_script", "track_interface", "track_process":
			leaveAll(x, "an address is announced while a backend of it can be used")
		default:
			leaveAll(x, "pentad has nothing of the kind")
		}
	}
}

// virtualServer reads `virtual_server IP PORT`, or one of a group.
func (k *keepalived) virtualServer(b *block) {
	out := &Service{}
	udp := false
	if p := b.find("protocol"); p != nil {
		switch strings.ToUpper(p.word(1)) {
		case "UDP":
			udp = true
			p.take()
		case "TCP":
			p.take()
		default:
			p.leave("only TCP and UDP are served")
		}
	}
	base := k.addresses(b, udp, out)
	if len(out.Listen) == 0 {
		leaveAll(b, "it has no address and port that a service could have")
		return
	}
	b.take()
	out.Name = name(base, k.used)
	direct := k.settings(b, out)
	var checks []*Health
	for _, x := range b.in {
		switch x.word(0) {
		case "real_server":
			if c := k.realServer(x, direct, 0, out); c != nil {
				checks = append(checks, c)
			}
		case "sorry_server", "sorry_server_inhibit":
			k.sorry(x, direct, out)
		}
	}
	k.checked(b, checks, out)
	k.result.Services = append(k.result.Services, out)
}

// addresses reads the listeners, and returns what the service is called after.
func (k *keepalived) addresses(b *block, udp bool, out *Service) string {
	add := func(x *block, address, port string) bool {
		a, err1 := netip.ParseAddr(address)
		p, err2 := strconv.ParseUint(port, 10, 16)
		if err1 != nil || err2 != nil || p == 0 {
			return false
		}
		out.listen(x.statement, listener(netip.AddrPortFrom(a, uint16(p)), udp))
		x.take()
		return true
	}
	switch b.word(1) {
	case "fwmark":
		b.leave("a service is an address and a port, and not a mark")
		return ""
	case "group":
		g := k.groups[b.word(2)]
		if g == nil {
			b.leave("there is no such group")
			return ""
		}
		for _, x := range g.in {
			if x.word(0) == "fwmark" {
				x.leave("a service is an address and a port, and not a mark")
			} else if !add(x, x.word(0), x.word(1)) {
				x.leave("want one address and a port; write a range out")
			}
		}
		return b.word(2)
	}
	add(b, b.word(1), b.word(2))
	return "vs-" + b.word(1) + "-" + b.word(2)
}

// settings reads those of a virtual server, and reports whether it is one of direct routing.
func (k *keepalived) settings(b *block, out *Service) (direct bool) {
	out.Balance, out.Forward = "least-connections", "nat" // wlc is the default
	for _, x := range b.in {
		switch x.word(0) {
		case "lb_algo", "lvs_sched":
			x.take()
			out.Balance = ipvsBalance(x.word(1), func(why string) { x.leave("%s", why) })
		case "lb_kind", "lvs_method":
			switch strings.ToUpper(x.word(1)) {
			case "DR":
				direct = true
				out.Forward = "direct"
				x.take()
				k.note(x, "packets that arrive go on to the real servers: director.interfaces names where they arrive, and real servers have the address (realServer)")
			case "NAT":
				x.take()
			default:
				x.leave("tunnels to real servers are not built; packets are translated")
			}
		case "persistence_timeout":
			x.take()
			seconds, err := strconv.Atoi(x.word(1))
			if x.word(1) == "" {
				seconds, err = 360, nil
			}
			if err != nil || seconds < 1 || seconds > 86400 {
				x.leave("affinity.timeout is 1s to 24h")
				continue
			}
			out.Affinity = &Affinity{span(time.Duration(seconds) * time.Second)}
		case "persistence_granularity":
			x.leave("a client is one address")
		case "delay_loop", "protocol", "real_server", "sorry_server", "sorry_server_inhibit", "retry", "delay_before_retry", "connect_timeout":
		case "alpha", "omega", "quorum", "hysteresis", "quorum_up", "quorum_down":
			x.leave("a service with one backend that can be used serves; a group of backends takes over when none of the one before can")
		case "virtualhost":
			x.take()
		default:
			leaveAll(x, "pentad has nothing of the kind")
		}
	}
	if direct {
		// The choice of a director is the same on all directors: by the packet alone.
		if out.Balance != "source-hash" {
			out.Balance = ""
		}
	}
	return direct
}

// ipvsBalance returns the balance of a scheduler of IPVS (ipvsadm(8)).
func ipvsBalance(scheduler string, left func(why string)) string {
	switch scheduler {
	case "rr", "wrr":
		return "random"
	case "lc", "wlc", "sed", "nq", "ovf", "fo":
		if scheduler == "ovf" || scheduler == "fo" {
			left("it fills one server before the next: give backends groups")
		}
		return "least-connections"
	case "sh", "mh":
		return "source-hash"
	}
	left("pentad has no such choice; what is left is by the least latency")
	return ""
}

// realServer reads one backend and how it is checked.
func (k *keepalived) realServer(x *block, direct bool, group int, out *Service) *Health {
	address, ok := k.backend(x, direct)
	if !ok {
		return nil
	}
	x.take()
	b := Backend{Address: address, Group: group}
	var check *Health
	for _, o := range x.in {
		switch o.word(0) {
		case "weight":
			o.take()
			w, err := strconv.Atoi(o.word(1))
			if err != nil || w < 0 {
				o.leave("%s is no weight", o.word(1))
				continue
			}
			b.Weight = &w
		case "inhibit_on_failure":
			o.take() // a backend that is down gets nothing, and connections to it are closed or kept as onDown says
		case "uthreshold":
			o.leave("breaker.maxConnections, for all backends of a service")
		case "TCP_CHECK", "HTTP_GET", "SSL_GET", "MISC_CHECK", "DNS_CHECK", "SMTP_CHECK", "UDP_CHECK", "PING_CHECK", "FILE_CHECK", "BFD_CHECK":
			if c := k.check(o); c != nil {
				check = c
			}
		default:
			leaveAll(o, "pentad has nothing of the kind")
		}
	}
	out.Backends = append(out.Backends, b)
	if check == nil {
		check = &Health{Probe: "none"}
	}
	return check
}

// backend reads `ADDRESS PORT`.
func (k *keepalived) backend(x *block, direct bool) (string, bool) {
	a, err := netip.ParseAddr(x.word(1))
	if err != nil {
		leaveAll(x, x.word(1)+" is not an address")
		return "", false
	}
	if direct {
		return a.String(), true
	}
	p, err := strconv.ParseUint(x.word(2), 10, 16)
	if err != nil || p == 0 {
		leaveAll(x, "it has no port")
		return "", false
	}
	return netip.AddrPortFrom(a, uint16(p)).String(), true
}

// sorry makes the server of last resort a group of its own.
func (k *keepalived) sorry(x *block, direct bool, out *Service) {
	if x.word(0) != "sorry_server" {
		x.leave("pentad has nothing of the kind")
		return
	}
	address, ok := k.backend(x, direct)
	if !ok {
		return
	}
	x.take()
	out.Backends = append(out.Backends, Backend{Address: address, Group: 1})
}

// check reads one checker.
func (k *keepalived) check(b *block) *Health {
	c := &Health{}
	switch b.word(0) {
	case "TCP_CHECK":
		c.Probe = "tcp"
	case "HTTP_GET", "SSL_GET":
		c.Probe, c.Path, c.TLS = "http", "/", b.word(0) == "SSL_GET"
	case "MISC_CHECK":
		c.Probe = "exec"
	default:
		leaveAll(b, "there is no such probe; backends are taken for healthy")
		return nil
	}
	b.take()
	for _, x := range b.in {
		switch x.word(0) {
		case "connect_port":
			x.take()
			c.Port, _ = strconv.Atoi(x.word(1))
		case "connect_timeout", "misc_timeout":
			x.take()
			c.Timeout = keepalivedSeconds(x)
		case "retry", "nb_get_retry":
			x.take()
			n, _ := strconv.Atoi(x.word(1))
			c.Fall = n + 1
		case "delay_loop":
			x.take()
			c.Interval = keepalivedSeconds(x)
		case "delay_before_retry":
			x.leave("a probe that failed is repeated after the interval")
		case "misc_path":
			x.take()
			c.Command = x.words[1:]
		case "url":
			x.take()
			k.url(x, c)
		case "virtualhost":
			x.take()
			c.Host = x.word(1)
		default:
			leaveAll(x, "a probe has nothing of the kind")
		}
	}
	return c
}

func (k *keepalived) url(b *block, c *Health) {
	for _, x := range b.in {
		switch x.word(0) {
		case "path":
			x.take()
			c.Path = x.word(1)
		case "status_code":
			x.take()
			c.Expect = strings.Join(x.words[1:], ",")
		case "virtualhost":
			x.take()
			c.Host = x.word(1)
		case "digest":
			x.leave("a probe looks at the status code alone")
		default:
			x.leave("a probe has nothing of the kind")
		}
	}
}

func keepalivedSeconds(x *block) string {
	f, err := strconv.ParseFloat(x.word(1), 64)
	if err != nil || f <= 0 {
		x.leave("%s is no time", x.word(1))
		return ""
	}
	return span(time.Duration(f * float64(time.Second)).Round(time.Millisecond))
}

// defaultDelayLoop is keepalived's own time between two checks.
const defaultDelayLoop = time.Minute

// checked makes of the checkers of real servers the one of the service.
func (k *keepalived) checked(b *block, all []*Health, out *Service) {
	if len(all) == 0 {
		return
	}
	out.Health = all[0]
	for _, c := range all[1:] {
		if fmt.Sprint(*c) != fmt.Sprint(*all[0]) {
			k.note(b, "its real servers are checked in different ways; that of the first holds for all")
			break
		}
	}
	if x := b.find("delay_loop"); x != nil {
		x.take()
		if out.Health.Interval == "" && out.Health.Probe != "none" {
			out.Health.Interval = keepalivedSeconds(x)
		}
	}
	if out.Health.Interval == "" && out.Health.Probe != "none" {
		out.Health.Interval = span(defaultDelayLoop)
	}
	for _, key := range []string{"retry", "delay_before_retry", "connect_timeout"} {
		if x := b.find(key); x != nil {
			x.leave("checkers say it themselves")
		}
	}
	// A probe takes no longer than the time to the next.
	interval, err1 := time.ParseDuration(out.Health.Interval)
	timeout, err2 := time.ParseDuration(out.Health.Timeout)
	if err1 == nil && err2 == nil && timeout > interval {
		out.Health.Timeout = out.Health.Interval
		k.note(b, "a probe takes no longer than the time to the next one")
	}
}
