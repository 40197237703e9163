package host

import "testing"

// A socket's mark is that of its packets: one of a probe must not say that it was
// translated.
func TestMarksAreApart(t *testing.T) {
	if ProbeMark&TranslatedMark != 0 {
		t.Errorf("the mark of probes, %#x, has the bit of packets that were translated, %#x", ProbeMark, TranslatedMark)
	}
}
