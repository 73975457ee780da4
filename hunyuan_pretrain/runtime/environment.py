"""Environment variables that libraries and drivers read once, on loading. They are set here, before torch is imported.

Variables set by the user stay, except that a command which computes on the CPU hides the GPUs. `doctor` shows the
variables and a run records them. This module does not import torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment

HIDDEN_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Variable:
    """A variable and its value unless the user has set it."""

    name: str
    value: str
    reason: str
    also: str = ""
    """Another name that the library accepts for it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All accepted names."""
        return (self.name, self.also) if self.also else (self.name,)


ONE_QUEUE = Variable(
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "1",
    "tensor parallelism overlaps collectives with GEMMs: kernels are queued in call order",
)
ON_GPU = (
    ONE_QUEUE,
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "micro-batches of different lengths do not fragment memory",
        "PYTORCH_ALLOC_CONF",
    ),
)
DETERMINISTIC = (
    Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "runtime.deterministic: cuBLAS then splits sums in a fixed way"),
    Variable("NCCL_ALGO", "^NVLS,NVLSTree", "runtime.deterministic: sums inside the switch have no fixed order"),
)


RECORDED = (
    Variable(
        "NCCL_GRAPH_REGISTER",
        "0",
        "runtime.cuda_graphs: NCCL cannot register buffers in segments that expand",
    ),
)


def wanted_variables(experiment: Experiment | None) -> tuple[Variable, ...]:
    """Variables that a run of `experiment` sets; None: those of a run with default settings."""
    if experiment is not None and experiment.runtime.device == "cpu":
        return (Variable(HIDDEN_GPUS, "", "runtime.device=cpu: megatron-core uses any GPU that it sees"),)
    is_deterministic = experiment is None or experiment.runtime.deterministic
    # with one hardware queue the exchange would wait until the shared expert has been launched
    has_two_streams = experiment is not None and experiment.parallel.overlap_shared_expert
    on_gpu = tuple(variable for variable in ON_GPU if not (has_two_streams and variable is ONE_QUEUE))
    is_recorded = experiment is not None and experiment.runtime.cuda_graphs
    return on_gpu + (DETERMINISTIC if is_deterministic else ()) + (RECORDED if is_recorded else ())


def prepare(experiment: Experiment | None) -> None:
    """Prepare this process for `experiment`, or, with None, for a computation on the CPU alone.

    Entry points call this before they import torch, or anything that does: it sets the variables of this module, then
    makes megatron-core work where there is no GPU. Raises ConfigError as `compute_on_cpu` does.
    """
    if experiment is None:
        compute_on_cpu()
    else:
        set_variables(experiment)

    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()


def set_variables(experiment: Experiment) -> None:
    """Set the variables that the user has not set. Call before torch is imported: a loaded driver no longer reads its
    variables."""
    if experiment.runtime.device == "cpu":
        compute_on_cpu()
        return
    for variable in wanted_variables(experiment):
        if not any(name in os.environ for name in variable.names):
            os.environ[variable.name] = variable.value


def compute_on_cpu() -> None:
    """Hide the GPUs from this process and its children.

    Raises ConfigError if torch has already found a GPU.
    """
    os.environ[HIDDEN_GPUS] = ""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        rule = "this process has a GPU already, and megatron-core would use it"
        raise ConfigError(
            "this machine", [Problem("runtime.device", "cpu", rule, f"set {HIDDEN_GPUS}= before Python starts")]
        )


def recorded(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of this module that are set, and others that configure the same libraries, sorted by name."""
    ours = {HIDDEN_GPUS, *(name for variable in ON_GPU + DETERMINISTIC for name in variable.names)}
    prefixes = (
        "NCCL_",
        "GLOO_",
        "NVTE_",
        "CUBLAS_",
        "TORCH_NCCL_",
        "NVIDIA_TF32",
        "TORCH_ALLOW_TF32",
        "OMP_NUM_THREADS",
    )
    return {name: environment[name] for name in sorted(environment) if name in ours or name.startswith(prefixes)}


OF_ONE_NODE = (
    "_IFNAME",
    "_HCA",
    "_FILE",
    "NCCL_HOSTID",
    "NCCL_DEBUG",
    HIDDEN_GPUS,
)
"""Parts of names of variables that may differ between nodes: they name devices or files of one, or only what is
logged."""


def compared(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of `recorded` that have to be the same on all ranks of a job."""
    return {
        name: value for name, value in recorded(environment).items() if not any(part in name for part in OF_ONE_NODE)
    }


def variable_rows(
    experiment: Experiment | None, environment: Mapping[str, str] = os.environ
) -> list[tuple[str, str, str]]:
    """(name, value, who set it or why) of the variables that a run will see."""
    found = recorded(environment)
    rows = []
    for variable in wanted_variables(experiment):
        given = next((name for name in variable.names if name in found and name != HIDDEN_GPUS), None)
        rows.append(
            (given, found[given], "as you set it") if given else (variable.name, variable.value, variable.reason)
        )
    seen = {name for name, *_ in rows}
    return rows + [(name, value, "as you set it") for name, value in found.items() if name not in seen]


ADVICE = (
    (
        "NCCL_SOCKET_IFNAME",
        "NCCL takes the first interface that is up; name the one between nodes if it is another",
    ),
    ("GLOO_SOCKET_IFNAME", "gloo takes the interface of the host's name; name the one between the nodes"),
    (
        "NCCL_IB_HCA",
        "NCCL uses every InfiniBand or RoCE adapter; name those between nodes if there are others",
    ),
    ("NCCL_DEBUG", "INFO shows which links and adapters NCCL has chosen, WARN only what fails"),
)
"""Variables that only the user can set, because they name what a cluster has; and when to."""


def advice_rows(environment: Mapping[str, str] = os.environ) -> list[tuple[str, str, str]]:
    """(name, "not set", when to set it) of the variables that matter between nodes and are not set."""
    return [(name, "not set", advice) for name, advice in ADVICE if name not in environment]


def keep_freed_memory() -> None:
    """Make malloc keep freed blocks instead of returning them to the system at once (glibc only; elsewhere a no-op).

    A training step on CPU frees and allocates the same large blocks repeatedly, and every fresh page costs a fault:
    about 6% of a step, measured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h
        for name, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(name, value)
