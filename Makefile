# `make demo` and `make test` need Python >= 3.11, a package registry, and (for
# compiled CPU code) a C++ compiler. Both build their own .venv with the versions
# of constraints.txt; nothing else has to be installed first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp

# What `make demo` does beyond its defaults, e.g. make demo ARGS="--bits 2.125 --json demo.json"
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow mutants docs lint clean

help:
	@echo "make demo       set up, then run the main job on a real model (ARGS=\"--json demo.json\")"
	@echo "make test       set up, then run the tests that need no accelerator and little time"
	@echo "make test-slow  the slow tests: thousands of random programs, every door and model"
	@echo "make mutants    put bugs into a copy, one at a time, and see whether the tests notice"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make lint       ruff and mypy"
	@echo "make venv       only set up .venv"
	@echo "make clean      remove .venv and tool caches"

# Remade when the project's metadata or the tested versions change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than Python 3.11, which constraints.txt needs; use: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV); the first time this downloads torch and takes minutes."
	PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check -c constraints.txt -e '.[demo,bench,dev,docs]'
	@touch $@

venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m skv_compile demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

mutants: $(STAMP)
	$(BIN)/python benchmarks/mutants.py $(ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy -p skv_compile

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build site *.egg-info
