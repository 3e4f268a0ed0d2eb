# `make help` lists what there is. All of it runs in .venv, made on first use; a machine
# needs Python 3.11 or later, and git.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# One file a process, as many processes as cores; each computes with one thread.
SPREAD := -n auto --dist loadfile
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Nothing that is started here reports home.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-all check bench docs clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Install everything into .venv, in the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null || echo "not on this machine"); \
	  echo "Cloister needs Python 3.11 or later; '$(PYTHON)' is $$found." >&2; \
	  echo "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[simulation,ray,dev]'
	@touch $@

demo: $(STAMP) ## Synthetic hospitals, a whole federation, a report, on this machine
	$(BIN)/cloister demo

test: check ## Every check, then every test but the slow (PYTEST_ARGS='-k gate' for some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) -m 'not slow' $(PYTEST_ARGS)

test-slow: $(STAMP) ## The slow tests: whole systems at work
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) -m slow $(PYTEST_ARGS)

test-all: test test-slow ## Every check and every test

check: $(STAMP) ## Lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## Run every benchmark; each prints its own table
	@for script in benchmarks/*.py; do \
	  if [ -e "$$script" ]; then echo "== $$script"; $(BIN)/python "$$script" || exit 1; \
	  else echo "There is no benchmark in benchmarks/."; fi; done

docs: $(STAMP) ## Write docs/commands.md, the reference of the command line
	$(BIN)/python -m typer deploy.cli utils docs --name cloister --output docs/commands.md

clean: ## Remove what was made here, .venv included
	rm -rf $(VENV) build dist docs/commands.md .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
