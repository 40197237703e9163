package pods_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
)

// twoNodes are hosts on one segment.
func twoNodes(t *testing.T) (nodes [2]*node) {
	t.Helper()
	lab.Need(t)
	segment, err := lab.NewSwitch()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := segment.Close(); err != nil {
			t.Error(err)
		}
	})
	for i := range nodes {
		nodes[i] = &node{World: e2e.New(t), t: t}
		if _, err := segment.Plug(nodes[i].Host, fmt.Sprintf("198.51.100.%d/24", 11+i), fmt.Sprintf("2001:db8:100::%d/64", 11+i)); err != nil {
			t.Fatal(err)
		}
	}
	return nodes
}

func hosts(overlay string) string {
	return fmt.Sprintf(`services: []
pods:
  overlay: %s
  ranges: [10.244.0.0/16, "2001:db8:244::/48"]
  hosts:
  - {name: a, addresses: [198.51.100.11, "2001:db8:100::11"], blocks: [10.244.1.0/24, "2001:db8:244:1::/120"]}
  - {name: b, addresses: [198.51.100.12, "2001:db8:100::12"], blocks: [10.244.2.0/24, "2001:db8:244:2::/120"]}
`, overlay)
}

// Pods of two hosts reach each other as themselves; what is taken away of what leads from
// one to the other comes back; without agents all goes on.
func TestTwoHosts(t *testing.T) {
	t.Parallel()
	for _, overlay := range []string{"direct", "vxlan"} {
		t.Run(overlay, func(t *testing.T) {
			t.Parallel()
			nodes := twoNodes(t)
			var pods [2]*pod
			for i, n := range nodes {
				n.RunAgent(hosts(overlay))
				pods[i] = n.newPod()
				n.add(pods[i])
				n.serve(pods[i].Host, fmt.Sprint("pod", i))
			}
			connected := func() {
				t.Helper()
				nodes[0].asks(pods[0].Host, pods[1].v4, "pod1", pods[0].v4.String())
				nodes[0].asks(pods[0].Host, pods[1].v6, "pod1", pods[0].v6.String())
				nodes[1].asks(pods[1].Host, pods[0].v4, "pod0", pods[1].v4.String())
				nodes[1].asks(nodes[1].Host, pods[0].v4, "pod0", "")
				nodes[1].asks(nodes[1].Host, pods[0].v6, "pod0", "")
				// Packets of full size, too.
				p, err := pods[0].Start(actor.Command("talk", "1", pods[1].v4.String()+":80"), lab.Outside)
				if err != nil {
					t.Fatal(err)
				}
				nodes[0].Eventually("it talks", func() error {
					if !strings.Contains(p.Log.String(), "talking") || strings.Contains(p.Log.String(), "broken") {
						return errors.New(p.Log.String())
					}
					return nil
				})
				p.Kill()
			}
			connected()
			taken := [][]string{{"ip", "route", "del", "10.244.2.0/24"}, {"ip", "-6", "route", "del", "2001:db8:244:2::/120"}}
			whole := "ip route; ip -6 route"
			want := []string{"10.244.2.0/24 via", "2001:db8:244:2::/120 via"}
			if overlay == "vxlan" {
				whole += "; ip neigh show dev pentad.vxlan; bridge fdb show dev pentad.vxlan; ip -o link show pentad.vxlan"
				want = append(want, "mtu 1450", "02:3e:23:e8:16:00 dst 198.51.100.12", "10.244.2.0 lladdr 02:3e:23:e8:16:00 PERMANENT")
				taken = append(taken, []string{"ip", "link", "set", "pentad.vxlan", "down"}, []string{"ip", "link", "del", "pentad.vxlan"},
					[]string{"bridge", "fdb", "del", "02:3e:23:e8:16:00", "dev", "pentad.vxlan", "dst", "198.51.100.12"},
					[]string{"ip", "neigh", "del", "10.244.2.0", "dev", "pentad.vxlan"},
					[]string{"ip", "link", "set", "pentad.vxlan", "address", "02:00:00:00:00:01"})
			}
			isWhole := func() error {
				out, err := nodes[0].Run(t.Context(), lab.Outside, "sh", "-c", whole)
				for _, w := range want {
					if !strings.Contains(out, w) {
						return fmt.Errorf("there is no %s: %s (%v)", w, out, err)
					}
				}
				return nil
			}
			for _, args := range taken {
				nodes[0].Eventually("all is there", isWhole)
				if out, err := nodes[0].Run(t.Context(), lab.Outside, args[0], args[1:]...); err != nil {
					t.Errorf("%v: %v: %s", args, err, out)
				}
				nodes[0].Eventually(strings.Join(args, " "), isWhole)
			}
			connected()
			for _, n := range nodes {
				n.Agent.Kill()
			}
			connected()
			// A host that is taken out of the file is reached no more, and nothing of it stays.
			nodes[0].RunAgent(strings.Split(hosts(overlay), "  - {name: b")[0])
			nodes[0].Eventually("nothing leads to the other host", func() error {
				out, _ := nodes[0].Run(t.Context(), lab.Outside, "sh", "-c", whole)
				if strings.Contains(out, "10.244.2.") || strings.Contains(out, "dst 198.51.100.12") {
					return errors.New(out)
				}
				return nil
			})
			nodes[0].MustPentad("down")
			if out, err := nodes[0].Run(t.Context(), lab.Outside, "ip", "link", "show", "pentad.vxlan"); err == nil {
				t.Errorf("the tunnel is left: %s", out)
			}
		})
	}
}
