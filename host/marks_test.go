package host

import "testing"

// A socket's mark is that of its packets: one of a probe must not say that it was
// translated.
func TestMarksAreApart(t *testing.T) {
	for what, mark := range map[string]int{"probes": ProbeMark, "proxies": ProxyMark} {
		if mark&TranslatedMark != 0 {
			t.Errorf("the mark of %s, %#x, has the bit of packets that were translated, %#x", what, mark, TranslatedMark)
		}
	}
	if ProbeMark == ProxyMark {
		t.Error("probes and proxies have one mark")
	}
}
