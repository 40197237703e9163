// Package migrate reads the configuration of the load balancers that people have and
// writes it as pentad's: what can be said in both, and of all else which line it is and why
// it is left. It is pure.
package migrate

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/config"
)

// Format is whose configuration it is.
type Format string

// The formats.
const (
	HAProxy    Format = "haproxy"
	Keepalived Format = "keepalived"
	IPVS       Format = "ipvsadm"
)

// Formats are all of them.
var Formats = []Format{HAProxy, Keepalived, IPVS}

// Guess returns the format of a text; empty: none that is known.
func Guess(text []byte) Format {
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		switch words[0] {
		case "global", "defaults", "frontend", "backend", "listen":
			return HAProxy
		case "global_defs", "vrrp_instance", "virtual_server", "vrrp_sync_group", "vrrp_script", "virtual_server_group":
			return Keepalived
		case "-A", "-a", "--add-service":
			return IPVS
		}
	}
	return ""
}

// Options say what a text leaves open.
type Options struct {
	// Wildcard is the address that stands for "every address of this host", which a
	// load balancer that listens can have and a virtual address is not.
	Wildcard netip.Addr
}

// Note is a line that was not translated.
type Note struct {
	Line int
	Text string
	Why  string
}

// String returns what people read.
func (n Note) String() string { return fmt.Sprintf("line %d: %s: %s", n.Line, n.Text, n.Why) }

// Result is what became of a text.
type Result struct {
	Services   []*Service
	Interfaces []string // on which the virtual addresses were announced by ARP and NDP
	Notes      []Note   // sorted by line
}

// Service is a service as pentad.yaml has it.
type Service struct {
	Name      string    `yaml:"name"`
	Listen    []string  `yaml:"listen,flow"`
	Balance   string    `yaml:"balance,omitempty"`
	Affinity  *Affinity `yaml:"affinity,omitempty,flow"`
	Breaker   *Breaker  `yaml:"breaker,omitempty,flow"`
	OnDown    string    `yaml:"onDown,omitempty"`
	Forward   string    `yaml:"forward,omitempty"`
	SlowStart string    `yaml:"slowStart,omitempty"`
	Backends  []Backend `yaml:"backends"`
	Health    *Health   `yaml:"health,omitempty,flow"`

	at map[string]*statement // where its listeners stand
}

// listen adds a listener, which stands there.
func (s *Service) listen(x *statement, l string) {
	if s.at == nil {
		s.at = make(map[string]*statement)
	}
	s.Listen, s.at[l] = append(s.Listen, l), x
}

// Affinity has the keys of `affinity`.
type Affinity struct {
	Timeout string `yaml:"timeout"`
}

// Breaker has those of `breaker` that others know.
type Breaker struct {
	MaxConnections int `yaml:"maxConnections"`
}

// Backend is one of `backends`.
type Backend struct {
	Address  string `yaml:"address"`
	Weight   *int   `yaml:"weight,omitempty"` // nil: as all others
	Group    int    `yaml:"group,omitempty"`
	Disabled bool   `yaml:"disabled,omitempty"`
}

// Health has the keys of `health` that others know.
type Health struct {
	Probe    string   `yaml:"probe"`
	Interval string   `yaml:"interval,omitempty"`
	Timeout  string   `yaml:"timeout,omitempty"`
	Rise     int      `yaml:"rise,omitempty"`
	Fall     int      `yaml:"fall,omitempty"`
	Port     int      `yaml:"port,omitempty"`
	Path     string   `yaml:"path,omitempty"`
	Host     string   `yaml:"host,omitempty"`
	Expect   string   `yaml:"expect,omitempty"`
	TLS      bool     `yaml:"tls,omitempty"`
	User     string   `yaml:"user,omitempty"`
	Command  []string `yaml:"command,omitempty,flow"`
}

// ErrFormat says that a format is none of the known.
var ErrFormat = errors.New("want haproxy, keepalived or ipvsadm")

// Read reads a text. Its error says that the text is none of the format at all.
func Read(f Format, text []byte, o Options) (*Result, error) {
	var r *Result
	var err error
	switch f {
	case HAProxy:
		r = readHAProxy(text, o)
	case Keepalived:
		r, err = readKeepalived(text, o)
	case IPVS:
		r = readIPVS(text)
	default:
		return nil, ErrFormat
	}
	if err != nil {
		return nil, err
	}
	for _, s := range r.Services {
		r.Notes = append(r.Notes, s.dropFamilies()...)
		s.tidy()
	}
	slices.SortStableFunc(r.Notes, func(a, b Note) int { return a.Line - b.Line })
	r.Notes = slices.Compact(r.Notes)
	return r, nil
}

