package socket

import (
	"context"
	"path/filepath"
	"strings"

	"github.com/fsnotify/fsnotify"

	"github.com/pentad/pentad/host"
)

// watchScope tells when the cgroup of the scope is made again: a unit that is
// restarted has another one of the same name, and its processes connect at once.
func (p *Plane) watchScope(ctx context.Context) {
	w, err := newScopeWatch()
	if err != nil {
		p.opts.Log.Warn("a scope.cgroup that is made again will have its hooks a second late", "error", err)
		return
	}
	defer w.watcher.Close()
	for {
		w.follow(p.scopeNow())
		select {
		case <-ctx.Done():
			return
		case <-p.scoped:
		case e := <-w.watcher.Events:
			if w.isMade(e) {
				p.opts.Lost()
			}
		case <-w.watcher.Errors:
			// Events were lost: what they would have told is seen when Intact is asked.
		}
	}
}

// scopeNow returns the cgroup that was applied last.
func (p *Plane) scopeNow() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.scope
}

// setScope notes which cgroup is wanted, whether it is there or not; the caller holds
// the lock.
func (p *Plane) setScope(cgroup string) {
	if p.scope == cgroup {
		return
	}
	p.scope = cgroup
	select {
	case p.scoped <- struct{}{}:
	default:
	}
}

// scopeWatch watches one cgroup.
type scopeWatch struct {
	watcher *fsnotify.Watcher
	cgroup  string // its name
	root    string // of the hierarchy
	path    string // of the cgroup
}

// newScopeWatch returns a watch of nothing.
func newScopeWatch() (*scopeWatch, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	return &scopeWatch{watcher: w}, nil
}

// follow watches the cgroup of this name from now on.
func (s *scopeWatch) follow(cgroup string) {
	if cgroup == s.cgroup {
		return
	}
	root, err := host.CgroupRoot()
	if err != nil {
		return
	}
	for _, dir := range s.watcher.WatchList() {
		// It may be gone already.
		_ = s.watcher.Remove(dir)
	}
	s.cgroup, s.root, s.path = cgroup, root, filepath.Join(root, cgroup)
	s.look()
}

// look watches every directory on the way to the cgroup that there is: each of them
// may go and come again.
func (s *scopeWatch) look() {
	for dir := s.path; dir != s.root && len(dir) > len(s.root); {
		dir = filepath.Dir(dir)
		// One that is missing is told of by the one above it.
		_ = s.watcher.Add(dir)
	}
}

// isMade reports whether an event says that the cgroup may be there again.
func (s *scopeWatch) isMade(e fsnotify.Event) bool {
	if e.Name != s.path && !strings.HasPrefix(s.path, e.Name+"/") {
		return false
	}
	s.look()
	return e.Has(fsnotify.Create)
}
