package agent

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/pentad/pentad/config"
)

// What is written of a text is read again by encoding/json.
func TestWriteText(t *testing.T) {
	for _, text := range []*config.Text{
		{Name: "/etc/pentad.yaml", Data: []byte("services: []\n")},
		{Name: "a \"name\"\n\x01", Data: bytes.Repeat([]byte{0, 0xff, '"'}, 5000), Patterns: []string{"/etc/*.yaml", `a"b`}, Included: []config.Part{
			{Name: "/etc/one.yaml", Data: []byte("1")}, {Name: "/etc/none.yaml"}, {Name: "ü", Data: []byte(strings.Repeat("x", 4097))},
		}},
	} {
		var b bytes.Buffer
		if err := writeText(&b, text); err != nil {
			t.Fatal(err)
		}
		var have config.Text
		if err := json.Unmarshal(b.Bytes(), &have); err != nil {
			t.Fatalf("%s: %v", text.Name, err)
		}
		if !have.Equal(text) || have.Name != text.Name || strings.Join(have.Patterns, " ") != strings.Join(text.Patterns, " ") {
			t.Errorf("%q is read as %q", text, &have)
		}
	}
}
