package service

import (
	"net/netip"
	"slices"
	"testing"
)

func TestMerge(t *testing.T) {
	at := func(port uint16, p Protocol) Listener {
		return Listener{Address: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port), Protocol: p}
	}
	held := at(80, TCP)
	held.Held, held.From = true, FromHost
	db := &Service{Name: "db", Source: SourceFile, Listeners: []Listener{at(80, TCP)}}
	idle := &Service{Name: "idle", Source: SourceFile}
	same := &Service{Name: "shop/same", Source: SourceKubernetes, Listeners: []Listener{held}}
	part := &Service{Name: "shop/part", Source: SourceKubernetes, Listeners: []Listener{at(80, TCP), at(80, UDP)}}
	apart := &Service{Name: "shop/apart", Source: SourceKubernetes, Listeners: []Listener{at(81, TCP)}}
	again := &Service{Name: "shop/again", Source: SourceKubernetes, Listeners: []Listener{at(81, TCP)}}
	for _, c := range []struct {
		name string
		of   [][]*Service
		want []string // names
		lost []string
	}{
		{"nothing", nil, nil, nil},
		{"one source", [][]*Service{{db, idle}}, []string{"db", "idle"}, nil},
		{"the other alone", [][]*Service{nil, {apart, again}}, []string{"shop/apart", "shop/again"}, nil},
		{"the file first", [][]*Service{{db, idle}, {same, part, apart, again}}, []string{"db", "idle", "shop/part", "shop/apart", "shop/again"}, []string{
			"service shop/same: 192.0.2.1:80 is not served for it on this host: it belongs to the service db of the source file",
			"service shop/part: 192.0.2.1:80 is not served for it on this host: it belongs to the service db of the source file",
		}},
		{"three", [][]*Service{{db}, {part}, {{Name: "third", Listeners: []Listener{at(80, UDP)}}}}, []string{"db", "shop/part"}, []string{
			"service shop/part: 192.0.2.1:80 is not served for it on this host: it belongs to the service db of the source file",
			"service third: 192.0.2.1:80/udp is not served for it on this host: it belongs to the service shop/part of the source kubernetes",
		}},
	} {
		merged, lost := Merge(c.of...)
		var names []string
		for _, s := range merged {
			names = append(names, s.Name)
			if s.Name == "shop/part" && c.name != "one source" && !slices.Equal(s.Listeners, []Listener{at(80, UDP)}) {
				t.Errorf("%s: shop/part listens at %v", c.name, s.Listeners)
			}
			if s.Name == "shop/apart" && s != apart {
				t.Errorf("%s: what lost nothing is a copy", c.name)
			}
		}
		if !slices.Equal(names, c.want) || !slices.Equal(lost, c.lost) {
			t.Errorf("%s: %v, lost %q", c.name, names, lost)
		}
	}
	if len(part.Listeners) != 2 {
		t.Error("the sources' own value was changed")
	}
}

func TestSources(t *testing.T) {
	var none Sources
	some := none.With(SourceKubernetes)
	for _, c := range []struct {
		set  Sources
		of   Source
		want bool
	}{
		{none, SourceFile, false}, {none, SourceUnknown, false}, {some, SourceKubernetes, true}, {some, SourceFile, false},
		// An earlier version did not say: it may be of any that is silent.
		{some, SourceUnknown, true}, {some.Without(SourceKubernetes), SourceUnknown, false},
	} {
		if c.set.Has(c.of) != c.want {
			t.Errorf("%b has %s: %t", c.set, c.of, !c.want)
		}
	}
}
