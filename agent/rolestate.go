package agent

import (
	"time"

	"github.com/pentad/pentad/service"
)

// mode is what becomes of a role.
type mode uint8

const (
	off     mode = iota // the file has no use for it
	waiting             // what it needs is not known yet
	on
)

// roleState is how a role is.
type roleState struct {
	name    string
	mode    mode
	minor   bool
	loud    bool
	number  uint64    // of what was known when it was tried last
	err     error     // why it is not, or not all, as wanted
	broken  bool      // somebody has changed what it made, and it is not put back yet
	applied time.Time // when it last was what it should be
	left    func() bool
	warner  warner // may be nil
}

// isSound reports whether the role does its work now.
func (s roleState) isSound() bool {
	if s.number == 0 {
		return false // it was not tried yet
	}
	if s.mode == waiting && s.left != nil {
		return s.left()
	}
	return !s.broken && (s.err == nil || isPartial(s.err))
}

// outcome is what a driver tells the loop when it has tried something.
type outcome struct {
	role     string
	number   uint64
	mode     mode
	services *service.Snapshot // of what was tried
	err      error
	broken   bool // somebody has changed what it made, and it is not put back
	verified bool // the whole kernel was read
}
