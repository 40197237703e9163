package view

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/plane/pod/attach"
)

// Pod is one device of a pod, as the kernel has it.
type Pod struct {
	Pod       string       `json:"pod"` // namespace/name; empty: not known
	Container string       `json:"container"`
	IfName    string       `json:"ifname"`
	Addresses []netip.Addr `json:"addresses"`
	Device    string       `json:"device"` // the host's end
	MTU       int          `json:"mtu"`
}

// ReadPods returns the pods of this host by their first address. There need be no agent.
func ReadPods() ([]Pod, error) {
	all, err := attach.List()
	if err != nil {
		return nil, err
	}
	pods := []Pod{}
	for _, a := range all {
		p := Pod{Pod: strings.TrimPrefix(a.Pod, "-"), Container: a.Container, IfName: a.IfName, Device: a.Device, MTU: a.MTU, Addresses: []netip.Addr{}}
		for _, x := range []netip.Addr{a.V4, a.V6} {
			if x.IsValid() {
				p.Addresses = append(p.Addresses, x)
			}
		}
		pods = append(pods, p)
	}
	slices.SortFunc(pods, func(a, b Pod) int { return slices.CompareFunc(a.Addresses, b.Addresses, netip.Addr.Compare) })
	return pods, nil
}
