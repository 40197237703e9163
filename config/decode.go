package config

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// decoder gathers errors while it walks the nodes of one file.
type decoder struct {
	file     string
	errors   Errors
	warnings Errors
	meant    []string // keys that unknown ones were probably meant for
	defaults *yaml.Node
	at       map[*service.Service]*origin
	disabled map[*service.Service]bool
	taken    taken
	vias     []viaNode

	proxyNodes    []*yaml.Node // of Proxies, and so on
	upstreamNodes []*yaml.Node
	peerNodes     []*yaml.Node
	l2Node        *yaml.Node
	forwardNodes  []*yaml.Node
	captureNodes  []*yaml.Node

	elsewhere *foreign // nodes that stand in another file; nil: none do
}

func newDecoder(file string) *decoder {
	return &decoder{file: file, at: make(map[*service.Service]*origin), disabled: make(map[*service.Service]bool)}
}

// foreign are nodes of another file.
type foreign struct {
	file  string
	nodes map[*yaml.Node]bool
}

func (f *foreign) add(n *yaml.Node) {
	if f.nodes[n] {
		return
	}
	f.nodes[n] = true
	for _, c := range n.Content {
		f.add(c)
	}
	if n.Alias != nil {
		f.add(n.Alias)
	}
}

// fileOf returns the file in which a node stands.
func (d *decoder) fileOf(n *yaml.Node) string {
	if d.elsewhere != nil && d.elsewhere.nodes[n] {
		return d.elsewhere.file
	}
	return d.file
}

// origin is where the parts of a service stand in the file.
type origin struct {
	file          string
	name          *yaml.Node
	health        *yaml.Node // nil: nothing is said of it
	forward       bool       // it is said what becomes of packets
	listeners     []service.Listener
	listenerNodes []*yaml.Node
	backendNodes  []*yaml.Node // of Backends
}

func (d *decoder) errorf(at *yaml.Node, format string, args ...any) {
	d.errors = append(d.errors, d.problem(at, format, args...))
}

func (d *decoder) problem(at *yaml.Node, format string, args ...any) Error {
	return Error{File: d.fileOf(at), Line: at.Line, Column: at.Column, Message: fmt.Sprintf(format, args...)}
}

// has reports whether a key was probably meant by another one.
func (d *decoder) has(key string) bool { return slices.Contains(d.meant, key) }

// failed returns the errors in the order of the file, or nil.
func (d *decoder) failed() error {
	if len(d.errors) == 0 {
		return nil
	}
	return d.sorted(d.errors)
}

// compareFiles puts the file itself before those that it includes.
func (d *decoder) compareFiles(a, b string) int {
	switch {
	case a == b:
		return 0
	case a == d.file:
		return -1
	case b == d.file:
		return 1
	}
	return cmp.Compare(a, b)
}

