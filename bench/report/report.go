// Package report is the table in which measurements end: what was measured, what
// it must be, and whether it is.
package report

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
)

// Row is one line of the table.
type Row struct {
	What   string  `json:"what"`
	Value  float64 `json:"value"`
	Unit   string  `json:"unit,omitempty"` // empty: a ratio
	Limit  float64 `json:"limit"`
	Below  bool    `json:"below"` // whether the value must be at most, or at least, the limit
	Met    bool    `json:"met"`
	Detail string  `json:"detail"`
}

func (r Row) line() string {
	must, met := "shown", ""
	if r.Limit != 0 || r.Below {
		sign := ">="
		if r.Below {
			sign = "<="
		}
		must = fmt.Sprintf("%s %.4g%s", sign, r.Limit, r.Unit)
		met = "NOT MET"
		if r.Met {
			met = "met"
		}
	}
	return fmt.Sprintf("%s\t%.3g%s\t%s\t%s\t%s", r.What, r.Value, r.Unit, must, met, r.Detail)
}

// Table gathers rows.
type Table struct {
	rows []Row
}

// Add judges a row and shows it at once.
func (t *Table) Add(r Row) {
	r.Met = r.Below && r.Value <= r.Limit || !r.Below && r.Value >= r.Limit
	t.rows = append(t.rows, r)
	fmt.Fprintf(os.Stderr, "%s\n", strings.ReplaceAll(r.line(), "\t", "  "))
}

// Finish prints the table, writes the results, and fails when a limit is not met.
func (t *Table) Finish(out string) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "WHAT\tVALUE\tMUST BE\t\tDETAIL")
	missed := 0
	for _, r := range t.rows {
		fmt.Fprintln(w, r.line())
		if !r.Met {
			missed++
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	data, err := json.MarshalIndent(t.rows, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, append(data, '\n'), 0o644); err != nil {
		return err
	}
	if missed > 0 {
		return fmt.Errorf("%d of %d figures are not met", missed, len(t.rows))
	}
	return nil
}
