"""Decides what this project uses on a machine that `device.probe` has described, and why a machine cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Literal

import torch

from hunyuan_pretrain.config.attention import BACKENDS, BackendName, Work, candidates, nearest
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.recipe import Recipe
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.runtime.device import Gpu, Machine, major_minor, usable_cores

TRANSFORMER_ENGINE_VERSIONS = {(0, 16): ((2, 9), (2, 11)), (0, 17): ((2, 11), (2, 20))}
"""First megatron-core version -> (first, last) Transformer Engine version that works with it and later ones.

0.16.1 sets its own bounds, in its extra `dev`. From 0.17 on the extras accept any version; the last one here is the
newest whose Python part the model was built with, under 0.19.2 and with stand-ins for the kernels.
"""

INSTALL_TRANSFORMER_ENGINE = 'pip install --no-build-isolation "hunyuan-pretrain[gpu]"'


def choose_device(setting: Literal["auto", "cuda", "cpu"]) -> Literal["cuda", "cpu"]:
    """The device that runtime.device selects on this machine. Raises ConfigError for cuda without a CUDA device."""
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this machine", [no_cuda()])
    return setting


def backend_of(device: Literal["cuda", "cpu"]) -> Literal["nccl", "gloo"]:
    """The torch.distributed backend for a device."""
    return "nccl" if device == "cuda" else "gloo"


def cpu_threads(ranks_per_node: int, setting: int | None = None) -> int:
    """Threads per rank on CPU: runtime.cpu_threads_per_rank, or an equal share of the usable cores, at least 1."""
    return setting or max(1, usable_cores() // ranks_per_node)


def obstacles(machine: Machine, experiment: Experiment | None = None, ranks: int = 1) -> list[Problem]:
    """Why this machine cannot train, or cannot run `ranks` ranks of this experiment; empty if it can."""
    found = []
    if machine.megatron_core is None:
        found.append(
            Problem("megatron-core", Problem.NO_VALUE, "is not installed", 'pip install "megatron-core>=0.16.1,<0.20"')
        )
    if machine.apex == "wrong":
        rule = (
            "the installed package of this name is not NVIDIA's (it has no amp_C), and megatron-core would use it "
            "as if it were"
        )
        found.append(
            Problem("apex", Problem.NO_VALUE, rule, "pip uninstall apex; NVIDIA's is built from its own repository")
        )
    if machine.transformer_engine_error:
        hint = f"{INSTALL_TRANSFORMER_ENGINE}, or pip uninstall transformer-engine"
        found.append(Problem("transformer-engine", machine.transformer_engine, machine.transformer_engine_error, hint))
    if experiment is None:
        return found
    if experiment.runtime.device == "cuda" and not machine.gpus:
        found.append(no_cuda(machine.cuda))
    uses_gpu = _trains_on_gpu(machine, experiment)
    if experiment.runtime.cuda_graphs:
        found += _recording_obstacles(machine)
    if uses_gpu and experiment.precision.dtype == "bf16":
        for gpu in machine.gpus:
            if gpu.capability < (8, 0):
                rule = f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and bf16 needs 8.0"
                found.append(Problem("precision.dtype", "bf16", rule, "use fp32"))
    if uses_gpu and ranks > len(machine.gpus):
        rule = f"{ranks} ranks on this node, which has {len(machine.gpus)} GPUs, and each rank needs its own"
        hint = "start fewer ranks here, or use runtime.device=cpu"
        found.append(Problem("ranks", Problem.NO_VALUE, rule, hint))
    return found + _transformer_engine_obstacles(machine, experiment) + _refused_attention(machine, experiment)


def uses_transformer_engine(machine: Machine, experiment: Experiment) -> bool:
    """Whether the layers are Transformer Engine's. `obstacles` reports why they cannot be where they are required.

    In fp32 the layers are this project's own, because Transformer Engine multiplies fp32 matrices in TF32; the rules
    refuse fp32 with runtime.transformer_engine=required. The same holds for frozen weights, with which Transformer
    Engine's layers have not been tried.
    """
    runtime = experiment.runtime
    if runtime.transformer_engine == "never" or runtime.device == "cpu":
        return False
    if experiment.tuning.is_partial:
        return False
    return machine.has_transformer_engine and experiment.precision.dtype == "bf16"


def uses_kernels(machine: Machine, experiment: Experiment) -> bool:
    """Whether the functions between the matmuls are Triton kernels."""
    runtime = experiment.runtime
    return runtime.kernels == "auto" and runtime.device != "cpu" and machine.has_triton


def _trains_on_gpu(machine: Machine, experiment: Experiment) -> bool:
    return experiment.runtime.device != "cpu" and bool(machine.gpus)


def _recording_obstacles(machine: Machine, environment: Mapping[str, str] = os.environ) -> Iterator[Problem]:
    """Why steps cannot be recorded here: no CUDA device, or variables with which replays go wrong."""
    if not machine.gpus:
        yield Problem("runtime.cuda_graphs", True, "this machine has no CUDA device", "use false")
    allocator = environment.get("PYTORCH_ALLOC_CONF", environment.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    wrong = {
        # pointers go through one buffer of the host, which a replay would read again
        "NVTE_USE_CUTLASS_GROUPED_GEMM": "replays would multiply by the matrices of the last call",
        "TORCH_NCCL_BLOCKING_WAIT": "NCCL would ask for events that are only recorded",
    }
    if "expandable_segments:True" in allocator:
        wrong["NCCL_GRAPH_REGISTER"] = f"NCCL would register memory that moves ({allocator})"
    for name, reason in wrong.items():
        if environment.get(name, "0") != "0":
            rule = f"{name}={environment[name]} is set in the environment: {reason}"
            yield Problem("runtime.cuda_graphs", True, rule, f"set {name}=0, or use false")


def _transformer_engine_obstacles(machine: Machine, experiment: Experiment) -> list[Problem]:
    found = []
    runtime, recipe = experiment.runtime, experiment.precision.recipe
    if runtime.transformer_engine == "required" and not machine.has_transformer_engine:
        if machine.transformer_engine is None:
            rule, hint = "it is not installed", INSTALL_TRANSFORMER_ENGINE
        elif machine.transformer_engine_error:
            rule, hint = machine.transformer_engine_error, INSTALL_TRANSFORMER_ENGINE
        else:
            rule, hint = "it runs on a CUDA device, and this machine has none", "use auto or never"
        found.append(Problem("runtime.transformer_engine", "required", rule, hint))
    updates = experiment.optimizer.use_precision_aware_optimizer and _trains_on_gpu(machine, experiment)
    if updates and not machine.has_transformer_engine:
        rule = "on a GPU it is Transformer Engine's Adam, which is not installed"
        hint = f"{INSTALL_TRANSFORMER_ENGINE}, or use false"
        found.append(Problem("optimizer.use_precision_aware_optimizer", True, rule, hint))
        return found
    has_layers = uses_transformer_engine(machine, experiment)
    if not has_layers and not updates:
        return found
    first, last = transformer_engine_versions(machine.megatron_core)
    if not first <= major_minor(str(machine.transformer_engine)) <= last:
        rule = f"megatron-core {machine.megatron_core} works with {first[0]}.{first[1]} to {last[0]}.{last[1]}"
        wanted = f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"
        hint = f'pip install --no-build-isolation "transformer-engine[pytorch,core_cu13]{wanted}"'
        found.append(Problem("transformer-engine", machine.transformer_engine, rule, hint))
    if recipe is None or not has_layers:
        return found
    for gpu in dict.fromkeys(machine.gpus):
        need = missing_for_fp8(recipe, gpu.capability, machine.cuda)
        if need:
            rule = (
                f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, torch CUDA "
                f"{machine.cuda}; it needs {need}"
            )
            hint = "use another recipe, or runtime.transformer_engine=never, which emulates it slowly"
            found.append(Problem("precision.fp8_recipe", recipe.name, rule, hint))
    return found


def transformer_engine_versions(megatron_core: str | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last (major, minor) version of Transformer Engine that this megatron-core version works with."""
    version = major_minor(megatron_core or "0.16")
    return TRANSFORMER_ENGINE_VERSIONS[
        max(first for first in TRANSFORMER_ENGINE_VERSIONS if first <= max(version, (0, 16)))
    ]


