# Every target sets itself up in .venv: the only thing needed is Python >= 3.12 (or uv).
# PYTHON=/path/to/python3.12 names an interpreter that is not on PATH.

VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.stamp-run
DEV := $(VENV)/.stamp-dev
CONFIG ?= configs/quickstart.py
LENGTHS ?= 1024,4096,16384
TESTS ?= tests

export HF_HUB_OFFLINE ?= 1

.PHONY: help train test test-full random-shapes lint format bench docs clean notebooks

help:
	@echo "make train      train the quickstart language model, evaluate it, print the table"
	@echo "                (CONFIG=configs/tiny.py another recipe, ARGS=... flags of python -m train)"
	@echo "make test       the test-suite at small sizes, ten minutes (TESTS=tests/models a part)"
	@echo "make test-full  the test-suite at real block sizes (long)"
	@echo "make random-shapes  100 random shapes a kernel, logged in benchmarks/results (an hour)"
	@echo "make notebooks  run the notebooks and save them with their outputs (ARGS=01)"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the files"
	@echo "make bench      dense and sparse attention side by side (LENGTHS=1024,4096)"
	@echo "make docs       the documentation site, in site/"
	@echo "make clean      remove .venv and caches, keep runs/"

$(RUN): pyproject.toml constraints.txt .python-version scripts/set_up.sh
	@bash scripts/set_up.sh $(VENV) .
	@touch $@

$(DEV): $(RUN)
	@bash scripts/set_up.sh $(VENV) ".[dev]"
	@touch $@

train: $(RUN)
	@$(BIN)/python -m train --config $(CONFIG) $(ARGS)

test: $(DEV)
	@$(BIN)/python -m pytest -n 2 -m "not full and not device" $(TESTS)

test-full: $(DEV)
	@PROPERTY_EXAMPLES=50 $(BIN)/python -m pytest -m "not device" $(TESTS)

random-shapes: $(DEV)
	@$(BIN)/python scripts/random_shapes.py --json benchmarks/results/random_shapes.json $(ARGS)

notebooks: $(DEV)
	@$(BIN)/python scripts/run_notebooks.py $(ARGS)

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(RUN)
	@$(BIN)/python scripts/bench_attention.py --lengths $(LENGTHS) $(ARGS)

docs: $(DEV)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
