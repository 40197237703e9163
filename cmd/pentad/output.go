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
	Backends  []backendOut  `json:"backends" yaml:"backends"`
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
	Since   time.Time `json:"since" yaml:"since"`
}

func newServiceOut(v *socket.View, s *service.Service) serviceOut {
	out := serviceOut{Name: s.Name, Balance: s.Balance.String(), Listen: []string{}}
	if s.Affinity > 0 {
		out.Affinity = &affinityOut{s.Affinity.String()}
	}
	out.Keepalive = newKeepaliveOut(s.Keepalive)
	for _, l := range s.Listeners {
		out.Listen = append(out.Listen, l.String())
	}
	out.Backends = newBackendsOut(v, s)
	return out
}

func newBackendsOut(v *socket.View, s *service.Service) []backendOut {
	out := make([]backendOut, len(s.Backends))
	for i, state := range s.States() {
		b := s.Backends[i]
		out[i] = backendOut{
			Address: b.Address.String(), Weight: b.Weight, Group: b.Group, Zone: b.Zone,
			State: state.String(), Since: v.Since[s.Name][b.Address].UTC(),
		}
	}
	return out
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
