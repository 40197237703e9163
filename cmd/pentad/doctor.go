package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/doctor"
	"github.com/pentad/pentad/view"
)

func newDoctor(at *places) *cobra.Command {
	var file string
	var fix bool
	cmd := &cobra.Command{
		Use:   "doctor [FILE]",
		Short: "Say what is wrong with this host, or will be, why, and how to mend it",
		Long: "Read the host, and say what of its kernel, settings, firewall and other programs keeps pentad from doing what the\n" +
			"configuration asks for: each with why it matters and the command that mends it. With --fix what a single setting mends\n" +
			"is mended, until the host restarts. Exit code 0: there is no fault; risks and notes are none. 1: there is one.",
		Example: "  pentad doctor\n  pentad doctor --fix\n  pentad doctor -o json",
		Args:    wants("[FILE]"),
	}
	addConfigFlag(cmd, &file)
	cmd.Flags().BoolVar(&fix, "fix", false, "mend what a setting of the kernel mends")
	o := addFormat(cmd, plainFormats)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		found, err := examine(cmd, at, file, args)
		if err != nil {
			return err
		}
		var failed error
		faults := false
		for i := range found {
			f := &found[i]
			if fix && f.Fixable() {
				err := f.Fix()
				f.Fixed, failed = err == nil, errors.Join(failed, err)
			}
			faults = faults || f.Severity == doctor.Fault && !f.Fixed
		}
		done, err := o.structured(cmd.OutOrStdout(), found)
		if !done {
			err = printFindings(cmd.OutOrStdout(), found)
		}
		if err == nil && failed == nil && faults {
			err = errNo
		}
		return errors.Join(err, failed)
	}
	return cmd
}

// examine reads the configuration, if there is any, the state of the agent and the host.
func examine(cmd *cobra.Command, at *places, file string, args []string) ([]doctor.Finding, error) {
	named := len(args) > 0 || cmd.Flags().Changed("config")
	name, data, err := readConfig(cmd, file, args)
	if err != nil && (named || !errors.Is(err, os.ErrNotExist)) {
		return nil, err
	}
	var c *config.Config
	var invalid []string
	if err == nil {
		if c, err = config.Parse(name, data); err != nil {
			invalid, c = []string{err.Error()}, nil
		}
	}
	pid := 0
	var problems []string
	s, err := view.ReadStatus(cmd.Context(), at.view())
	switch {
	case err != nil:
		problems = append(problems, err.Error())
	case s.Agent != nil || c != nil:
		problems = s.Problems
		if s.Agent != nil {
			pid = s.Agent.PID
		}
	}
	facts := doctor.Read(c, at.pins, pid)
	facts.ConfigErrors, facts.Problems = invalid, problems
	found := doctor.Examine(facts)
	if found == nil {
		found = []doctor.Finding{}
	}
	return found, nil
}

func printFindings(w io.Writer, found []doctor.Finding) error {
	if len(found) == 0 {
		_, err := fmt.Fprintln(w, "nothing is wrong with this host")
		return err
	}
	for i, f := range found {
		if i > 0 {
			fmt.Fprintln(w)
		}
		rows := [][]string{{string(f.Severity), f.What}, {"  why", f.Why}}
		switch {
		case f.Fixed:
			rows = append(rows, []string{"  mended", f.Mend})
		case f.Mend != "":
			rows = append(rows, []string{"  mend", f.Mend})
		}
		if err := wrapped(w, rows); err != nil {
			return err
		}
	}
	return nil
}
