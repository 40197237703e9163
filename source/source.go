// Package source holds what every source of desired state emits. A source knows one
// place where services come from, nothing of the kernel, and nothing of other sources:
// it emits all that it knows each time that this changes, and what the host does about
// it is for the agent to say.
package source

import (
	"net/netip"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
)

// Update is all that one source knows at one moment. It is immutable.
type Update struct {
	From service.Source
	// Err is why the newest state of the source is not in force. Nothing else is set
	// then, and what it said before goes on.
	Err error

	Services []*service.Service // unchanged ones are the same pointers
	Problems []Problem          // sorted by object

	// Digest is the same for all hosts that were told the same by a fleet; of other
	// sources it is empty.
	Digest string

	// Config is the file, whose other sections are for the agent. Other sources
	// have none.
	Config *config.Config
	Text   *config.Text // that Config was read from

	// Node is what a cluster says of this host beside its services.
	Node
}

// Node is what a cluster says of one of its nodes.
type Node struct {
	Checks   []Check        // sorted by port
	Pods     []netip.Prefix // addresses of the pods of this node
	Reserved []netip.Prefix // addresses that only Services have
	Leaving  bool           // the Node is being deleted or is about to be
	Unserved int            // ports of a protocol that pentad does not serve (SCTP)
}

// Check is a health check by which load balancers find out whether this node has
// endpoints of a Service with externalTrafficPolicy Local.
type Check struct {
	Port      uint16 // spec.healthCheckNodePort
	Namespace string
	Name      string
	// Ready endpoints on this node, of each family: a load balancer that asks by
	// IPv6 sends IPv6.
	Endpoints4, Endpoints6 int
}

// Problem is an object that makes no sense. It breaks nothing else.
type Problem struct {
	Object  string // "Service shop/web"
	Message string // what is wrong, what is done about it, and what to do
}
