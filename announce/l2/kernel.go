package l2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/pins"
)

// planeDir is the directory of pins of this plane. The maps have a number in the name:
// those of another layout are another agent's.
const planeDir = "l2"

const (
	mapsDir  = "maps-1"
	linksDir = "links"
	maxVIPs  = 16384 // MAX_VIPS of bpf/l2.bpf.c
)

var mapNames = []string{kernelMapVips, kernelMapLeases, kernelMapDevices, kernelMapHeard, kernelMapAnswers}

// forEver is a lease that does not end.
const forEver = math.MaxUint64

// kernel is the maps, and what is in them.
type kernel struct {
	dir     string
	maps    map[string]*ebpf.Map
	vips    map[netip.Addr]bool // owned, or not
	devices map[uint32]kernelDevice
}

// openKernel opens the pinned maps, or makes them, and reads what is in them.
func openKernel(dir string) (*kernel, error) {
	spec, err := loadKernel()
	if err != nil {
		return nil, err
	}
	k := &kernel{dir: dir, maps: make(map[string]*ebpf.Map), vips: make(map[netip.Addr]bool), devices: make(map[uint32]kernelDevice)}
	for _, d := range []string{mapsDir, linksDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	for _, name := range mapNames {
		if k.maps[name], err = pins.OpenOrMake(filepath.Join(dir, mapsDir, name), spec.Maps[name]); err != nil {
			k.close()
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
	}
	if err := k.read(); err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

func (k *kernel) close() {
	for _, m := range k.maps {
		m.Close()
	}
}

func (k *kernel) read() error {
	var key kernelAddress
	var vip kernelVip
	all := k.maps[kernelMapVips].Iterate()
	for all.Next(&key, &vip) {
		k.vips[addressOf(key)] = vip.Owned != 0
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("map %s: %w", kernelMapVips, err)
	}
	var index uint32
	var device kernelDevice
	all = k.maps[kernelMapDevices].Iterate()
	for all.Next(&index, &device) {
		k.devices[index] = device
	}
	return all.Err()
}

// attach has interfaces run a new program, and others none. What the program answers
// with is written before.
func (k *kernel) attach(there map[string]pins.Interface) error {
	spec, err := loadKernel()
	if err != nil {
		return err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: k.maps})
	if err != nil {
		return fmt.Errorf("the kernel does not take the program: %w", err)
	}
	defer coll.Close()
	var keep []uint32
	for name, i := range there {
		if err := k.setDevice(i); err != nil {
			return fmt.Errorf("interface %s: %w", name, err)
		}
		// Before a director, for which a question to a VIP is one more packet to it.
		if err := pins.AttachInterface(filepath.Join(k.dir, linksDir), i.Index, coll.Programs[kernelProgNeighbours], true); err != nil {
			return fmt.Errorf("interface %s: %w", name, err)
		}
		keep = append(keep, i.Index)
	}
	errs := []error{pins.DetachOthers(filepath.Join(k.dir, linksDir), keep)}
	for index := range k.devices {
		if !slices.Contains(keep, index) {
			errs = append(errs, k.dropDevice(index))
		}
	}
	return errors.Join(errs...)
}

func (k *kernel) setDevice(i pins.Interface) error {
	d := kernelDevice{Mac: i.MAC}
	if err := k.maps[kernelMapDevices].Put(i.Index, d); err != nil {
		return err
	}
	k.devices[i.Index] = d
	for vip := range k.vips {
		if err := joinGroup(i.Index, vip); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) dropDevice(index uint32) error {
	var errs []error
	for vip := range k.vips {
		errs = append(errs, leaveGroup(index, vip))
	}
	if err := k.maps[kernelMapDevices].Delete(index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		errs = append(errs, err)
	}
	delete(k.devices, index)
	return errors.Join(errs...)
}

// areAttached reports whether just these interfaces have the program and answer with the
// address that they have.
func (k *kernel) areAttached(there map[string]pins.Interface) bool {
	if len(there) != len(k.devices) {
		return false
	}
	for _, i := range there {
		if k.devices[i.Index].Mac != i.MAC || !pins.IsAttached(filepath.Join(k.dir, linksDir), i.Index) {
			return false
		}
	}
	for _, name := range mapNames {
		if _, err := os.Stat(filepath.Join(k.dir, mapsDir, name)); err != nil {
			return false
		}
	}
	return true
}

// join has all interfaces take questions for all VIPs.
func (k *kernel) join() error {
	var errs []error
	for index := range k.devices {
		for vip := range k.vips {
			errs = append(errs, joinGroup(index, vip))
		}
	}
	return errors.Join(errs...)
}

// areJoined reports whether they do.
func (k *kernel) areJoined() bool {
	for index := range k.devices {
		if !areJoined(index, k.vips) {
			return false
		}
	}
	return true
}

// set makes the VIPs in the kernel just these, owned or not.
func (k *kernel) set(vips map[netip.Addr]bool) error {
	var errs []error
	for vip := range k.vips {
		if _, ok := vips[vip]; !ok {
			errs = append(errs, k.drop(vip))
		}
	}
	for vip, owned := range vips {
		was, there := k.vips[vip]
		if there && was == owned {
			continue
		}
		if !there {
			for index := range k.devices {
				errs = append(errs, joinGroup(index, vip))
			}
		}
		errs = append(errs, k.setOwned(vip, owned))
	}
	return errors.Join(errs...)
}

func (k *kernel) setOwned(vip netip.Addr, owned bool) error {
	v := kernelVip{}
	if owned {
		v.Owned = 1
	}
	if err := k.maps[kernelMapVips].Put(keyOf(vip), v); err != nil {
		if errors.Is(err, unix.E2BIG) {
			return fmt.Errorf("%s: more VIPs than the %d that can be announced on a segment", vip, maxVIPs)
		}
		return fmt.Errorf("%s: %w", vip, err)
	}
	k.vips[vip] = owned
	return nil
}

func (k *kernel) drop(vip netip.Addr) error {
	if err := k.maps[kernelMapVips].Delete(keyOf(vip)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	delete(k.vips, vip)
	var errs []error
	for index := range k.devices {
		errs = append(errs, leaveGroup(index, vip))
	}
	return errors.Join(errs...)
}

// setLease says until when this host has what it owns: for ever, or for a time from now.
func (k *kernel) setLease(lasts time.Duration, always bool) error {
	until := uint64(forEver)
	if !always {
		until = bootTime() + uint64(lasts)
	}
	return k.maps[kernelMapLeases].Put(uint32(0), kernelLease{Until: until})
}

// lasts reports whether what an earlier agent owned is still this host's.
func (k *kernel) lasts() bool {
	var l kernelLease
	err := k.maps[kernelMapLeases].Lookup(uint32(0), &l)
	return err == nil && l.Until > bootTime()
}

// claim is somebody else's.
type foreignClaim struct {
	at  uint64 // ns since boot
	mac net.HardwareAddr
}

// claimOf returns who else has said last that he has a VIP; false: nobody.
func (k *kernel) claimOf(vip netip.Addr) (foreignClaim, bool) {
	var c kernelClaim
	if err := k.maps[kernelMapHeard].Lookup(keyOf(vip), &c); err != nil {
		return foreignClaim{}, false
	}
	return foreignClaim{c.At, slices.Clone(c.Mac[:])}, true
}

// answers returns how many questions were answered, by ARP and NDP.
func (k *kernel) answers() (counts [2]uint64, err error) {
	for i := range counts {
		var each []uint64
		if err := k.maps[kernelMapAnswers].Lookup(uint32(i), &each); err != nil {
			return counts, err
		}
		for _, n := range each {
			counts[i] += n
		}
	}
	return counts, nil
}

// bootTime is in ns since boot, as the kernel's programs have it.
func bootTime() uint64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0 // there is no kernel without it
	}
	return uint64(t.Nano())
}

func keyOf(a netip.Addr) (k kernelAddress) {
	b := a.As16()
	for i := range k.Word {
		k.Word[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return k
}

func addressOf(k kernelAddress) netip.Addr {
	var b [16]byte
	for i, w := range k.Word {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

// Remove takes everything out of the kernel, whoever put it there.
func Remove(pinDir string) error {
	dir := filepath.Join(pinDir, planeDir)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{pins.DetachOthers(filepath.Join(dir, linksDir), nil)}
	// Without the maps nobody knows which groups were joined.
	if k, err := openKernel(dir); err == nil {
		for _, index := range slices.Collect(maps.Keys(k.devices)) {
			errs = append(errs, k.dropDevice(index))
		}
		k.close()
	}
	all, err := os.ReadDir(dir)
	errs = append(errs, err)
	for _, d := range all {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, d.Name())))
	}
	return errors.Join(errs...)
}
