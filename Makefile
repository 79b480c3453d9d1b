# `make demo` and `make test` do everything on a machine with Python 3.11+ and nothing else.
PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch that is installed where there is no NVIDIA GPU (on Linux; macOS wheels are CPU/MPS already).
TORCH_CPU ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.prefmix-installed

.PHONY: help setup demo test lint format docs bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | awk -F: '{printf "make %-8s%s\n", $$1, $$2}'

setup: $(STAMP)  ## build .venv with everything (a second call is instant)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: prefmix needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then :; \
	elif command -v nvidia-smi >/dev/null || [ "$$(uname -s)" != Linux ]; then \
	  echo "installing torch ..." >&2; $(BIN)/pip install -q torch; \
	else \
	  echo "installing torch $(TORCH_CPU) (CPU build) ..." >&2; \
	  $(BIN)/pip install -q --retries 0 --extra-index-url $(TORCH_CPU_INDEX) 'torch==$(TORCH_CPU)+cpu' || { \
	    echo "error: no CPU build of torch $(TORCH_CPU) at $(TORCH_CPU_INDEX); install any torch into $(VENV) yourself" \
	         "($(BIN)/pip install torch pulls several GB of CUDA) and run make again" >&2; exit 1; }; \
	fi
	@echo "installing prefmix and its tools ..." >&2
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $(STAMP)

demo: setup  ## the main job on real rows and a real language model, five to ten minutes on two cores
	$(BIN)/prefmix demo

test: setup  ## the whole suite
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## rewrite the pages that are made from the code, then build the site into site/
	@$(BIN)/python -c 'import zensical, mkdocstrings_handlers.python' 2>/dev/null || $(BIN)/pip install -q -e '.[docs]'
	$(BIN)/python -m prefmix.cli.config_page > docs/config.md
	$(BIN)/python docs/stage.py build/docs
	$(BIN)/zensical build --strict

bench: setup  ## speed figures, each behind its own correctness gate: about an hour (training.py alone takes --quick)
	@for script in benchmarks/*.py; do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

clean:  ## remove the environment and build products
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache
