# `make help` lists the targets. Every target builds the environment it needs; nothing has to be
# activated. A second call installs nothing unless pyproject.toml or constraints.txt has changed.

VENV        ?= .venv
VENV_LATEST ?= .venv-latest
VENV_LOWEST ?= .venv-lowest
VENV_BENCH  ?= .venv-bench
SPECS       ?= two_phases diabetes
WORKERS     ?= auto
# Some of the programs in benchmarks/ and options for them, for example:
# make bench BENCHES="scalar_descent width_ten" BENCH_ARGS="--rounds 3"
BENCHES     ?=
BENCH_ARGS  ?=
# Further options for pytest, for example: make test PYTEST_ARGS="tests/test_loss.py -x"
PYTEST_ARGS ?=

# The first Python on the PATH that is recent enough; `make PYTHON=/path/to/python` overrides it.
RECENT = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	if $$p -c "$(RECENT)" >/dev/null 2>&1; then command -v $$p; break; fi; done)

# The newest released Python on the PATH or among pyenv's.
RELEASED = import sys; v = sys.version_info; \
	v >= (3, 11) and v.releaselevel == 'final' and print('%03d.%03d' % v[1:3], sys.executable)
NEWEST_PYTHON ?= $(shell for p in python3 python3.15 python3.14 python3.13 python3.12 python3.11 \
	$(wildcard $(HOME)/.pyenv/versions/3.*/bin/python); do \
	$$p -c "$(RELEASED)" 2>/dev/null; done | sort | tail -n 1 | cut -d ' ' -f 2-)

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

# Tests of one file share compiled programs, so they go to one process.
BY_FILE := -n $(WORKERS) --dist loadfile --durations 10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# ---------------------------------------------------------------- what people type

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: study
study: $(VENV)/.installed ## Install gradflow into .venv and run the default study (SPECS="two_phases diabetes")
	$(BIN)/gradflow study --overwrite $(SPECS)

.PHONY: test
test: $(VENV)/.installed-test ## Install with the test dependencies and run the tests in parallel
	$(PYTEST) $(BY_FILE) $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.installed-test ## Run the long tests that `make test` leaves out
	$(PYTEST) -n $(WORKERS) --durations 10 -m slow $(PYTEST_ARGS)

.PHONY: mutants
mutants: $(VENV)/.installed-test ## Break the code on purpose, entry by entry of tests/mutants.toml; half an hour and more
	$(BIN)/python tests/run_mutants.py $(MUTANTS)

.PHONY: test-latest
test-latest: $(VENV_LATEST)/.installed-test ## Run the tests on the newest Python with the newest dependencies
	$(VENV_LATEST)/bin/python -m pytest $(BY_FILE) $(PYTEST_ARGS)

.PHONY: test-lowest
test-lowest: $(VENV_LOWEST)/.installed-test ## Run the tests with the oldest dependencies that pyproject.toml admits
	$(VENV_LOWEST)/bin/python -m pytest $(BY_FILE) $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.installed-dev ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: format
format: $(VENV)/.installed-dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV_BENCH)/.installed ## Measure beside numba, torch, SciPy and diffrax (BENCHES="scalar_descent"); minutes to hours
	@set -e; for file in $(or $(BENCHES:%=benchmarks/bench_%.py),benchmarks/bench_*.py); do \
	  echo "== $$file"; $(VENV_BENCH)/bin/python "$$file" $(BENCH_ARGS); done

.PHONY: bench-check
bench-check: $(VENV_BENCH)/.installed ## Measure again; fail if a ratio is 1.5x worse than the committed one
	$(VENV_BENCH)/bin/python benchmarks/check.py $(BENCH_ARGS) $(BENCHES)

.PHONY: hooks
hooks: $(VENV)/.installed-dev ## Install the pre-commit hooks into this clone
	$(BIN)/pre-commit install

.PHONY: constraints
constraints: $(VENV)/.installed-dev ## Pin the newest versions that pyproject.toml admits in constraints.txt
	$(PIP) uv
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade --no-header \
	    --no-annotate --no-emit-package gradflow --extra test --extra dev pyproject.toml; } > constraints.new
	mv constraints.new constraints.txt

.PHONY: clean
clean: ## Remove builds and caches; environments and results stay
	rm -rf build dist site .hypothesis .jax_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Remove the environments too
	rm -rf $(VENV) $(VENV_LATEST) $(VENV_LOWEST) $(VENV_BENCH)

# ---------------------------------------------------------------- environments

# bin/pip is the last thing that `python -m venv` writes, so an interrupted one is made again.
define make_venv
	@test -n "$(1)" || { \
	  echo "gradflow needs Python 3.11 or newer and found none on the PATH." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(1) -c "$(RECENT)" || { \
	  echo "gradflow needs Python 3.11 or newer; $(1) is $$($(1) --version 2>&1)." >&2; exit 1; }
	$(1) -m venv --clear $(@D:/bin=)
endef

$(VENV)/bin/pip $(VENV_LOWEST)/bin/pip $(VENV_BENCH)/bin/pip:
	$(call make_venv,$(PYTHON))

$(VENV_LATEST)/bin/pip:
	$(call make_venv,$(NEWEST_PYTHON))

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing into $(VENV); the first time takes about a minute."
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing into $(VENV); the first time takes about a minute."
	$(PIP) --constraint constraints.txt --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing into $(VENV); the first time takes about a minute."
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

# torch needs an older mpmath than the tests do.
$(VENV_BENCH)/.installed: pyproject.toml constraints.txt | $(VENV_BENCH)/bin/pip
	sed '/^mpmath==/d' constraints.txt > $(VENV_BENCH)/constraints.txt
	$(VENV_BENCH)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(VENV_BENCH)/constraints.txt --editable '.[bench]'
	@touch $@

$(VENV_LATEST)/.installed-test: pyproject.toml | $(VENV_LATEST)/bin/pip
	$(VENV_LATEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --upgrade --upgrade-strategy eager --editable '.[test]'
	@touch $@

$(VENV_LOWEST)/.installed-test: pyproject.toml | $(VENV_LOWEST)/bin/pip
	$(VENV_LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV_LOWEST)/bin/uv pip install --quiet --python $(VENV_LOWEST)/bin/python \
	  --resolution lowest-direct --editable '.[test]'
	@touch $@
