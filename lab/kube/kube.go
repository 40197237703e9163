// Package kube runs a real Kubernetes on lab hosts: etcd, kube-apiserver and
// whatever else a test wants, compiled from Kubernetes' own module. Nothing is
// faked, RBAC is on, and Close of the lab host takes all of it away.
package kube

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/pki"
)

// The ranges of a lab's cluster.
const (
	ServiceRange4 = "10.96.0.0/16"
	ServiceRange6 = "2001:db8:96::/112"
)

// Cluster is a control plane on one host.
type Cluster struct {
	Host    *lab.Host
	Address string // of the API server
	Client  kubernetes.Interface
	Config  *rest.Config // of an administrator

	bin       string
	ca        *pki.Authority
	serving   pki.Pair
	accounts  pki.Pair
	etcd, api *lab.Process
	others    []*lab.Process
}

// ready bounds the wait for a program to answer.
const ready = time.Minute

// Start starts etcd and the API server on a host that has the address. The
// programs must have been built.
func Start(ctx context.Context, bin string, h *lab.Host, address string) (*Cluster, error) {
	c := &Cluster{Host: h, Address: address, bin: bin}
	var err error
	if c.ca, err = pki.New(h.Dir); err != nil {
		return nil, err
	}
	at := []net.IP{net.ParseIP(address), net.ParseIP("127.0.0.1"), net.ParseIP("10.96.0.1")}
	if c.serving, err = c.ca.Issue("apiserver", "kube-apiserver", nil, at, []string{"kubernetes", "kubernetes.default.svc"}); err != nil {
		return nil, err
	}
	if c.accounts, err = c.ca.Issue("accounts", "service-accounts", nil, nil, nil); err != nil {
		return nil, err
	}
	if err := c.StartEtcd(); err != nil {
		return nil, err
	}
	if err := c.StartAPIServer(); err != nil {
		return nil, err
	}
	admin, err := c.Kubeconfig("admin", "admin", "system:masters")
	if err != nil {
		return nil, err
	}
	if c.Config, err = clientcmd.BuildConfigFromFlags("", admin); err != nil {
		return nil, err
	}
	c.Config.Dial = c.dial
	c.Config.QPS, c.Config.Burst = -1, -1
	if c.Client, err = kubernetes.NewForConfig(c.Config); err != nil {
		return nil, err
	}
	return c, c.Ready(ctx)
}

// dial reaches the API server from outside of the lab.
func (c *Cluster) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	doErr := c.Host.Do(func() error {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, address)
		return nil
	})
	if doErr != nil {
		return nil, doErr
	}
	return conn, err
}

