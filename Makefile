# `make demo` and `make test` set up what they need; a fresh machine wants only Python 3.11 or 3.12, make and a C compiler.

# PYTHON, TEXT and the like mean other things in people's shells: they count on make's command line only, and are handed to nothing that it
# starts but where a recipe says so.
SETTINGS := PYTHON VENV TEXT CORPUS WORK
$(foreach name,$(SETTINGS),$(if $(filter environment%,$(origin $(name))),\
    $(info make: $(name) in the environment does not count here; if it is meant: make $(name)=...)$(eval override undefine $(name))))
MAKEOVERRIDES :=
# A setting as an argument of a shell command, whatever is in it.
quote = '$(subst ','\'',$(value $(1)))'

VENV ?= .venv
ifneq ($(words $(VENV)),1)
$(error VENV: a folder without spaces in its name, not "$(VENV)")
endif
PY := $(VENV)/bin/python
# The interpreter of the environment: python3.11, else python3.12, unless it is there already.
PYTHON ?= $(or $(wildcard $(PY)),$(firstword $(foreach name,python3.11 python3.12,$(shell command -v $(name)))),python3.11)
LATEST := .venv-latest
STAMP := $(VENV)/.installed

# A file or folder of your own text to train on; empty: the standard library of Python.
TEXT ?=
# A JSONL file for data-bench; WORK is where everything is written, some three times its size.
CORPUS ?=
WORK ?= data_bench_out
unexport $(SETTINGS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-latest test-layouts test-gpu docs data-bench lint check lock clean

help: ## Say what each target does
	@awk '/^##@ / { printf "\n%s\n", substr($$0, 5) } match($$0, /^[a-z-]+:.*## /) \
		{ name = $$0; sub(/:.*/, "", name); printf "  %-13s %s\n", name, substr($$0, RLENGTH + 1) }' $(MAKEFILE_LIST)

# The stamp is written last, so that an interrupted installation starts again.
$(STAMP): pyproject.toml Makefile $(wildcard .ci/locks/*)
	'$(PYTHON)' .ci/locks/environment.py set-up $(VENV)
	touch $@

##@ The main job

demo: $(STAMP) ## Text -> tokenizer -> packed data -> pretraining on two CPU processes -> export -> generation; TEXT=file or folder for your own text
	$(PY) -m launch.demo $(if $(TEXT),--text $(call quote,TEXT))

##@ Before a commit

# Every file of these takes a few seconds; what needs ranks, whole runs or a site is in `make test`.
QUICK := tests/project/test_imports.py tests/project/test_shape.py tests/project/test_every_yaml_loads_and_plans.py tests/unit/config \
    tests/unit/plan tests/unit/launch/test_node.py tests/unit/data/test_mixture.py tests/unit/data/test_packing.py

check: lint ## What to run before a commit, in under three minutes: lint, types and the quick tests
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m pytest -q -n 2 --dist loadfile -m "not slow and not layouts_all and not gpu" $(QUICK) $(PYTEST_ARGS)

lint: $(STAMP) ## Style and types only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

##@ Tests

# Two files of tests at a time, the long ones (tests/e2e, tests/parallel) first: a test has up to four ranks, but mostly one is at work.
test: lint docs ## Everything that CI checks: lint, types, the site of docs/, all tests, two files at a time; PYTEST_ARGS="-n 0 -k words" goes to pytest
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What meets transformers, megatron-core, torch, pydantic, typer, datatrove and tokenizers.
BORDERS := tests/project/test_borders.py tests/reference tests/unit/config/test_load.py tests/unit/test_cli.py tests/unit/runtime \
    tests/unit/data/test_tokenizer_engines.py tests/unit/data_tools/test_datatrove_pipeline.py tests/unit/checkpoint \
    tests/unit/model/test_hunyuan_model.py tests/unit/model/test_transformer_engine.py tests/unit/train/test_optimizer.py

test-latest: ## The tests at the borders to other people's packages, with the newest of everything that pyproject.toml allows; heeds PIP_CONSTRAINT
	'$(PYTHON)' .ci/locks/environment.py set-up $(LATEST) --latest
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(LATEST)/bin/python -m pytest -n 2 --dist loadfile $(BORDERS) $(PYTEST_ARGS)

test-layouts: $(STAMP) ## Every legal parallel layout of up to 8 ranks against one rank, and random models; some minutes to an hour
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m pytest -m layouts_all tests/parallel $(PYTEST_ARGS)

test-gpu: $(STAMP) ## On a machine with a GPU and Transformer Engine in PY's environment: tests of the kernels, and a table of speeds in bf16 and FP8
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make test-gpu: this machine has no usable CUDA device')"
	$(PY) -m pytest -m gpu tests $(PYTEST_ARGS)
	$(PY) tests/benchmarks/fp8_throughput.py

##@ The rest

# Not --quiet: it keeps warnings from --strict too.
docs: $(STAMP) ## The documentation site, in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --config-file .ci/mkdocs.yml

data-bench: $(STAMP) ## Tokenizer, shards, packs and mixtures of CORPUS=corpus.jsonl, with times, memory and sizes
	@test -n $(call quote,CORPUS) || { echo "make data-bench: CORPUS=corpus.jsonl is missing" >&2; exit 2; }
	$(PY) tests/benchmarks/data_chain.py $(call quote,CORPUS) $(call quote,WORK)

lock: $(STAMP) ## Write .ci/locks/*.txt anew: the newest of everything that pyproject.toml allows, with digests; torch stays
	$(PY) -m pip install --quiet uv
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) .ci/locks/environment.py lock

clean: ## Remove what the demo and the tests wrote; the environment stays
	rm -rf demo_out data_bench_out site .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
