package nat

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// Whoever may have a translated connection stays tracked.
func TestReviewed(t *testing.T) {
	t.Parallel()
	a := netip.MustParseAddr("10.1.0.1")
	tracked, waning := plainIn(setTracked)(a), plainIn(setWaning)(a)
	for _, c := range []struct {
		tracked, waning, busy []element
		want                  string // what is removed and added
	}{
		{tracked, nil, tracked, ""},
		{tracked, nil, nil, "-tracked4 +waning4"},
		{nil, waning, nil, "-waning4"},
		{nil, waning, tracked, "-waning4 +tracked4"},
		{tracked, waning, tracked, "-waning4"},
		{tracked, waning, nil, "-tracked4 +waning4"},
		{nil, nil, tracked, ""},
	} {
		got := reviewed(c.tracked, c.waning, c.busy)
		var words []string
		for _, e := range got.remove {
			words = append(words, "-"+e.in.String())
		}
		for _, e := range got.add {
			words = append(words, "+"+e.in.String())
		}
		slices.Sort(words[:len(got.remove)])
		if have := strings.Join(words, " "); have != c.want {
			t.Errorf("%v %v %v: %s, want %s", len(c.tracked), len(c.waning), len(c.busy), fmt.Sprint(have), c.want)
		}
	}
}
