package service

import (
	"slices"
	"strings"
)

// Renamed returns the services of to that are services of from under another name,
// as new name to old. What makes a service the same is where it listens: a name is
// for people, and what is known of its connections and backends outlives it. It costs
// little where few have changed and both are in the order of their names.
func Renamed(from, to []*Service) map[string]string {
	return renamedOf(moved(ordered(from), ordered(to)))
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

// ordered returns services in the order of their names.
func ordered(all []*Service) []*Service {
	if slices.IsSortedFunc(all, byName) {
		return all
	}
	all = slices.Clone(all)
	slices.SortFunc(all, byName)
	return all
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
