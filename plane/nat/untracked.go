package nat

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/ipam"
)

// Between untracked ranges only clients are tracked whose packets are translated. The
// kernel notes them by itself when they begin (rules.go). What is here notes those that
// had begun before the kernel did, and forgets those that have ended.

// noting commits a change. If it makes ranges untracked, the clients in these ranges
// whose packets are translated already are noted with it, and those that began
// meanwhile right after.
func (p *Plane) noting(k *kernel, c *change, commit func() error) error {
	ranges := rangesIn(c.add)
	if ranges == nil {
		return commit()
	}
	before, err := translatedClients(ranges)
	if err != nil {
		return err
	}
	c.add = append(c.add, before...)
	if err := commit(); err != nil {
		return err
	}
	after, err := translatedClients(ranges)
	if err != nil {
		return err
	}
	k.add(after)
	return p.flush(k)
}

// rangesIn returns the untracked ranges among elements.
func rangesIn(all []element) []ipam.Range {
	var ranges []ipam.Range
	for _, e := range all {
		if e.in.name == setUntracked {
			ranges = append(ranges, rangeOf(e.key))
		}
	}
	return ranges
}

// translatedClients returns, as elements, the clients in ranges that have connections
// whose destination is translated.
func translatedClients(ranges []ipam.Range) ([]element, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("conntrack: %w", err)
	}
	defer conn.Close()
	found := make(map[netip.Addr]bool)
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		ae := netlink.NewAttributeEncoder()
		ae.ByteOrder = binary.BigEndian
		// A kernel that does not look at these (before Linux 5.15) shows all.
		ae.Uint32(attrStatus, statusDNAT)
		ae.Uint32(attrStatusMask, statusDNAT)
		attributes, err := ae.Encode()
		if err != nil {
			return nil, fmt.Errorf("conntrack: %w", err)
		}
		messages, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: msgGet, Flags: netlink.Request | netlink.Dump},
			Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attributes...),
		})
		if err != nil {
			return nil, fmt.Errorf("conntrack: %w", err)
		}
		for _, m := range messages {
			client, translated, err := parseClient(m.Data)
			if err != nil {
				return nil, fmt.Errorf("conntrack: %w", err)
			}
			if _, in := ipam.Find(ranges, client); in && translated {
				found[client] = true
			}
		}
	}
	all := make([]element, 0, len(found))
	for a := range found {
		all = append(all, plainIn(setTracked)(a)...)
	}
	return all, nil
}

// parseClient returns who began a connection, and whether its destination is
// translated.
func parseClient(data []byte) (client netip.Addr, translated bool, err error) {
	ad, err := netlink.NewAttributeDecoder(data[len(header):])
	if err != nil {
		return client, false, err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case attrStatus:
			translated = ad.Uint32()&statusDNAT != 0
		case attrTupleOrig:
			ad.Nested(func(tuple *netlink.AttributeDecoder) error {
				for tuple.Next() {
					if tuple.Type() != attrTupleIP {
						continue
					}
					tuple.Nested(func(ip *netlink.AttributeDecoder) error {
						for ip.Next() {
							if ip.Type() == attrIPv4Src || ip.Type() == attrIPv6Src {
								client, _ = netip.AddrFromSlice(ip.Bytes())
							}
						}
						return nil
					})
				}
				return nil
			})
		}
	}
	return client, translated, ad.Err()
}

// reviewEvery is how often the clients that are tracked are looked through.
const reviewEvery = time.Minute

// review forgets the clients that had no translated connection at the last review and
// have begun none since.
//
// A client without one is waning first: its packets are tracked still, and when it
// begins a translated connection the kernel notes it anew. So whoever is waning has
// begun what conntrack shows now, or is noted.
func (p *Plane) review() error {
	ranges := p.untracked()
	if ranges == nil {
		return nil
	}
	k, err := dial()
	if err != nil {
		return err
	}
	defer k.close()
	tracked, err := k.of(setTracked)
	if err != nil {
		return err
	}
	waning, err := k.of(setWaning)
	if err != nil || len(tracked)+len(waning) == 0 {
		return err
	}
	// Conntrack may be large: changes must not wait until it is read. A table that is
	// made anew meanwhile has nobody to forget, and this fails.
	busy, err := translatedClients(ranges)
	if err != nil {
		return err
	}
	c := reviewed(tracked, waning, busy)
	if len(c.remove)+len(c.add) == 0 {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.commitAtOnce(k, &c, nil)
}

// untracked returns the ranges between which nothing is tracked now, if any.
func (p *Plane) untracked() []ipam.Range {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.applied == nil {
		return nil
	}
	return rangesIn(rangeElements(setUntracked, p.applied.Untracked))
}

// reviewed is what becomes of tracked and waning clients. It is pure.
func reviewed(tracked, waning, busy []element) change {
	var c change
	translated := make(map[element]bool, len(busy))
	for _, e := range busy {
		translated[e] = true
	}
	noted := make(map[element]bool, len(tracked))
	for _, e := range tracked {
		noted[e] = true
		if !translated[e] {
			c.remove = append(c.remove, e)
			c.add = append(c.add, e.as(setWaning))
		}
	}
	for _, e := range waning {
		e := e.as(setTracked)
		switch {
		case translated[e] && !noted[e]:
			c.remove = append(c.remove, e.as(setWaning))
			c.add = append(c.add, e)
		case translated[e] || !noted[e]:
			c.remove = append(c.remove, e.as(setWaning))
		}
	}
	return c
}

// as is the same address in another set.
func (e element) as(name setName) element {
	e.in.name = name
	return e
}
