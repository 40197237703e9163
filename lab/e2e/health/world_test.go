// Package health_test tests probes beside real servers.
package health_test

import (
	"testing"

	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, nil) }

type world struct{ *e2e.World }

func newWorld(t testing.TB, addresses ...string) *world { return &world{e2e.New(t, addresses...)} }
