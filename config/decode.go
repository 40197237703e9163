package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/pentad/pentad/service"
)

// decoder gathers errors while it walks the nodes of one file.
type decoder struct {
	file   string
	errors Errors
	at     map[*service.Service]*origin
}

// origin is where the parts of a service stand in the file.
type origin struct {
	name          *yaml.Node
	listeners     []service.Listener
	listenerNodes []*yaml.Node
}

func (d *decoder) errorf(at *yaml.Node, format string, args ...any) {
	d.errors = append(d.errors, Error{
		File: d.file, Line: at.Line, Column: at.Column, Message: fmt.Sprintf(format, args...),
	})
}

// failed returns the errors in the order of the file, or nil.
func (d *decoder) failed() error {
	if len(d.errors) == 0 {
		return nil
	}
	slices.SortStableFunc(d.errors, func(a, b Error) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return d.errors
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
	return strconv.Quote(n.Value)
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
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" || err != nil || v < low || v > high {
		d.errorf(n, "want a whole number from %d to %d, found %s", low, high, found(n))
		return 0, false
	}
	return v, true
}

// duration reads a duration of whole units: of a second, of a millisecond or of any.
func (d *decoder) duration(n *yaml.Node, low, high, unit time.Duration) (time.Duration, bool) {
	v, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil || v < low || v > high {
		d.errorf(n, "want a duration from %s to %s, such as %s, found %s",
			short(low), short(high), short(max(low, min(high, 2*time.Second))), found(n))
		return 0, false
	}
	if v%unit != 0 {
		d.errorf(n, "want whole %ss, found %q", units[unit], n.Value)
		return 0, false
	}
	return v, true
}

var units = map[time.Duration]string{time.Second: "second", time.Millisecond: "millisecond"}

// percentage reads 1% to 100%.
func (d *decoder) percentage(n *yaml.Node) int {
	text, isPercentage := strings.CutSuffix(n.Value, "%")
	v, err := strconv.Atoi(text)
	if n.Kind != yaml.ScalarNode || !isPercentage || err != nil || v < 1 || v > 100 {
		d.errorf(n, "want a percentage from 1%% to 100%%, found %s", found(n))
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

// short writes a duration without its zero parts: 3h, not 3h0m0s.
func short(d time.Duration) string {
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
	want := strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
	v, ok := d.text(n, want)
	if !ok {
		return 0, false
	}
	i := slices.Index(words, v)
	if i < 0 {
		d.errorf(n, "want %s, found %s%s", want, found(n), nearest(v, words))
		return 0, false
	}
	return i, true
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
			d.errorf(e, "want %s, without bits behind its length, found %q", want, text)
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
		d.errorf(n, "want %s, found %q%s", what, text, addressHint(text))
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

// addressHint says what is most likely wrong with an address.
func addressHint(text string) string {
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
		return "; names are not resolved, write the IP address"
	}
	return ""
}

// listener reads VIP:port[/tcp|udp].
func (d *decoder) listener(n *yaml.Node) (service.Listener, bool) {
	const want = "a listener VIP:PORT[/tcp|udp], such as 10.96.0.10:3306 or [2001:db8::10]:53/udp"
	l := service.Listener{Protocol: service.TCP}
	text, ok := d.text(n, want)
	if !ok {
		return l, false
	}
	address, protocol, named := strings.Cut(text, "/")
	switch {
	case !named || protocol == "tcp":
	case protocol == "udp":
		l.Protocol = service.UDP
	default:
		d.errorf(n, "want protocol tcp or udp, found %q%s", protocol, nearest(protocol, []string{"tcp", "udp"}))
		return l, false
	}
	l.Address, ok = d.address(n, address, want)
	return l, ok
}

// nearest suggests the word that was probably meant, or nothing.
func nearest(word string, words []string) string {
	const longest = 64 // no key is nearly as long
	if len(word) > longest {
		return "; known are " + strings.Join(words, ", ")
	}
	best, distance := "", 1+len(word)/2
	for _, w := range words {
		if n := editDistance(strings.ToLower(word), strings.ToLower(w)); n < distance {
			best, distance = w, n
		}
	}
	if best == "" {
		return "; known are " + strings.Join(words, ", ")
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// editDistance counts the letters to insert, remove, change or swap with their
// neighbour to turn one word into the other (optimal string alignment).
func editDistance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