// File returns the result as pentad.yaml, with the notes as comments, and what `pentad
// check` has against it.
func (r *Result) File(source string) ([]byte, error) {
	file := struct {
		Announce any        `yaml:"announce,omitempty"`
		Services []*Service `yaml:"services"`
	}{Services: r.Services}
	if file.Services == nil {
		file.Services = []*Service{}
	}
	if len(r.Interfaces) > 0 {
		file.Announce = map[string]any{"l2": map[string]any{"interfaces": r.Interfaces}}
	}
	text, err := yaml.Dump(file, yaml.WithIndent(2))
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "# Made from %s. Read it before it is used: `pentad check` and `pentad diff` tell more.\n", source)
	if len(r.Notes) > 0 {
		fmt.Fprintf(&out, "#\n# Not translated:\n")
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&out, "#   %s\n", oneLine(n.String()))
	}
	out.Write(text)
	_, err = config.Parse("pentad.yaml", out.Bytes())
	return out.Bytes(), err
}

func oneLine(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r < ' ' }), " ")
}

// dropFamilies drops listeners of a family of which there is no backend: others accept a
// connection of one family and make one of the other.
func (s *Service) dropFamilies() (dropped []Note) {
	has := func(six bool) bool {
		return len(s.Backends) == 0 || slices.ContainsFunc(s.Backends, func(b Backend) bool { return isSix(b.Address) == six })
	}
	s.Listen = slices.DeleteFunc(s.Listen, func(l string) bool {
		if has(isSix(l)) {
			return false
		}
		x := s.at[l]
		dropped = append(dropped, Note{x.line, strings.Join(x.words, " "), "no backend of " + s.Name + " is of the family of " + l})
		return true
	})
	return dropped
}

// isSix reports whether a listener, or the address of a backend, is IPv6.
func isSix(text string) bool {
	if a, err := netip.ParseAddr(text); err == nil {
		return a.Is6()
	}
	return strings.HasPrefix(text, "[")
}

// tidy leaves out what says no more than its absence.
func (s *Service) tidy() {
	same := len(s.Backends) > 0
	for _, b := range s.Backends {
		first := s.Backends[0].Weight
		same = same && (b.Weight == nil) == (first == nil) && (first == nil || *b.Weight == *first && *first != 0)
	}
	for i := range s.Backends {
		if same {
			s.Backends[i].Weight = nil
		} else if s.Backends[i].Weight == nil {
			one := 1
			s.Backends[i].Weight = &one
		}
	}
	if s.Backends == nil {
		s.Backends = []Backend{}
	}
}

// statement is a line, or part of one, that something is to become of.
type statement struct {
	line  int
	words []string
	taken bool
	why   string
}

func (s *statement) take() { s.taken = true }

// leave says why it is not translated; the first reason counts.
func (s *statement) leave(format string, args ...any) {
	if s.why == "" {
		s.why = fmt.Sprintf(format, args...)
	}
}

func (s *statement) word(i int) string {
	if i < len(s.words) {
		return s.words[i]
	}
	return ""
}

// notes returns a note for each statement of which nothing became, or not all.
func notes(all []*statement) (left []Note) {
	for _, s := range all {
		if s.taken && s.why == "" {
			continue
		}
		why := s.why
		if why == "" {
			why = "pentad has nothing of the kind"
		}
		left = append(left, Note{s.line, s.shown(), why})
	}
	return left
}

// secrets are words behind which a password stands, which is not to be repeated.
var secrets = []string{"auth_pass", "auth", "password", "insecure-password"}

// shown is what a note shows of a statement.
func (s *statement) shown() string {
	if i := slices.IndexFunc(s.words, func(w string) bool { return slices.Contains(secrets, w) }); i >= 0 && i+1 < len(s.words) {
		return strings.Join(s.words[:i+1], " ") + " ..."
	}
	return strings.Join(s.words, " ")
}

// name makes a name of a service of a text, which no other has.
func name(text string, used map[string]bool) string {
	var b strings.Builder
	for _, r := range strings.ToLower(text) {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			b.WriteRune(r)
		case !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
	}
	base := strings.Trim(b.String(), "-")
	if base == "" {
		base = "service"
	}
	base = strings.Trim(base[:min(len(base), 55)], "-")
	result := base
	for i := 2; used[result]; i++ {
		result = fmt.Sprintf("%s-%d", base, i)
	}
	used[result] = true
	return result
}

// span returns a duration as pentad writes it.
func span(d time.Duration) string {
	text := d.String()
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(text, zero) {
			text = strings.TrimSuffix(text, zero[1:])
		}
	}
	return text
}

// listener returns a listener of a service.
func listener(a netip.AddrPort, udp bool) string {
	if udp {
		return a.String() + "/udp"
	}
	return a.String()
}
