package ipam

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/service"
)

func ranges(t *testing.T, texts ...string) []Range {
	t.Helper()
	var all []Range
	for _, text := range texts {
		r, err := ParseRange(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

func addrs(texts ...string) []netip.Addr {
	var all []netip.Addr
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

func TestParseRange(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.0/30":              "192.0.2.0-192.0.2.3",
		"192.0.2.7/32":              "192.0.2.7-192.0.2.7",
		"192.0.2.10 - 192.0.2.20":   "192.0.2.10-192.0.2.20",
		"2001:db8::/126":            "2001:db8::-2001:db8::3",
		"192.0.2.9-192.0.2.9":       "192.0.2.9-192.0.2.9",
		"192.0.2.9":                 "",
		"192.0.2.20-192.0.2.10":     "",
		"192.0.2.1-2001:db8::1":     "",
		"::ffff:192.0.2.1/128":      "",
		"fe80::1%eth0-fe80::2%eth0": "",
		"everything":                "",
	} {
		r, err := ParseRange(text)
		if (err != nil) != (want == "") || err == nil && r.First.String()+"-"+r.Last.String() != want {
			t.Errorf("%q: %v, %v; want %q", text, r, err, want)
		}
		if again, err := ParseRange(r.String()); want != "" && (err != nil || again != r) {
			t.Errorf("%q is written as %s, which is read as %v, %v", text, r, again, err)
		}
	}
}

func TestAllocate(t *testing.T) {
	day := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	auto := Pool{Name: "auto", Auto: true, Ranges: ranges(t, "192.0.2.0/30", "2001:db8::/120")}
	named := Pool{Name: "named", Ranges: ranges(t, "198.51.100.254-198.51.101.1"), AvoidEnds: true}
	choosy := Pool{Name: "choosy", Auto: true, Priority: -1, Ranges: ranges(t, "203.0.113.1/32"),
		Admits: func(owner string) bool { return strings.HasPrefix(owner, "shop/") }}
	over := Pool{Name: "over", Ranges: ranges(t, "192.0.2.1-192.0.2.2")}
	pools := []Pool{auto, named, choosy, over}
	web := []Port{{"TCP", 80}}
	for name, c := range map[string]struct {
		claims []Claim
		want   string
	}{
		"first":                         {[]Claim{{Owner: "a/x", V4: true}}, "a/x 192.0.2.0 Allocated"},
		"both":                          {[]Claim{{Owner: "a/x", V4: true, V6: true}}, "a/x 192.0.2.0 2001:db8:: Allocated"},
		"by priority":                   {[]Claim{{Owner: "shop/x", V4: true}, {Owner: "shop/y", V4: true}}, "shop/x 203.0.113.1 Allocated; shop/y 192.0.2.0 Allocated"},
		"by name":                       {[]Claim{{Owner: "a/x", V4: true, Pool: "named"}}, "a/x 198.51.100.254 Allocated"},
		"avoids the ends":               {[]Claim{{Owner: "a/x", V4: true, Pool: "named", Current: addrs("198.51.100.254")}, {Owner: "a/y", V4: true, Pool: "named"}}, "a/x 198.51.100.254 Allocated; a/y 198.51.101.1 Allocated"},
		"not for it":                    {[]Claim{{Owner: "a/x", V4: true, Pool: "choosy"}}, "a/x UnknownPool"},
		"unknown pool":                  {[]Claim{{Owner: "a/x", V4: true, Pool: "nowhere"}}, "a/x UnknownPool"},
		"asked for":                     {[]Claim{{Owner: "a/x", V4: true, Addresses: addrs("192.0.2.3")}}, "a/x 192.0.2.3 Allocated"},
		"asked elsewhere":               {[]Claim{{Owner: "a/x", V4: true, Addresses: addrs("10.0.0.1")}}, "a/x NotInPool"},
		"asked an end":                  {[]Claim{{Owner: "a/x", V4: true, Addresses: addrs("198.51.101.0")}}, "a/x NotInPool"},
		"conflict":                      {[]Claim{{Owner: "a/x", Created: day.Add(1), V4: true, Addresses: addrs("192.0.2.3")}, {Owner: "b/y", Created: day, V4: true, Addresses: addrs("192.0.2.3")}}, "a/x InUse; b/y 192.0.2.3 Allocated"},
		"who has it stays":              {[]Claim{{Owner: "a/x", Created: day.Add(1), V4: true, Current: addrs("192.0.2.0")}, {Owner: "b/y", Created: day, V4: true}}, "a/x 192.0.2.0 Allocated; b/y 192.0.2.1 Allocated"},
		"twice by mistake":              {[]Claim{{Owner: "a/x", Created: day.Add(1), V4: true, Current: addrs("192.0.2.0")}, {Owner: "b/y", Created: day, V4: true, Current: addrs("192.0.2.0")}}, "a/x 192.0.2.1 Allocated; b/y 192.0.2.0 Allocated"},
		"asks for another":              {[]Claim{{Owner: "a/x", V4: true, Current: addrs("192.0.2.0"), Addresses: addrs("192.0.2.2")}}, "a/x 192.0.2.2 Allocated"},
		"asks for a pool":               {[]Claim{{Owner: "a/x", V4: true, Current: addrs("192.0.2.0"), Pool: "named"}}, "a/x 198.51.100.254 Allocated"},
		"asks for what nobody can have": {[]Claim{{Owner: "a/x", V4: true, Current: addrs("192.0.2.2"), Addresses: addrs("10.0.0.1")}}, "a/x 192.0.2.2 NotInPool"},
		"asks for no pool":              {[]Claim{{Owner: "a/x", V4: true, Current: addrs("192.0.2.2"), Pool: "nowhere"}}, "a/x 192.0.2.2 UnknownPool"},
		"asks for another's": {[]Claim{{Owner: "a/x", V4: true, Current: addrs("192.0.2.2"), Addresses: addrs("192.0.2.3")}, {Owner: "b/y", V4: true, Current: addrs("192.0.2.3")}},
			"a/x 192.0.2.2 InUse; b/y 192.0.2.3 Allocated"},
		"asks for a pool that overlaps": {[]Claim{{Owner: "shop/x", V4: true, Current: addrs("192.0.2.1"), Pool: "over"}}, "shop/x 192.0.2.1 Allocated"},
		"no pool at all, optional":      {[]Claim{{Owner: "a/x", V4: true, V6: true, Optional: true, Pool: "nowhere"}}, "a/x UnknownPool"},
		"written by others":             {[]Claim{{Owner: "a/x", V4: true, Current: addrs("10.9.9.9"), Foreign: true}}, "a/x 192.0.2.0 Allocated"},
		"written by others, of a pool":  {[]Claim{{Owner: "a/x", V4: true, Current: addrs("192.0.2.3"), Foreign: true}}, "a/x 192.0.2.3 Allocated"},
		"the older leaves those who share": {[]Claim{{Owner: "a/old", Created: day, V4: true, Ports: web, Current: addrs("192.0.2.1"), Changed: true},
			{Owner: "b/young", Created: day.Add(1), V4: true, Share: "k", Ports: []Port{{"TCP", 81}}, Current: addrs("192.0.2.1")}}, "a/old 192.0.2.0 Allocated; b/young 192.0.2.1 Allocated"},
		"the older takes a port of who shares": {[]Claim{{Owner: "a/old", Created: day, V4: true, Share: "k", Ports: web, Current: addrs("192.0.2.1"), Changed: true},
			{Owner: "b/young", Created: day.Add(1), V4: true, Share: "k", Ports: web, Current: addrs("192.0.2.1")}}, "a/old 192.0.2.0 Allocated; b/young 192.0.2.1 Allocated"},
		"shrunk":          {[]Claim{{Owner: "a/x", V4: true, Current: addrs("10.9.9.9")}}, "a/x 10.9.9.9 NotInPool"},
		"family goes":     {[]Claim{{Owner: "a/x", V4: true, Current: addrs("192.0.2.0", "2001:db8::5")}}, "a/x 192.0.2.0 Allocated"},
		"family comes":    {[]Claim{{Owner: "a/x", V4: true, V6: true, Current: addrs("192.0.2.2")}}, "a/x 192.0.2.2 2001:db8:: Allocated"},
		"optional family": {[]Claim{{Owner: "a/x", V4: true, V6: true, Optional: true, Pool: "named"}}, "a/x 198.51.100.254 Allocated"},
		"shared": {[]Claim{
			{Owner: "a/x", V4: true, Share: "k", Ports: web}, {Owner: "a/y", V4: true, Share: "k", Ports: []Port{{"UDP", 80}}},
			{Owner: "a/z", V4: true, Share: "k", Ports: web}, {Owner: "b/x", V4: true, Share: "l", Ports: []Port{{"TCP", 81}}},
		}, "a/x 192.0.2.0 Allocated; a/y 192.0.2.0 Allocated; a/z 192.0.2.1 Allocated; b/x 192.0.2.2 Allocated"},
		"exhausted": {[]Claim{{Owner: "a/1", V4: true}, {Owner: "a/2", V4: true}, {Owner: "a/3", V4: true}, {Owner: "a/4", V4: true}, {Owner: "a/5", V4: true}},
			"a/1 192.0.2.0 Allocated; a/2 192.0.2.1 Allocated; a/3 192.0.2.2 Allocated; a/4 192.0.2.3 Allocated; a/5 Exhausted"},
	} {
		if have := show(Allocate(pools, c.claims)); have != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", name, have, c.want)
		}
	}
	if have := show(Allocate(nil, []Claim{{Owner: "a/x", V4: true, V6: true, Optional: true}})); have != "a/x NoPool" {
		t.Errorf("without pools: %s", have)
	}
}

func show(results []Result) string {
	var all []string
	for _, r := range results {
		words := []string{r.Owner}
		for _, a := range r.Addresses {
			words = append(words, a.String())
		}
		all = append(all, strings.Join(append(words, string(r.Reason)), " "))
		if (r.Reason == Allocated) != (r.Message == "") {
			all = append(all, "a message that is missing or too much: "+r.Message)
		}
	}
	return strings.Join(all, "; ")
}

func TestOverlaps(t *testing.T) {
	found := Overlaps([]Pool{
		{Name: "a", Ranges: ranges(t, "192.0.2.0/24")}, {Name: "b", Ranges: ranges(t, "192.0.2.200-192.0.3.5", "2001:db8::/64")},
		{Name: "c", Ranges: ranges(t, "192.0.3.6/32")},
	})
	if len(found) != 1 || found[0].A != "a" || found[0].B != "b" || found[0].Common.String() != "192.0.2.200-192.0.2.255" {
		t.Errorf("found %v", found)
	}
}

// history is a random life of a cluster: claims come, go, ask for other things,
// and pools grow and shrink.
type history struct {
	r      *rand.Rand
	claims []Claim
	pools  []Pool
	born   int
}

func (h *history) step() {
	switch n := h.r.IntN(10); {
	case n < 5 && len(h.claims) < 40:
		h.born++
		c := Claim{Owner: fmt.Sprintf("n/%d", h.born), Created: time.Unix(int64(h.r.IntN(50)), 0), V4: h.r.IntN(4) > 0, V6: h.r.IntN(3) == 0}
		c.V6 = c.V6 || !c.V4
		h.ask(&c)
		h.claims = append(h.claims, c)
	case n < 7 && len(h.claims) > 0:
		i := h.r.IntN(len(h.claims))
		h.claims = slices.Delete(h.claims, i, i+1)
	case n < 8 && len(h.claims) > 0:
		h.ask(&h.claims[h.r.IntN(len(h.claims))])
	case n == 9:
		h.draw()
	}
}

func (h *history) ask(c *Claim) {
	c.Addresses, c.Pool, c.Share = nil, "", ""
	switch h.r.IntN(6) {
	case 0:
		c.Addresses = addrs(fmt.Sprintf("192.0.2.%d", h.r.IntN(40)))
	case 1:
		c.Pool = fmt.Sprintf("p%d", h.r.IntN(4))
	case 2, 3:
		c.Share = fmt.Sprintf("k%d", h.r.IntN(2))
	}
	c.Ports = []Port{{"TCP", uint16(h.r.IntN(3))}}
}

func (h *history) draw() {
	h.pools = nil
	for i := range h.r.IntN(4) {
		first := h.r.IntN(30)
		r, err := ParseRange(fmt.Sprintf("192.0.2.%d-192.0.2.%d", first, first+h.r.IntN(10)))
		if err != nil {
			panic(err)
		}
		p := Pool{Name: fmt.Sprintf("p%d", i), Auto: h.r.IntN(4) > 0, Priority: h.r.IntN(2), AvoidEnds: h.r.IntN(2) == 0, Ranges: []Range{r}}
		if h.r.IntN(2) == 0 {
			p.Ranges = append(p.Ranges, Range{netip.MustParseAddr("2001:db8::"), netip.MustParseAddr("2001:db8::9")})
		}
		h.pools = append(h.pools, p)
	}
}

// Whatever happens: nobody has what another has unless both want to share it,
// nobody loses what he did not give up, nothing is held by nobody, and somebody
// goes without only if there is nothing for him.
func TestHistories(t *testing.T) {
	for seed := range uint64(300) {
		h := &history{r: rand.New(rand.NewPCG(seed, 1))}
		h.draw()
		for step := range 60 {
			h.step()
			results := Allocate(h.pools, h.claims)
			if problem := h.check(results); problem != "" {
				t.Fatalf("seed %d, step %d: %s\n%s", seed, step, problem, show(results))
			}
			again := Allocate(h.pools, h.claims)
			if show(again) != show(results) {
				t.Fatalf("seed %d, step %d: the same again gives something else", seed, step)
			}
			for i := range h.claims {
				// Some results are lost on their way: the controller was killed.
				if h.r.IntN(8) > 0 {
					h.claims[i].Current = resultOf(results, h.claims[i].Owner).Addresses
				}
			}
			if settled := Allocate(h.pools, h.claims); h.r.IntN(4) == 0 && len(settled) != len(h.claims) {
				t.Fatalf("seed %d, step %d: %d results of %d claims", seed, step, len(settled), len(h.claims))
			}
		}
	}
}

func resultOf(results []Result, owner string) Result {
	i := slices.IndexFunc(results, func(r Result) bool { return r.Owner == owner })
	return results[i]
}

func (h *history) check(results []Result) string {
	holders := make(map[netip.Addr][]*Claim)
	for i := range h.claims {
		c := &h.claims[i]
		r := resultOf(results, c.Owner)
		if len(r.Addresses) > 2 || len(r.Addresses) == 2 && r.Addresses[0].Is4() == r.Addresses[1].Is4() {
			return c.Owner + " has two of a family"
		}
		for _, a := range r.Addresses {
			if !c.wants(service.FamilyOf(a)) {
				return c.Owner + " has a family that it does not want"
			}
			if !slices.Contains(c.Current, a) && !slices.ContainsFunc(h.pools, func(p Pool) bool { return p.has(a) }) {
				return fmt.Sprintf("%s was given %s, which is in no pool", c.Owner, a)
			}
			holders[a] = append(holders[a], c)
		}
	}
	for a, all := range holders {
		for i, x := range all {
			for _, y := range all[i+1:] {
				if x.Share == "" || x.Share != y.Share || slices.Equal(x.Ports, y.Ports) {
					return fmt.Sprintf("%s and %s both have %s", x.Owner, y.Owner, a)
				}
			}
		}
	}
	for i := range h.claims {
		if problem := h.checkOne(&h.claims[i], resultOf(results, h.claims[i].Owner), holders); problem != "" {
			return problem
		}
	}
	return ""
}

func (h *history) checkOne(c *Claim, r Result, holders map[netip.Addr][]*Claim) string {
	plain := len(c.Addresses) == 0 && c.Pool == ""
	for _, a := range c.Current {
		if !plain || !c.wants(service.FamilyOf(a)) || slices.Contains(r.Addresses, a) {
			continue
		}
		// Lost: somebody who did not share it must have had it as well.
		contested := slices.ContainsFunc(h.claims, func(o Claim) bool { return o.Owner != c.Owner && slices.Contains(o.Current, a) })
		if !contested {
			return fmt.Sprintf("%s lost %s", c.Owner, a)
		}
	}
	if r.Reason != Exhausted {
		return ""
	}
	for _, p := range h.pools {
		if plain && !p.Auto || c.Pool != "" && p.Name != c.Pool {
			continue
		}
		for _, f := range service.EachFamily {
			if !c.wants(f) || slices.ContainsFunc(r.Addresses, func(a netip.Addr) bool { return service.FamilyOf(a) == f }) {
				continue
			}
			for _, x := range p.Ranges {
				for a := x.First; !x.Last.Less(a); a = a.Next() {
					if service.FamilyOf(a) == f && !p.avoids(a) && len(holders[a]) == 0 {
						return fmt.Sprintf("%s goes without although %s is free", c.Owner, a)
					}
				}
			}
		}
	}
	return ""
}
