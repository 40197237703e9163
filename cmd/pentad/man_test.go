package main

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spf13/cobra/doc"
)

var manDir = flag.String("man", "", "directory into which TestMan writes manual pages")

// Every command has a manual page. With -man they are kept: packages have them.
func TestMan(t *testing.T) {
	dir := *manDir
	if dir == "" {
		dir = t.TempDir()
	}
	root, _ := newRoot()
	root.DisableAutoGenTag = true
	// The date of a page is not when it was built: two builds are the same.
	header := &doc.GenManHeader{Section: "8", Manual: "pentad", Source: "pentad " + version, Date: &time.Time{}}
	if err := doc.GenManTree(root, header, dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pentad.8", "pentad-backend-drain.8", "pentad-doctor.8"} {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || len(raw) < 200 {
			t.Errorf("%s: %v, %d bytes", name, err, len(raw))
		}
	}
}
