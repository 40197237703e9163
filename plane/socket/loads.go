package socket

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// The map loads is an array of arrays, each with the loads of loadChunk
// backends. The arrays are pinned beside it, as "loads-0", "loads-1", ...

const loadChunk = uint32(kernelLimitLOAD_CHUNK)

// maxBackends is how many backends the map loads has room for.
const maxBackends = loadChunk * uint32(kernelLimitLOAD_CHUNKS)

var errTooMany = fmt.Errorf("a host has at most %d backends", maxBackends)

func loadsPin(dir string, chunk int) string {
	return filepath.Join(dir, fmt.Sprintf("%s-%d", kernelMapLoads, chunk))
}

// openLoads opens the arrays of a set.
func (s *mapSet) openLoads(opts *ebpf.LoadPinOptions) error {
	for {
		m, err := ebpf.LoadPinnedMap(loadsPin(s.dir, len(s.loads)), opts)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("map %s: %w", kernelMapLoads, err)
		}
		s.loads = append(s.loads, m)
	}
}

// addLoads makes arrays until there is one for every index below n.
func (s *mapSet) addLoads(spec *ebpf.CollectionSpec, n uint32) error {
	if n > maxBackends {
		return errTooMany
	}
	var chunks, fds []uint32
	for uint32(len(s.loads))*loadChunk < n {
		m, err := ebpf.NewMap(spec.Maps[kernelMapLoads].InnerMap)
		if err != nil {
			return fmt.Errorf("map %s: %w", kernelMapLoads, err)
		}
		chunk := len(s.loads)
		s.loads = append(s.loads, m)
		if err := pinAnew(m, loadsPin(s.dir, chunk)); err != nil {
			return fmt.Errorf("map %s: %w", kernelMapLoads, err)
		}
		chunks, fds = append(chunks, uint32(chunk)), append(fds, uint32(m.FD()))
	}
	if len(chunks) == 0 {
		return nil
	}
	// All at once: the kernel waits for a grace period after each write to such a
	// map (kernel/bpf/syscall.c, maybe_wait_bpf_programs).
	if _, err := s.maps[kernelMapLoads].BatchUpdate(chunks, fds, nil); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapLoads, err)
	}
	return nil
}

// keepLoads takes over the arrays of another set, whose map loads this set has.
func (s *mapSet) keepLoads(from *mapSet) error {
	for i, m := range from.loads {
		c, err := m.Clone()
		if err != nil {
			return err
		}
		s.loads = append(s.loads, c)
		if err := pinAnew(c, loadsPin(s.dir, i)); err != nil {
			return fmt.Errorf("map %s: %w", kernelMapLoads, err)
		}
	}
	return nil
}

// isBusy reports whether a backend has connections.
func isBusy(l *kernelLoad) bool { return l.Inflight > 0 || l.Datagrams > 0 }

// readLoads returns the loads of all backends by index.
func (s *mapSet) readLoads() ([]kernelLoad, error) {
	all := make([]kernelLoad, 0, len(s.loads)*int(loadChunk))
	for _, m := range s.loads {
		chunk, err := dump[uint32, kernelLoad](m)
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", kernelMapLoads, err)
		}
		all = append(all, chunk.values...)
	}
	return all, nil
}

// readLoad returns the load of one backend.
func (s *mapSet) readLoad(index uint32) (kernelLoad, error) {
	var l kernelLoad
	if int(index/loadChunk) >= len(s.loads) {
		return l, fmt.Errorf("map %s: backend %d is not in it", kernelMapLoads, index)
	}
	return l, s.loads[index/loadChunk].Lookup(index%loadChunk, &l)
}

// clearLoads wipes the loads of backends to which nothing refers.
func (s *mapSet) clearLoads(indexes []uint32) error {
	byChunk := make(map[uint32]batch[uint32, kernelLoad])
	for _, i := range indexes {
		b := byChunk[i/loadChunk]
		b.add(i%loadChunk, kernelLoad{})
		byChunk[i/loadChunk] = b
	}
	for chunk, b := range byChunk {
		if int(chunk) >= len(s.loads) {
			continue
		}
		if _, err := s.loads[chunk].BatchUpdate(b.keys, b.values, nil); err != nil {
			return fmt.Errorf("map %s: %w", kernelMapLoads, err)
		}
	}
	return nil
}
