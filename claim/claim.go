// Package claim gives hosts blocks of addresses for their pods, so that no address is
// ever two hosts'. Each block that is somebody's is one object of a store, and the name
// of the object is the prefix: two owners of one cannot be expressed. A host claims a
// block by making the object, which fails if there is one, and that write is the whole
// claim. Only the owner gives a block back, after its last address is free and when
// nobody gives any of it any more.
//
// What a host does next is decided by Holder, which is pure; Run is where it is done.
// Stores are folders.
package claim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/pentad/pentad/ipam"
)

// Owner is a host. A machine that was installed anew under an old name is another one:
// what the old one had may still be in use.
type Owner struct {
	Name    string
	Machine string // MachineID
}

// Block is a block that has an owner: one object of a store.
type Block struct {
	ipam.Block
	Owner     Owner
	Addresses []netip.Addr // by which other hosts reach the owner, one of a family
	Draining  bool         // no more addresses of it are given; it will be free
	Epoch     uint64       // how often the owner has confirmed that it is there
	// Incarnation is the start of the owner that wrote it last. Two that live at the same
	// time are two machines, one of which is a copy of the other.
	Incarnation string

	ID       string // of the object: it never comes again
	Revision string // of the object's last write
}

// Equal reports whether both say the same, whatever their revisions are.
func (b Block) Equal(o Block) bool {
	return b.Block == o.Block && b.Owner == o.Owner && slices.Equal(b.Addresses, o.Addresses) && b.Draining == o.Draining && b.Epoch == o.Epoch && b.Incarnation == o.Incarnation && b.ID == o.ID
}

// Errors of stores.
var (
	// ErrTaken says that somebody has the block already.
	ErrTaken = errors.New("somebody has this block")
	// ErrChanged says that the object is not as it was read, or is gone.
	ErrChanged = errors.New("the block was changed meanwhile")
)

// Table is what a store has at one moment: blocks by their names.
type Table struct {
	Blocks map[netip.Prefix]Block
	// Problems are objects that make no sense. They are nobody's blocks, and their
	// names are taken all the same.
	Problems []string
	Bad      map[string]bool // their keys
	// Fresh says that nothing is older than the moment in which it was asked for. It
	// is so of the first table after any interruption.
	Fresh bool
}

// Of returns the blocks of a host by their names.
func (t Table) Of(o Owner) (all []Block) {
	for _, b := range t.Blocks {
		if b.Owner == o {
			all = append(all, b)
		}
	}
	slices.SortFunc(all, byName)
	return all
}

func byName(a, b Block) int { return a.Name().Compare(b.Name()) }

// Store is where blocks lie. All writes are atomic, and each is there for whoever reads
// afterwards.
type Store interface {
	// Create makes the object. ErrTaken: there is one of the name.
	Create(context.Context, Block) error
	// Update writes an object that is at the revision that the block has. Else it is
	// ErrChanged.
	Update(context.Context, Block) error
	// Delete removes an object that is at the revision that the block has. Else it is
	// ErrChanged.
	Delete(context.Context, Block) error
	// Follow emits what there is, and again after each change, until the context ends
	// or the store does not answer: then it returns why. The first table that it emits
	// is Fresh, and no later one is older than one before.
	Follow(ctx context.Context, emit func(Table)) error
}

// MachineID returns what tells machines of one name apart: of /etc/machine-id, which is
// not to be told to others (machine-id(5)). Empty: this one has none.
func MachineID() string {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil || len(strings.TrimSpace(string(id))) == 0 {
		return ""
	}
	return HashMachineID(strings.TrimSpace(string(id)))
}

// HashMachineID makes it of the machine's own id.
func HashMachineID(id string) string {
	sum := sha256.Sum256([]byte("pentad " + id))
	return hex.EncodeToString(sum[:8])
}
