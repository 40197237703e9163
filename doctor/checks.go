package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// checks are all that is looked for, each a function of facts.
var checks = []func(*Facts) []Finding{
	checkConfig, checkCgroups, checkKernel, checkPrograms, checkKubeProxy, checkForwarding, checkFirewall, checkRealServer,
	checkReversePath, checkBridge, checkConntrack, checkPorts, checkFiles, checkManagers, checkInterfaces, checkClock,
}

func one(f Finding) []Finding { return []Finding{f} }

func checkConfig(f *Facts) (all []Finding) {
	for _, text := range f.ConfigErrors {
		all = append(all, Finding{Severity: Fault, Code: "config", What: text, Why: "the file is not put in force; what was in force stays", Mend: "pentad check"})
	}
	for _, text := range f.Problems {
		all = append(all, Finding{Severity: Fault, Code: "status", What: text, Why: "the agent, or what it has put into the kernel, is not what it should be", Mend: "pentad status"})
	}
	return all
}

func checkCgroups(f *Facts) []Finding {
	if f.CgroupErr != nil {
		return one(Finding{Severity: Fault, Code: "cgroup", What: "there is no cgroup v2: " + f.CgroupErr.Error(),
			Why: "programs in connect() are attached to a cgroup of version 2", Mend: "mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with systemd.unified_cgroup_hierarchy=1"})
	}
	// net_cls and net_prio of version 1 take the place in a socket where its cgroup of version 2 stands.
	for _, c := range []string{"net_cls", "net_prio"} {
		if slices.Contains(f.CgroupV1, c) {
			return one(Finding{Severity: Risk, Code: "cgroup-v1", What: "the controller " + c + " is mounted as cgroup v1",
				Why: "as soon as somebody uses it, new sockets count to the root cgroup: with scope.cgroup other than / they are not translated", Mend: "boot with cgroup_no_v1=net_cls,net_prio"})
		}
	}
	return nil
}

func checkKernel(f *Facts) (all []Finding) {
	if !f.BPFFS {
		all = append(all, Finding{Severity: Fault, Code: "bpffs", What: "no bpf filesystem is mounted at /sys/fs/bpf",
			Why: "what pentad has in the kernel is pinned there, so that it outlives the agent; the agent mounts it if it may", Mend: "mount -t bpf bpf /sys/fs/bpf"})
	}
	for _, text := range f.MissingFeatures {
		all = append(all, Finding{Severity: Note, Code: "kernel", What: "this kernel has no " + text, Why: "what depends on it is done in another way, or not at all", Mend: "pentad version lists them; a newer kernel has them"})
	}
	if len(f.MissingCaps) > 0 {
		all = append(all, Finding{Severity: Risk, Code: "capabilities", What: "this command lacks " + strings.Join(f.MissingCaps, ", "), Why: "it does not see everything", Mend: "run it as root"})
	}
	return all
}

func checkPrograms(f *Facts) []Finding {
	if len(f.Programs) == 0 {
		return nil
	}
	var texts []string
	for _, p := range f.Programs {
		texts = append(texts, fmt.Sprintf("%s (%d) at %s", p.Name, p.ID, p.At))
	}
	return one(Finding{Severity: Note, Code: "programs", What: "programs of others are attached beside ours: " + list(texts),
		Why: "all of them run; who rewrites a destination before us decides what we see, and one that refuses refuses", Mend: "bpftool cgroup tree shows whose they are"})
}

func checkKubeProxy(f *Facts) []Finding {
	if f.Processes["kube-proxy"] == 0 || f.Config == nil || f.Config.Source.Kubernetes == nil {
		return nil
	}
	return one(Finding{Severity: Risk, Code: "kube-proxy", What: "kube-proxy runs beside pentad, which serves the same Services",
		Why:  "packets are translated by whose rules come first, sessions and policies of both need not agree, and its rules stay when it ends",
		Mend: "kubectl -n kube-system delete daemonset kube-proxy; then kube-proxy --cleanup on each node"})
}

