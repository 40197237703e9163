package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/migrate"
)

func newImport() *cobra.Command {
	var format, wildcard, to string
	names := make([]string, len(migrate.Formats))
	for i, f := range migrate.Formats {
		names[i] = string(f)
	}
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Make a pentad.yaml of the configuration of HAProxy, keepalived or IPVS",
		Long: "Translate haproxy.cfg, keepalived.conf or the output of `ipvsadm-save -n` into a pentad.yaml. Every line that could not be\n" +
			"translated is named, with the reason, in comments at the top of the file and on the standard error output. Nothing is put\n" +
			"in force. Exit code 0: everything was translated; 1: not all of it.",
		Example: "  pentad import /etc/haproxy/haproxy.cfg --address 203.0.113.10 -w pentad.yaml\n" +
			"  ipvsadm-save -n | pentad import - --format ipvsadm",
		Args: wants("FILE"),
	}
	cmd.Flags().StringVar(&format, "format", "", strings.Join(names, ", ")+"; without it as the text looks")
	cmd.Flags().StringVar(&wildcard, "address", "", "the virtual address that stands for \"every address of the host\" (bind *:80)")
	cmd.Flags().StringVarP(&to, "write", "w", "", "write to a file that does not exist yet; without it to the standard output")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var o migrate.Options
		if wildcard != "" {
			a, err := netip.ParseAddr(wildcard)
			if err != nil || a.IsUnspecified() {
				return misused(cmd, "--address: %q is not an address such as 203.0.113.10", wildcard)
			}
			o.Wildcard = a
		}
		text, err := readImport(cmd, args[0])
		if err != nil {
			return err
		}
		f := migrate.Format(format)
		if f == "" {
			f = migrate.Guess(text)
		}
		r, err := migrate.Read(f, text, o)
		if errors.Is(err, migrate.ErrFormat) {
			return misused(cmd, "--format: %v", err)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		return printImport(cmd, r, args[0], to)
	}
	return cmd
}

func readImport(cmd *cobra.Command, from string) ([]byte, error) {
	if from == "-" {
		return io.ReadAll(cmd.InOrStdin())
	}
	return config.Read(from)
}

func printImport(cmd *cobra.Command, r *migrate.Result, from, to string) error {
	text, wrong := r.File(from)
	if to == "" {
		if _, err := cmd.OutOrStdout().Write(text); err != nil {
			return err
		}
	} else if err := writeNew(to, text); err != nil {
		return err
	}
	w := cmd.ErrOrStderr()
	for _, n := range r.Notes {
		fmt.Fprintf(w, "%s: %s\n", from, n)
	}
	if wrong != nil {
		fmt.Fprintf(w, "the result has to be mended before `pentad check` accepts it:\n%v\n", wrong)
	}
	fmt.Fprintf(w, "%d services, %d lines were not translated, or not all of them\n", len(r.Services), len(r.Notes))
	if wrong != nil || len(r.Notes) > 0 {
		return errNo
	}
	return nil
}

func writeNew(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Close())
}
