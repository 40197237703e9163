package flow

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pentad/pentad/api"
)

// AddAnnouncement says whether the network is told of the VIP, which is how packets of
// others come here at all.
func (e *Explanation) AddAnnouncement(all api.Announcements, q Question) {
	a := q.Destination.Addr()
	i := slices.IndexFunc(all.VIPs, func(v api.AnnouncedVIP) bool { return v.Address == a })
	if i < 0 {
		return
	}
	v := all.VIPs[i]
	switch {
	case v.Missing != "" && len(v.To) > 0:
		e.step("announced", "to %s, in an aggregate, or until it is taken back; but %s", strings.Join(v.To, ", "), v.Missing)
	case v.Missing != "":
		e.step("announced", "no: %s", v.Missing)
		e.Conclusion += fmt.Sprintf(" Nobody is told that %s is here, because %s.", a, v.Missing)
	case len(v.To) == 0:
		e.step("announced", "no: %s", strings.Join(v.NotTo, "; "))
		e.Conclusion += fmt.Sprintf(" Nobody is told that %s is here: %s.", a, strings.Join(v.NotTo, "; "))
	default:
		e.step("announced", "to %s", strings.Join(v.To, ", "))
		for _, not := range v.NotTo {
			e.step("announced", "not to %s", not)
		}
	}
}
