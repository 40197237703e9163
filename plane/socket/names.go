package socket

import "fmt"

// dropNames takes names of UDP sockets out of the map udp_more that the walk with a
// number did not meet: their sockets were closed while nobody was told. Whoever made
// them gets back his share of the map.
func (s *mapSet) dropNames(walk uint32) error {
	all, err := dump[kernelUdpMoreKey, kernelUdpNames](s.maps[kernelMapUdpMore])
	if err != nil {
		return fmt.Errorf("map udp_more: %w", err)
	}
	var gone []kernelUdpMoreKey
	held := make(map[uint64]uint32)
	wrong := make(map[uint64]bool)
	for i, k := range all.keys {
		if n := all.values[i]; n.Seen == uint8(walk) {
			held[n.Share]++
		} else {
			gone = append(gone, k)
			wrong[n.Share] = true
		}
	}
	if err := drop(s, kernelMapUdpMore, gone); err != nil {
		return err
	}
	return s.correctShares(held, wrong)
}

// correctShares sets how many entries of udp_more those have of whom it was wrong,
// and forgets who has none.
func (s *mapSet) correctShares(held map[uint64]uint32, wrong map[uint64]bool) error {
	shares, err := dump[uint64, uint32](s.maps[kernelMapUdpShares])
	if err != nil {
		return fmt.Errorf("map udp_shares: %w", err)
	}
	var none []uint64
	var right batch[uint64, uint32]
	for i, share := range shares.keys {
		switch {
		case held[share] == 0 && (wrong[share] || shares.values[i] == 0):
			none = append(none, share)
		case wrong[share]:
			right.keys = append(right.keys, share)
			right.values = append(right.values, held[share])
		}
	}
	if err := put(s, kernelMapUdpShares, right); err != nil {
		return err
	}
	return drop(s, kernelMapUdpShares, none)
}
