package config

import (
	"net/netip"
	"slices"

	"go.yaml.in/yaml/v4"
)

// Source says where services come from besides the file.
type Source struct {
	Kubernetes *Kubernetes // nil: from no cluster
	Etcd       *Etcd       // nil: there is none
}

// Kubernetes says how this host is a node of a cluster.
type Kubernetes struct {
	Kubeconfig        string         // path; empty: the service account of the pod that this is
	Node              string         // empty: the environment's NODE_NAME, else the host name
	NodePortAddresses []netip.Prefix // empty: those that the Node says it has
	AllowExternalIPs  []netip.Prefix // externalIPs that processes on the nodes are led to, too
	Untracked         []netip.Prefix // between which connections need not be tracked; sorted
	Health            netip.AddrPort // of /healthz and /livez
}

// Equal reports whether both mean the same.
func (k *Kubernetes) Equal(o *Kubernetes) bool {
	if k == nil || o == nil {
		return k == o
	}
	return k.Kubeconfig == o.Kubeconfig && k.Node == o.Node && k.Health == o.Health &&
		slices.Equal(k.NodePortAddresses, o.NodePortAddresses) && slices.Equal(k.AllowExternalIPs, o.AllowExternalIPs) &&
		slices.Equal(k.Untracked, o.Untracked)
}

var sourceSchema = schema[Source]{what: "source", fields: []field[Source]{
	section("kubernetes",
		"This host is a node of a Kubernetes cluster and serves all its Services, to its processes and pods and to what arrives "+
			"from outside. `{}` is enough in a pod.",
		&kubernetesSchema, func(s *Source) *Kubernetes {
			s.Kubernetes = &Kubernetes{Health: netip.MustParseAddrPort(defaultNodeHealth)}
			return s.Kubernetes
		}),
	section("etcd",
		"The etcd that the hosts of a fleet share. Blocks of `pods.ranges` are claimed there, on hosts that are no nodes of a cluster.",
		&etcdSchema, func(s *Source) *Etcd {
			s.Etcd = &Etcd{Prefix: defaultEtcdPrefix}
			return s.Etcd
		}),
}}

// checkSource finds sources that cannot be.
func (d *decoder) checkSource(c *Config, at *yaml.Node) {
	if at == nil {
		return
	}
	if c.Source.Kubernetes == nil && c.Source.Etcd == nil {
		d.errorf(at, "source names none; it needs one of the keys \"kubernetes\" and \"etcd\"")
	}
	if c.Source.Etcd != nil {
		d.checkEtcd(c.Source.Etcd, at)
	}
}

// defaultNodeHealth is where cloud load balancers look, because it is where
// kube-proxy answers (its --healthz-bind-address).
const defaultNodeHealth = "0.0.0.0:10256"

// maxUntracked bounds source.kubernetes.untracked.
const maxUntracked = 8

var kubernetesSchema = schema[Kubernetes]{what: "kubernetes", fields: []field[Kubernetes]{
	text("kubeconfig", "path",
		"How to reach the API server; without it the service account of the pod that pentad runs in.",
		"the path of a kubeconfig", func(to *Kubernetes, v string) { to.Kubeconfig = v }),
	text("node", "name",
		"The name of this host's Node; the environment variable NODE_NAME, else the host name, by default.",
		"the name of a Node", func(to *Kubernetes, v string) { to.Node = v }),
	prefixes("nodePortAddresses",
		"NodePorts are served at the addresses of this host that lie in these prefixes, such as `[10.0.0.0/8]`; `[0.0.0.0/0, \"::/0\"]` is "+
			"all. Without it at the addresses that the Node says it has. Processes of the host itself reach them at the loopback, too.",
		func(to *Kubernetes, v []netip.Prefix) { to.NodePortAddresses = v }),
	prefixes("allowExternalIPs",
		"externalIPs in these prefixes are served like any address of a Service. Others are served to the outside only and never where they "+
			"are an address of a node: whoever may write a Service could draw connections of others to himself (CVE-2020-8554).",
		func(to *Kubernetes, v []netip.Prefix) { to.AllowExternalIPs = v }),
	{
		key: "untracked", kind: "list of prefixes",
		doc: "The addresses of the pods of all nodes, such as `[10.244.0.0/16]`: connections between them are not tracked by the kernel (conntrack), " +
			"except those of pods whose packets had to be translated. They are set up faster and take no room in its table. Not for nodes where " +
			"something else filters the packets of pods by the state of their connections (`ct state`), as network policies made of nftables or " +
			"iptables do.",
		set: func(d *decoder, n *yaml.Node, to *Kubernetes) {
			to.Untracked = d.prefixes(n)
			if len(to.Untracked) > maxUntracked {
				d.errorf(n, "untracked has %d prefixes; at most %d, because every packet is compared with them", len(to.Untracked), maxUntracked)
			}
			slices.SortFunc(to.Untracked, netip.Prefix.Compare)
		},
	},
	field[Kubernetes]{
		key: "health", kind: "ADDRESS:PORT",
		doc: "Address of `/healthz` and `/livez`, by which load balancers of clouds judge the node. The default is kube-proxy's.",
		set: func(d *decoder, n *yaml.Node, to *Kubernetes) { to.Health = d.ownAddress(n, defaultNodeHealth) },
	}.or(defaultNodeHealth),
}}
