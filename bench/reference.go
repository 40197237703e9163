package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/service"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu" reference bpf/reference.bpf.c

// attachReference fills the reference's maps with the services and attaches one
// of its programs to the host's inside.
func attachReference(h *lab.Host, services []*service.Service, name string) (*ebpf.Program, func(), error) {
	var o referenceObjects
	if err := loadReferenceObjects(&o, nil); err != nil {
		return nil, nil, err
	}
	if err := fillReference(&o, services); err != nil {
		return nil, nil, err
	}
	root, err := host.CgroupRoot()
	if err != nil {
		return nil, nil, err
	}
	p := o.Connect4
	if name == "empty" {
		p = o.Empty
	}
	l, err := link.AttachCgroup(link.CgroupOptions{
		Path: filepath.Join(root, h.Scope()), Attach: ebpf.AttachCGroupInet4Connect, Program: p,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("reference: %w", err)
	}
	return p, func() { l.Close(); o.Close() }, nil
}

func fillReference(o *referenceObjects, services []*service.Service) error {
	var keys []referenceServiceKey
	var values []referenceServiceValue
	var ids []uint32
	var backends []referenceBackendValue
	for n, s := range services {
		for _, l := range s.Listeners {
			k := referenceServiceKey{Addr: word(l.Address.Addr()), Port: network(l.Address.Port()), Protocol: uint8(l.Protocol)}
			keys = append(keys, k)
			values = append(values, referenceServiceValue{Count: uint32(len(s.Backends)), Reverse: uint32(n)})
			for i, b := range s.Backends {
				id := uint32(len(ids) + 1)
				ids = append(ids, id)
				backends = append(backends, referenceBackendValue{
					Addr: word(b.Address.Addr()), Port: network(b.Address.Port()), Protocol: uint8(l.Protocol),
				})
				k.Slot = uint16(i + 1)
				keys = append(keys, k)
				values = append(values, referenceServiceValue{Backend: id, Reverse: uint32(n)})
			}
		}
	}
	if _, err := o.Services.BatchUpdate(keys, values, nil); err != nil {
		return fmt.Errorf("reference services: %w", err)
	}
	if _, err := o.Backends.BatchUpdate(ids, backends, nil); err != nil {
		return fmt.Errorf("reference backends: %w", err)
	}
	return nil
}

// word and network are an IPv4 address and a port as they lie on the wire.
func word(a netip.Addr) uint32 {
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

func network(p uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], p)
	return binary.NativeEndian.Uint16(b[:])
}
