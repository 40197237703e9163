package view

import (
	"net/netip"
	"time"

	"github.com/pentad/pentad/plane/socket"
)

// HistoryEvery is how long one point of a history is from the next, HistoryFor how far it
// goes back.
const (
	HistoryEvery = 15 * time.Second
	HistoryFor   = 15 * time.Minute
)

const historyPoints = int(HistoryFor / HistoryEvery)

// History is what backends did of late. It is a value of some hundred bytes a backend:
// whoever keeps one says for how many.
type History struct {
	series map[backendKey]*series
	round  uint64
}

// series is a ring of points.
type series struct {
	points      [historyPoints]Point
	begun       uint64 // the round of the first point
	round       uint64 // of the last one
	connections uint64 // as counted then
	failed      uint64
}

// Point is what a backend did up to a moment.
type Point struct {
	InFlight     uint32  `json:"inFlight"`
	Connections  uint32  `json:"connections"` // since the point before
	Failed       uint32  `json:"failed"`      // the same
	ResponseTime float32 `json:"responseSeconds"`
}

// NewHistory returns one that knows nothing.
func NewHistory() *History { return &History{series: make(map[backendKey]*series)} }

// Add notes what all backends do at one moment. Those that are not there any more are
// forgotten.
func (h *History) Add(loads []socket.BackendLoad) {
	h.round++
	for i := range loads {
		l := &loads[i]
		k := backendKey{l.Service, l.Address}
		s, known := h.series[k]
		if !known {
			// What it did before nobody knows when.
			s = &series{begun: h.round, connections: l.Connections, failed: l.Failed}
			h.series[k] = s
		}
		s.points[h.round%uint64(historyPoints)] = Point{
			InFlight: l.InFlight, Connections: uint32(since(s.connections, l.Connections)), Failed: uint32(since(s.failed, l.Failed)),
			ResponseTime: float32(l.Response.Seconds()),
		}
		s.round, s.connections, s.failed = h.round, l.Connections, l.Failed
	}
	for k, s := range h.series {
		if s.round != h.round {
			delete(h.series, k)
		}
	}
}

// Clear forgets everything.
func (h *History) Clear() { clear(h.series) }

// Of returns the points of a backend, oldest first, and none of one that is not known.
func (h *History) Of(service string, address netip.AddrPort) []Point {
	s, known := h.series[backendKey{service, address}]
	if !known {
		return nil
	}
	first := s.begun
	if s.round-first >= uint64(historyPoints) {
		first = s.round - uint64(historyPoints) + 1
	}
	points := make([]Point, 0, s.round-first+1)
	for r := first; r <= s.round; r++ {
		points = append(points, s.points[r%uint64(historyPoints)])
	}
	return points
}
