package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Version is the Kubernetes that the tests run, as lab/kube/binaries/go.mod has it.
const Version = "v1.34.2"

// Program is a program of Kubernetes.
type Program string

// The programs.
const (
	APIServer         Program = "kube-apiserver"
	ControllerManager Program = "kube-controller-manager"
	Proxy             Program = "kube-proxy"
	Scheduler         Program = "kube-scheduler"
	Kubelet           Program = "kubelet"
)

// Build compiles programs, unless an earlier run has, and returns the directory
// that holds them. They lie in the user's cache, because a cold build takes
// minutes: the module binaries names them, and nothing of Kubernetes' own code is
// a dependency of pentad.
func Build(ctx context.Context, programs ...Program) (string, error) {
	packages := make([]string, len(programs))
	for i, p := range programs {
		packages[i] = "k8s.io/kubernetes/cmd/" + string(p)
	}
	return compile(ctx, "binaries", "kubernetes-"+Version, "-s -w -X k8s.io/component-base/version.gitVersion="+Version, packages)
}

// HelmVersion is the Helm that renders the chart, as lab/kube/helm/go.mod has it.
const HelmVersion = "v3.19.2"

// Helm compiles Helm in the same way and returns its path.
func Helm(ctx context.Context) (string, error) {
	dir, err := compile(ctx, "helm", "helm-"+HelmVersion, "-s -w", []string{"helm.sh/helm/v3/cmd/helm"})
	return filepath.Join(dir, "helm"), err
}

// compile builds packages of the module beside this file whose programs are missing
// in a directory of the cache.
func compile(ctx context.Context, module, name, flags string, packages []string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "pentad", name+"-"+runtime.GOARCH)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(dir)
	if err != nil {
		return "", err
	}
	defer unlock()
	var missing []string
	for _, p := range packages {
		if _, err := os.Stat(filepath.Join(dir, filepath.Base(p))); errors.Is(err, os.ErrNotExist) {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return dir, nil
	}
	next := filepath.Join(dir, "next") + "/"
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-v", "-trimpath", "-ldflags", flags, "-o", next}, missing...)...)
	if cmd.Dir, err = moduleDir(module); err != nil {
		return "", err
	}
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	said := &progress{what: name, every: progressEvery}
	cmd.Stdout, cmd.Stderr = said, said
	said.say(fmt.Sprintf("compiling %s, once, into %s: this takes minutes", strings.Join(missing, ", "), dir))
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", strings.Join(missing, ", "), err, tail(said.text.String()))
	}
	for _, m := range missing {
		program := filepath.Base(m)
		if err := os.Rename(next+program, filepath.Join(dir, program)); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// progressEvery is how often a long compilation says that it goes on.
const progressEvery = 15 * time.Second

// progress counts the packages that go build -v names, and says how many there are.
type progress struct {
	what  string
	every time.Duration
	text  strings.Builder
	began time.Time
	last  time.Time
	count int
}

func (p *progress) say(text string) {
	p.began, p.last = time.Now(), time.Now()
	fmt.Fprintln(os.Stderr, text)
}

// Write takes what go build says.
func (p *progress) Write(b []byte) (int, error) {
	p.count += bytes.Count(b, []byte("\n"))
	if time.Since(p.last) >= p.every {
		p.last = time.Now()
		fmt.Fprintf(os.Stderr, "%s: %d packages in %s\n", p.what, p.count, time.Since(p.began).Round(time.Second))
	}
	return p.text.Write(b)
}

// lock keeps two test programs from building the same.
func lock(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// moduleDir finds a module beside this file.
func moduleDir(name string) (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("where the module lies: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "lab", "kube", name), nil
}
