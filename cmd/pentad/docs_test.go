package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pentad/pentad/agent"
	"github.com/pentad/pentad/config"
)

var update = flag.Bool("update", false, "write the documentation instead of comparing it")

// The reference pages are written from the code, so that they cannot drift.
func TestDocs(t *testing.T) {
	for name, text := range map[string]string{
		"commands.md": commandsPage(),
		"keys.md":     keysPage(),
		"metrics.md":  metricsPage(),
	} {
		path := filepath.Join("../../docs/reference", name)
		if *update {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		have, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(have, []byte(text)) {
			t.Errorf("%s is not what the code says; run make generate (%v)", path, err)
		}
	}
}

const written = "\n<!-- Written from the code by make generate. -->\n\n"

func commandsPage() string {
	var b strings.Builder
	b.WriteString("# Commands\n" + written)
	root, _ := newRoot()
	b.WriteString("Exit codes: 0 done; 1 the answer is \"no\" or an operation failed; 2 wrong usage. `pentad completion bash` (or zsh,\n" +
		"fish, powershell) prints shell completion.\n\n")
	b.WriteString("Every command takes:\n\n")
	flags(&b, root.PersistentFlags())
	describe(&b, root)
	return b.String()
}

func describe(b *strings.Builder, parent *cobra.Command) {
	for _, c := range parent.Commands() {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		if c.Runnable() && !c.HasAvailableSubCommands() {
			long := c.Long
			if long == "" {
				long = c.Short + "."
			}
			fmt.Fprintf(b, "\n## %s\n\n%s\n\n```console\n%s\n```\n", strings.Replace(c.UseLine(), " [flags]", "", 1), long, dedent(c.Example))
			if c.LocalNonPersistentFlags().HasFlags() {
				b.WriteString("\n")
				flags(b, c.LocalNonPersistentFlags())
			}
		}
		describe(b, c)
	}
}

func dedent(text string) string {
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		lines[i] = "$ " + strings.TrimSpace(l)
	}
	return strings.Join(lines, "\n")
}

func flags(b *strings.Builder, set *pflag.FlagSet) {
	b.WriteString("| flag | meaning | default |\n| --- | --- | --- |\n")
	set.VisitAll(func(f *pflag.Flag) {
		if f.Name == "help" {
			return
		}
		name := "`--" + f.Name + "`"
		if f.Shorthand != "" {
			name = "`-" + f.Shorthand + "`, " + name
		}
		fmt.Fprintf(b, "| %s | %s | `%s` |\n", name, f.Usage, f.DefValue)
	})
}

func keysPage() string {
	var b strings.Builder
	b.WriteString("# Keys of pentad.yaml\n" + written + "| key | value | default | meaning |\n| --- | --- | --- | --- |\n")
	for _, k := range config.Keys() {
		fallback := ""
		if k.Default != "" {
			fallback = "`" + k.Default + "`"
		}
		if k.Required {
			fallback = "required"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", k.Path, strings.ReplaceAll(k.Kind, "|", `\|`), fallback, k.Doc)
	}
	return b.String()
}

func metricsPage() string {
	var b strings.Builder
	b.WriteString("# Metrics\n" + written + "Served at `/metrics` of `api.listen`, beside those of the Go runtime and of the process. Counters live in the kernel\n" +
		"and go on across restarts of the agent.\n\n| metric | type | label | meaning |\n| --- | --- | --- | --- |\n")
	for _, m := range agent.Metrics {
		label := ""
		if m.Labels != "" {
			label = "`" + m.Labels + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.Name, m.Type, label, m.Help)
	}
	return b.String()
}

// Every command that does something explains itself with an example.
func TestHelp(t *testing.T) {
	root, _ := newRoot()
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			if sub.Name() != "completion" {
				walk(sub)
			}
		}
		if c.Runnable() && !c.Hidden && !c.HasAvailableSubCommands() && (c.Short == "" || c.Example == "") {
			t.Errorf("%s has no summary or no example", c.CommandPath())
		}
	}
	walk(root)
}

// Every configuration in the documentation is valid, and every command there is one.
func TestExamplesInDocs(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)^```(yaml|console)\n(.*?)^```")
	spans := regexp.MustCompile("`(pentad [^`]+)`")
	for _, page := range append(pages, "../../README.md") {
		raw, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		text := string(raw)
		for _, m := range blocks.FindAllStringSubmatch(text, -1) {
			switch m[1] {
			case "yaml":
				if !strings.Contains(m[2], "apiVersion:") && strings.Contains(m[2], "services:") {
					if _, err := config.Parse(page, []byte(m[2])); err != nil {
						t.Errorf("%s: %v\n%s", page, err, m[2])
					}
				}
			case "console":
				for line := range strings.Lines(m[2]) {
					if command, ok := strings.CutPrefix(strings.TrimSpace(line), "$ pentad "); ok {
						checkCommand(t, page, command)
					}
				}
			}
		}
		for _, m := range spans.FindAllStringSubmatch(blocks.ReplaceAllString(text, ""), -1) {
			checkCommand(t, page, strings.TrimPrefix(m[1], "pentad "))
		}
	}
}

// checkCommand finds a command and reads its flags, and does not run it.
func checkCommand(t *testing.T, page, line string) {
	t.Helper()
	line, _, _ = strings.Cut(line, " > ")
	line, _, _ = strings.Cut(line, " < ")
	root, _ := newRoot()
	cmd, rest, err := root.Find(strings.Fields(line))
	if err == nil {
		err = cmd.ParseFlags(rest)
	}
	if err == nil && cmd.HasAvailableSubCommands() && len(cmd.Flags().Args()) > 0 {
		err = fmt.Errorf("%q is no command", cmd.Flags().Arg(0))
	}
	if err != nil {
		t.Errorf("%s: pentad %s: %v", page, line, err)
	}
}
