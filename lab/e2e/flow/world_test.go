// Package flow_test tests what pentad tells of connections.
package flow_test

import (
	"testing"

	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, clients) }

var clients = map[string]actor.Role{"burst": burst, "udp leaves": udpLeaves}

type world struct{ *e2e.World }

func newWorld(t testing.TB, addresses ...string) *world { return &world{e2e.New(t, addresses...)} }