def missing_for_fp8(recipe: Recipe, capability: tuple[int, int], cuda_version: str | None) -> str | None:
    """What the GPU or torch's CUDA version lacks for Transformer Engine to run `recipe`; None if nothing."""
    return recipe.missing(capability, tuple(int(part) for part in (cuda_version or "0").split(".")[:2]))


def attention_work(machine: Machine, experiment: Experiment, gpu: Gpu | None) -> Work:
    """The attention that a rank of `experiment` computes on this GPU; None: on a CPU."""
    parallel, model, longest = experiment.parallel, experiment.model, max(s.sequence_length for s in experiment.stages)
    ranks, is_split = parallel.tensor_model_parallel_size, parallel.context_parallel_size > 1
    is_gathered = is_split and parallel.context_parallel_method == "all_gather"
    if parallel.context_parallel_method == "all_to_all":
        ranks *= parallel.context_parallel_size
    queries = longest // parallel.context_parallel_size if is_gathered else longest
    return Work(
        capability=None if gpu is None else gpu.capability,
        packages={
            "transformer-engine": machine.transformer_engine if uses_transformer_engine(machine, experiment) else None,
            "flash-attn": machine.flash_attn,
            "flash-attn-3": machine.flash_attn_3,
        },
        dtype=experiment.precision.dtype,
        head_dim=model.head_dim,
        is_deterministic=experiment.runtime.deterministic,
        is_gathered=is_gathered,
        is_recorded=experiment.runtime.cuda_graphs,
        longest_scores=model.num_attention_heads // ranks * queries * longest,
    )


