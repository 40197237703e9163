package controller

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pentad/pentad/ipam"
)

// claimOf is what a Service wants. What it asks for and cannot be read is said.
func claimOf(s *corev1.Service) (ipam.Claim, string) {
	c := ipam.Claim{
		Owner: s.Namespace + "/" + s.Name, Created: s.CreationTimestamp.Time,
		Pool: s.Annotations[AnnotationPool], Share: shareKey(s),
		Optional: s.Spec.IPFamilyPolicy != nil && *s.Spec.IPFamilyPolicy == corev1.IPFamilyPolicyPreferDualStack,
	}
	for _, f := range s.Spec.IPFamilies {
		c.V4, c.V6 = c.V4 || f == corev1.IPv4Protocol, c.V6 || f == corev1.IPv6Protocol
	}
	for _, p := range s.Spec.Ports {
		c.Ports = append(c.Ports, ipam.Port{Protocol: string(p.Protocol), Port: uint16(p.Port)})
	}
	for _, in := range s.Status.LoadBalancer.Ingress {
		if a, err := netip.ParseAddr(in.IP); err == nil {
			c.Current = append(c.Current, a)
		}
	}
	asked := cmp.Or(s.Annotations[AnnotationAddresses], s.Spec.LoadBalancerIP)
	var problem string
	for _, text := range strings.Split(asked, ",") {
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		a, err := netip.ParseAddr(text)
		if err != nil {
			problem = fmt.Sprintf("%q is asked for and is no address; write one such as 192.0.2.10", text)
			// Neither what it asks for nor anything else: it has asked.
			a = netip.IPv6Unspecified()
		}
		c.Addresses = append(c.Addresses, a)
	}
	return c, problem
}

// shareKey is the key of a Service. Who shares an address shares the hosts that it
// leads to, so that those with the policy Local share among those with the same
// pods only.
func shareKey(s *corev1.Service) string {
	key := s.Annotations[AnnotationShare]
	if key == "" || s.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		return key
	}
	pods, err := json.Marshal(s.Spec.Selector) // of a map: sorted
	if err != nil {
		return ""
	}
	return key + " " + s.Namespace + " " + string(pods)
}

// conditionAllocated is the condition of a Service that says what became of its wish.
const conditionAllocated = "pentad.io/AddressAllocated"

// desiredStatus returns the status that a Service shall have, and whether it has
// another.
func desiredStatus(s *corev1.Service, r ipam.Result) (corev1.ServiceStatus, bool) {
	want := *s.Status.DeepCopy()
	var ingress []corev1.LoadBalancerIngress
	mode := corev1.LoadBalancerIPModeVIP
	for _, a := range r.Addresses {
		in := corev1.LoadBalancerIngress{IP: a.String(), IPMode: &mode}
		// Others may have noted more about an address that stays.
		for _, have := range s.Status.LoadBalancer.Ingress {
			if have.IP == in.IP {
				in = have
			}
		}
		ingress = append(ingress, in)
	}
	same := slices.EqualFunc(s.Status.LoadBalancer.Ingress, ingress, func(a, b corev1.LoadBalancerIngress) bool { return a.IP == b.IP })
	if !same {
		want.LoadBalancer.Ingress = ingress
	}
	c := metav1.Condition{
		Type: conditionAllocated, Status: metav1.ConditionTrue, Reason: string(r.Reason), Message: r.Message, ObservedGeneration: s.Generation,
	}
	if len(r.Addresses) == 0 {
		c.Status = metav1.ConditionFalse
	}
	have := meta.FindStatusCondition(want.Conditions, conditionAllocated)
	if have != nil && have.Status == c.Status && have.Reason == c.Reason && have.Message == c.Message {
		return want, !same
	}
	c.LastTransitionTime = metav1.NewTime(time.Now().Truncate(time.Second))
	meta.SetStatusCondition(&want.Conditions, c)
	return want, true
}
