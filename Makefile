# Two commands do all the set-up on a fresh machine: make demo, make test.
# They need Go 1.26 (or any Go since 1.21, which fetches it) and Linux.

PREFIX  ?= /usr/local
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT  ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
LDFLAGS  = -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
SUDO     = $(if $(filter 0,$(shell id -u)),,sudo)
AS_ROOT  = $(SUDO) env "PATH=$$PATH" "HOME=$$HOME" "CI=$$CI"
GO       = $(shell command -v go)
# The commands' documentation needs the programs' types: those come first.
GENERATE = $(GO) generate ./plane/... ./announce/... ./drops ./bench/... ./api/... && $(GO) generate ./cmd/...
# Go files that people write.
GOFILES  = $(shell git ls-files '*.go' | grep -v '_bpfel\.go$$')
CFILES   = $(shell git ls-files '*.bpf.c' '*/bpf/*.h')

# Packages whose tests need neither root nor a kernel of their own.
PURE     = ./api/... ./claim ./config ./doctor ./drops ./flow ./health/... ./ipam ./nodehealth ./proxy/... ./service ./source/file ./view

.PHONY: all build generate format check test bench bench-kube demo package package-check install clean

all: build

# Without the tag gRPC brings its traces along, whose templates call methods by name: the
# linker keeps every method of every type then, and the program is half as large again.
build:
	CGO_ENABLED=0 $(GO) build -trimpath -tags grpcnotrace -ldflags '$(LDFLAGS)' -o bin/pentad ./cmd/pentad
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o bin/pentad-cni ./cmd/pentad-cni

# The compiled programs, the page, and the documentation that is written from the code.
generate:
	scripts/need generate
	$(GENERATE)

format:
	scripts/need generate
	gofmt -w $(GOFILES)
	clang-format-19 -i $(CFILES)

check:
	scripts/need generate check
	@bad=$$(gofmt -l $(GOFILES)); [ -z "$$bad" ] || { echo "gofmt would change: $$bad; run make format"; exit 1; }
	clang-format-19 --dry-run -Werror $(CFILES)
	$(GO) vet ./...
	$(GO) vet -tags cluster ./lab/e2e/pods
	$(GO) tool staticcheck ./...
	CGO_ENABLED=1 $(GO) test -race -count=1 $(PURE)
	$(AS_ROOT) CGO_ENABLED=1 $(GO) test -race -count=1 ./agent ./announce/...
	$(GO) mod tidy -diff
	@before=$$(git status --porcelain); $(GENERATE) && after=$$(git status --porcelain) && \
	[ "$$before" = "$$after" ] || { echo "generated files were not up to date:"; git diff --stat; exit 1; }
	npm --prefix api/web/app run --silent check

# Real kernel, real clients and servers: needs root. The tests of a cluster compile
# Kubernetes, once, and keep all processors busy: they run by themselves, because
# others measure latencies; so do those of other rooms that have the tag cluster. Both
# halves run, whatever becomes of the first.
test:
	scripts/need test
	@worst=0; \
	set -x; \
	$(AS_ROOT) $(GO) test -count=1 -timeout 15m $$($(GO) list ./... | grep -v /lab/e2e/cluster) || worst=$$?; \
	$(AS_ROOT) $(GO) run ./lab/kube/compile && $(AS_ROOT) $(GO) test -count=1 -timeout 30m ./lab/e2e/cluster || worst=$$?; \
	$(AS_ROOT) $(GO) test -count=1 -timeout 5m -tags cluster -run TestCluster ./lab/e2e/pods || worst=$$?; \
	exit $$worst

bench-kube: build
	scripts/need bench-kube
	$(GO) build -o bin/bench-kube ./bench/kube
	$(SUDO) env "PATH=$$PATH" "HOME=$$HOME" bin/bench-kube -pentad bin/pentad

bench: build
	scripts/need bench
	$(GO) build -o bin/bench ./bench
	$(SUDO) bin/bench -pentad bin/pentad

# dist/: a deb and an rpm for each architecture.
package:
	scripts/need package
	scripts/package $(VERSION) $(COMMIT) $(GO)

# Installs, replaces, removes and purges the package in a fresh Debian.
package-check: package
	$(SUDO) deploy/package/try dist/pentad_*_$$($(GO) env GOARCH).deb

demo: build
	$(SUDO) bin/pentad demo

install: build
	install -D -m 755 bin/pentad $(DESTDIR)$(PREFIX)/bin/pentad
	install -D -m 755 bin/pentad-cni $(DESTDIR)/opt/cni/bin/pentad-cni
	install -D -m 644 deploy/systemd/pentad.service $(DESTDIR)/etc/systemd/system/pentad.service
	sed -i 's#/usr/local/bin#$(PREFIX)/bin#' $(DESTDIR)/etc/systemd/system/pentad.service
	[ -e $(DESTDIR)/etc/pentad/pentad.yaml ] || install -D -m 644 deploy/pentad.yaml $(DESTDIR)/etc/pentad/pentad.yaml

clean:
	rm -rf bin dist bench/.work
