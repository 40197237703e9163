package l2

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// etherType is that of what announcers say to each other: the first that is for local
// experiments (IEEE 802, clause 9.2.4). It never passes a router.
const etherType = 0x88b5

// id tells one run of an agent from all others.
type id [16]byte

// key is a VIP in messages: the beginning of its hash.
type key uint64

// claim is what an announcer says of a VIP.
type claim uint8

const (
	capable claim = 1 // it could have it: a backend is usable
	owner   claim = 2 // it has it
)

// message is a part of what an announcer says: that it is there, and of some VIPs, what
// it claims. All parts of a version are the whole.
type message struct {
	group    uint64
	sender   id
	nonce    uint64 // of the sender; whoever answers with it has heard this run of it
	sequence uint64 // grows with each message of a sender
	priority uint8
	leaving  bool     // it gives up all that it has
	name     string   // of its host
	heard    []uint64 // nonces of those whom it hears
	version  uint32
	part     uint16 // of parts, from 0
	parts    uint16
	claims   []claimed
}

type claimed struct {
	key   key
	claim claim
}

// Sizes, in bytes. A message fits into a frame of 1,500.
const (
	headSize   = 4 + 8 + 16 + 8 + 8 + 1 + 1 + 1 + 1 + 4 + 2 + 2 + 2
	claimSize  = 9
	macSize    = 16
	maxName    = 64
	maxMembers = 32
	maxClaims  = (1440 - headSize - maxName - 8*maxMembers - macSize) / claimSize
)

var magic = [4]byte{'p', 'n', 'l', 1}

var errMalformed = errors.New("no message of an announcer")

// append writes a message behind b and signs it.
func (m message) append(b, secret []byte) []byte {
	start := len(b)
	leaving := byte(0)
	if m.leaving {
		leaving = 1
	}
	b = append(b, magic[:]...)
	b = binary.BigEndian.AppendUint64(b, m.group)
	b = append(b, m.sender[:]...)
	b = binary.BigEndian.AppendUint64(b, m.nonce)
	b = binary.BigEndian.AppendUint64(b, m.sequence)
	b = append(b, m.priority, leaving, byte(len(m.name)), byte(len(m.heard)))
	b = binary.BigEndian.AppendUint32(b, m.version)
	b = binary.BigEndian.AppendUint16(b, m.part)
	b = binary.BigEndian.AppendUint16(b, m.parts)
	b = binary.BigEndian.AppendUint16(b, uint16(len(m.claims)))
	b = append(b, m.name...)
	for _, n := range m.heard {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	for _, c := range m.claims {
		b = append(binary.BigEndian.AppendUint64(b, uint64(c.key)), byte(c.claim))
	}
	return append(b, sign(b[start:], secret)...)
}

func sign(b, secret []byte) []byte {
	h := hmac.New(sha256.New, secret)
	h.Write(b)
	return h.Sum(nil)[:macSize]
}

// parse reads a message that was signed with the secret. What follows it is padding.
func parse(b, secret []byte) (m message, err error) {
	if len(b) < headSize+macSize || [4]byte(b) != magic {
		return m, errMalformed
	}
	h := b[4:]
	m.group, m.sender = binary.BigEndian.Uint64(h), id(h[8:])
	m.nonce, m.sequence = binary.BigEndian.Uint64(h[24:]), binary.BigEndian.Uint64(h[32:])
	m.priority, m.leaving = h[40], h[41] == 1
	names, heard := int(h[42]), int(h[43])
	m.version, m.part, m.parts = binary.BigEndian.Uint32(h[44:]), binary.BigEndian.Uint16(h[48:]), binary.BigEndian.Uint16(h[50:])
	claims := int(binary.BigEndian.Uint16(h[52:]))
	size := headSize + names + 8*heard + claimSize*claims
	if len(b) < size+macSize || m.part >= m.parts || names > maxName || heard > maxMembers || claims > maxClaims {
		return m, errMalformed
	}
	if !hmac.Equal(sign(b[:size], secret), b[size:size+macSize]) {
		return m, fmt.Errorf("%w: it is signed with another key", errMalformed)
	}
	rest := b[headSize:]
	m.name, rest = string(rest[:names]), rest[names:]
	for range heard {
		m.heard, rest = append(m.heard, binary.BigEndian.Uint64(rest)), rest[8:]
	}
	for range claims {
		m.claims, rest = append(m.claims, claimed{key(binary.BigEndian.Uint64(rest)), claim(rest[8])}), rest[claimSize:]
	}
	return m, nil
}
