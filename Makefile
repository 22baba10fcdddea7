# A fresh machine needs git, make, gcc and Python >= 3.11; everything else comes into .venv.
#
#   make demo      install, then the whole way of the data on the embedded sample; DEMO="--dir DIR" elsewhere
#   make test      install, then the tests (minutes); make test-all runs the long ones
#   make check     lint, format and types; make fix repairs what can be repaired
#
# PYTHON=python3.12 make …   chooses the interpreter that makes .venv

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV := $(shell sed -n 's/^uv==/uv==/p' requirements.lock)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SOURCES := training data models launch eval tests benchmarks

.PHONY: help install demo test test-all check fix clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; name one: make PYTHON=/path/to/python3.12 …" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is not a Python >= 3.11; name one: make PYTHON=/path/to/python3.12 …" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "$(UV)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	$(BIN)/python -m launch.demo $(DEMO)

test: install
	$(PYTEST) -m "not all" $(ARGS)

test-all: install
	$(PYTEST) -o faulthandler_timeout=2400 -m all $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs are results: they stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