// Ready waits until the API server says that it is.
func (c *Cluster) Ready(ctx context.Context) error {
	err := lab.Eventually(ready, func() error {
		if ctx.Err() != nil {
			return nil
		}
		select {
		case <-c.api.Done():
			return fmt.Errorf("the API server ended:\n%s", lab.Indent(c.api.Log.String()))
		default:
		}
		_, err := c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err != nil {
			time.Sleep(50 * time.Millisecond)
			return err
		}
		_, err = c.Client.CoreV1().ServiceAccounts("default").List(ctx, metav1.ListOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("API server: %w\n%s", err, lab.Indent(tail(c.api.Log.String())))
	}
	return ctx.Err()
}

func tail(text string) string { return text[max(0, len(text)-4000):] }

// StartEtcd starts etcd, on the data that it had if there was one before.
func (c *Cluster) StartEtcd() (err error) {
	c.etcd, err = c.Host.Start(exec.Command("etcd", "--data-dir", filepath.Join(c.Host.Dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380",
		"--initial-cluster", "default=http://127.0.0.1:2380", "--quota-backend-bytes", "4294967296"), lab.Outside)
	return err
}

// StartAPIServer starts the API server; Ready waits for it.
func (c *Cluster) StartAPIServer() (err error) {
	ca := filepath.Join(c.Host.Dir, "ca.crt")
	c.api, err = c.Host.Start(exec.Command(filepath.Join(c.bin, string(APIServer)),
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--advertise-address="+c.Address,
		"--tls-cert-file="+c.serving.Cert, "--tls-private-key-file="+c.serving.Key, "--client-ca-file="+ca,
		"--kubelet-client-certificate="+c.serving.Cert, "--kubelet-client-key="+c.serving.Key,
		"--service-account-key-file="+c.accounts.Cert, "--service-account-signing-key-file="+c.accounts.Key,
		"--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=RBAC,Node",
		"--service-cluster-ip-range="+ServiceRange4+","+ServiceRange6, "--allow-privileged=true",
		"--enable-admission-plugins=NodeRestriction", "--event-ttl=1h", "--profiling=false",
		"--max-requests-inflight=1000", "--max-mutating-requests-inflight=1000"), lab.Outside)
	return err
}

// KillAPIServer ends the API server at once.
func (c *Cluster) KillAPIServer() { c.api.Kill() }

// Etcd is the process of etcd.
func (c *Cluster) Etcd() *lab.Process { return c.etcd }

// Compact has etcd forget all but the newest revision: a watch from an older one
// cannot go on (410 Gone).
func (c *Cluster) Compact(ctx context.Context) error {
	etcdctl := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "etcdctl", args...)
		cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
		p, err := c.Host.Start(cmd, lab.Outside)
		if err != nil {
			return "", err
		}
		err = p.Wait()
		return p.Log.String(), err
	}
	out, err := etcdctl("put", "/lab/compact", "1", "-w", "fields")
	if err != nil {
		return fmt.Errorf("etcdctl: %w: %s", err, out)
	}
	for line := range strings.Lines(out) {
		if revision, ok := strings.CutPrefix(strings.TrimSpace(line), `"Revision" : `); ok {
			if out, err = etcdctl("compact", revision); err != nil {
				return fmt.Errorf("etcdctl: %w: %s", err, out)
			}
			return nil
		}
	}
	return fmt.Errorf("etcdctl did not tell the revision: %s", out)
}

// StartControllerManager starts the controllers of Kubernetes that are named, or
// all. Those that look after nodes and pods find no kubelet in most labs.
func (c *Cluster) StartControllerManager(controllers ...string) error {
	if len(controllers) == 0 {
		controllers = []string{"*"}
	}
	kubeconfig, err := c.Kubeconfig("controller-manager", "system:kube-controller-manager")
	if err != nil {
		return err
	}
	p, err := c.Host.Start(exec.Command(filepath.Join(c.bin, string(ControllerManager)),
		"--kubeconfig="+kubeconfig, "--use-service-account-credentials=true", "--leader-elect=false",
		"--service-account-private-key-file="+c.accounts.Key, "--root-ca-file="+filepath.Join(c.Host.Dir, "ca.crt"),
		"--allocate-node-cidrs=false", "--profiling=false", "--controllers="+strings.Join(controllers, ",")), lab.Outside)
	c.others = append(c.others, p)
	return err
}

// Kubeconfig writes how a user with a certificate reaches the API server, and
// returns its path.
func (c *Cluster) Kubeconfig(name, user string, groups ...string) (string, error) {
	p, err := c.ca.Issue(name, user, groups, nil, nil)
	if err != nil {
		return "", err
	}
	return c.writeKubeconfig(name, &clientcmdapi.AuthInfo{ClientCertificate: p.Cert, ClientKey: p.Key})
}

// AccountKubeconfig writes how a service account reaches the API server: its
// rights are those that RBAC gives it.
func (c *Cluster) AccountKubeconfig(ctx context.Context, namespace, account string) (string, error) {
	hour := int64(3600)
	t, err := c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &hour}}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("token of %s/%s: %w", namespace, account, err)
	}
	return c.writeKubeconfig(namespace+"-"+account, &clientcmdapi.AuthInfo{Token: t.Status.Token})
}

// PodKubeconfig writes how a pod of a service account on a node reaches the API server:
// its token says which node that is. The pod is made for it, and never runs.
func (c *Cluster) PodKubeconfig(ctx context.Context, namespace, account, node string) (string, error) {
	pod, err := c.Client.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: account + "-" + node},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: account, Containers: []corev1.Container{{Name: "main", Image: "none"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	hour := int64(3600)
	t, err := c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: &hour, BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("token of %s/%s: %w", namespace, pod.Name, err)
	}
	return c.writeKubeconfig(namespace+"-"+pod.Name, &clientcmdapi.AuthInfo{Token: t.Status.Token})
}

func (c *Cluster) writeKubeconfig(name string, who *clientcmdapi.AuthInfo) (string, error) {
	path := filepath.Join(c.Host.Dir, name+".kubeconfig")
	return path, clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{"lab": {
			Server: "https://" + net.JoinHostPort(c.Address, "6443"), CertificateAuthority: filepath.Join(c.Host.Dir, "ca.crt"),
		}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{name: who},
		Contexts:       map[string]*clientcmdapi.Context{"lab": {Cluster: "lab", AuthInfo: name}},
		CurrentContext: "lab",
	}, path)
}

// AddNode makes a Node object as a kubelet does: with its addresses, its zone and
// the range of its pods.
func (c *Cluster) AddNode(ctx context.Context, name, zone string, addresses, podCIDRs []string) error {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: zone}}}
	n.Spec.PodCIDRs = podCIDRs
	if len(podCIDRs) > 0 {
		n.Spec.PodCIDR = podCIDRs[0]
	}
	n, err := c.Client.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	for _, a := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now()}}
	_, err = c.Client.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
	return err
}
