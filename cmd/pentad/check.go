package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/view"
)

func newCheck() *cobra.Command {
	var file string
	var strict bool
	cmd := &cobra.Command{
		Use:   "check [FILE]",
		Short: "Validate a configuration file; change nothing",
		Long: "Validate a configuration file and print every error as file:line:column, and what is valid but most likely not meant\n" +
			"as a warning. FILE may be - for standard input. Exit code 0: valid, 1: not; with --strict also 1 for a warning.",
		Example: "  pentad check /etc/pentad/pentad.yaml\n  pentad check --strict -o json - < pentad.yaml",
		Args:    wants("[FILE]"),
	}
	addConfigFlag(cmd, &file)
	cmd.Flags().BoolVar(&strict, "strict", false, "take warnings for errors")
	o := addFormat(cmd, plainFormats)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, data, err := readConfig(cmd, file, args)
		if err != nil {
			return err
		}
		report := newReport(name, data)
		failed := len(report.Errors) > 0 || strict && len(report.Warnings) > 0
		done, err := o.structured(cmd.OutOrStdout(), report)
		if !done {
			err = report.print(cmd.OutOrStdout(), cmd.ErrOrStderr())
		}
		if err == nil && failed {
			err = errNo
		}
		return err
	}
	return cmd
}

// report is what a check has found.
type report struct {
	File     string    `json:"file"`
	Valid    bool      `json:"valid"`
	Errors   []problem `json:"errors"`
	Warnings []problem `json:"warnings"`

	Services  int `json:"services"`
	Listeners int `json:"listeners"`
	Backends  int `json:"backends"`
}

// problem is one thing wrong with a file.
type problem struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Column  int    `json:"column"`
	Message string `json:"message"`
}

func newProblems(all config.Errors) []problem {
	out := make([]problem, len(all))
	for i, e := range all {
		out[i] = problem{e.File, e.Line, e.Column, e.Message}
	}
	return out
}

func newReport(name string, data []byte) report {
	r := report{File: name, Errors: []problem{}, Warnings: []problem{}}
	c, err := config.ParseText(config.WithIncluded(name, data))
	var all config.Errors
	if errors.As(err, &all) {
		r.Errors = newProblems(all)
		return r
	}
	r.Valid, r.Warnings = true, newProblems(c.Warnings)
	// Without cgroups nothing can be said of them; `pentad run` does.
	if cgroups, err := host.CgroupRoot(); err == nil {
		r.Warnings = append(r.Warnings, newProblems(c.CheckHost(cgroups))...)
	}
	r.Services = len(c.Services)
	for _, s := range c.Services {
		r.Listeners += len(s.Listeners)
		r.Backends += len(s.Backends)
	}
	return r
}

// mostShown is how many errors are printed.
const mostShown = 20

func (r report) print(out, errOut io.Writer) error {
	for i, p := range r.Errors {
		if i == mostShown {
			fmt.Fprintf(errOut, "and %d more errors\n", len(r.Errors)-mostShown)
			break
		}
		fmt.Fprintf(errOut, "%s:%d:%d: %s\n", p.File, p.Line, p.Column, p.Message)
	}
	for i, p := range r.Warnings {
		if i == mostShown {
			fmt.Fprintf(errOut, "and %d more warnings\n", len(r.Warnings)-mostShown)
			break
		}
		fmt.Fprintf(errOut, "%s:%d:%d: warning: %s\n", p.File, p.Line, p.Column, p.Message)
	}
	if !r.Valid {
		return nil
	}
	_, err := fmt.Fprintf(out, "%s is valid: %s, %s, %s\n", r.File,
		view.Count(r.Services, "service"), view.Count(r.Listeners, "listener"), view.Count(r.Backends, "backend"))
	return err
}

// addConfigFlag gives a command the flag -c.
func addConfigFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", config.DefaultPath, "configuration file")
}

// readConfig reads the file that an argument or the flag -c names; - is standard input.
func readConfig(cmd *cobra.Command, file string, args []string) (name string, data []byte, err error) {
	if len(args) > 0 {
		if cmd.Flags().Changed("config") {
			return "", nil, misused(cmd, "the file is named twice: %s and -c %s", args[0], file)
		}
		file = args[0]
	}
	switch file {
	case "":
		return "", nil, misused(cmd, "the name of the file is empty")
	case "-":
		data, err = config.ReadFrom(os.Stdin)
		file = "standard input"
	default:
		data, err = config.Read(file)
	}
	if err != nil {
		return "", nil, fmt.Errorf("configuration %s cannot be read: %w", file, unwrapped(err))
	}
	return file, data, nil
}

// unwrapped leaves out the name of the file, which was said.
func unwrapped(err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// loadConfig reads a valid file.
func loadConfig(cmd *cobra.Command, file string, args []string) (*config.Config, string, error) {
	name, data, err := readConfig(cmd, file, args)
	if err != nil {
		return nil, "", err
	}
	c, err := config.ParseText(config.WithIncluded(name, data))
	return c, name, err
}
