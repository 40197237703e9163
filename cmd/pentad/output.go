package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// format is how a list is printed.
type format string

var formats = []string{"table", "json", "yaml", "wide"}

// String, Set and Type implement pflag.Value.
func (f *format) String() string { return string(*f) }

// Set takes one of the known formats.
func (f *format) Set(v string) error {
	if !slices.Contains(formats, v) {
		return fmt.Errorf("want one of %s", strings.Join(formats, ", "))
	}
	*f = format(v)
	return nil
}

// Type names the value in --help.
func (f *format) Type() string { return "FORMAT" }

// addFormat gives a command the flag -o.
func addFormat(cmd *cobra.Command) *format {
	f := format("table")
	cmd.Flags().VarP(&f, "output", "o", "table, json, yaml or wide")
	// The flag was just defined: this cannot fail.
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	return &f
}

// structured prints v as JSON or YAML, and reports whether the format was one
// of them.
func (f format) structured(w io.Writer, v any) (bool, error) {
	switch f {
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return true, e.Encode(v)
	case "yaml":
		e := yaml.NewEncoder(w)
		e.SetIndent(2)
		return true, e.Encode(v)
	}
	return false, nil
}

// table prints rows in aligned columns.
func table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.TrimRight(strings.Join(r, "\t"), "\t "))
	}
	return t.Flush()
}

// serviceOut and backendOut are what is printed of a service and of a backend;
// the names are those of the configuration.
type serviceOut struct {
	Name      string        `json:"name" yaml:"name"`
	Listen    []string      `json:"listen" yaml:"listen"`
	Balance   string        `json:"balance" yaml:"balance"`
	Affinity  *affinityOut  `json:"affinity,omitempty" yaml:"affinity,omitempty"`
	Keepalive *keepaliveOut `json:"keepalive,omitempty" yaml:"keepalive,omitempty"`
	Breaker   *breakerOut   `json:"breaker,omitempty" yaml:"breaker,omitempty"`
	Connect   *connectOut   `json:"connect,omitempty" yaml:"connect,omitempty"`
	OnDown    string        `json:"onDown" yaml:"onDown"`
	SlowStart string        `json:"slowStart,omitempty" yaml:"slowStart,omitempty"`
	Flows     bool          `json:"flows" yaml:"flows"`
	Backends  []backendOut  `json:"backends" yaml:"backends"`

	// What packets find that arrive from other hosts and from guests of this one.
	Packets []packetsOut `json:"packets,omitempty" yaml:"packets,omitempty"`
}

type keepaliveOut struct {
	Idle     string `json:"idle" yaml:"idle"`
	Interval string `json:"interval,omitempty" yaml:"interval,omitempty"`
	Probes   int    `json:"probes,omitempty" yaml:"probes,omitempty"`
}

func newKeepaliveOut(k service.Keepalive) *keepaliveOut {
	if k.Idle == 0 {
		return nil
	}
	out := &keepaliveOut{Idle: k.Idle.String(), Probes: k.Probes}
	if k.Interval > 0 {
		out.Interval = k.Interval.String()
	}
	return out
}

type breakerOut struct {
	MaxConnections int    `json:"maxConnections,omitempty" yaml:"maxConnections,omitempty"`
	Failures       int    `json:"failures,omitempty" yaml:"failures,omitempty"`
	Ejection       string `json:"ejection,omitempty" yaml:"ejection,omitempty"`
	MaxEjected     string `json:"maxEjected,omitempty" yaml:"maxEjected,omitempty"`
}

func newBreakerOut(b service.Breaker) *breakerOut {
	if b == (service.Breaker{}) {
		return nil
	}
	out := &breakerOut{MaxConnections: b.MaxConnections, Failures: b.Failures}
	if b.Failures > 0 {
		out.Ejection, out.MaxEjected = b.Ejection.String(), fmt.Sprintf("%d%%", b.MaxEjected)
	}
	return out
}

type connectOut struct {
	Timeout string `json:"timeout" yaml:"timeout"`
}

type affinityOut struct {
	Timeout string `json:"timeout" yaml:"timeout"`
}

