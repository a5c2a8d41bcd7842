# `make` lists the targets. Every target that needs the environment makes it first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Any Python >= 3.11, < 3.13; `make install PYTHON=/path/to/python` chooses one.
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12,$(shell $(p) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13)' 2>/dev/null && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WHEEL_VENV := build/wheel-venv
WHEEL_TESTS := build/wheel-tests

# Where the CPU build of torch comes from: PyPI's own Linux wheel brings CUDA along. `TORCH_INDEX=` means pip's usual
# sources only. If the index cannot be reached, pip says so once and goes on with its usual sources.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_INDEX_ARGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 1 --timeout 20)

CONSTRAINTS := requirements/constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
PACKAGES := cce_torchrec dlrm_example launch
ARGS ?=

.PHONY: help install quickstart test bench lint format wheel test-wheel clean clean-venv

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv: the pinned CPU stack and this project, editable

# The stamp is written last, so an interrupted install is done again. torchrec goes in without its dependencies, since it
# declares the CUDA wheel of FBGEMM (pyproject.toml says more).
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python >=3.11,<3.13 not found; try: make install PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "[1/4] torch, CPU build"
	@$(PIP_INSTALL) --no-deps $(TORCH_INDEX_ARGS) torch
	@echo "[2/4] this project and its dependencies"
	@$(PIP_INSTALL) --editable '.[cpu,dev,example,launch]'
	@echo "[3/4] torchrec"
	@$(PIP_INSTALL) --no-deps torchrec
	@echo "[4/4] does the stack load?"
	@$(BIN)/python -W ignore -c 'import torch, fbgemm_gpu, torchrec; print("torch", torch.__version__, "torchrec", torchrec.__version__)' \
	  || { echo "The stack does not load: 'make clean-venv install' starts afresh." >&2; exit 1; }
	@touch $@

quickstart: install ## Train a small DLRM with compressed tables on MovieLens-100K
	$(BIN)/python -m dlrm_example.quickstart $(ARGS)

test: install ## Run the tests (ARGS="-k name -x" is passed on to pytest)
	$(BIN)/python -m pytest $(ARGS)

bench: install ## Run the short set of benchmarks, some minutes (ARGS="--only step"); results in runs/bench
	$(BIN)/python -m benchmarks $(ARGS)

lint: install ## Check style, formatting and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

wheel: install ## Build the wheel into dist/
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

# The wheel's own environment sees the stack of .venv through a .pth file, but not the editable project: Python does not read
# .pth files of a directory that was itself added by one. The tests run on a copy, away from the source tree.
test-wheel: wheel ## Install the wheel into an environment of its own and run the tests against it
	rm -rf $(WHEEL_VENV) $(WHEEL_TESTS)
	$(BIN)/python -m venv --without-pip $(WHEEL_VENV)
	$(BIN)/python -m pip --python $(WHEEL_VENV)/bin/python install --quiet --no-deps --no-index dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(WHEEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/stack.pth"
	mkdir -p $(WHEEL_TESTS)
	tar -c --exclude='./.*' --exclude=./build --exclude=./dist --exclude=./runs --exclude='*.egg-info' --exclude=__pycache__ \
	  $(PACKAGES:%=--exclude=./%) . | tar -x -C $(WHEEL_TESTS)
	cd $(WHEEL_TESTS) && ../wheel-venv/bin/python -W ignore -c 'import cce_torchrec as m; print(m.__file__); assert "wheel-venv" in m.__file__'
	cd $(WHEEL_TESTS) && ../wheel-venv/bin/python -m pytest $(ARGS)

clean: ## Remove build products and caches; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-venv: ## Remove .venv
	rm -rf $(VENV)
