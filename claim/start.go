package claim

import (
	"errors"
	"time"
)

// ErrCopied says that this host must not use its blocks.
var ErrCopied = errors.New("another host lives that has the name and the machine id of this one; is one of the two machines a copy of the other? This one claims no more blocks. Give it a name (host.name) and an /etc/machine-id of its own, and start its agent anew")

const (
	// takeOver is how long a machine that lives has to write its blocks back.
	takeOver = 3 * time.Second
	// mostLost is how often a host writes its blocks back before it gives up.
	mostLost = 3
)

// start is how far it is known that no copy of this host lives. A machine that was started
// anew and one that was copied look the same: both find blocks of their name that another
// start has written. So they write their own start there, and wait: a machine that lives
// writes its own back.
type start struct {
	settled   bool            // nobody did
	copied    bool            // somebody did
	contested bool            // there were blocks of another start
	ours      map[string]bool // blocks that were seen as this start has written them, by ID
	lost      int             // how often one of them was another's afterwards
	since     time.Time       // all of them have been this start's
}

// look looks at the blocks of this host.
func (s *start) look(mine []Block, incarnation string, now time.Time) {
	if s.copied {
		return
	}
	was := s.ours
	s.ours = make(map[string]bool, len(mine))
	foreign := 0
	for _, b := range mine {
		switch {
		case b.Incarnation == incarnation:
			s.ours[b.ID] = true
		case was[b.ID]:
			foreign++
			s.lost++
		default:
			foreign++
		}
	}
	s.contested = s.contested || foreign > 0
	switch {
	case s.lost >= mostLost, s.lost > 0 && !s.settled:
		s.copied = true
	case !s.contested:
		s.settled = true
	case foreign > 0:
		s.since = time.Time{}
	case s.since.IsZero():
		s.since = now
	case now.Sub(s.since) >= takeOver:
		s.settled = true
	}
}
