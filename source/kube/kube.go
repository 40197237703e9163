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
)

// Options say which node this is.
type Options struct {
	Node              string
	NodePortAddresses []netip.Prefix // empty: the addresses in the Node's status
	AllowExternalIPs  []netip.Prefix
}