func (d *decoder) sorted(all Errors) Errors {
	slices.SortStableFunc(all, func(a, b Error) int {
		return cmp.Or(d.compareFiles(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	// What is wrong with something that stands for several is said once.
	return slices.Compact(all)
}

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// found says what a node is, for "want a duration, found a list".
func found(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	if n.Tag == "!!null" {
		return "nothing"
	}
	return strconv.Quote(shorten(n.Value))
}

// shorten leaves out what nobody would read of a value.
func shorten(text string) string {
	const most = 80
	runes := []rune(text)
	if len(runes) <= most {
		return text
	}
	return string(runes[:most]) + "..."
}

func (d *decoder) text(n *yaml.Node, want string) (string, bool) {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Value == "" {
		d.errorf(n, "want %s, found %s", want, found(n))
		return "", false
	}
	return n.Value, true
}

// list calls each for every element.
func (d *decoder) list(n *yaml.Node, want string, each func(*yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		d.errorf(n, "want %s, found %s", want, found(n))
		return
	}
	for _, e := range n.Content {
		each(resolve(e))
	}
}

func (d *decoder) integer(n *yaml.Node, low, high int) (int, bool) {
	v, err := strconv.Atoi(n.Value)
	switch {
	case n.Kind == yaml.ScalarNode && n.Tag == "!!str" && err == nil:
		d.errorf(n, "want a whole number from %d to %d, found text in quotes; write %s without quotes", low, high, n.Value)
		return 0, false
	case n.Kind != yaml.ScalarNode || n.Tag != "!!int" || err != nil || v < low || v > high:
		d.errorf(n, "want a whole number from %d to %d, found %s", low, high, found(n))
		return 0, false
	}
	return v, true
}

// duration reads a duration of whole units: of a second, of a millisecond or of any.
func (d *decoder) duration(n *yaml.Node, low, high, unit time.Duration) (time.Duration, bool) {
	v, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil || v < low || v > high {
		d.errorf(n, "want a duration from %s to %s, such as %s, found %s%s",
			Duration(low), Duration(high), Duration(max(low, min(high, 2*time.Second))), found(n), durationHint(n, err))
		return 0, false
	}
	if v%unit != 0 {
		d.errorf(n, "want whole %ss, found %q", units[unit], shorten(n.Value))
		return 0, false
	}
	return v, true
}

// durationHint says what is most likely wrong with a duration.
func durationHint(n *yaml.Node, err error) string {
	switch {
	case n.Kind != yaml.ScalarNode || err == nil:
		return ""
	case n.Tag == "!!int" || n.Tag == "!!float":
		return fmt.Sprintf("; the unit is missing: did you mean %ss?", n.Value)
	}
	return "; the units are ms, s, m and h, as in 500ms or 1h30m"
}

var units = map[time.Duration]string{time.Second: "second", time.Millisecond: "millisecond"}

// percentage reads 1% to 100%.
func (d *decoder) percentage(n *yaml.Node) int {
	text, isPercentage := strings.CutSuffix(n.Value, "%")
	v, err := strconv.Atoi(text)
	if n.Kind != yaml.ScalarNode || !isPercentage || err != nil || v < 1 || v > 100 {
		hint := ""
		if v, err := strconv.Atoi(n.Value); n.Kind == yaml.ScalarNode && err == nil && v >= 1 && v <= 100 {
			hint = fmt.Sprintf("; did you mean %s%%?", n.Value)
		}
		d.errorf(n, "want a percentage from 1%% to 100%%, found %s%s", found(n), hint)
		return 0
	}
	return v
}

// truth reads true or false.
func (d *decoder) truth(n *yaml.Node) (is, ok bool) {
	v, err := strconv.ParseBool(n.Value)
	if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" || err != nil {
		d.errorf(n, "want true or false, found %s", found(n))
		return false, false
	}
	return v, true
}

// Duration writes a duration as a file does, without its zero parts: 3h, not 3h0m0s.
func Duration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// word reads one of a few words and returns its index.
func (d *decoder) word(n *yaml.Node, words ...string) (int, bool) {
	want := words[len(words)-1]
	if len(words) > 1 {
		want = strings.Join(words[:len(words)-1], ", ") + " or " + want
	}
	v, ok := d.text(n, want)
	if !ok {
		return 0, false
	}
	i := slices.Index(words, v)
	if i < 0 {
		d.errorf(n, "want %s, found %s%s", want, found(n), meant(v, words))
		return 0, false
	}
	return i, true
}

// foreignWords are what others call what is called otherwise here.
var foreignWords = map[string]string{
	"master": "primary", "slave": "replica", "secondary": "replica", "leader": "primary", "follower": "replica",
	"roundrobin": "random", "round-robin": "random", "rr": "random", "wrr": "random", "leastconn": "least-connections", "lc": "least-connections",
	"wlc": "least-connections", "least_conn": "least-connections", "source": "source-hash", "ip_hash": "source-hash", "sh": "source-hash", "mh": "source-hash",
	"maglev": "source-hash", "close": "reset", "shutdown-sessions": "reset", "mariadb": "mysql", "pgsql": "postgres", "postgresql": "postgres", "script": "exec",
}

// meant says which word was probably meant.
func meant(word string, words []string) string {
	if ours := foreignWords[strings.ToLower(word)]; slices.Contains(words, ours) {
		return fmt.Sprintf("; that is called %q here", ours)
	}
	if (strings.EqualFold(word, "https") || strings.EqualFold(word, "ssl")) && slices.Contains(words, "http") {
		if strings.EqualFold(word, "ssl") {
			return "; that is called \"tls\" here"
		}
		return "; write \"probe: http\" and \"tls: true\""
	}
	return service.Nearest(word, words)
}

// prefixes reads a list of address prefixes.
func (d *decoder) prefixes(n *yaml.Node) []netip.Prefix {
	const want = "a prefix such as 192.0.2.0/24 or 2001:db8::/32"
	var all []netip.Prefix
	d.list(n, "a list of prefixes, such as [192.0.2.0/24]", func(e *yaml.Node) {
		text, ok := d.text(e, want)
		if !ok {
			return
		}
		p, err := netip.ParsePrefix(text)
		if err != nil || p.Masked() != p {
			d.errorf(e, "want %s, without bits behind its length, found %q", want, shorten(text))
			return
		}
		if p.Addr().Is4In6() {
			d.errorf(e, "want %s, found %q; an address of IPv4 is written as such, also where sockets of IPv6 use it", want, shorten(text))
			return
		}
		all = append(all, p)
	})
	return all
}

// address reads ADDRESS:PORT that a connection can go to.
func (d *decoder) address(n *yaml.Node, text, what string) (netip.AddrPort, bool) {
	ap, err := netip.ParseAddrPort(text)
	if err != nil {
		d.errorf(n, "want %s, found %q%s", what, shorten(text), addressHint(text))
		return ap, false
	}
	addr := ap.Addr()
	problem := ""
	switch {
	case ap.Port() == 0:
		problem = "port 0 cannot be connected to"
	case addr.Is4In6():
		problem = "write it as IPv4: " + netip.AddrPortFrom(addr.Unmap(), ap.Port()).String()
	case addr.Zone() != "":
		problem = "an address with a zone is not supported"
	case addr.Is6() && addr.IsLinkLocalUnicast():
		problem = "a link-local address cannot be connected to without a zone, which is not supported"
	case addr.IsUnspecified():
		problem = "the unspecified address cannot be connected to"
	case addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		problem = "a multicast or broadcast address has no single owner"
	}
	if problem != "" {
		d.errorf(n, "%s is not %s: %s", text, what, problem)
		return ap, false
	}
	return ap, true
}

// ownAddress reads ADDRESS:PORT at which this host listens, such as the example; that may
// be every address.
func (d *decoder) ownAddress(n *yaml.Node, example string) netip.AddrPort {
	want := "an address such as " + example
	v, ok := d.text(n, want)
	if !ok {
		return netip.AddrPort{}
	}
	at, err := netip.ParseAddrPort(v)
	if err != nil || at.Port() == 0 || at.Addr().Zone() != "" {
		hint := addressHint(v)
		if strings.HasPrefix(v, ":") {
			hint = fmt.Sprintf("; every IPv4 address is 0.0.0.0%s", v)
		}
		d.errorf(n, "want %s, found %q%s", want, shorten(v), hint)
	}
	return at
}

// addressHint says what is most likely wrong with an address.
func addressHint(text string) string {
	switch {
	case strings.Contains(text, "://"):
		return "; write the address without what stands before ://"
	case strings.Contains(text, "${") || strings.HasPrefix(text, "$"):
		return "; variables of the environment are not expanded"
	case strings.ContainsAny(text, " \t"):
		return "; there is a blank in it"
	case strings.HasPrefix(text, ":"):
		return "; the address before the port is missing"
	}
	if hint := bracketHint(text); hint != "" {
		return hint
	}
	if a, err := netip.ParseAddr(text); err == nil {
		return fmt.Sprintf("; the port is missing: %s", netip.AddrPortFrom(a, 80))
	}
	host, port, ok := strings.Cut(text, ":")
	if !ok || strings.Contains(port, ":") {
		return ""
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "; a port is a number from 1 to 65535"
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return hostHint(host)
	}
	return ""
}

// bracketHint says how the IPv6 address is written that a text probably is.
func bracketHint(text string) string {
	if strings.Count(text, ":") < 2 || strings.HasPrefix(text, "[") {
		return ""
	}
	at := strings.LastIndex(text, ":")
	host, port := text[:at], text[at+1:]
	if _, err := strconv.ParseUint(port, 10, 16); err == nil {
		if a, err := netip.ParseAddr(host); err == nil && a.Is6() {
			return fmt.Sprintf("; an IPv6 address is written in brackets: did you mean \"[%s]:%s\"?", host, port)
		}
	}
	if a, err := netip.ParseAddr(text); err == nil && a.Is6() {
		return fmt.Sprintf("; the port is missing, and an IPv6 address is written in brackets: \"[%s]:80\"", text)
	}
	return ""
}

// hostHint says why what looks like an IPv4 address is none.
func hostHint(host string) string {
	parts := strings.Split(host, ".")
	for _, p := range parts {
		n, err := strconv.Atoi(p)
		switch {
		case err != nil:
			return "; names are not resolved, write the IP address"
		case n > 255:
			return fmt.Sprintf("; %d is more than 255", n)
		case len(p) > 1 && p[0] == '0':
			return fmt.Sprintf("; %s has a leading zero", p)
		}
	}
	return fmt.Sprintf("; an IPv4 address has four numbers, this has %d", len(parts))
}

// listener reads VIP:port[/tcp|udp].
func (d *decoder) listener(n *yaml.Node) (service.Listener, bool) {
	const want = "a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp"
	l := service.Listener{Protocol: service.TCP}
	if n.Kind == yaml.SequenceNode || n.Kind == yaml.MappingNode {
		d.errorf(n, "want %s, found %s; what begins with a bracket is written in quotes: \"[2001:db8::10]:53/udp\"", want, found(n))
		return l, false
	}
	text, ok := d.text(n, want)
	if !ok {
		return l, false
	}
	address, protocol, named := strings.Cut(text, "/")
	if strings.Contains(text, "://") {
		address, named = text, false
	}
	switch {
	case !named || protocol == "tcp":
	case protocol == "udp":
		l.Protocol = service.UDP
	default:
		d.errorf(n, "want protocol tcp or udp, found %q%s", shorten(protocol), protocolHint(protocol))
		return l, false
	}
	l.Address, ok = d.address(n, address, want)
	return l, ok
}

func protocolHint(protocol string) string {
	switch {
	case strings.EqualFold(protocol, "sctp") || strings.EqualFold(protocol, "icmp"):
		return "; other protocols are not served"
	case protocol != "" && protocol[0] >= '0' && protocol[0] <= '9':
		return "; a listener is one address, not a prefix"
	}
	return service.Nearest(protocol, []string{"tcp", "udp"})
}
