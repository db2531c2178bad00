# Everything a developer does, one word each. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARGS ?=
LOCK_ARGS ?=
PREFIX ?= /opt/replicator
DESTDIR ?=

# Named after what was installed and where: the same files again cost nothing, a changed pin or a
# moved checkout installs again.
STAMP := $(VENV)/.stamp-$(shell { pwd; cat requirements/dev.txt pyproject.toml; } | sha256sum | cut -c1-16)
BENCH_STAMP := $(VENV)/.stamp-bench-$(shell sha256sum <requirements/bench.txt | cut -c1-16)
NPM_BIN := .peers/node_modules/.bin
CODE := $(wildcard protocol replicator agents bench tests)
PYTEST := $(BIN)/python -m pytest
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP_COMPILE = env -u PIP_FIND_LINKS $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
	--no-header --no-emit-index-url --no-emit-find-links --no-emit-trusted-host $(LOCK_ARGS)

.PHONY: help setup peers demo test test-unit test-release lint bench docs lock install clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv with everything pinned, and the product in it (instant when nothing changed)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: $(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 or newer is needed: make setup PYTHON=python3.11" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "setup: $(PYTHON) cannot make a venv; on Debian: apt-get install python3-venv" >&2; \
		exit 1; }
	@rm -f $(VENV)/.stamp-*
	@{ [ -x $(BIN)/pip ] && grep -qsF " $(CURDIR)/$(VENV)" $(VENV)/pyvenv.cfg; } || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) --require-hashes -r requirements/dev.txt
	@# compat: one plain .pth line, so that no import hook is paid for at every start. Its setuptools is pinned.
	PYTHONWARNINGS="ignore:Compat editable installs" $(PIP_INSTALL) --no-deps --no-build-isolation \
		--config-settings editable_mode=compat -e .
	@touch $@

peers: ## check for the programs the tests talk to; as root, install what is missing
	@.ci/peers

demo: setup ## every role on this machine, ending with a verified VMDK (ARGS="--json", ARGS="--azure")
	@.ci/peers --optional $(filter --azure,$(ARGS))
	@PATH="$(CURDIR)/$(NPM_BIN):$$PATH" $(BIN)/replicator demo $(ARGS)

test: setup peers ## the whole suite, sized for every run (ARGS="tests/house -k layers" for a part)
	$(PYTEST) -n $(JOBS) --dist loadfile --durations=15 --durations-min=1 $(ARGS)

test-unit: setup ## what needs no program of others
	$(PYTEST) -n $(JOBS) --dist loadfile --durations=15 --durations-min=1 -m "not peer and not release" $(ARGS)

test-release: setup peers ## the whole suite with the long runs and the release counts: hours
	REPLICATOR_RELEASE=1 $(PYTEST) -n $(JOBS) --dist loadfile --durations=0 --durations-min=1 --timeout=28800 -m "" $(ARGS)

lint: setup ## ruff and mypy --strict: seconds
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy --strict $(CODE)

bench: setup $(BENCH_STAMP) ## the benchmark table on this machine: 20 minutes (ARGS="--quick": 3)
	@.ci/peers --bench
	@$(BIN)/replicator bench --output bench/results/bench.json --plot bench/results $(ARGS)

$(BENCH_STAMP): $(STAMP)
	@rm -f $(VENV)/.stamp-bench-*
	$(PIP_INSTALL) --require-hashes -r requirements/bench.txt
	@touch $@

docs: setup ## draw the state tables of the code into protocol/SPEC.md again
	$(BIN)/python -m protocol.diagrams --write

lock: setup ## compile requirements/*.in to pins with hashes (LOCK_ARGS=--upgrade for newer versions)
	$(PIP_COMPILE) --output-file requirements/runtime.txt requirements/runtime.in
	$(PIP_COMPILE) --output-file requirements/dev.txt requirements/dev.in
	$(PIP_COMPILE) --output-file requirements/bench.txt requirements/bench.in
	cd requirements/npm && npm install --package-lock-only --omit-lockfile-registry-resolved --ignore-scripts --no-fund --no-audit

install: setup ## a venv of its own in PREFIX (/opt/replicator), systemd units, samples; DESTDIR for packages
	@.ci/install "$(DESTDIR)" "$(PREFIX)" "$(PYTHON)" "$(BIN)"

clean: ## remove environments, fetched parts, caches and build leftovers
	rm -rf $(VENV) .peers .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
