# `make demo` and `make test` set up what they need; a fresh machine wants only Python 3.11 or later, make and a C compiler.

PYTHON ?= python3.11
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# On Linux PyPI's torch brings CUDA, some GB; PIP_EXTRA_INDEX_URL can point at PyTorch's index of CPU builds.

# A file or folder of your own text to train on; empty: the standard library of Python.
TEXT ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-layouts test-gpu data-bench lint clean

help: ## Say what each target does
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# Transformer Engine's Python part, 1 MB, goes into a folder that only its tests see: megatron-core changes its ways where it can import it.
# The stamp is written last, so that an interrupted installation starts again.
$(STAMP): pyproject.toml Makefile
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -e ".[dev]"
	$(PY) -m pip install --quiet --upgrade --no-deps --target $(VENV)/transformer_engine transformer-engine==2.11.0
	touch $@

demo: $(STAMP) ## Text -> tokenizer -> packed data -> pretraining on two CPU processes -> export -> generation; TEXT=file or folder for your own text
	$(PY) -m launch.demo $(if $(TEXT),--text "$(TEXT)")

# Two files of tests at a time, the long ones (tests/e2e, tests/parallel) first: a test has up to four ranks, but mostly one is at work.
test: lint ## Everything that CI checks: lint, types, all tests, two files at a time; PYTEST_ARGS="-n 0 -k words" goes to pytest
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-layouts: $(STAMP) ## Every legal parallel layout of up to 8 ranks against one rank, and random models; some minutes to an hour
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m pytest -m layouts_all tests/parallel $(PYTEST_ARGS)

test-gpu: $(STAMP) ## On a machine with a GPU and Transformer Engine in PY's environment: tests of the kernels, and a table of speeds in bf16 and FP8
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make test-gpu: this machine has no usable CUDA device')"
	$(PY) -m pytest -m gpu tests $(PYTEST_ARGS)
	$(PY) tests/benchmarks/fp8_throughput.py

# A JSONL file; WORK is where everything is written, some three times its size.
CORPUS ?=
WORK ?= data_bench_out

data-bench: $(STAMP) ## Tokenizer, shards, packs and mixtures of CORPUS=corpus.jsonl, with times, memory and sizes
	@test -n "$(CORPUS)" || { echo "make data-bench: CORPUS=corpus.jsonl is missing" >&2; exit 2; }
	$(PY) tests/benchmarks/data_chain.py "$(CORPUS)" "$(WORK)"

lint: $(STAMP) ## Style and types only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean: ## Remove what the demo and the tests wrote; the environment stays
	rm -rf demo_out data_bench_out .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
