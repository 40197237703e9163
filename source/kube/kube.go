// Package kube is the source of a node of a Kubernetes cluster: it watches
// Services, EndpointSlices and the node's own Node, and emits the services as
// this node has to serve them.
//
// What Kubernetes promises is in the API's comments (k8s.io/api/core/v1,
// discovery/v1) and in the documentation of Services, "Virtual IPs and Service
// Proxies" and "EndpointSlices"; docs/kubernetes-checklist.md goes through it
// point by point. Nothing here touches the kernel, and an API server that is
// away is no reason to emit anything.
package kube

import (
	"net/netip"

	"github.com/pentad/pentad/service"
)

// Update is all that the cluster wants of this node.
type Update struct {
	Services []*service.Service // unchanged ones are the same pointers
	Checks   []Check            // sorted by port
	Problems []Problem          // sorted by object
	Guests   []netip.Prefix     // addresses of the pods of this node
	Reserved []netip.Prefix     // addresses that only Services have
	Leaving  bool               // the Node is being deleted or is about to be
	Unserved int                // ports of a protocol that pentad does not serve (SCTP)
}

// Check is a health check by which load balancers find out whether this node has
// endpoints of a Service with externalTrafficPolicy Local.
type Check struct {
	Port      uint16 // spec.healthCheckNodePort
	Namespace string
	Name      string
	// Ready endpoints on this node, of each family.
	Endpoints4, Endpoints6 int
}

// Problem is something in the cluster that makes no sense. It breaks nothing
// else.
type Problem struct {
	Object  string // "Service shop/web"
	Message string // what is wrong, what is done about it, and what to do
}

// Options say which node this is.
type Options struct {
	Node              string
	NodePortAddresses []netip.Prefix // empty: the addresses in the Node's status
	AllowExternalIPs  []netip.Prefix
}
