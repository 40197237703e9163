// Package cni is the front of the CNI plugin (the specification, versions 0.3.1 to 1.1.0):
// it reads what a container runtime wants and says what it got. What is done stands in
// plane/pod/attach; neither the agent nor an API server is asked.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/pentad/pentad/plane/pod/attach"
)

// Versions are those of the specification that are spoken.
var Versions = version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0")

// Error codes: those of the specification, and of this plugin.
const (
	codeTryLater     = types.ErrTryAgainLater        // 11
	codeNotAvailable = 50                            // STATUS: no container can be added
	codeBadConfig    = types.ErrInvalidNetworkConfig // 7
	codeFailed       = types.ErrInternal
)

// maxTime bounds everything: a runtime waits longer, and repeats what failed.
const maxTime = 20 * time.Second

// conf is the configuration of the network.
type conf struct {
	types.NetConf
	Network string `json:"network"` // where the agent has written it
}

// Funcs are the verbs of the plugin.
var Funcs = skel.CNIFuncs{Add: add, Del: del, Check: check, GC: gc, Status: status}

func parse(stdin []byte) (conf, error) {
	c := conf{Network: attach.DefaultPath}
	if err := json.Unmarshal(stdin, &c); err != nil {
		return c, types.NewError(codeBadConfig, "the configuration of the network cannot be read", err.Error())
	}
	if err := version.ParsePrevResult(&c.NetConf); err != nil {
		return c, types.NewError(codeBadConfig, "prevResult cannot be read", err.Error())
	}
	return c, nil
}

func request(args *skel.CmdArgs, c conf) (attach.Request, error) {
	r := attach.Request{Container: args.ContainerID, IfName: args.IfName, Netns: args.Netns, Network: c.Name}
	var namespace, name string
	for _, part := range strings.Split(args.Args, ";") {
		key, value, _ := strings.Cut(part, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			namespace = value
		case "K8S_POD_NAME":
			name = value
		case "IP":
			a, err := netip.ParseAddr(value)
			if err != nil {
				return r, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS: IP=%s is no address", value), "")
			}
			r.Wanted = a.Unmap()
		}
	}
	if name != "" {
		r.Pod = namespace + "/" + name
	}
	return r, nil
}

func add(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	r, err := request(args, c)
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(context.Background(), maxTime)
	defer stop()
	n, done, err := attach.ReadLocked(ctx, c.Network)
	if err != nil {
		return types.NewError(codeTryLater, err.Error(), "")
	}
	defer done()
	a, err := attach.Attach(ctx, n, r)
	switch {
	case errors.Is(err, attach.ErrFull):
		remedy := "give this host another one: pods.blocks"
		if n.Claimed {
			remedy = "this host claims another one; `pentad status` says what holds it up"
		}
		return types.NewError(codeTryLater, err.Error(), fmt.Sprintf("they are %s; %s", blocks(n), remedy))
	case err != nil:
		return types.NewError(codeFailed, err.Error(), "")
	}
	result := &current.Result{CNIVersion: current.ImplementedSpecVersion}
	if c.PrevResult != nil {
		if result, err = current.NewResultFromResult(c.PrevResult); err != nil {
			return types.NewError(codeBadConfig, "prevResult cannot be read", err.Error())
		}
	}
	addTo(result, a, args.Netns)
	return types.PrintResult(result, c.CNIVersion)
}

func blocks(n attach.Network) string {
	var all []string
	for _, b := range n.Blocks {
		for _, p := range []netip.Prefix{b.V4, b.V6} {
			if p.IsValid() {
				all = append(all, p.String())
			}
		}
	}
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, ", ")
}

// addTo adds what a pod got to the result of plugins before.
func addTo(result *current.Result, a attach.Attachment, netns string) {
	result.Interfaces = append(result.Interfaces,
		&current.Interface{Name: a.Device, Mac: a.HostMAC.String(), Mtu: a.MTU},
		&current.Interface{Name: a.IfName, Mac: a.PodMAC.String(), Mtu: a.MTU, Sandbox: netns})
	inPod := len(result.Interfaces) - 1
	for _, x := range []struct{ address, gateway netip.Addr }{{a.V4, attach.Gateway4}, {a.V6, attach.Gateway6}} {
		if !x.address.IsValid() {
			continue
		}
		bits := x.address.BitLen()
		result.IPs = append(result.IPs, &current.IPConfig{
			Interface: &inPod, Gateway: x.gateway.AsSlice(), Address: net.IPNet{IP: x.address.AsSlice(), Mask: net.CIDRMask(bits, bits)},
		})
		result.Routes = append(result.Routes, &types.Route{Dst: net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}, GW: x.gateway.AsSlice()})
	}
}

// del always succeeds if there is nothing: the specification wants it.
func del(args *skel.CmdArgs) error {
	if err := attach.Detach(args.ContainerID, args.IfName, args.Netns); err != nil {
		return types.NewError(codeFailed, err.Error(), "")
	}
	return nil
}

func check(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	r, err := request(args, c)
	if err != nil {
		return err
	}
	if err := attach.Check(r); err != nil {
		return types.NewError(codeFailed, err.Error(), "")
	}
	return nil
}

// gc removes the devices of containers that the runtime does not know any more. Their
// network namespaces would have taken them along; one that somebody holds open has not.
func gc(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	if c.ValidAttachments == nil {
		return types.NewError(codeBadConfig, "GC without cni.dev/valid-attachments: nothing is removed", "")
	}
	valid := make(map[[2]string]bool)
	for _, a := range c.ValidAttachments {
		valid[[2]string{a.ContainerID, a.IfName}] = true
	}
	all, err := attach.List()
	if err != nil {
		return types.NewError(codeFailed, err.Error(), "")
	}
	var errs []error
	for _, a := range all {
		if a.Network == c.Name && !valid[[2]string{a.Container, a.IfName}] {
			errs = append(errs, attach.Detach(a.Container, a.IfName, ""))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return types.NewError(codeFailed, err.Error(), "")
	}
	return nil
}

// status says whether pods can be added. That all addresses are given is no fault of the
// network: a runtime that hears of one has its node drained of pods that are well.
func status(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	if _, err := attach.Read(c.Network); err != nil {
		return types.NewError(codeNotAvailable, err.Error(), "")
	}
	return nil
}
