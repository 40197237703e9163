package director_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/pentad/pentad/plane/director"
)

func members(n int) []director.Member {
	var all []director.Member
	for i := range n {
		all = append(all, director.Member{Address: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), Weight: 100})
	}
	return all
}

func shares(table []uint16, n int) []int {
	all := make([]int, n)
	for _, i := range table {
		all[i]++
	}
	return all
}

// Whoever makes a table, in whatever order he hears of its members, makes the same.
func TestTablesAreTheSame(t *testing.T) {
	all := members(100)
	all[7].Weight, all[8].Weight = 50, 65535
	want := director.Table(all)
	for range 10 {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		if !slices.Equal(director.Table(all), want) {
			t.Fatal("another order makes another table")
		}
	}
}

// Members have places by their weight, within one in a hundred of the mean.
func TestShares(t *testing.T) {
	for _, n := range []int{1, 2, 10, 100, 1000} {
		for i, s := range shares(director.Table(members(n)), n) {
			if mean := float64(director.Slots) / float64(n); float64(s) < 0.98*mean || float64(s) > 1.02*mean {
				t.Errorf("of %d members number %d has %d places, the mean is %.0f", n, i, s, mean)
			}
		}
	}
	weighted := members(4)
	weighted[0].Weight, weighted[1].Weight, weighted[2].Weight, weighted[3].Weight = 1, 2, 3, 4
	for i, s := range shares(director.Table(weighted), 4) {
		if want := float64(director.Slots) * float64(i+1) / 10; float64(s) < want-2 || float64(s) > want+2 {
			t.Errorf("number %d has %d places, want %.0f", i, s, want)
		}
	}
	if director.Table(nil) != nil {
		t.Error("a table of nobody")
	}
}

// Who goes leaves his places to others, who keep nearly all of theirs.
func TestFewMove(t *testing.T) {
	all := members(100)
	before := director.Table(all)
	after := director.Table(all[:99])
	moved := 0
	for i := range before {
		if before[i] != 99 && before[i] != after[i] {
			moved++
		}
	}
	if share := float64(moved) / director.Slots; share > 0.01 {
		t.Errorf("%.2f %% of the places moved without need", share*100)
	}
}
