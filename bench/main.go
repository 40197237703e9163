// Command bench measures pentad beside what a user would pick instead, all in
// one run on one machine: peers alternate, figures are medians, and what counts
// is the ratio. It prints one table and writes bench/results.json.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/pentad/pentad/bench/report"
	"github.com/pentad/pentad/lab/actor"
)

// row is one line of the table.
type row = report.Row

// board is what the measurements work with.
type board struct {
	table   report.Table
	self    string // this program
	program string // pentad
}

func (b *board) add(r row) { b.table.Add(r) }

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
	{"chores", chores},
	{"capacity", capacity},
	{"probes", probes},
	{"kills", kills},
	{"life", lives},
	{"heal", heals},
	{"late", lateBackend},
	{"dead", deadBackends},
	{"reset", resets},
	{"flow", flowRate},
	{"failover", failover},
	{"proxy", proxies},
	{"capture", captures},
	{"pods", podTimes},
	{"fleet", fleets},
}

func main() {
	actor.MainByArgument(helpers)
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
	return b.table.Finish(out)
}
