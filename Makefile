# One entry point for everything; `make help` lists the targets.
SHELL := /bin/bash

# giouring reaches into the syscall package, which linkers since Go 1.23 refuse
# unless told otherwise.
GOFLAGS_LINK := -ldflags=-checklinkname=0
STATICCHECK  := honnef.co/go/tools/cmd/staticcheck@v0.7.0
PREFIX       ?= /usr/local
STORE        ?= file
SEEDS        ?= 500
FIRST        ?= 0
FUZZTIME     ?= 30s
# Says what is being done, and how long it took.
STAGE        := scripts/stage
export CGO_ENABLED := 1

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/lsdd, bin/lsdctl, and the C library in bin/librbd
	go build $(GOFLAGS_LINK) -o bin/ ./cmd/lsdd ./cmd/lsdctl
	$(MAKE) --no-print-directory -s -C librbd BIN=$(CURDIR)/bin/librbd

.PHONY: demo
demo: setup build ## the whole path on one machine: create, attach, mkfs, kill -9, verify (STORE=file|rados)
	scripts/demo $(STORE)

.PHONY: test
test: setup check unit on-ceph vm ## everything that CI runs, set-up included

.PHONY: setup
setup: ## install what building, tests and lab need (Debian 12, as root)
	scripts/setup all

.PHONY: check
check: ## gofmt, vet, staticcheck, for every build tag
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$unformatted" || { echo "not gofmt'ed: $$unformatted" >&2; exit 1; }
	$(STAGE) "vet" go vet $(GOFLAGS_LINK) -tags lab,ublk,e2e,invariants,mutate ./...
	$(STAGE) "staticcheck" go run $(STATICCHECK) -tags lab,ublk,e2e,invariants,mutate ./...

# Those with tests that the race detector does not see in the short form: see internal/racetest.
slow_packages = $(shell git grep -l 'racetest\.Slow(t)' -- '*_test.go' | xargs -n1 dirname | sort -u | sed 's|^|./|')

# Stages that wait more than they compute run side by side, each in one piece of the output.
SIDE_BY_SIDE := $(MAKE) --no-print-directory -j2 --output-sync=target

.PHONY: unit
unit: ## unit tests: all with the race detector, in short; whole packages without it where it leaves tests out; simulation and fuzz seeds
	$(STAGE) "unit tests with the race detector" go test $(GOFLAGS_LINK) -race -short -timeout 20m $$(go list ./... | grep -v /tests/bench$$)
	$(SIDE_BY_SIDE) whole-packages costs simulations

.PHONY: whole-packages
whole-packages:
	$(STAGE) "whole packages without it" go test $(GOFLAGS_LINK) -tags invariants -timeout 20m $(slow_packages)

.PHONY: costs
costs:
	$(STAGE) "tests of the benchmarks" go test $(GOFLAGS_LINK) -timeout 15m ./tests/bench
	$(STAGE) "what a hundred images cost" go test $(GOFLAGS_LINK) -count=1 -run 'Hundred|Hung' -v ./internal/daemon

.PHONY: simulations
simulations:
	$(STAGE) "simulation" $(MAKE) --no-print-directory sim SEEDS=1000
	$(STAGE) "simulation of planted bugs" $(MAKE) --no-print-directory sim-mutations

.PHONY: race
race: ## everything that is not in a VM or on Ceph with the race detector, long form
	$(STAGE) "all tests with the race detector" go test $(GOFLAGS_LINK) -race -timeout 0 $$(go list ./... | grep -v /tests/bench)

.PHONY: lab
lab: ## the stores' conformance suite, fencing, and diffs from and to rbd, on a real Ceph cluster
	$(STAGE) "stores on real Ceph" go test $(GOFLAGS_LINK) -tags lab -timeout 10m ./backend/...
	$(STAGE) "fencing on real Ceph" go test $(GOFLAGS_LINK) -tags lab -timeout 5m -run RADOS ./engine
	$(STAGE) "diffs from and to rbd" go test $(GOFLAGS_LINK) -tags lab -timeout 5m -run RBD ./cmd/lsdctl

.PHONY: on-ceph
on-ceph: build ## lab and librbd, side by side
	$(SIDE_BY_SIDE) lab librbd

.PHONY: vm
vm: build ## ublk and end-to-end tests on kernels 6.12 and 7.2, short form
	@for k in 6.12 7.2; do scripts/stage "ublk on kernel $$k" \
	  go test $(GOFLAGS_LINK) -tags ublk -count=1 -exec "$(CURDIR)/scripts/vm --kernel $$k --timeout 600 --" ./ublk || exit 1; done
	$(STAGE) "end to end on real ublk kernels" scripts/e2e --short

.PHONY: vm-long
vm-long: build ## the same, long form
	scripts/e2e --long

# HOURS or MINUTES in all, half of it on each store.
soak_seconds := $(shell echo $$(( ($(or $(MINUTES),$(if $(HOURS),$(HOURS) * 60,5)) * 60) / 2 )))

.PHONY: soak
soak: build ## everything at once in the VM, on both stores: HOURS=1 or MINUTES=5, SEED=n to do it again
	scripts/e2e --soak $(soak_seconds) --seed $(or $(SEED),0)

.PHONY: sim
sim: ## the simulation over many seeds (SEEDS=500, FIRST=0), or one (SEED=123)
	go test $(GOFLAGS_LINK) -tags invariants -c -o bin/sim.test ./engine
ifdef SEED
	@echo "== seed $(SEED); what happens goes to bin/sim-$(SEED).log"
	bin/sim.test -test.run 'Simulation$$' -test.timeout 0 -sim.seeds 1 -sim.first $(SEED) -sim.log 2>bin/sim-$(SEED).log
else
	bin/sim.test -test.run 'Simulation$$' -test.timeout 0 -sim.seeds $(SEEDS) -sim.first $(FIRST) -sim.progress
endif

.PHONY: sim-mutations
sim-mutations: ## plants bugs, one at a time: the simulation must find each within 3000 seeds
	go test $(GOFLAGS_LINK) -tags invariants,mutate -timeout 0 -count=1 -v -run 'Mutation' ./engine

.PHONY: fuzz
fuzz: ## each fuzz test for FUZZTIME (30s)
	scripts/fuzz $(FUZZTIME)

.PHONY: fuzz-long
fuzz-long: ## each fuzz test for a minute
	$(MAKE) fuzz FUZZTIME=1m

BESIDE := go build $(GOFLAGS_LINK) -o bin/ ./tests/bench/beside && bin/beside
# ONLY=name, CASES=regex, TURNS=n: see bin/beside run --help
beside_flags = $(if $(ONLY),--only '$(ONLY)') $(if $(CASES),--cases '$(CASES)') $(if $(TURNS),--turns $(TURNS))

.PHONY: bench
bench: setup build ## lsd side by side with its peers, and the tables and plots of docs/benchmarks.md: nearly three hours (ONLY=name|name TURNS=5)
	$(if $(CASES),@echo "CASES is for make bench-short: docs/benchmarks.md has all" >&2; exit 1)
	scripts/setup bench
	$(BESIDE) run --out docs/benchmarks $(beside_flags); ran=$$?; bin/beside report && exit $$ran

.PHONY: bench-short
bench-short: setup build ## a first look at the same, ten minutes, into bin/beside.out (ONLY=name|name CASES=regex TURNS=1)
	scripts/setup bench
	$(BESIDE) run --short $(beside_flags)

.PHONY: bench-ublk
bench-ublk: setup ## what ublk's features do that lsd goes without, each on and off, in the VM: zero copy, threads (TURNS=5)
	go test $(GOFLAGS_LINK) -tags ublk -count=1 -run xxx -bench 'ZeroCopy|Threads' -benchtime 1x -timeout 0 \
	  -exec "$(CURDIR)/scripts/vm --cpus 2 --timeout 3600 --disk 1G --" ./ublk -ublk.disk /dev/vda $(if $(TURNS),-ublk.turns $(TURNS))

.PHONY: bench-engine
bench-engine: ## the engine's cost in CPU
	go test $(GOFLAGS_LINK) -run xxx -bench . -benchmem ./engine ./internal/extmap

.PHONY: bench-space
bench-space: ## write and space amplification of overwrites, beside theory
	go test $(GOFLAGS_LINK) -run xxx -bench Amplification -benchtime 1x -timeout 0 -v ./tests/bench

