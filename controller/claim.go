package controller

import (
	"cmp"
	"encoding/json"
	"fmt"
	"hash/fnv"
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
	have := meta.FindStatusCondition(s.Status.Conditions, conditionAllocated)
	c.Foreign = have == nil
	if granted, terms, ok := recorded(have); ok {
		c.Changed = terms != termsOf(s, c)
		if len(c.Current) == 0 {
			// Somebody has emptied the status: it is its own still.
			c.Current = granted
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

// What the condition of a Service that has addresses says, after what is wrong: "has
// ADDRESS and ADDRESS", and for those that may share them ", shared by KEY: PORTS".
const (
	recordHas    = "has "
	recordAnd    = " and "
	recordShared = ", shared by "
	recordApart  = "; " // after what is wrong
)

// recordOf is what a Service has, and on which terms.
func recordOf(addresses []netip.Addr, terms string) string {
	texts := make([]string, len(addresses))
	for i, a := range addresses {
		texts[i] = a.String()
	}
	return recordHas + strings.Join(texts, recordAnd) + terms
}

// termsOf is on which terms a Service shares what it has.
func termsOf(s *corev1.Service, c ipam.Claim) string {
	if c.Share == "" {
		return ""
	}
	var ports []string
	for _, p := range c.Ports {
		ports = append(ports, fmt.Sprintf("%s %d", p.Protocol, p.Port))
	}
	slices.Sort(ports)
	terms := recordShared + s.Annotations[AnnotationShare] + ": " + strings.Join(ports, ", ")
	if c.Share != s.Annotations[AnnotationShare] {
		h := fnv.New32a()
		h.Write([]byte(c.Share))
		terms += fmt.Sprintf(", with the pods %08x", h.Sum32())
	}
	return terms
}

// recorded reads a record.
func recorded(c *metav1.Condition) (addresses []netip.Addr, terms string, ok bool) {
	if c == nil || c.Status != metav1.ConditionTrue {
		return nil, "", false
	}
	text := c.Message
	if i := strings.LastIndex(text, recordApart+recordHas); i >= 0 {
		text = text[i+len(recordApart):]
	}
	text, ok = strings.CutPrefix(text, recordHas)
	if !ok {
		return nil, "", false
	}
	text, shared, sharing := strings.Cut(text, recordShared)
	if sharing {
		terms = recordShared + shared
	}
	for _, t := range strings.Split(text, recordAnd) {
		a, err := netip.ParseAddr(t)
		if err != nil {
			return nil, "", false
		}
		addresses = append(addresses, a)
	}
	return addresses, terms, true
}

// conditionAllocated is the condition of a Service that says what became of its wish.
const conditionAllocated = "pentad.io/AddressAllocated"

// desiredStatus returns the status that a Service shall have, and whether it has
// another.
func desiredStatus(s *corev1.Service, claim ipam.Claim, r ipam.Result) (corev1.ServiceStatus, bool) {
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
	switch {
	case len(r.Addresses) == 0:
		c.Status = metav1.ConditionFalse
	case r.Message == "":
		c.Message = recordOf(r.Addresses, termsOf(s, claim))
	default:
		c.Message += recordApart + recordOf(r.Addresses, termsOf(s, claim))
	}
	have := meta.FindStatusCondition(want.Conditions, conditionAllocated)
	if have != nil && have.Status == c.Status && have.Reason == c.Reason && have.Message == c.Message {
		return want, !same
	}
	c.LastTransitionTime = metav1.NewTime(time.Now().Truncate(time.Second))
	meta.SetStatusCondition(&want.Conditions, c)
	return want, true
}
