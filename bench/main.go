// Command bench measures pentad beside what a user would pick instead, all in
// one run on one machine: peers alternate, figures are medians, and what counts
// is the ratio. It prints one table and writes bench/results.json.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"text/tabwriter"
)

// row is one line of the table.
type row struct {
	What   string  `json:"what"`
	Value  float64 `json:"value"`
	Unit   string  `json:"unit,omitempty"` // empty: a ratio
	Limit  float64 `json:"limit"`
	Below  bool    `json:"below"` // whether the value must be at most, or at least, the limit
	Met    bool    `json:"met"`
	Detail string  `json:"detail"`
}

// board gathers rows.
type board struct {
	self    string // this program
	program string // pentad
	rows    []row
}

func (b *board) add(r row) {
	r.Met = r.Below && r.Value <= r.Limit || !r.Below && r.Value >= r.Limit
	b.rows = append(b.rows, r)
	fmt.Fprintf(os.Stderr, "%s\n", strings.ReplaceAll(r.line(), "\t", "  "))
}

func (r row) line() string {
	must, met := "shown", ""
	if r.Limit != 0 || r.Below {
		sign := ">="
		if r.Below {
			sign = "<="
		}
		must = fmt.Sprintf("%s %.4g%s", sign, r.Limit, r.Unit)
		met = "NOT MET"
		if r.Met {
			met = "met"
		}
	}
	return fmt.Sprintf("%s\t%.3g%s\t%s\t%s\t%s", r.What, r.Value, r.Unit, must, met, r.Detail)
}

// parts are the measurements, in the order of the table.
var parts = []struct {
	name string
	run  func(context.Context, *board) error
}{
	{"connect", connectTimes},
	{"wrk", wrk},
	{"runtime", runTimes},
	{"size", sizes},
	{"change", smallChange},
	{"capacity", capacity},
	{"probes", probes},
	{"kills", kills},
	{"life", lives},
	{"heal", heals},
	{"late", lateBackend},
	{"reset", resets},
	{"flow", flowRate},
	{"failover", failover},
}

func main() {
	if runHelper() {
		return
	}
	only := flag.String("only", "", "comma-separated parts to run instead of all")
	program := flag.String("pentad", "bin/pentad", "the program to measure")
	out := flag.String("out", "bench/results.json", "where the results go")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *only, *program, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only, program, out string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	b := &board{self: self, program: program}
	for _, p := range parts {
		if only != "" && !slices.Contains(strings.Split(only, ","), p.name) {
			continue
		}
		if err := p.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return b.finish(out)
}

// finish prints the table, writes the results, and fails when a limit is not met.
func (b *board) finish(out string) error {
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tVALUE\tMUST BE\t\tDETAIL")
	missed := 0
	for _, r := range b.rows {
		fmt.Fprintln(t, r.line())
		if !r.Met {
			missed++
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	data, err := json.MarshalIndent(b.rows, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, append(data, '\n'), 0o644); err != nil {
		return err
	}
	if missed > 0 {
		return fmt.Errorf("%d of %d figures are not met", missed, len(b.rows))
	}
	return nil
}
