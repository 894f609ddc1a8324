# Every target sets up .venv by itself (python3, venv and pip are all it needs) and reuses it until pyproject.toml changes.
.PHONY: test test-fast test-parallel lint format demo docs clean
SHELL := /bin/bash
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.ready-$(shell cksum < pyproject.toml | cut -d' ' -f1)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: lint
	@echo "test: the suite on $(WORKERS) processes; make test-parallel has the other layouts of ranks"
	@$(PYTEST) -m "not parallel"

test-fast: $(STAMP)
	@echo "test-fast: everything but the slow tests, on $(WORKERS) processes"
	@$(PYTEST) -m "not slow and not parallel"

test-parallel: $(STAMP)
	@echo "test-parallel: every other row of the matrix of layouts, every other pair of them at a resume"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m parallel

lint: $(STAMP)
	@echo "lint: ruff, mypy, import contracts"
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo --config pyproject.toml > .venv/imports.log || { cat .venv/imports.log; exit 1; }

format: $(STAMP)
	@echo "format: ruff rewrites the tree"
	@$(BIN)/ruff check -q --fix . && $(BIN)/ruff format -q .

demo: $(STAMP)
	@echo "demo: a small VLM composed, trained, exported, run and scored on handwriting, in demo_output/"
	@$(BIN)/tessera demo

docs: $(STAMP)
	@echo "docs: docs/flags.md and tests/surface/flags.txt from the table of flags"
	@$(BIN)/python tests/surface/test_flags.py

clean:
	@echo "clean: .venv and caches"
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: $(PYTHON) is older than 3.10; use make PYTHON=..."; exit 1; }
	@echo "setup: .venv with torch 2.13.0 and tessera (minutes on the first time, then reused)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -e '.[dev]'
	@rm -f .venv/.ready-* && touch $@