def attention_obstacles(machine: Machine, experiment: Experiment) -> dict[BackendName, str | None]:
    """Every attention backend, and why it cannot compute this experiment's attention on this machine; None if nothing
    is known against it."""
    gpus = machine.gpus if experiment.runtime.device != "cpu" else ()
    works = [attention_work(machine, experiment, gpu) for gpu in dict.fromkeys(gpus)] or [
        attention_work(machine, experiment, None)
    ]
    return {
        name: next((reason for work in works if (reason := backend.missing(work)) is not None), None)
        for name, backend in BACKENDS.items()
    }


def _refused_attention(machine: Machine, experiment: Experiment) -> list[Problem]:
    """Why the backend that runtime.attention_backend names cannot be used here."""
    setting = experiment.runtime.attention_backend
    found = attention_obstacles(machine, experiment)
    if setting == "auto" or (reason := found[setting]) is None:
        return []
    gpus = machine.gpus if experiment.runtime.device != "cpu" else ()
    hint = nearest(setting, attention_work(machine, experiment, gpus[0] if gpus else None))
    return [Problem("runtime.attention_backend", setting, reason, hint)]


def _attention_rows(machine: Machine, experiment: Experiment) -> list[tuple[str, str]]:
    """What computes attention, and why the other backends do not."""
    if experiment.runtime.device == "cpu" or not machine.gpus:
        return [("attention", f"per_document: {BACKENDS['per_document'].meaning}")]
    setting, found = experiment.runtime.attention_backend, attention_obstacles(machine, experiment)
    rows = []
    for kind, title in (("packed", "attention of packs"), ("uniform", "attention of one length")):
        able = [name for name in candidates(setting, kind) if found[name] is None]  # type: ignore[arg-type]
        how = "the fastest that is right, measured before the first step: " if len(able) > 1 else ""
        rows.append((title, how + ", ".join(able) if able else "nothing that runs here"))
    return rows + [(f"not {name}", reason) for name, reason in found.items() if reason is not None]


def what_is_used(machine: Machine, experiment: Experiment | None = None) -> list[tuple[str, str]]:
    """(name, value) rows of what training on this machine uses. Settings of `experiment` override the machine's
    defaults."""
    setting = "auto" if experiment is None else experiment.runtime.device
    device = machine.device if setting == "auto" else setting
    rows: list[tuple[str, str]] = [("device", device), ("collectives", backend_of(device))]
    if device == "cpu":
        ranks = 1 if experiment is None or experiment.parallel.world_size is None else experiment.parallel.world_size
        threads = cpu_threads(ranks, None if experiment is None else experiment.runtime.cpu_threads_per_rank)
        rows.append(("threads per rank", f"{threads} (for {ranks} ranks on this node)"))
    is_engine = machine.has_transformer_engine if experiment is None else uses_transformer_engine(machine, experiment)
    rows.append(("linear layers", f"Transformer Engine {machine.transformer_engine}" if is_engine else "local layers"))
    is_fused = machine.has_triton if experiment is None else uses_kernels(machine, experiment)
    rows.append(("functions between them", f"kernels of Triton {machine.triton}" if is_fused else "torch operations"))
    rows += [] if experiment is None else _attention_rows(machine, experiment)
    if experiment is not None and experiment.runtime.cuda_graphs:
        rows.append(("steps", "recorded as CUDA graphs and replayed"))
    recipe = None if experiment is None else experiment.precision.fp8_recipe
    if recipe:
        rows.append(
            (
                "FP8",
                f"{recipe} on Transformer Engine" if is_engine else f"{recipe}, emulated (slow; numbers, not speed)",
            )
        )
    return rows


def no_cuda(build: str | None = torch.version.cuda) -> Problem:
    reason = "torch is a CPU build" if build is None else f"torch was built with CUDA {build}, but sees no device"
    return Problem("runtime.device", "cuda", f"this machine has no usable CUDA: {reason}", "use auto or cpu")


def fuses_wgrad_accumulation(with_transformer_engine: bool = False) -> bool:
    """Whether weight gradients can be accumulated into main_grad inside the GEMM: always on CPU (cpu_megatron); on CUDA
    with Transformer Engine's layers, or with core's and Apex's extension."""
    return (
        with_transformer_engine
        or not torch.cuda.is_available()
        or find_spec("fused_weight_gradient_mlp_cuda") is not None
    )
