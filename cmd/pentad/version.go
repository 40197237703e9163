package main

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/plane/socket"
)

// Set by the Makefile.
var (
	version = "devel"
	commit  = "unknown"
)

func newVersion() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show the version, the commit, and the kernel features found",
		Example: "  pentad version",
		Args:    wants(),
	}
	f := addFormat(cmd, plainFormats)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		out := versionOut{Version: version, Commit: commit, Kernel: kernelRelease()}
		for _, x := range socket.Features {
			out.Features = append(out.Features, featureOut{x.Name, found(x.Check()), x.Since})
		}
		if done, err := f.structured(cmd.OutOrStdout(), out); done {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "pentad %s, commit %s\nLinux %s\n\n", out.Version, out.Commit, out.Kernel)
		rows := [][]string{{"KERNEL FEATURE", "FOUND", "SINCE"}}
		for _, x := range out.Features {
			rows = append(rows, []string{x.Name, x.Found, "Linux " + x.Since})
		}
		return table(cmd.OutOrStdout(), rows)
	}
	return cmd
}

type versionOut struct {
	Version  string       `json:"version"`
	Commit   string       `json:"commit"`
	Kernel   string       `json:"kernel"`
	Features []featureOut `json:"features"`
}

type featureOut struct {
	Name  string `json:"name"`
	Found string `json:"found"`
	Since string `json:"since"`
}

// found turns the outcome of a feature test into a word.
func found(err error) string {
	switch {
	case err == nil:
		return "yes"
	case errors.Is(err, ebpf.ErrNotSupported):
		return "no"
	}
	return "unknown (needs root)"
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}
