package health

import "time"

// lanes share a bounded number of probes among services, so that one whose
// backends are silent does not keep others from being probed. Each service has a
// lane; lanes take turns; and a lane takes no more slots than it leaves free
// (Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
// Switches", 1998): one greedy service gets half of them, n get 1/(n+1) each, and
// as much stays free for others.
type lanes struct {
	free    int
	waiting int // targets in all lanes
	lanes   map[string]*lane
	turns   []*lane // lanes in which somebody waits
}

// lane is one service.
type lane struct {
	service  string
	queue    []*target
	underway int
}

// maxInFlight bounds the probes under way at once. It is far above what a
// healthy fleet needs.
const maxInFlight = 4096

// slotsFor returns how many probes may be under way when a process may have so
// many files open: half of them are for all else.
func slotsFor(files uint64) int { return int(min(maxInFlight, max(16, files/2))) }

func newLanes(slots int) lanes { return lanes{free: slots, lanes: make(map[string]*lane)} }

// wait puts a target at the end of its lane, unless it waits already.
func (l *lanes) wait(t *target) {
	if t.waiting {
		return
	}
	n := l.lanes[t.Service]
	if n == nil {
		n = &lane{service: t.Service}
		l.lanes[t.Service] = n
	}
	t.waiting = true
	n.queue = append(n.queue, t)
	l.waiting++
	if len(n.queue) == 1 {
		l.turns = append(l.turns, n)
	}
}

// next returns the target whose probe may begin, or nil when none may.
func (l *lanes) next() *target {
	for range len(l.turns) {
		n := l.turns[0]
		l.turns = l.turns[1:]
		if n.underway >= l.free {
			l.turns = append(l.turns, n)
			continue
		}
		t := n.queue[0]
		n.queue[0] = nil
		n.queue = n.queue[1:]
		l.waiting--
		t.waiting = false
		if len(n.queue) > 0 {
			l.turns = append(l.turns, n)
		}
		if t.gone {
			l.drop(n)
			return l.next()
		}
		n.underway++
		l.free--
		return t
	}
	return nil
}

// done gives the slot of a target back.
func (l *lanes) done(t *target) {
	n := l.lanes[t.Service]
	n.underway--
	l.free++
	l.drop(n)
}

// drop forgets a lane in which nobody is.
func (l *lanes) drop(n *lane) {
	if n.underway == 0 && len(n.queue) == 0 {
		delete(l.lanes, n.service)
	}
}

// oldest returns the service whose first target waits longest, and since when;
// "" when nobody waits.
func (l *lanes) oldest() (service string, since time.Time) {
	for _, n := range l.turns {
		if first := n.queue[0]; service == "" || first.was.Before(since) {
			service, since = n.service, first.was
		}
	}
	return service, since
}
