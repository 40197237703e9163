package socket

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"

	"github.com/pentad/pentad/host"
)

// Feature is something that the plane needs from the kernel.
type Feature struct {
	Name   string
	Since  string // the first kernel that has it
	Needed string // what for
	probe  func() error
}

// Features lists what the plane needs, checked by trying, not by version.
var Features = []Feature{
	{"cgroup/sock_addr programs", "4.17", "translation in connect()",
		func() error { return features.HaveProgramType(ebpf.CGroupSockAddr) }},
	{"bpf_sk_storage_get in cgroup/sock_addr", "5.2", "names of unconnected UDP sockets",
		func() error { return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSkStorageGet) }},
	{"bpf_get_netns_cookie in cgroup/sock_addr", "5.7", "affinity and source-hash",
		func() error { return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie) }},
	{"bpf_get_socket_cookie in cgroup/sock", "5.8", "forgetting closed sockets",
		func() error { return features.HaveProgramHelper(ebpf.CGroupSock, asm.FnGetSocketCookie) }},
	{"bpf_get_netns_cookie in cgroup/sock", "5.7", "ports of the host that are held for services",
		func() error { return features.HaveProgramHelper(ebpf.CGroupSock, asm.FnGetNetnsCookie) }},
	{"cgroup/sock_ops programs", "4.13", "the outcome of connects",
		func() error { return features.HaveProgramType(ebpf.SockOps) }},
	{"bpf_skc_to_tcp_sock in sock_ops", "5.9", "why a connect failed, and latencies",
		func() error { return features.HaveProgramHelper(ebpf.SockOps, asm.FnSkcToTcpSock) }},
	{"bpf_for_each_map_elem", "5.13", "counting back sockets that are no more",
		func() error { return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnForEachMapElem) }},
	{"bpf_loop", "5.17", "looking at a failover group as a whole",
		func() error { return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnLoop) }},
	{"bpf_ktime_get_coarse_ns", "5.11", "affinity time-out",
		func() error { return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnKtimeGetCoarseNs) }},
	{"atomic compare-and-exchange in BPF", "5.12", "remembering sockets without a lock", features.HaveV3ISA},
	{"bpf_set_retval in cgroup programs", "5.18", "refusing a connection at once",
		func() error { return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval) }},
	{"BPF type information of the kernel", "5.2", "maps with a spin lock", haveBTF},
}

// haveSockDestroy reports whether the kernel can close a socket from within an
// iterator (Linux 6.5).
var haveSockDestroy = sync.OnceValue(func() bool {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return false
	}
	var f *btf.Func
	return spec.TypeByName("bpf_sock_destroy", &f) == nil
})

func haveBTF() error {
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		return ebpf.ErrNotSupported
	}
	return nil
}

// Check tries the feature: nil, ebpf.ErrNotSupported, or another error when the
// kernel would not say.
func (f Feature) Check() error { return f.probe() }

// CheckHost returns what keeps the plane from working on this host: missing
// capabilities first, because without them features cannot be tried.
func CheckHost() error {
	if missing := host.MissingCapabilities(); len(missing) > 0 {
		return fmt.Errorf("missing %s; run as root or give the process these capabilities",
			strings.Join(missing, " and "))
	}
	return checkFeatures(Features)
}

func checkFeatures(needed []Feature) error {
	var errs []error
	for _, f := range needed {
		if err := f.Check(); errors.Is(err, ebpf.ErrNotSupported) {
			errs = append(errs, fmt.Errorf("this kernel lacks %s (%s): Linux %s or newer has it", f.Name, f.Needed, f.Since))
		}
	}
	return errors.Join(errs...)
}
