package controller

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/pentad/pentad/ipam"
)

// poolResource is the custom resource AddressPool; deploy/kubernetes/base/crd.yaml
// is its schema.
var poolResource = schema.GroupVersionResource{Group: "pentad.io", Version: "v1alpha1", Resource: "addresspools"}

// AddressPool is addresses that Services of type LoadBalancer get.
type AddressPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              AddressPoolSpec   `json:"spec"`
	Status            AddressPoolStatus `json:"status,omitzero"`
}

// AddressPoolSpec is what its author wants.
type AddressPoolSpec struct {
	Addresses         []string              `json:"addresses"`
	AutoAssign        *bool                 `json:"autoAssign,omitempty"` // nil: true
	AvoidBuggyIPs     bool                  `json:"avoidBuggyIPs,omitempty"`
	Priority          int                   `json:"priority,omitempty"`
	NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector,omitempty"`
	ServiceSelector   *metav1.LabelSelector `json:"serviceSelector,omitempty"`
}

// AddressPoolStatus is how it is used.
type AddressPoolStatus struct {
	Used       int                `json:"used"` // addresses that Services have
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

func readPool(o *unstructured.Unstructured) (*AddressPool, error) {
	p := &AddressPool{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, p); err != nil {
		return nil, fmt.Errorf("AddressPool %s: %w", o.GetName(), err)
	}
	return p, nil
}

// lookup finds the labels of a Service and of its namespace.
type lookup func(owner string) (service, namespace labels.Set)

// pool is the pool as ipam knows it. What is wrong with it is said, and what is
// right holds.
func (p *AddressPool) pool(find lookup) (ipam.Pool, []string) {
	out := ipam.Pool{
		Name: p.Name, Priority: p.Spec.Priority, Auto: p.Spec.AutoAssign == nil || *p.Spec.AutoAssign, AvoidEnds: p.Spec.AvoidBuggyIPs,
	}
	var problems []string
	for _, text := range p.Spec.Addresses {
		r, err := ipam.ParseRange(text)
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		out.Ranges = append(out.Ranges, r)
	}
	byNamespace, err1 := selector(p.Spec.NamespaceSelector)
	byService, err2 := selector(p.Spec.ServiceSelector)
	for _, err := range []error{err1, err2} {
		if err != nil {
			problems = append(problems, err.Error())
		}
	}
	if err1 != nil || err2 != nil {
		// Nobody, rather than everybody.
		byNamespace = labels.Nothing()
	}
	out.Admits = func(owner string) bool {
		service, namespace := find(owner)
		return byNamespace.Matches(namespace) && byService.Matches(service)
	}
	return out, problems
}

func selector(s *metav1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return labels.Everything(), nil
	}
	return metav1.LabelSelectorAsSelector(s)
}

// The condition of a pool.
const (
	conditionReady    = "Ready"
	reasonValid       = "Valid"
	reasonInvalid     = "Invalid"
	reasonOverlapping = "Overlapping"
)

// condition says whether a pool is what its author meant.
func (p *AddressPool) condition(problems []string, overlaps []ipam.Overlap) metav1.Condition {
	c := metav1.Condition{Type: conditionReady, Status: metav1.ConditionTrue, Reason: reasonValid, ObservedGeneration: p.Generation}
	for _, o := range overlaps {
		if o.A != p.Name && o.B != p.Name {
			continue
		}
		other := o.A
		if other == p.Name {
			other = o.B
		}
		c.Status, c.Reason = metav1.ConditionFalse, reasonOverlapping
		problems = append(problems, fmt.Sprintf("%s is in the pool %s, too: each address is given out once, by either; give the pools addresses of their own",
			o.Common, other))
	}
	if len(problems) > 0 && c.Reason == reasonValid {
		c.Status, c.Reason = metav1.ConditionFalse, reasonInvalid
	}
	slices.Sort(problems)
	c.Message = strings.Join(problems, "; ")
	return c
}

// The annotations by which a Service asks for what it has no field for.
const (
	// AnnotationAddresses asks for addresses, separated by commas.
	AnnotationAddresses = "pentad.io/addresses"
	// AnnotationPool asks for an address of a pool.
	AnnotationPool = "pentad.io/pool"
	// AnnotationShare names a key: Services with the same may have the same address.
	AnnotationShare = "pentad.io/share"
	// LoadBalancerClass is the loadBalancerClass of Services that are ours whatever
	// other controllers there are.
	LoadBalancerClass = "pentad.io/load-balancer"
)

// ours reports whether a Service gets its addresses here.
func (c *Controller) ours(s *corev1.Service) bool {
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return false
	}
	// One that is being deleted has its address until it is gone: that is what its
	// finalizers wait for. But it gets no more.
	if s.DeletionTimestamp != nil && len(s.Status.LoadBalancer.Ingress) == 0 {
		return false
	}
	if s.Spec.LoadBalancerClass == nil {
		return !c.opts.RequireClass
	}
	return *s.Spec.LoadBalancerClass == LoadBalancerClass
}
