package main

import (
	"context"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/pentad/pentad/agent"
	"github.com/pentad/pentad/config"
)

// gcPercent is how much the heap of the agent may grow before it is collected.
const gcPercent = 40

func newRun(at *places) *cobra.Command {
	var file string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the agent of this host",
		Long: "Run the agent of this host: install the services of the configuration file, watch the file, probe the\n" +
			"backends. When the agent ends, whatever the way, the services stay in the kernel and go on working;\n" +
			"the next agent takes them over. `pentad down` removes them.",
		Example: "  pentad run -c /etc/pentad/pentad.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if verbose {
				level = slog.LevelDebug
			}
			// Small before fast: parsing a large file would leave twice as much behind.
			debug.SetGCPercent(gcPercent)
			log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
			quietClient(log)
			return agent.Run(cmd.Context(), agent.Options{
				ConfigFile: file, Pins: at.pins, RunDir: at.runDir, Version: version, Log: log,
			})
		},
	}
	cmd.Flags().StringVarP(&file, "config", "c", config.DefaultPath, "configuration file")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "log more")
	return cmd
}

// quietClient has the client of Kubernetes write to our log, and only with -v: what
// matters of it is said by those who use it.
func quietClient(log *slog.Logger) {
	if !log.Enabled(context.Background(), slog.LevelDebug) {
		log = slog.New(slog.DiscardHandler)
	}
	klog.SetSlogLogger(log)
}