func checkForwarding(f *Facts) (all []Finding) {
	if !f.forwards() {
		return nil
	}
	why := "the configuration forwards packets of others; the kernel drops them"
	if f.differs("net.ipv4.ip_forward", "1") {
		all = append(all, Finding{Severity: Fault, Code: "ip-forward", What: "this host does not forward IPv4", Why: why}.bySysctl("net.ipv4.ip_forward", "1"))
	}
	if f.differs("net.ipv6.conf.all.forwarding", "1") && f.hasIPv6() {
		// Routers do not take default routes from router advertisements: that is why this is not for --fix.
		all = append(all, Finding{Severity: Fault, Code: "ip-forward", What: "this host does not forward IPv6", Why: why,
			Mend: "sysctl -w net.ipv6.conf.all.forwarding=1; if the default route comes from router advertisements, first net.ipv6.conf.IFACE.accept_ra=2, or it is lost"})
	}
	return all
}

// hasIPv6 reports whether anything that is forwarded is of IPv6.
func (f *Facts) hasIPv6() bool {
	return slices.ContainsFunc(f.VIPs(), func(a netip.Addr) bool { return a.Is6() }) ||
		slices.ContainsFunc(f.Config.Pods.Ranges, func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// VIPs returns the addresses of services of the file.
func (f *Facts) VIPs() (all []netip.Addr) {
	if f.Config == nil {
		return nil
	}
	for _, s := range f.Config.Services {
		for _, l := range s.Listeners {
			all = append(all, l.Address.Addr())
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

func checkFirewall(f *Facts) (all []Finding) {
	if f.forwards() {
		for _, c := range f.Dropping {
			all = append(all, Finding{Severity: Risk, Code: "forward-policy", What: fmt.Sprintf("the chain %s of the table %s drops what is forwarded and no rule of it accepts", c.Name, c.Table),
				Why:  "packets to services and pods pass this host only if a rule there lets them: Docker and firewalld set such policies",
				Mend: fmt.Sprintf("let them pass there, by address: nft list chain %s %s shows its rules", c.Table, c.Name)})
		}
	}
	for _, c := range f.Translated {
		all = append(all, Finding{Severity: Fault, Code: "foreign-dnat", What: fmt.Sprintf("the chain %s of the table %s translates %s, which belongs to a service", c.Name, c.Table, list(c.VIPs)),
			Why: "packets go where that rule says, whatever pentad decides", Mend: fmt.Sprintf("nft -a list chain %s %s; take the rule out", c.Table, c.Name)})
	}
	return all
}

func checkRealServer(f *Facts) (all []Finding) {
	if f.Config == nil || !f.Config.RealServer.Wanted() {
		return nil
	}
	for name, want := range map[string]string{"net.ipv4.conf.all.arp_ignore": "1", "net.ipv4.conf.all.arp_announce": "2"} {
		if f.differs(name, want, "2", "8") {
			all = append(all, Finding{Severity: Risk, Code: "arp", What: name + " is " + f.Sysctls[name],
				Why: "a real server that answers ARP for a VIP takes it from the director; the agent sets it, and is dead or was overruled"}.bySysctl(name, want))
		}
	}
	slices.SortFunc(all, func(a, b Finding) int { return strings.Compare(a.What, b.What) })
	return all
}

func checkReversePath(f *Facts) []Finding {
	if !f.forwards() || f.Sysctls["net.ipv4.conf.all.rp_filter"] != "1" {
		return nil
	}
	return one(Finding{Severity: Note, Code: "rp-filter", What: "net.ipv4.conf.all.rp_filter is 1 (strict)",
		Why:  "packets that arrive by another way than answers would leave are dropped without a word: with several uplinks, ECMP or direct routing those are many",
		Mend: "sysctl -w net.ipv4.conf.all.rp_filter=2, if there are several ways"})
}

func checkBridge(f *Facts) []Finding {
	if f.Sysctls["net.bridge.bridge-nf-call-iptables"] != "1" || len(f.Dropping) == 0 || !f.hasPods() {
		return nil
	}
	return one(Finding{Severity: Note, Code: "bridge-nf", What: "net.bridge.bridge-nf-call-iptables is 1, and a firewall drops what is forwarded",
		Why: "what passes a bridge of this host goes through the firewall, too", Mend: "sysctl -w net.bridge.bridge-nf-call-iptables=0, if nothing else needs it"})
}

// nearlyFull is the share of the table of connections at which it is said.
const nearlyFull = 0.8

func checkConntrack(f *Facts) []Finding {
	used, room := f.Conntrack[0], f.Conntrack[1]
	if room == 0 || float64(used) < nearlyFull*float64(room) {
		return nil
	}
	f1 := Finding{Severity: Risk, Code: "conntrack", What: fmt.Sprintf("the table of connections is nearly full: %d of %d", used, room),
		Why: "when it is, the kernel drops packets of new connections, name look-ups first"}.bySysctl("net.netfilter.nf_conntrack_max", strconv.Itoa(2*room))
	if used >= room {
		f1.Severity, f1.What = Fault, fmt.Sprintf("the table of connections is full: %d of %d", used, room)
	}
	return one(f1)
}

func checkPorts(f *Facts) []Finding {
	first, last, ok := portRange(f.Sysctls["net.ipv4.ip_local_port_range"])
	if !ok || f.Config == nil || f.Config.Source.Kubernetes == nil || f.Sysctls["net.ipv4.ip_local_reserved_ports"] != "" {
		return nil
	}
	// The default of service-node-port-range of the API server.
	const low, high = 30000, 32767
	if first > high || last < low {
		return nil
	}
	return one(Finding{Severity: Note, Code: "ports", What: fmt.Sprintf("ports for outgoing connections (%d to %d) overlap NodePorts (%d to %d)", first, last, low, high),
		Why: "a port that a connection of this host has is no free NodePort meanwhile"}.bySysctl("net.ipv4.ip_local_reserved_ports", fmt.Sprintf("%d-%d", low, high)))
}

func portRange(text string) (first, last int, ok bool) {
	_, err := fmt.Sscan(text, &first, &last)
	return first, last, err == nil
}

// fewFiles is how many open files are few for an agent that probes many backends.
const fewFiles = 4096

func checkFiles(f *Facts) []Finding {
	if f.FilesLimit == 0 || f.FilesLimit >= fewFiles {
		return nil
	}
	return one(Finding{Severity: Risk, Code: "files", What: fmt.Sprintf("the agent may have %d files open", f.FilesLimit),
		Why: "each probe and each connection of a proxy needs one", Mend: "LimitNOFILE=1048576 in its unit; systemctl edit pentad"})
}

func checkManagers(f *Facts) (all []Finding) {
	if !f.hasPods() {
		return nil
	}
	for name, mend := range map[string]string{
		"NetworkManager":   "in /etc/NetworkManager/conf.d/pentad.conf: [keyfile] unmanaged-devices=interface-name:pd*;interface-name:pentad*",
		"systemd-networkd": "in /etc/systemd/network/10-pentad.network: [Match] Name=pd* pentad*, [Link] Unmanaged=yes",
	} {
		// The kernel keeps the first 15 characters of a name.
		if f.Processes[name[:min(len(name), 15)]] > 0 {
			all = append(all, Finding{Severity: Note, Code: "manager", What: name + " runs on this host", Why: "unless it is told not to, it may take devices of pods for its own, and their addresses and routes away", Mend: mend})
		}
	}
	slices.SortFunc(all, func(a, b Finding) int { return strings.Compare(a.What, b.What) })
	return all
}

// checkInterfaces looks for those that the configuration names.
func checkInterfaces(f *Facts) (all []Finding) {
	if f.Config == nil {
		return nil
	}
	named := func(where, name string) {
		if name != "" && !slices.Contains(f.Interfaces, name) {
			all = append(all, Finding{Severity: Fault, Code: "interface", What: fmt.Sprintf("%s names the interface %s, which is not there", where, name), Why: "nothing is done at it", Mend: "ip link shows what there is: " + list(f.Interfaces)})
		}
	}
	for _, c := range f.Config.Captures {
		named("the capture "+c.Name, c.Interface)
	}
	for _, name := range f.Config.Director.Interfaces {
		named("director", name)
	}
	return all
}

func checkClock(f *Facts) []Finding {
	if !f.Unsynced || f.Config == nil || f.Config.Source.Etcd == nil && f.Config.Source.Kubernetes == nil {
		return nil
	}
	return one(Finding{Severity: Note, Code: "clock", What: "the clock of this host follows no other", Why: "certificates are judged by it, and what hosts of a fleet say of times is compared", Mend: "run chrony or systemd-timesyncd"})
}