type backendOut struct {
	Service string    `json:"service,omitempty" yaml:"service,omitempty"`
	Address string    `json:"address" yaml:"address"`
	Weight  uint32    `json:"weight" yaml:"weight"`
	Group   uint32    `json:"group" yaml:"group"`
	Zone    string    `json:"zone,omitempty" yaml:"zone,omitempty"`
	State   string    `json:"state" yaml:"state"`
	Why     string    `json:"why,omitempty" yaml:"why,omitempty"`
	Since   time.Time `json:"since" yaml:"since"`

	InFlight    uint32 `json:"inFlight" yaml:"inFlight"`
	EjectedFor  int    `json:"ejectedFor,omitempty" yaml:"ejectedFor,omitempty"` // how many clients do not use it
	RTT         string `json:"rtt,omitempty" yaml:"rtt,omitempty"`               // of handshakes; absent: unknown
	Response    string `json:"response,omitempty" yaml:"response,omitempty"`     // from request to first byte; absent: unknown
	Failures    uint32 `json:"failures" yaml:"failures"`                         // failed connects in a row, of the client with most
	Connections uint64 `json:"connections" yaml:"connections"`
	Failed      uint64 `json:"failed" yaml:"failed"`
	Ejections   uint64 `json:"ejections" yaml:"ejections"`
}

func newServiceOut(v *socket.View, s *service.Service) serviceOut {
	out := serviceOut{Name: s.Name, Balance: s.Balance.String(), Listen: []string{}}
	if s.Affinity > 0 {
		out.Affinity = &affinityOut{s.Affinity.String()}
	}
	out.Keepalive = newKeepaliveOut(s.Keepalive)
	out.Breaker = newBreakerOut(s.Breaker)
	if s.ConnectTimeout > 0 {
		out.Connect = &connectOut{s.ConnectTimeout.String()}
	}
	out.OnDown, out.Flows = s.OnDown.String(), !s.Silent
	if s.SlowStart > 0 {
		out.SlowStart = s.SlowStart.String()
	}
	for _, l := range s.Listeners {
		out.Listen = append(out.Listen, l.String())
	}
	out.Backends = newBackendsOut(v, s)
	return out
}

// ejectedState is what is shown of a backend that could serve, but for its failures.
const ejectedState = "ejected"

func newBackendsOut(v *socket.View, s *service.Service) []backendOut {
	out := make([]backendOut, len(s.Backends))
	for i, state := range s.States() {
		b := s.Backends[i]
		l := v.Loads[s.Name][b.Address]
		out[i] = backendOut{
			Address: b.Address.String(), Weight: b.Weight, Group: b.Group, Zone: b.Zone,
			State: state.String(), Why: why(b, state, l), Since: v.Since[s.Name][b.Address].UTC(),
			InFlight: l.InFlight, EjectedFor: l.Clients, RTT: latency(l.RTT), Response: latency(l.Response), Failures: l.Failures,
			Connections: l.Connections, Failed: l.Failed, Ejections: l.Ejections,
		}
		if l.Ejected && (state == service.Serving || state == service.Standby) {
			out[i].State = ejectedState
		}
	}
	return out
}

// why says in a few words what keeps a backend from taking connections, or nothing.
func why(b service.Backend, state service.State, l socket.Load) string {
	switch {
	case state == service.Down:
		return "its probe fails"
	case b.Drained && b.DrainUntil > 0 && !b.DrainOver:
		if left := time.Until(time.Unix(int64(b.DrainUntil), 0)); left > 0 {
			return fmt.Sprintf("drained; what is left is closed in %s", left.Round(time.Second))
		}
		return "drained"
	case b.Drained:
		return "drained"
	case b.Weight == 0:
		return "weight 0"
	case l.Ejected:
		return blamed(l)
	case state == service.Standby:
		return "a lower group serves"
	}
	return ""
}

// blamed says for whom a backend is ejected, and until when.
func blamed(l socket.Load) string {
	of := "failed connects of " + count(l.Clients, "client")
	if l.Shunned {
		of = "failed connects of several clients, and others avoid it"
	}
	switch {
	case l.Trial:
		return of + "; a connection is trying it"
	case l.For > 0:
		return fmt.Sprintf("%s; tried again in %s", of, l.For.Round(100*time.Millisecond))
	}
	return of + "; the next connection tries it"
}

// latency writes a latency in microseconds or milliseconds, nothing for 0.
func latency(d time.Duration) string {
	switch {
	case d == 0:
		return ""
	case d >= 10*time.Millisecond:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Microsecond).String()
}

// ago writes how long ago something was, in one or two units.
func ago(t time.Time) string {
	d := time.Since(t)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}

// bytesText writes a size for people.
func bytesText(n uint64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
}
