package service

import (
	"slices"
	"strconv"
	"strings"
)

// StatusCodes is a set of HTTP status codes as inclusive ranges.
type StatusCodes [][2]int

// Contains reports whether the code is in the set.
func (s StatusCodes) Contains(code int) bool {
	return slices.ContainsFunc(s, func(r [2]int) bool { return r[0] <= code && code <= r[1] })
}

// ParseStatusCodes reads codes and ranges, separated by commas: "200-299,404".
func ParseStatusCodes(text string) (StatusCodes, error) {
	var set StatusCodes
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			to = from
		}
		low, err := strconv.Atoi(from)
		if err != nil {
			return nil, err
		}
		high, err := strconv.Atoi(to)
		if err != nil {
			return nil, err
		}
		if low < 100 || high > 599 || low > high {
			return nil, strconv.ErrRange
		}
		set = append(set, [2]int{low, high})
	}
	return set, nil
}
