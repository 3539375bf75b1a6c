# Two commands do everything on a fresh machine with Python 3.11 or 3.12: `make demo` and `make test`.
# Both make .venv on their first run and install into it once; a second run installs nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Give another interpreter with `make PYTHON=/path/to/python3.12 test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do command -v $$p >/dev/null && \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && \
	echo $$p && break; done)
# The build of torch is the machine's business (CPU or CUDA), so it is pinned here and nowhere else.
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SUDO = $(shell [ $$(id -u) = 0 ] || echo sudo)

.PHONY: help demo test chaos lint types install system-deps clean

help: ## Say what the targets do
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: $(STAMP) ## Train two sample concepts end to end, serve them, write runs/demo/report.html
	@$(VENV)/bin/echodistill demo

test: $(STAMP) ## Run every test that needs no GPU
	@# Tests that run a Ray fill two cores, so they follow each other; the others do not wait for
	@# them. A Ray driver that has lived through many can end a process that starts ranks of its own.
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal tests/test_house.py tests/unit
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile -m "not ray" tests/integration
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m ray tests/integration tests/chaos

chaos: $(STAMP) ## Train twelve concepts under twenty-five faults; takes many minutes
	@OMP_NUM_THREADS=1 $(PY) -m tests.chaos

lint: $(STAMP) ## Check style (ruff) and types (mypy)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

install: $(STAMP) ## Make .venv and install into it

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(PY) ]; then \
	  if [ -z "$(PYTHON)" ]; then \
	    echo "EchoDistill needs Python 3.11 or 3.12, and none is on the PATH: install one (Debian, Ubuntu:" \
	      "apt-get install python3 python3-venv) or give it with make PYTHON=/path/to/python3.12" >&2; exit 2; fi; \
	  echo "making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "$(PYTHON) cannot make a virtual environment: on Debian or Ubuntu, apt-get install" \
	      "python3-venv (or $(notdir $(PYTHON))-venv), then run make again" >&2; exit 2; }; fi
	@$(PY) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
	  echo "$(VENV) holds $$($(PY) --version), and EchoDistill needs Python 3.11 or 3.12: remove $(VENV) and run" \
	    "make again" >&2; exit 2; }
	@echo "installing into $(VENV) (a few minutes, once)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[dev]' '$(TORCH)'
	@touch $@

system-deps: ## Install the system packages that optional tests want (Debian, Ubuntu; needs root)
	@command -v apt-get >/dev/null || { echo "this target knows apt-get only: install chromium," \
	  "redis-server and prometheus with your own package manager" >&2; exit 2; }
	$(SUDO) apt-get update
	@for package in chromium redis-server prometheus; do \
	  $(SUDO) apt-get install -y --no-install-recommends $$package || \
	  echo "$$package cannot be had here: the tests that want it are reported as not run" >&2; done

clean: ## Remove what runs and tools wrote (not .venv)
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache *.egg-info
