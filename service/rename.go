package service

import (
	"slices"
	"strings"
)

// Renamed returns the services of to that are services of from under another name,
// as new name to old. What makes a service the same is where it listens: a name is
// for people, and what is known of its connections and backends outlives it.
func Renamed(from, to []*Service) map[string]string {
	return (&Snapshot{}).Next(from).Renamed(to)
}

// Renamed is that function for services that follow a snapshot. It costs little where
// few have changed and they are in the order of their names: of those that are as they
// were not even the names are looked at.
func (s *Snapshot) Renamed(to []*Service) map[string]string {
	if !s.sorts(to) {
		to = slices.Clone(to)
		slices.SortFunc(to, byName)
	}
	return renamedOf(moved(s.Services, to))
}

// renamedOf does it by looking at all.
func renamedOf(from, to []*Service) map[string]string {
	owner := make(map[Listener]string)
	for _, s := range from {
		for _, l := range s.Listeners {
			owner[l] = s.Name
		}
	}
	r := renames{owner: owner, now: make(map[string]*Service, len(to)), taken: make(map[string]bool)}
	for _, s := range to {
		r.now[s.Name] = s
	}
	var renamed map[string]string
	for _, s := range to {
		old := r.before(s)
		if old == "" || r.taken[old] {
			continue
		}
		if renamed == nil {
			renamed = make(map[string]string)
		}
		renamed[s.Name], r.taken[old] = old, true
	}
	return renamed
}

// moved leaves out the services that are in both with the same name and the same
// listeners: they were not renamed, and nobody else is they under another name.
func moved(from, to []*Service) (before, now []*Service) {
	i := 0
	for _, s := range to {
		for i < len(from) && from[i] != s && strings.Compare(from[i].Name, s.Name) < 0 {
			before = append(before, from[i])
			i++
		}
		switch {
		case i < len(from) && (from[i] == s || from[i].Name == s.Name && slices.Equal(from[i].Listeners, s.Listeners)):
			i++
		case i < len(from) && from[i].Name == s.Name:
			before, now = append(before, from[i]), append(now, s)
			i++
		default:
			now = append(now, s)
		}
	}
	return append(before, from[i:]...), now
}

type renames struct {
	owner map[Listener]string // in from
	now   map[string]*Service // in to
	taken map[string]bool     // old names that have a new one
}

// keeps reports whether the service of this name still listens where it did.
func (r *renames) keeps(name string) bool {
	s := r.now[name]
	return s != nil && slices.ContainsFunc(s.Listeners, func(l Listener) bool { return r.owner[l] == name })
}

// before returns the other name that a service had, or "".
func (r *renames) before(s *Service) string {
	if r.keeps(s.Name) {
		return ""
	}
	for _, l := range s.Listeners {
		if old := r.owner[l]; old != "" && old != s.Name && !r.keeps(old) {
			return old
		}
	}
	return ""
}
