package main

import (
	"github.com/spf13/cobra"

	"github.com/pentad/pentad/config"
)

func newSchema() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON schema of pentad.yaml, for editors",
		Long: "Print the JSON schema (json-schema.org, draft 2020-12) of pentad.yaml, with which editors complete and check it. The\n" +
			"first line of a file tells the language server where it is: # yaml-language-server: $schema=PATH",
		Example: "  pentad schema > /usr/local/share/pentad/schema.json",
		Args:    wants(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeJSON(cmd.OutOrStdout(), config.Schema())
		},
	}
}
