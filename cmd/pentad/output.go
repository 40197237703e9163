package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v4"
	"golang.org/x/term"
)

// output is how a command prints.
type output struct {
	format    string
	noHeaders bool
	formats   []string
}

// The formats of what is more in a wide table, and of the others.
var (
	plainFormats = []string{"table", "json", "yaml"}
	wideFormats  = []string{"table", "wide", "json", "yaml"}
)

// String, Set and Type implement pflag.Value.
func (o *output) String() string { return o.format }

// Set takes one of the known formats.
func (o *output) Set(v string) error {
	if !slices.Contains(o.formats, v) {
		return fmt.Errorf("want one of %s", strings.Join(o.formats, ", "))
	}
	o.format = v
	return nil
}

// Type names the value in --help.
func (*output) Type() string { return "FORMAT" }

// addFormat gives a command the flag -o.
func addFormat(cmd *cobra.Command, formats []string) *output {
	o := &output{format: "table", formats: formats}
	cmd.Flags().VarP(o, "output", "o", strings.Join(formats, ", "))
	// The flag was just defined: this cannot fail.
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	return o
}

// addList gives a command the flags of a list.
func addList(cmd *cobra.Command) *output {
	o := addFormat(cmd, wideFormats)
	cmd.Flags().BoolVar(&o.noHeaders, "no-headers", false, "leave out the names of the columns")
	return o
}

func (o *output) wide() bool { return o.format == "wide" }

// structured prints v as JSON or YAML, and reports whether the format was one
// of them. Both have the same keys.
func (o *output) structured(w io.Writer, v any) (bool, error) {
	switch o.format {
	case "json":
		return true, writeJSON(w, v)
	case "yaml":
		return true, writeYAML(w, v)
	}
	return false, nil
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// writeCompact writes a value in one line.
func writeCompact(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// writeYAML writes what JSON has in the style of YAML: one list of names will do.
func writeYAML(w io.Writer, v any) error {
	var raw bytes.Buffer
	if err := writeJSON(&raw, v); err != nil {
		return err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(raw.Bytes(), &doc); err != nil {
		return err
	}
	unquote(&doc)
	e := yaml.NewEncoder(w)
	e.SetIndent(2)
	return e.Encode(&doc)
}

// unquote lets the encoder choose how each node is written.
func unquote(n *yaml.Node) {
	n.Style = 0
	for _, c := range n.Content {
		unquote(c)
	}
}

// print prints a table: the names of its columns, and rows.
func (o *output) print(w io.Writer, head []string, rows [][]string) error {
	if !o.noHeaders {
		rows = append([][]string{head}, rows...)
	}
	return table(w, rows)
}

// table prints rows in aligned columns. On a terminal the last one is cut where the
// line would not fit, and states have colours.
func table(w io.Writer, rows [][]string) error {
	var text bytes.Buffer
	t := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.TrimRight(strings.Join(r, "\t"), "\t "))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	width, isTerminal := terminal(w)
	if !isTerminal {
		_, err := w.Write(text.Bytes())
		return err
	}
	for line := range strings.Lines(text.String()) {
		if _, err := io.WriteString(w, paint(fit(strings.TrimSuffix(line, "\n"), width))+"\n"); err != nil {
			return err
		}
	}
	return nil
}

// terminal returns how wide the terminal is that is written to, if it is one.
func terminal(w io.Writer) (width int, is bool) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	width, _, err := term.GetSize(int(f.Fd()))
	return width, err == nil && width > 0
}

// linesOf returns how many lines of a table there is room for.
func linesOf(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return shownServices
	}
	_, height, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return shownServices
	}
	return max(1, height-2)
}

// fit cuts a line that is longer than the terminal is wide.
func fit(line string, width int) string {
	if runes := []rune(line); len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	return line
}

// colours are those of words that stand alone in a line.
var colours = map[string]string{
	"down": "31", "refused": "31", "PROBLEM": "31", "ejected": "33", "full": "33", "drained": "33", "panic": "33", "warning": "33", "serving": "32",
}

// paint gives states their colours, unless NO_COLOR (no-color.org) asks for none.
func paint(line string) string {
	if os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return line
	}
	for word, colour := range colours {
		for _, at := range []string{"  " + word + "  ", word + "  "} {
			if strings.HasPrefix(at, word) && !strings.HasPrefix(line, at) {
				continue
			}
			line = strings.Replace(line, at, strings.Replace(at, word, "\x1b["+colour+"m"+word+"\x1b[0m", 1), 1)
		}
	}
	return line
}

// wrapped prints rows of two columns; on a terminal what is long goes on below itself.
func wrapped(w io.Writer, rows [][]string) error {
	width, isTerminal := terminal(w)
	if !isTerminal {
		return table(w, rows)
	}
	first := 0
	for _, r := range rows {
		first = max(first, len([]rune(r[0])))
	}
	var out [][]string
	for _, r := range rows {
		for i, line := range breakText(strings.ReplaceAll(r[1], "\n\t", "\n"), max(20, width-first-2)) {
			name := r[0]
			if i > 0 {
				name = ""
			}
			out = append(out, []string{name, line})
		}
	}
	return table(w, out)
}

// breakText breaks a text between words, so that no line is longer than it may be if
// that can be had.
func breakText(text string, most int) []string {
	var lines []string
	for line := range strings.SplitSeq(text, "\n") {
		for len([]rune(line)) > most {
			runes := []rune(line)
			at := strings.LastIndex(string(runes[:most+1]), " ")
			if at <= 0 {
				break
			}
			lines = append(lines, line[:at])
			line = line[at+1:]
		}
		lines = append(lines, line)
	}
	return lines
}
