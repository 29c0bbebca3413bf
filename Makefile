# `make run` and `make test` are all that a fresh machine needs: Python 3.11, make and git are the only things asked for.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
JOBS ?= 2

.PHONY: setup run test lint bench bench-accuracy up clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Sora needs Python 3.11: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; rm -rf $(VENV); exit 1; }
	@echo "Installing the locked environment into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

run: setup
	$(BIN)/sora run

up: setup
	$(BIN)/sora up

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .sora prepared data
