package doctor

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/pentad/pentad/config"
)

func parse(t *testing.T, text string) *config.Config {
	t.Helper()
	c, err := config.Parse("f.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// well is a host with which nothing is wrong.
func well(c *config.Config) *Facts {
	return &Facts{
		Config: c, BPFFS: true, Interfaces: []string{"lo", "eth0"}, Conntrack: [2]int{10, 1000}, FilesLimit: 1 << 20,
		Sysctls: map[string]string{
			"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1", "net.ipv4.conf.all.rp_filter": "2", "net.ipv4.conf.all.arp_ignore": "1",
			"net.ipv4.conf.all.arp_announce": "2", "net.ipv4.ip_local_port_range": "32768 60999",
		},
		Processes: map[string]int{},
	}
}

func TestExamine(t *testing.T) {
	const plain = "services: []\n"
	const nat = "services:\n- {name: web, listen: ['192.0.2.1:80', '[2001:db8::1]:80'], forward: nat, backends: ['10.0.0.1:80', '[2001:db8::2]:80']}\n"
	const kube = "source: {kubernetes: {kubeconfig: /k}}\n"
	const pods = "pods: {blocks: [10.1.0.0/24]}\nservices: []\n"
	vip := netip.MustParseAddr("192.0.2.1")
	for _, c := range []struct {
		name, config string
		change       func(*Facts)
		want         []string // severity and code of each
	}{
		{"nothing", plain, func(*Facts) {}, nil},
		{"everything is well", nat, func(*Facts) {}, nil},
		{"no forwarding where nobody forwards", plain, func(f *Facts) { f.Sysctls["net.ipv4.ip_forward"] = "0" }, nil},
		{"no forwarding", nat, func(f *Facts) { f.Sysctls["net.ipv4.ip_forward"] = "0" }, []string{"fault ip-forward fix"}},
		{"no forwarding of IPv6 is not mended", nat, func(f *Facts) { f.Sysctls["net.ipv6.conf.all.forwarding"] = "0" }, []string{"fault ip-forward"}},
		{"no forwarding of IPv6 that nobody has", pods, func(f *Facts) { f.Sysctls["net.ipv6.conf.all.forwarding"] = "0" }, nil},
		{"a setting that there is not", nat, func(f *Facts) { f.Sysctls = nil }, nil},
		{"no cgroup v2", plain, func(f *Facts) { f.CgroupErr = errors.New("no") }, []string{"fault cgroup"}},
		{"net_cls", plain, func(f *Facts) { f.CgroupV1 = []string{"net_cls"} }, []string{"risk cgroup-v1"}},
		{"no bpffs", plain, func(f *Facts) { f.BPFFS = false }, []string{"fault bpffs"}},
		{"kube-proxy on another kind of host", plain, func(f *Facts) { f.Processes["kube-proxy"] = 1 }, nil},
		{"kube-proxy", kube, func(f *Facts) { f.Processes["kube-proxy"] = 1 }, []string{"risk kube-proxy"}},
		{"ports overlap", kube, func(f *Facts) { f.Sysctls["net.ipv4.ip_local_port_range"] = "10000 60999" }, []string{"note ports fix"}},
		{"ports are reserved", kube, func(f *Facts) {
			f.Sysctls["net.ipv4.ip_local_port_range"], f.Sysctls["net.ipv4.ip_local_reserved_ports"] = "10000 60999", "30000-32767"
		}, nil},
		{"ports do not overlap", kube, func(f *Facts) { f.Sysctls["net.ipv4.ip_local_port_range"] = "40000 60999" }, nil},
		{"a firewall where nobody forwards", plain, func(f *Facts) { f.Dropping = []Chain{{Table: "ip filter", Name: "FORWARD"}} }, nil},
		{"a firewall", nat, func(f *Facts) { f.Dropping = []Chain{{Table: "ip filter", Name: "FORWARD"}} }, []string{"risk forward-policy"}},
		{"a VIP is somebody else's", plain, func(f *Facts) { f.Translated = []Chain{{"ip nat", "PREROUTING", []netip.Addr{vip}}} }, []string{"fault foreign-dnat"}},
		{"a real server that answers", "realServer: {vips: [192.0.2.1]}\nservices: []\n", func(f *Facts) { f.Sysctls["net.ipv4.conf.all.arp_ignore"] = "0" }, []string{"risk arp fix"}},
		{"a real server with a stricter setting", "realServer: {vips: [192.0.2.1]}\nservices: []\n", func(f *Facts) { f.Sysctls["net.ipv4.conf.all.arp_ignore"] = "8" }, nil},
		{"strict", nat, func(f *Facts) { f.Sysctls["net.ipv4.conf.all.rp_filter"] = "1" }, []string{"note rp-filter"}},
		{"conntrack", plain, func(f *Facts) { f.Conntrack = [2]int{800, 1000} }, []string{"risk conntrack fix"}},
		{"conntrack is full", plain, func(f *Facts) { f.Conntrack = [2]int{1000, 1000} }, []string{"fault conntrack fix"}},
		{"conntrack is not known", plain, func(f *Facts) { f.Conntrack = [2]int{} }, nil},
		{"few files", plain, func(f *Facts) { f.FilesLimit = 1024 }, []string{"risk files"}},
		{"managers", pods, func(f *Facts) { f.Processes["NetworkManager"], f.Processes["systemd-network"] = 1, 1 }, []string{"note manager", "note manager"}},
		{"an interface that there is not", "director: {interfaces: [eth7]}\nservices: []\n", func(*Facts) {}, []string{"fault interface"}},
		{"an interface that there is", "director: {interfaces: [eth0]}\nservices: []\n", func(*Facts) {}, nil},
		{"an odd clock of a host alone", plain, func(f *Facts) { f.Unsynced = true }, nil},
		{"an odd clock of a node", kube, func(f *Facts) { f.Unsynced = true }, []string{"note clock"}},
		{"programs of others", plain, func(f *Facts) { f.Programs = []Program{{"connect4", "other", 7}} }, []string{"note programs"}},
		{"the worst comes first", nat, func(f *Facts) {
			f.Sysctls["net.ipv4.conf.all.rp_filter"], f.FilesLimit, f.Problems = "1", 100, []string{"something"}
		}, []string{"fault status", "risk files", "note rp-filter"}},
	} {
		f := well(parse(t, c.config))
		c.change(f)
		var have []string
		for _, x := range Examine(f) {
			text := fmt.Sprint(x.Severity, " ", x.Code)
			if x.Fixable() {
				text += " fix"
			}
			have = append(have, text)
			if x.What == "" || x.Why == "" || x.Mend == "" {
				t.Errorf("%s: %+v says not everything", c.name, x)
			}
		}
		if !slices.Equal(have, c.want) {
			t.Errorf("%s: %v, want %v", c.name, have, c.want)
		}
	}
	// Without a configuration nothing is known of what is wanted.
	if found := Examine(well(nil)); len(found) > 0 {
		t.Errorf("without a configuration: %+v", found)
	}
}
