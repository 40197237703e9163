package agent

import "context"

// plane owns one kind of thing, in the kernel or served to others, and makes it look
// like a want: a value that says what this plane needs to be told, and nothing more. It
// knows no other plane and no source.
type plane[W any] interface {
	// Apply makes it look like the want, whatever it was before. It may be called
	// again after any error.
	Apply(context.Context, W) error
	// Intact reports whether what Apply made is still there. It is cheap.
	Intact() bool
	// Distrust makes the next Apply read the kernel instead of remembering it.
	Distrust()
	// Run does the plane's own chores until the context ends. No walk over processes,
	// network namespaces or sockets holds a lock that Apply waits for.
	Run(context.Context)
	// Close lets go of the plane after Run has ended. What is in the kernel stays.
	Close()
}

// want is what a plane is told. It is immutable.
type want[W any] interface {
	// Equal reports whether the plane need not be called for it.
	Equal(W) bool
}

// warner is a plane that has something to say to people though nothing failed.
type warner interface{ Warnings() []string }

// withdrawer is a plane that has told others something that outlives it.
type withdrawer interface {
	// Withdraw takes it back, before Close.
	Withdraw()
}
