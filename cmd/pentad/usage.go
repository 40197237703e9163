package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/service"
)

// usageError is a command line that makes no sense.
type usageError struct {
	cmd *cobra.Command
	err error
}

// Error says what is wrong.
func (e *usageError) Error() string { return e.err.Error() }

// Unwrap returns the cause.
func (e *usageError) Unwrap() error { return e.err }

func misused(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{cmd, fmt.Errorf(format, args...)}
}

// hint says how a command is used.
func hint(cmd *cobra.Command) string {
	return fmt.Sprintf("usage: %s; see `%s --help`", strings.TrimSuffix(cmd.UseLine(), " [flags]"), cmd.CommandPath())
}

// wants returns a check of arguments that names the one that is missing. Those in
// brackets may be.
func wants(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		for i, name := range names {
			if i >= len(args) && !strings.HasPrefix(name, "[") {
				return misused(cmd, "%s is missing", name)
			}
		}
		if len(args) > len(names) {
			return misused(cmd, "%q is one argument too many", args[len(names)])
		}
		return nil
	}
}

// finish makes every group of commands refuse words that are none, and every command
// explain what is wrong with its flags.
func finish(cmd *cobra.Command) {
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &usageError{cmd, err} })
	for _, sub := range cmd.Commands() {
		finish(sub)
	}
	if cmd.Runnable() || !cmd.HasSubCommands() {
		return
	}
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			if cmd.HasParent() {
				return misused(cmd, "a command is missing: %s", strings.Join(words(cmd), ", "))
			}
			return cmd.Help()
		}
		return misused(cmd, "%q is no command of %s%s", args[0], cmd.CommandPath(), nearestCommand(cmd, args[0]))
	}
}

// nearestCommand says which command was probably meant: one of another group, if it has
// that very name.
func nearestCommand(cmd *cobra.Command, word string) string {
	for _, group := range cmd.Root().Commands() {
		for _, c := range group.Commands() {
			if !c.Hidden && c.Name() == word {
				return fmt.Sprintf("; did you mean %q?", c.CommandPath())
			}
		}
	}
	return service.Nearest(word, words(cmd))
}

// setHelp has `help WORD` say that there is no such command, if there is none.
func setHelp(root *cobra.Command) {
	root.SetHelpCommand(&cobra.Command{
		Use:     "help [COMMAND]",
		Short:   "Help about any command",
		Example: "  pentad help backend drain",
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return misused(cmd, "%q is no command of pentad%s", strings.Join(args, " "), nearestCommand(root, args[len(args)-1]))
			}
			return about.Help()
		},
	})
}

func words(cmd *cobra.Command) []string {
	var all []string
	for _, c := range cmd.Commands() {
		if !c.Hidden {
			all = append(all, c.Name())
		}
	}
	return all
}

// durationValue is a flag with a duration that is not negative.
type durationValue time.Duration

// String, Set and Type implement pflag.Value.
func (d *durationValue) String() string { return time.Duration(*d).String() }

// Set reads a duration such as 60s.
func (d *durationValue) Set(text string) error {
	v, err := time.ParseDuration(text)
	switch {
	case err != nil && isNumber(text):
		return fmt.Errorf("the unit is missing; did you mean %ss?", text)
	case err != nil:
		return errors.New("want a duration such as 60s, 5m or 1h30m")
	case v < 0:
		return errors.New("a duration is not negative")
	}
	*d = durationValue(v)
	return nil
}

// Type names the value in --help.
func (*durationValue) Type() string { return "DURATION" }

func isNumber(text string) bool {
	_, err := strconv.ParseFloat(text, 64)
	return err == nil
}

// pidValue is a flag with the id of a process.
type pidValue int

// String, Set and Type implement pflag.Value.
func (p *pidValue) String() string { return strconv.Itoa(int(*p)) }

// Set reads the id of a process.
func (p *pidValue) Set(text string) error {
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 1 {
		return errors.New("the id of a process is a whole number from 1")
	}
	*p = pidValue(n)
	return nil
}

// Type names the value in --help.
func (*pidValue) Type() string { return "PID" }
