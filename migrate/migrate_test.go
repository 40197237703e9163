package migrate

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the files of testdata anew")

// Files as people publish them. What becomes of each lies beside it; every line of a text
// is translated or named.
func TestFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/*.*")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, path := range files {
		if strings.HasSuffix(path, ".yaml") {
			continue
		}
		n++
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			f := Guess(text)
			if want, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(path), ".rules"), "-"); !strings.HasPrefix(string(f), want) {
				t.Errorf("it is taken for %q", f)
			}
			r, err := Read(f, text, Options{Wildcard: netip.MustParseAddr("203.0.113.10")})
			if err != nil {
				t.Fatal(err)
			}
			got, wrong := r.File(filepath.Base(path))
			// A director and an authenticated probe need what only people know.
			if wrong != nil && !strings.Contains(wrong.Error(), "director") && !strings.Contains(wrong.Error(), "passwordFile") {
				t.Errorf("the result is not valid: %v\n%s", wrong, got)
			}
			golden := path + ".yaml"
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil || string(want) != string(got) {
				t.Errorf("have (%v)\n%s", err, got)
			}
		})
	}
	if n < 11 {
		t.Errorf("there are only %d files", n)
	}
}

func TestRubbish(t *testing.T) {
	for _, text := range []string{"", "}", "virtual_server {", "listen", "listen x\nserver", "listen x\nbind\nserver a", "frontend x\nbind :\ndefault_backend y", "-a", "-A -t", "-A -t 192.0.2.1:80 -s", "virtual_server\n{\n}", "listen x y\n\"", "bind x:1-2\nlisten a :80-99999\nserver \\"} {
		for _, f := range Formats {
			r, err := Read(f, []byte(text), Options{})
			if err != nil {
				continue
			}
			if _, err := r.File("rubbish"); err != nil && len(r.Services) == 0 {
				t.Errorf("%q as %s: %v", text, f, err)
			}
		}
	}
	if _, err := Read("nginx", nil, Options{}); err == nil {
		t.Error("an unknown format is read")
	}
}
