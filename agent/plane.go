package agent

import (
	"context"

	"github.com/pentad/pentad/service"
)

// plane owns one kind of kernel object and makes the kernel look like a snapshot. It
// knows no other plane and no source.
type plane interface {
	// Apply makes the kernel look like the snapshot, whatever it was before. It may be
	// called again after any error.
	Apply(context.Context, *service.Snapshot) error
	// Intact reports whether what Apply made is still there. It is cheap.
	Intact() bool
	// Distrust makes the next Apply read the kernel instead of remembering it.
	Distrust()
	// Run does the plane's own chores until the context ends. No walk over processes,
	// network namespaces or sockets holds a lock that Apply waits for.
	Run(context.Context)
}
