package bfd

import "time"

// Settings are how closely a neighbour is watched. They are comparable.
type Settings struct {
	Interval   time.Duration // between packets, in both directions, whole microseconds; 10 ms to 1 min
	Multiplier uint8         // of intervals without a packet after which the neighbour is dead; 1 to 255
}

// idleInterval is the least between packets while a session is not up (RFC 5880, section
// 6.8.3).
const idleInterval = time.Second

// Session is one end of a session: the state machine of RFC 5880, section 6.8. It reads no
// clock and sends nothing itself.
type Session struct {
	settings Settings
	draw     func() float64 // 0 to 1, for the jitter

	mine, yours uint32
	state       State
	diagnostic  Diagnostic
	remote      Packet    // the last that came; of no meaning while yours is 0
	polling     bool      // what we want has changed, and the neighbour has not confirmed it
	sends       time.Time // when the next packet is due; zero: none is
	expires     time.Time // when the neighbour counts as dead; zero: nothing was heard from it
	changed     time.Time
}

// NewSession begins a session. mine tells it from others of this host and is not 0; draw
// returns numbers from 0 to 1.
func NewSession(settings Settings, mine uint32, now time.Time, draw func() float64) *Session {
	return &Session{settings: settings, draw: draw, mine: mine, state: Down, sends: now, changed: now}
}

// State returns the state, and since when it is.
func (s *Session) State() (State, time.Time) { return s.state, s.changed }

// Diagnostic returns why the session left the state up last.
func (s *Session) Diagnostic() Diagnostic { return s.diagnostic }

// Remote returns the last packet of the neighbour; false: none came in time.
func (s *Session) Remote() (Packet, bool) { return s.remote, s.yours != 0 }

// Detection returns after how long a silent neighbour counts as dead: what it can send is
// what counts, so that nobody is given up who was never asked to hurry (section 6.8.4).
func (s *Session) Detection() time.Duration {
	if s.yours == 0 {
		return 0
	}
	return time.Duration(s.remote.Multiplier) * max(s.settings.Interval, s.remote.DesiredTx)
}

// Deadline returns when Tick has something to do; zero: only after a packet.
func (s *Session) Deadline() time.Time {
	if s.sends.IsZero() || !s.expires.IsZero() && s.expires.Before(s.sends) {
		return s.expires
	}
	return s.sends
}

// Receive takes a packet of the neighbour. It returns what has to be answered at once.
func (s *Session) Receive(p Packet, now time.Time) (answer Packet, answers bool) {
	if s.state == AdminDown {
		return Packet{}, false
	}
	s.remote, s.yours = p, p.Mine
	if p.Final {
		s.polling = false
	}
	s.transit(p.State, now)
	s.expires = now.Add(s.Detection())
	// The neighbour may take more, or fewer, than it did: what was to be sent late is
	// sent as it can be now.
	if next := s.next(now, 1); s.sends.IsZero() || !next.IsZero() && next.Before(s.sends) {
		s.sends = next
	}
	if s.isQuiet() {
		s.sends = time.Time{}
	}
	if p.Poll {
		answer = s.packet()
		answer.Poll, answer.Final = false, true
		return answer, true
	}
	return Packet{}, false
}

// transit follows section 6.8.6.
func (s *Session) transit(remote State, now time.Time) {
	switch {
	case remote == AdminDown:
		if s.state != Down {
			s.become(Down, NeighborDown, now)
		}
	case s.state == Down && remote == Down:
		s.become(Init, s.diagnostic, now)
	case s.state == Down && remote == Init, s.state == Init && remote >= Init:
		s.become(Up, NoDiagnostic, now)
	case s.state == Up && remote == Down:
		s.become(Down, NeighborDown, now)
	}
}

// become changes the state; the neighbour hears of it at once.
func (s *Session) become(to State, why Diagnostic, now time.Time) {
	s.state, s.diagnostic, s.changed = to, why, now
	// As often as we want to send is another number now (section 6.8.3).
	s.polling = to == Up
	s.sends = now
}

// Tick does what is due. It returns the packet that has to be sent.
func (s *Session) Tick(now time.Time) (p Packet, sends bool) {
	if !s.expires.IsZero() && !now.Before(s.expires) {
		s.expires, s.yours = time.Time{}, 0
		// What it could take is not known any more: it may be another one, that waits
		// to be spoken to.
		if s.sends.IsZero() {
			s.sends = now
		}
		if s.state == Init || s.state == Up {
			s.become(Down, Expired, now)
		}
	}
	if s.sends.IsZero() || now.Before(s.sends) {
		return Packet{}, false
	}
	s.sends = s.next(now, s.draw())
	return s.packet(), true
}

// Close ends the session. The packet tells the neighbour that this is no failure.
func (s *Session) Close(now time.Time) Packet {
	s.become(AdminDown, AdministratedIt, now)
	s.sends, s.expires = time.Time{}, time.Time{}
	return s.packet()
}

// next returns when to send after now; drawn, 0 to 1, is where in the jitter. Zero: not at
// all.
func (s *Session) next(now time.Time, drawn float64) time.Time {
	if s.isQuiet() {
		return time.Time{}
	}
	interval := s.desired()
	if s.yours != 0 {
		interval = max(interval, s.remote.RequiredRx)
	}
	// 75 % to 100 % of it; with a multiplier of 1 never later than 90 % (section 6.8.7).
	most := 0.25
	if s.settings.Multiplier == 1 {
		most = 0.15
	}
	return now.Add(time.Duration(float64(interval) * (0.75 + most*drawn)))
}

// isQuiet reports whether the neighbour wants no packets.
func (s *Session) isQuiet() bool {
	if s.state == AdminDown {
		return true
	}
	if s.yours == 0 {
		return false
	}
	demands := s.remote.Demand && s.state == Up && s.remote.State == Up
	return (s.remote.RequiredRx == 0 || demands) && !s.polling
}

// desired is as often we want to send.
func (s *Session) desired() time.Duration {
	if s.state == Up {
		return s.settings.Interval
	}
	return max(idleInterval, s.settings.Interval)
}

func (s *Session) packet() Packet {
	return Packet{
		Diagnostic: s.diagnostic, State: s.state, Poll: s.polling, Multiplier: s.settings.Multiplier,
		Mine: s.mine, Yours: s.yours, DesiredTx: s.desired(), RequiredRx: s.settings.Interval,
	}
}
