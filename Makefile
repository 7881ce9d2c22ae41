# Everything a contributor does here. `make` alone shows the list.
VERSION  := $(shell git describe --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w
GOBUILD  := CGO_ENABLED=0 go build -trimpath
PREFIX   ?= /usr/local
FUZZTIME ?= 30s

.DEFAULT_GOAL := help
.PHONY: help setup build test test-guests test-faults lint bench fuzz check install man clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install the host packages and Go, then build
	./setup.sh

build: bin/pyro-runsc ## build bin/pyro, bin/pyro-agent and bin/pyro-runsc
	$(GOBUILD) -ldflags "$(LDFLAGS) -X github.com/pyro-mcp/pyro/internal/cli.Version=$(VERSION)" -o bin/pyro ./cmd/pyro
	$(GOBUILD) -ldflags "$(LDFLAGS)" -o bin/pyro-agent ./cmd/pyro-agent

# gVisor's runtime: minutes the first time, and only when its module changes.
bin/pyro-runsc: runsc/main.go runsc/go.mod runsc/go.sum
	cd runsc && $(GOBUILD) -ldflags "$(LDFLAGS)" -o ../bin/pyro-runsc .

# RERUNS is how often a test that failed is run again, by itself: CI says 1, so that
# one that a busy machine makes fail holds nobody up. Both runs are reported. A
# package in which more than three failed, or one that died, is not run again.
RERUNS ?= 0
# $(call gotest,FLAGS,PACKAGES)
gotest = $(if $(filter 0,$(RERUNS)),go test $(1) $(2),go tool gotestsum --format pkgname-and-test-fails --rerun-fails=$(RERUNS) --rerun-fails-max-failures=3 --packages="$(2)" -- $(1))

# Go does not see that the programs which test/... runs have changed: -count=1.
test: ## run the tests that need no guest, with the race detector
	$(call gotest,-race,$$(go list ./... | grep -v /test/))
	$(call gotest,-race -count=1,./test/...)

test-guests: build ## run the engine suite and the scenarios on real guests
	PYRO_TEST_ENGINE=gvisor PYRO_RUNSC=$(CURDIR)/bin/pyro-runsc $(call gotest,-count=1 -timeout 30m,./internal/engine/... $$(go list ./test/... | grep -v /faults))
	PYRO_TEST_ENGINE=qemu $(call gotest,-count=1 -timeout 40m,$$(go list ./test/... | grep -v /faults))

# FAULT_ENGINES are the engines to break: CI gives each a job of its own.
FAULT_ENGINES ?= host gvisor qemu
test-faults: build ## kill, fill, damage and race pyro at every step, on each of FAULT_ENGINES
	@set -e; for e in $(FAULT_ENGINES); do echo "engine $$e"; \
		PYRO_TEST_ENGINE=$$e PYRO_TEST_REQUIRE=faults,$$e PYRO_RUNSC=$(CURDIR)/bin/pyro-runsc \
		go test -count=1 -timeout 90m ./test/faults; done

lint: ## gofmt, go vet, staticcheck, errcheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "run gofmt -w on these"; exit 1; }
	go vet ./...
	go tool staticcheck ./...
	go tool errcheck -ignoretests -exclude .errcheck ./...

bench: build ## measure against something named, write docs/performance.md: 25 minutes
	go test -run '^$$' -bench . -benchtime 1x -timeout 60m ./bench/ | go run ./bench/page -o docs/performance.md

fuzz: ## fuzz every decoder for FUZZTIME each (default 30s)
	@set -e; for pkg in $$(go list ./...); do \
		for f in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "$$pkg $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; done

check: lint test ## what must pass before a commit

install: build man ## install into PREFIX (default /usr/local)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 755 bin/pyro bin/pyro-agent bin/pyro-runsc $(DESTDIR)$(PREFIX)/bin/
	install -m 644 bin/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1/

man: ## write the manual pages to bin/man
	go run -ldflags "-X github.com/pyro-mcp/pyro/internal/cli.Version=$(VERSION)" ./cmd/pyro-man bin/man

clean: ## remove what build made
	rm -rf bin