.PHONY: bench-latency
bench-latency: ## latency of writes with and without the cleaner, and under overload
	go test $(GOFLAGS_LINK) -run xxx -bench 'CleanerLatency|Overload' -benchtime 1x -timeout 0 -v ./tests/bench -bench.rounds 10

.PHONY: bench-read
bench-read: ## reads through the engine and its read cache beside the store alone: a directory, and Ceph
	go test $(GOFLAGS_LINK) -tags lab -run xxx -bench ReadPath -benchtime 1x -timeout 0 ./tests/bench

.PHONY: bench-scale
bench-scale: ## opening images up to 64 TiB: time and memory against size, objects and log
	go test $(GOFLAGS_LINK) -run TestHugeImage -bench 'Open$$|Replay|DirtyLog|HugeImage' -benchtime 1x -timeout 0 -v ./engine

.PHONY: librbd
librbd: build ## the C library's own tests, with ASan and UBSan, then fio, QEMU and kills on a directory and on Ceph
	$(STAGE) "the C library by itself" $(MAKE) --no-print-directory -C librbd SAN=1 test
	go test $(GOFLAGS_LINK) -count=1 -run Alloc -v ./librbd/ring
	$(STAGE) "unchanged programs on the C library" go test $(GOFLAGS_LINK) -tags lab -count=1 -short -timeout 15m ./tests/librbd

.PHONY: librbd-long
librbd-long: build ## the same programs, long form: guests, resizes, mirrors and migrations on Ceph as well
	go test $(GOFLAGS_LINK) -tags lab -count=1 -timeout 20m ./tests/librbd

# ASan's library does not let librados throw in programs in C, as QEMU, Python and tgt on Ceph are: it is there before
# C++'s. And QEMU's -daemonize forks while another thread of its own may be in ASan's allocator, whose lock the child
# then waits for without end. UBSan alone has everything.
.PHONY: librbd-san
librbd-san: build ## all these programs on the C library with UBSan, and with ASan where that can be (SHORT=-short)
	$(MAKE) --no-print-directory -s -C librbd SAN=1 BIN=$(CURDIR)/bin/san/librbd
	$(MAKE) --no-print-directory -s -C librbd UBSAN=1 BIN=$(CURDIR)/bin/ubsan/librbd
	cp bin/lsdctl bin/san/
	cp bin/lsdctl bin/ubsan/
	LSD_LIBRBD_SAN=san go test $(GOFLAGS_LINK) -tags lab -count=1 -timeout 20m $(SHORT) \
		-run 'Fio|Killed|GoCeph|OtherUser|(QEMU|Cinder|Tgt|Guest|BlockResize|Mirror|Migration|Grows)/file' ./tests/librbd
	LSD_LIBRBD_SAN=ubsan go test $(GOFLAGS_LINK) -tags lab -count=1 -timeout 20m $(SHORT) -skip Install ./tests/librbd

# SYSTEM=1 puts the directory before that of the distribution's librbd for all programs; without it
# the line is there and does nothing.
.PHONY: install-librbd
install-librbd: build ## install the C library below PREFIX, where lsdctl run finds it; SYSTEM=1: where all programs do
	install -d $(DESTDIR)$(PREFIX)/lib/lsd $(DESTDIR)/etc/ld.so.conf.d
	install -m 0644 bin/librbd/librbd.so.1 bin/librbd/librbd-preload.so $(DESTDIR)$(PREFIX)/lib/lsd/
	echo '$(if $(SYSTEM),,# )$(PREFIX)/lib/lsd' > $(DESTDIR)/etc/ld.so.conf.d/00-lsd-librbd.conf
	$(if $(DESTDIR),,ldconfig)

.PHONY: install
install: build ## install the binaries and the systemd unit below PREFIX
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)/etc/systemd/system
	install -m 0755 bin/lsdd bin/lsdctl $(DESTDIR)$(PREFIX)/bin/
	sed 's|/usr/local/bin|$(PREFIX)/bin|' dist/lsd.service > $(DESTDIR)/etc/systemd/system/lsd.service

.PHONY: clean
clean: ## remove what was built
	rm -rf bin
