package claim

import (
	"testing"
	"time"
)

func TestStart(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	block := func(id, incarnation string) Block { return Block{ID: id, Incarnation: incarnation} }
	type step struct {
		after           time.Duration
		mine            []Block
		settled, copied bool
	}
	for name, steps := range map[string][]step{
		"a host without blocks":       {{0, nil, true, false}},
		"the agent was started again": {{0, []Block{block("1", "me")}, true, false}},
		"the host was started again": {
			{0, []Block{block("1", "old"), block("2", "old")}, false, false},
			{time.Second, []Block{block("1", "me"), block("2", "old")}, false, false},
			{time.Second, []Block{block("1", "me"), block("2", "me")}, false, false},
			{takeOver / 2, []Block{block("1", "me"), block("2", "me")}, false, false},
			{takeOver / 2, []Block{block("1", "me"), block("2", "me")}, true, false},
		},
		"a copy of a host that lives": {
			{0, []Block{block("1", "old")}, false, false},
			{time.Second, []Block{block("1", "me")}, false, false},
			{time.Second, []Block{block("1", "old")}, false, true},
			{time.Hour, []Block{block("1", "old")}, false, true},
		},
		"a host that lives, and its copy": {
			{0, []Block{block("1", "me")}, true, false},
			{time.Second, []Block{block("1", "copy")}, true, false},
			{time.Second, []Block{block("1", "me")}, true, false},
		},
		"a copy that does not give in": {
			{0, []Block{block("1", "me")}, true, false},
			{time.Second, []Block{block("1", "copy")}, true, false},
			{time.Second, []Block{block("1", "me")}, true, false},
			{time.Second, []Block{block("1", "copy")}, true, false},
			{time.Second, []Block{block("1", "me")}, true, false},
			{time.Second, []Block{block("1", "copy")}, true, true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var s start
			at := now
			for i, x := range steps {
				at = at.Add(x.after)
				if s.look(x.mine, "me", at); s.settled != x.settled || s.copied != x.copied {
					t.Errorf("after step %d it is %+v", i, s)
				}
			}
		})
	}
}
