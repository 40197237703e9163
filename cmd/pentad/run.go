package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/pentad/pentad/agent"
)

// gcPercent is how much the heap of the agent may grow before it is collected.
const gcPercent = 40

func newRun(at *places) *cobra.Command {
	var file string
	var log logFlags
	cmd := &cobra.Command{
		Use:   "run [FILE]",
		Short: "Run the agent of this host",
		Long: "Run the agent of this host: install the services of the configuration file, watch the file, probe the\n" +
			"backends. When the agent ends, whatever the way, the services stay in the kernel and go on working;\n" +
			"the next agent takes them over. `pentad down` removes them. SIGHUP has the file read again. A file that is not\n" +
			"valid is no reason to end where a service manager waits or something is installed: the agent waits for a better one.",
		Example: "  pentad run /etc/pentad/pentad.yaml",
		Args:    wants("[FILE]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				if cmd.Flags().Changed("config") {
					return misused(cmd, "the file is named twice: %s and -c %s", args[0], file)
				}
				file = args[0]
			}
			path, err := filepath.Abs(file)
			if err != nil {
				return err
			}
			// Small before fast: parsing a large file would leave twice as much behind.
			debug.SetGCPercent(gcPercent)
			hup := make(chan os.Signal, 1)
			signal.Notify(hup, syscall.SIGHUP)
			defer signal.Stop(hup)
			return agent.Run(cmd.Context(), agent.Options{
				ConfigFile: path, Pins: at.pins, RunDir: at.runDir, StateDir: at.state(), Version: version, Log: log.logger(), Reload: hup,
			})
		},
	}
	addConfigFlag(cmd, &file)
	log.add(cmd)
	return cmd
}

// logFlags say how a command that stays writes its log.
type logFlags struct {
	verbose bool
	format  logFormat
}

// logFormat is text or json.
type logFormat string

// String, Set and Type implement pflag.Value.
func (f *logFormat) String() string { return string(*f) }

// Set takes one of the formats.
func (f *logFormat) Set(text string) error {
	if text != "text" && text != "json" {
		return fmt.Errorf("want text or json")
	}
	*f = logFormat(text)
	return nil
}

// Type names the value in --help.
func (*logFormat) Type() string { return "FORMAT" }

func (l *logFlags) add(cmd *cobra.Command) {
	l.format = "text"
	cmd.Flags().BoolVarP(&l.verbose, "verbose", "v", false, "log more: every probe that fails, every change that is applied")
	cmd.Flags().Var(&l.format, "log-format", "text or json")
}

// logger writes to standard error. The client of Kubernetes writes there only with -v:
// what matters of it is said by those who use it.
func (l *logFlags) logger() *slog.Logger {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if l.verbose {
		opts.Level = slog.LevelDebug
	}
	var handler slog.Handler = slog.NewTextHandler(os.Stderr, opts)
	if l.format == "json" {
		handler = slog.NewJSONHandler(os.Stderr, opts)
	}
	log := slog.New(handler)
	client := log
	if !log.Enabled(context.Background(), slog.LevelDebug) {
		client = slog.New(slog.DiscardHandler)
	}
	klog.SetSlogLogger(client)
	return log
}
