package doctor

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/plane/socket"
)

// settings are the kernel parameters that are looked at.
var settings = []string{
	"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv4.conf.all.rp_filter", "net.ipv4.conf.all.arp_ignore", "net.ipv4.conf.all.arp_announce",
	"net.bridge.bridge-nf-call-iptables", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports",
}

// names are the processes that are looked for, as the kernel shortens them.
var names = []string{"kube-proxy", "NetworkManager", "systemd-network"}

// Read finds the facts of this host. The configuration may be nil; agent is the process
// of the agent, or 0. What cannot be read is left out: a doctor says what he sees.
func Read(c *config.Config, pins string, agent int) *Facts {
	f := &Facts{Config: c, Sysctls: make(map[string]string), Processes: make(map[string]int), BPFFS: isBPFFS("/sys/fs/bpf"), MissingCaps: host.MissingCapabilities()}
	root, err := host.CgroupRoot()
	f.CgroupErr = err
	f.CgroupV1 = cgroupV1()
	for _, x := range socket.Features {
		if errors.Is(x.Check(), ebpf.ErrNotSupported) {
			f.MissingFeatures = append(f.MissingFeatures, fmt.Sprintf("%s (Linux %s)", x.Name, x.Since))
		}
	}
	for _, name := range settings {
		if raw, err := os.ReadFile(sysctlPath(name)); err == nil {
			f.Sysctls[name] = strings.Join(strings.Fields(string(raw)), " ")
		}
	}
	if err == nil {
		scope := root
		if c != nil {
			scope = filepath.Join(root, c.Scope.Cgroup)
		}
		f.Programs = foreignPrograms(root, scope, pins)
	}
	f.readProcesses()
	f.readFirewall()
	interfaces, err := net.Interfaces()
	for _, i := range interfaces {
		f.Interfaces = append(f.Interfaces, i.Name)
	}
	if err != nil {
		f.Interfaces = nil
	}
	f.Conntrack = [2]int{number("/proc/sys/net/netfilter/nf_conntrack_count"), number("/proc/sys/net/netfilter/nf_conntrack_max")}
	f.FilesLimit = filesLimit(agent)
	var t unix.Timex
	if state, err := unix.Adjtimex(&t); err == nil {
		f.Unsynced = state == unix.TIME_ERROR
	}
	return f
}

func sysctlPath(name string) string {
	return "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
}

func number(path string) int {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(raw))) // 0: not known
	return n
}

func isBPFFS(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// cgroupV1 returns the controllers that are mounted as version 1 (cgroups(7)).
func cgroupV1() (all []string) {
	raw, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(raw)) {
		if fields := strings.Fields(line); len(fields) > 3 && fields[2] == "cgroup" {
			for _, option := range strings.Split(fields[3], ",") {
				if option == "net_cls" || option == "net_prio" {
					all = append(all, option)
				}
			}
		}
	}
	return all
}

// places are where programs of others would matter, by name.
var places = map[string]ebpf.AttachType{
	"connect4": ebpf.AttachCGroupInet4Connect, "connect6": ebpf.AttachCGroupInet6Connect,
	"sendmsg4": ebpf.AttachCGroupUDP4Sendmsg, "sendmsg6": ebpf.AttachCGroupUDP6Sendmsg,
}

// foreignPrograms returns programs of others at the root and at our cgroup.
func foreignPrograms(root, scope, pins string) (all []Program) {
	own := ownPrograms(pins)
	cgroups := []string{root, scope}
	slices.Sort(cgroups)
	for _, cgroup := range slices.Compact(cgroups) {
		dir, err := os.Open(cgroup)
		if err != nil {
			continue
		}
		for name, at := range places {
			found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: at})
			if err != nil {
				continue
			}
			for _, p := range found.Programs {
				if !own[p.ID] {
					all = append(all, Program{At: fmt.Sprintf("%s of the cgroup %s", name, cgroup), Name: programName(p.ID), ID: uint32(p.ID)})
				}
			}
		}
		dir.Close()
	}
	slices.SortFunc(all, func(a, b Program) int { return strings.Compare(a.At, b.At) })
	return all
}

// ownPrograms are those of the links that are pinned by pentad.
func ownPrograms(pins string) map[ebpf.ProgramID]bool {
	own := make(map[ebpf.ProgramID]bool)
	// The tree is ours; what cannot be read of it is taken for somebody else's.
	_ = filepath.WalkDir(pins, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || filepath.Base(filepath.Dir(path)) != "links" && !strings.Contains(path, "links") {
			return nil
		}
		l, err := link.LoadPinnedLink(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil
		}
		defer l.Close()
		if info, err := l.Info(); err == nil {
			own[info.Program] = true
		}
		return nil
	})
	return own
}

func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return "a program"
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil || info.Name == "" {
		return "a program without a name"
	}
	return info.Name
}

func (f *Facts) readProcesses() {
	// The pattern is constant: Glob cannot fail.
	all, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, path := range all {
		raw, err := os.ReadFile(path)
		if name := strings.TrimSpace(string(raw)); err == nil && slices.Contains(names, name) {
			f.Processes[name]++
		}
	}
}

// readFirewall looks through the chains of others (nftables, and iptables that is made of it).
func (f *Facts) readFirewall() {
	conn, err := nft.Dial()
	if err != nil {
		return
	}
	defer func() { _ = conn.CloseLasting() }()
	chains, err := conn.ListChains()
	if err != nil {
		return
	}
	vips := f.VIPs()
	for _, c := range chains {
		if strings.HasPrefix(c.Table.Name, "pentad") {
			continue
		}
		named := Chain{Table: familyName(c.Table.Family) + " " + c.Table.Name, Name: c.Name}
		if c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
			f.Dropping = append(f.Dropping, named)
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			continue
		}
		for _, r := range rules {
			named.VIPs = append(named.VIPs, translated(r, vips)...)
		}
		if len(named.VIPs) > 0 {
			f.Translated = append(f.Translated, named)
		}
	}
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyBridge:
		return "bridge"
	}
	return strconv.Itoa(int(f))
}

// translated returns which VIPs a rule translates, by their address alone.
func translated(r *nftables.Rule, vips []netip.Addr) (all []netip.Addr) {
	translates := slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		switch x := e.(type) {
		case *expr.NAT:
			return x.Type == expr.NATTypeDestNAT
		case *expr.Redir:
			return true
		case *expr.Target:
			return x.Name == "DNAT" || x.Name == "REDIRECT"
		}
		return false
	})
	if !translates {
		return nil
	}
	for _, vip := range vips {
		if slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
			c, is := e.(*expr.Cmp)
			return is && c.Op == expr.CmpOpEq && bytes.Equal(c.Data, vip.AsSlice())
		}) {
			all = append(all, vip)
		}
	}
	return all
}

// filesLimit returns how many files a process may have open; 0: not known.
func filesLimit(pid int) uint64 {
	if pid == 0 {
		return 0
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		return 0
	}
	for s := bufio.NewScanner(bytes.NewReader(raw)); s.Scan(); {
		if rest, is := strings.CutPrefix(s.Text(), "Max open files"); is {
			if fields := strings.Fields(rest); len(fields) > 0 {
				n, _ := strconv.ParseUint(fields[0], 10, 64) // unlimited: 0, not known to be few
				return n
			}
		}
	}
	return 0
}
