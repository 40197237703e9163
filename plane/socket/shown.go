package socket

import (
	"slices"

	"github.com/pentad/pentad/service"
)

// shown are the listeners of one service in the kernel, in their order. Most services
// have one or two, for which a map takes ten times as much memory.
type shown []shownListener

type shownListener struct {
	at    service.Listener
	value kernelListener
}

func newShown(all map[service.Listener]kernelListener) shown {
	s := make(shown, 0, len(all))
	for at, value := range all {
		s = append(s, shownListener{at, value})
	}
	slices.SortFunc(s, func(a, b shownListener) int { return a.at.Compare(b.at) })
	return s
}

func (s shown) find(at service.Listener) (int, bool) {
	return slices.BinarySearchFunc(s, at, func(x shownListener, at service.Listener) int { return x.at.Compare(at) })
}

// get returns the zero value for what is not shown.
func (s shown) get(at service.Listener) (value kernelListener) {
	if i, found := s.find(at); found {
		value = s[i].value
	}
	return value
}

func (s *shown) set(at service.Listener, value kernelListener) {
	i, found := s.find(at)
	if !found {
		*s = slices.Insert(*s, i, shownListener{at: at})
	}
	(*s)[i].value = value
}

func (s *shown) remove(at service.Listener) {
	if i, found := s.find(at); found {
		*s = slices.Delete(*s, i, i+1)
	}
}

// listeners returns them as they are now.
func (s shown) listeners() []service.Listener {
	all := make([]service.Listener, len(s))
	for i, x := range s {
		all[i] = x.at
	}
	return all
}
