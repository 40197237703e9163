// Package monitoring tests the alerts that are shipped.
package monitoring

import (
	"os"
	"os/exec"
	"regexp"
	"testing"

	"github.com/pentad/pentad/agent"
	"github.com/pentad/pentad/lab"
)

// Each alert fires when it should, and is made of metrics that there are.
func TestRules(t *testing.T) {
	raw, err := os.ReadFile("rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	board, err := os.ReadFile("dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	known := make(map[string]bool)
	for _, m := range agent.Metrics {
		known[m.Name] = true
	}
	for _, name := range regexp.MustCompile(`pentad_[a-z_]+`).FindAllString(string(raw)+string(board), -1) {
		if !known[name] {
			t.Errorf("there is no metric %s", name)
		}
	}
	lab.Need(t, "promtool")
	if out, err := exec.Command("promtool", "test", "rules", "rules.test.yml").CombinedOutput(); err != nil {
		t.Errorf("promtool: %v: %s", err, out)
	}
}
