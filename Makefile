# `make run` and `make test` are all that a fresh machine needs: Python 3.11, make and git are the only things asked for.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/installed
TESTS := $(VENV)/installed-dev
# Tools with environments of their own, so that neither lock carries them.
RELEASE := .venv-release
AUDIT := .venv-audit
DIST ?= dist
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
JOBS ?= 2
# Bytecode is compiled after the installation, on all cores: pip's own took three times as long, and without any an
# environment that forbids writing it would have every process compile everything again.
INSTALL = $(BIN)/python -m pip install --quiet --no-deps --no-compile
# Some packages carry templates that are no Python; what does not compile does not matter.
COMPILE = $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true

.PHONY: setup setup-dev run test test-fast test-faults coverage lint up clean bench bench-accuracy bench-soak faults release audit

setup: $(RUNS)

setup-dev: $(TESTS)

$(RUNS): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Sora needs Python 3.11: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; rm -rf $(VENV); exit 1; }
	@echo "Installing the locked environment into $(VENV) (some minutes the first time)"
	@$(INSTALL) --require-hashes -r requirements.lock
	@$(INSTALL) --no-build-isolation -e .
	@$(COMPILE)
	@touch $@

$(TESTS): $(RUNS) requirements-dev.lock
	@$(INSTALL) --require-hashes -r requirements-dev.lock
	@$(COMPILE)
	@touch $@

$(RELEASE)/installed $(AUDIT)/installed: .venv-%/installed: requirements-%.lock
	@rm -rf .venv-$*
	@$(PYTHON) -m venv .venv-$* || python3 -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --no-deps --require-hashes -r $<
	@touch $@

run: setup
	$(BIN)/sora run

up: setup
	$(BIN)/sora up

# tests/tiers.py orders the files, the longest first; xdist's own order (most tests first) would end with some of them.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# All tests. The summary before the last line says what was skipped, and why.
test: setup-dev
	$(PYTEST)

# No server, no training, no TensorFlow.
test-fast: setup-dev
	$(PYTEST) -m "not slow"

# Runs and servers under one fault each (kills, full disks, servers away, clocks); the rest of tests/faults is in `test`.
test-faults: setup-dev
	SORA_FAULTS=1 $(PYTEST) tests/faults

# All tests, and which lines of sora and flows they ran, in every process: a table, and pages in .coverage-html.
coverage: setup-dev
	$(PYTEST) --cov --cov-report=term --cov-report=html:.coverage-html $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# Under 20 minutes: preprocessing, loading, training throughput.
bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

# Hours, in pieces: each finished fold is a file in benchmarks/results/folds, to be committed, and a run computes what is
# missing. Options: ARGS="--set motions8 --next 3" (three folds), ARGS="--set motions8 --baseline mean-image".
bench-accuracy: setup
	$(BIN)/python -m benchmarks.accuracy $(ARGS)

# Half an hour: a project is trained, then its champion moves 40 times under load. Options: ARGS="--minutes 5 --moves 5"
bench-soak: setup
	$(BIN)/python -m benchmarks.serving.soak $(ARGS)

# A hundred faults at random moments, in pieces of ten minutes: call it until all have a result. Options:
# ARGS="--next 5", ARGS="--scenes DIR" (keeps the projects between the pieces), ARGS=--summary (the table).
faults: setup
	$(BIN)/python -m benchmarks.faults $(ARGS)

# Archives for a release and, beside them, the bill of materials of the locked environment (CycloneDX, validated).
release: $(RELEASE)/installed
	$(RELEASE)/bin/python -m build --no-isolation --outdir $(DIST)
	$(RELEASE)/bin/cyclonedx-py requirements --pyproject pyproject.toml --spec-version 1.6 --output-format JSON \
		--output-reproducible --output-file $(DIST)/sora-video-$(VERSION).cdx.json requirements.lock

# Known vulnerabilities of everything locked, asked of PyPI's advisory service. No part of `make test`: it needs that
# service, and its answer changes without a change here.
audit: $(AUDIT)/installed
	@$(AUDIT)/bin/python infra/audit.py $(ARGS)

clean:
	rm -rf $(VENV) $(RELEASE) $(AUDIT) .sora prepared data
