package health

// machine decides from a row of probe results whether a backend is up. A
// backend that nothing is known of counts as up, and its first result decides
// alone: a new backend that does not answer must not get connections for
// another interval.
type machine struct {
	up     bool
	known  bool // a result or an earlier agent has decided
	streak int  // results in a row against the present state
}

// observe takes one result and reports whether the state changed.
func (m *machine) observe(ok bool, rise, fall int) bool {
	if !m.known {
		m.known, m.streak = true, 0
		changed := m.up != ok
		m.up = ok
		return changed
	}
	if ok == m.up {
		m.streak = 0
		return false
	}
	m.streak++
	needed := fall
	if ok {
		needed = rise
	}
	if m.streak < needed {
		return false
	}
	m.up, m.streak = ok, 0
	return true
}
