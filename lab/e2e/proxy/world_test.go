// Package proxy_test tests proxies with clients and servers that nobody here wrote.
package proxy_test

import (
	"testing"

	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, clients) }

type world struct{ *e2e.World }

func newWorld(t testing.TB, addresses ...string) *world { return &world{e2e.New(t, addresses...)} }
