package main

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
)

// packetsOut is what the kernel does with packets to a listener.
type packetsOut struct {
	Listen   string   `json:"listen" yaml:"listen"`
	From     []string `json:"from" yaml:"from"` // guests, world
	Balance  string   `json:"balance" yaml:"balance"`
	Guarded  bool     `json:"guarded" yaml:"guarded"`
	Sources  []string `json:"sources,omitempty" yaml:"sources,omitempty"` // of guarded ones: who may come
	Dropped  bool     `json:"dropped" yaml:"dropped"`                     // without backends: dropped, else refused
	Backends []string `json:"backends" yaml:"backends"`
}

// readPackets reads the table for packets; without one the view is empty.
func readPackets() (*nat.View, error) {
	v, err := nat.Read()
	if errors.Is(err, nat.ErrNothingInstalled) {
		return &nat.View{}, nil
	}
	return v, err
}

func placesOf(f service.From) []string {
	var words []string
	for place, word := range map[service.From]string{service.FromGuests: "guests", service.FromWorld: "world"} {
		if f&place != 0 {
			words = append(words, word)
		}
	}
	slices.Sort(words)
	return words
}

func newPacketsOut(m nat.Mapping) packetsOut {
	out := packetsOut{
		Listen: m.Listener.String(), From: placesOf(m.Listener.From), Balance: service.Random.String(),
		Guarded: m.Listener.Guarded, Dropped: m.Dropped, Backends: []string{},
	}
	if m.Hashed {
		out.Balance = service.SourceHash.String()
	}
	for _, r := range m.Sources {
		out.Sources = append(out.Sources, r.String())
	}
	for _, b := range m.Backends {
		out.Backends = append(out.Backends, b.Address.String())
	}
	return out
}

// addPackets puts mappings to the services that they belong to. Some have no other.
func addPackets(all []serviceOut, packets []nat.Mapping) []serviceOut {
	at := make(map[string]int, len(all))
	for i, s := range all {
		at[s.Name] = i
	}
	for _, m := range packets {
		i, known := at[m.Service]
		if !known {
			i = len(all)
			at[m.Service] = i
			all = append(all, serviceOut{Name: m.Service, Listen: []string{}, Backends: []backendOut{}})
		}
		all[i].Packets = append(all[i].Packets, newPacketsOut(m))
	}
	slices.SortStableFunc(all, func(a, b serviceOut) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// packetRows is a row for each mapping: listener, from whom, to what.
func packetRows(packets []nat.Mapping, wide bool) [][]string {
	var rows [][]string
	for _, m := range packets {
		out := newPacketsOut(m)
		from := strings.Join(out.From, ", ")
		if out.Guarded {
			from += " in the source ranges"
		}
		to := leadsTo(out.Backends, wide)
		if m.Dropped {
			to = "nothing: dropped"
		}
		rows = append(rows, []string{out.Listen, from, to})
	}
	return rows
}

// withPackets puts rows of sockets (SERVICE, LISTENER, BALANCE, BACKENDS, MAPS TO)
// and of packets together, with a column that says whose connections they are. Where
// all find the same there is one row.
func withPackets(sockets [][]string, packets []nat.Mapping, wide bool) [][]string {
	var rows [][]string
	at := make(map[[2]string]int)
	for _, r := range sockets {
		at[[2]string{r[0], r[1]}] = len(rows)
		rows = append(rows, []string{r[0], r[1], r[2], "sockets", r[3], r[4]})
	}
	for i, p := range packetRows(packets, wide) {
		m := packets[i]
		if k, known := at[[2]string{m.Service, p[0]}]; known && rows[k][5] == p[2] {
			rows[k][3] += ", " + p[1]
			continue
		}
		rows = append(rows, []string{m.Service, p[0], newPacketsOut(m).Balance, p[1], fmt.Sprint(len(m.Backends)), p[2]})
	}
	slices.SortStableFunc(rows, func(a, b []string) int { return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1])) })
	return rows
}
