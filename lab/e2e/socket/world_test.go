// Package socket_test tests what processes get of plane/socket: real clients and servers,
// in the real kernel.
package socket_test

import (
	"testing"

	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, clients) }

type world struct{ *e2e.World }

func newWorld(t testing.TB, addresses ...string) *world { return &world{e2e.New(t, addresses...)} }
