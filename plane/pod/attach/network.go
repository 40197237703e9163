package attach

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// DefaultPath is where the agent writes the network for plugins.
const DefaultPath = "/run/pentad/pods.json"

// Network is what a plugin has to know, as the agent has written it last.
type Network struct {
	Blocks []Block `json:"blocks"` // of this host, used in their order
	MTU    int     `json:"mtu"`
	// Closed are blocks of this host of which no more addresses are given, each with
	// the mark of the decision.
	Closed map[netip.Prefix]string `json:"closed,omitempty"`
	// Claimed says that the blocks are claimed as they are needed: one more is on its
	// way when they are full.
	Claimed bool `json:"claimed,omitempty"`
}

// Block is addresses that this host alone gives to pods. The n-th of both families go
// together; the first belongs to nobody.
type Block struct {
	V4 netip.Prefix `json:"v4,omitzero"`
	V6 netip.Prefix `json:"v6,omitzero"`
}

// ErrNoNetwork says that no agent has written a network yet.
var ErrNoNetwork = errors.New("this host has no pod network: its agent has not run with a section \"pods\" since it was started")

// Read reads the network that was written last.
func Read(path string) (Network, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Network{}, ErrNoNetwork
	}
	var n Network
	if err == nil {
		err = json.Unmarshal(b, &n)
	}
	if err != nil {
		return Network{}, fmt.Errorf("the pod network in %s cannot be read: %w", path, err)
	}
	return n, nil
}

// Write makes a network the one that plugins use from now on.
func (n Network) Write(path string) error {
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	next := path + ".next"
	if err := os.WriteFile(next, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// Forget has plugins add no more pods.
func Forget(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// slot is one place of a block.
type slot struct{ v4, v6 netip.Addr }

// DevicePrefix is how the names of all host ends begin.
const DevicePrefix = "pd"

// device is the name of the host's end: it is the reservation of the address. That of an
// IPv6 address alone has the beginning of its hash.
func (s slot) device() string {
	if s.v4.IsValid() {
		b := s.v4.As4()
		return DevicePrefix + hex.EncodeToString(b[:])
	}
	b := s.v6.As16()
	sum := sha256.Sum256(b[:])
	return DevicePrefix + "6" + hex.EncodeToString(sum[:6])
}

// mac is the link-layer address of the pod's end, a function of its address.
func (s slot) mac() net.HardwareAddr {
	if s.v4.IsValid() {
		b := s.v4.As4()
		return append(net.HardwareAddr{0x0a, 0x58}, b[:]...)
	}
	b := s.v6.As16()
	return append(net.HardwareAddr{0x0a, 0x59}, b[12:]...)
}

// slots returns all places of the network, each block from a place drawn by lot: an
// address is not given again at once. With a valid address it is that one alone.
func (n Network) slots(wanted netip.Addr) iter.Seq[slot] {
	return func(yield func(slot) bool) {
		for _, b := range n.Blocks {
			size := b.size()
			start := rand.IntN(max(1, size-1))
			for i := range size - 1 {
				s := b.slot(1 + (start+i)%(size-1))
				if wanted.IsValid() && s.v4 != wanted && s.v6 != wanted {
					continue
				}
				if !yield(s) {
					return
				}
			}
		}
	}
}

// Free returns how many pods still find an address, beside those that are there.
func (n Network) Free(there []Attachment) (free int) {
	for _, b := range n.Blocks {
		free += b.size() - 1
		for _, a := range there {
			if b.V4.IsValid() && b.V4.Contains(a.V4) || b.V6.IsValid() && b.V6.Contains(a.V6) {
				free--
			}
		}
	}
	return free
}

// maxBlock is how many places of a block are used at most.
const maxBlock = 1 << 16

func (b Block) size() int {
	bits := 16
	for _, p := range []netip.Prefix{b.V4, b.V6} {
		if p.IsValid() {
			bits = min(bits, p.Addr().BitLen()-p.Bits())
		}
	}
	return min(maxBlock, 1<<bits)
}

func (b Block) slot(i int) (s slot) {
	if b.V4.IsValid() {
		s.v4 = nth(b.V4, i)
	}
	if b.V6.IsValid() {
		s.v6 = nth(b.V6, i)
	}
	return s
}

// nth returns the n-th address of a prefix, which has at least as many.
func nth(p netip.Prefix, n int) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	low := b[len(b)-4:]
	binary.BigEndian.PutUint32(low, binary.BigEndian.Uint32(low)+uint32(n))
	a, _ := netip.AddrFromSlice(b)
	return a
}

// maxDumps is how often devices are listed again, because some came or went meanwhile.
const maxDumps = 100

// Links returns all devices of this host.
func Links() ([]netlink.Link, error) {
	for range maxDumps {
		links, err := netlink.LinkList()
		if err == nil {
			return links, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("devices cannot be listed: %w", err)
		}
	}
	return nil, errors.New("devices cannot be listed: they come and go all the time")
}

// usedNames returns the names of all host ends.
func usedNames() (map[string]bool, error) {
	links, err := Links()
	if err != nil {
		return nil, err
	}
	used := make(map[string]bool)
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, DevicePrefix) {
			used[l.Attrs().Name] = true
		}
	}
	return used, nil
}

// List returns the devices that pods of this host have, as they say themselves.
func List() ([]Attachment, error) {
	links, err := Links()
	if err != nil {
		return nil, err
	}
	var all []Attachment
	for _, l := range links {
		a, ok := parseAlias(l.Attrs().Alias)
		if !ok || !isOurs(l) {
			continue
		}
		x := l.Attrs()
		a.Device, a.Index, a.MTU, a.HostMAC = x.Name, x.Index, x.MTU, x.HardwareAddr
		all = append(all, a)
	}
	return all, nil
}
