# Every target is idempotent, and quick the second time. `make demo` is the whole product in two minutes.
# Another Python: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
FLOOR_VENV := .venv-floor
DEEPSPEED := $(VENV)/deepspeed
PIP := -m pip --disable-pip-version-check install --quiet

export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-slow test-floor check format bench gpu-validate docs paper-tables clean

help: ## show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED) ## create .venv with the pinned dependencies

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowmem needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that no other package can ask for another build of it.
$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python $(PIP) -c constraints.txt torch
	$(BIN)/python $(PIP) -c constraints.txt -e .
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# Beside the environment and not in it: Accelerate imports DeepSpeed in every process that can, and that talks.
$(DEEPSPEED): constraints.txt | $(INSTALLED_DEV)
	rm -rf $@
	DS_BUILD_OPS=0 $(BIN)/python $(PIP) -c constraints.txt --no-deps --target $@ deepspeed einops hjson msgpack ninja py-cpuinfo

demo: $(INSTALLED) ## train the quickstart recipe and print what it saved
	$(BIN)/lowmem train recipes/quickstart.yaml resume=never save.dir=runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(INSTALLED_DEV) $(DEEPSPEED) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(INSTALLED_DEV) $(DEEPSPEED) ## run the long tests too, and everything on the oldest supported transformers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	$(MAKE) test-floor

test-floor: constraints.txt pyproject.toml | $(VENV)/bin/python ## the tests on the oldest supported transformers
	test -x $(FLOOR_VENV)/bin/python || $(PYTHON) -m venv $(FLOOR_VENV)
	sed 's/^transformers==.*/transformers==5.17.0/' constraints.txt > $(FLOOR_VENV)/constraints.txt
	$(FLOOR_VENV)/bin/python $(PIP) -c $(FLOOR_VENV)/constraints.txt torch
	$(FLOOR_VENV)/bin/python $(PIP) -c $(FLOOR_VENV)/constraints.txt -e '.[dev]'
	OMP_NUM_THREADS=1 $(FLOOR_VENV)/bin/python -m pytest -m "not slow" -n 2

check: $(INSTALLED_DEV) ## lint, format, types, layers and recipes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py tests/test_recipes.py

format: $(INSTALLED_DEV) ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED_DEV) ## time optimizer steps against the peers
	$(BIN)/python scripts/bench_step.py

gpu-validate: $(INSTALLED) ## hold the memory plan against this machine's GPU, in under 9 minutes
	$(BIN)/python scripts/gpu_validate.py

docs: $(INSTALLED) ## regenerate what the documentation takes from the code
	$(BIN)/python scripts/make_optimizer_table.py
	$(BIN)/python scripts/make_reference_pages.py
	$(BIN)/python scripts/make_scaling_page.py

paper-tables: $(INSTALLED) ## hold our memory figures against those that papers publish
	$(BIN)/python scripts/make_paper_tables.py

clean: ## remove the environments and caches, not your runs
	rm -rf $(VENV) $(FLOOR_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
