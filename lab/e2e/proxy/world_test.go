// Package proxy_test tests proxies with clients and servers that nobody here wrote.
package proxy_test

import (
	"testing"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, clients) }

type world struct{ *e2e.World }

func newWorld(t testing.TB, addresses ...string) *world { return &world{e2e.New(t, addresses...)} }

// another makes a host beside the one of the world.
func (w *world) another() *lab.Host {
	w.T.Helper()
	h, err := lab.NewHost()
	if err != nil {
		w.T.Fatal(err)
	}
	w.T.Cleanup(func() {
		if err := h.Close(); err != nil {
			w.T.Error(err)
		}
	})
	return h
}
