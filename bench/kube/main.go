// Command kube measures pentad as a node's service proxy beside kube-proxy in
// nftables mode, against one API server, in one run. It prints one table and
// writes bench/kube/results.json.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pentad/pentad/bench/report"
	"github.com/pentad/pentad/lab/actor"
)

// The size of the large cluster.
const (
	manyServices  = 10_000
	manyEndpoints = 10
)

// parts are the measurements, in the order of the table.
var parts = []struct {
	name string
	run  func(context.Context, *bench) error
}{
	{"rolling", rollingUpdate},
	{"deleted", deletedPod},
	{"dead", deadEndpoints},
	{"nodeport", nodePorts},
	{"start", start},
	{"change", changes},
	{"kube-proxy", startTheirsLarge},
	{"connect", connects},
}

func main() {
	actor.Main(helpers)
	only := flag.String("only", "", "comma-separated parts to run instead of all")
	program := flag.String("pentad", "bin/pentad", "the program to measure")
	out := flag.String("out", "bench/kube/results.json", "where the results go")
	services := flag.Int("services", manyServices, "Services of the large cluster")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *only, *program, *out, *services); err != nil {
		fmt.Fprintln(os.Stderr, "bench-kube:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only, program, out string, services int) error {
	program, err := filepath.Abs(program)
	if err != nil {
		return err
	}
	b, err := newBench(ctx, program, services)
	if err != nil {
		return err
	}
	defer b.Close()
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

// bench is the cluster that is measured and the table of results.
type bench struct {
	*cluster
	table    report.Table
	program  string
	services int
}
