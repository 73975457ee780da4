"""Variables that libraries and drivers read once, when they are loaded: set in one place, before torch is imported.

What a user has set stays, except that a command which computes on the CPU sees no GPU. `doctor` shows them and a run
records them. Imports no torch.
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
    """One variable and the value that it has unless the user has set it."""

    name: str
    value: str
    reason: str
    also: str = ""
    """Another name that means the same to the library."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name, and the other one."""
        return (self.name, self.also) if self.also else (self.name,)


ON_GPU = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "tensor parallelism overlaps collectives with products: queued in the order of the calls",
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "micro-batches of other lengths do not fragment memory",
        "PYTORCH_ALLOC_CONF",
    ),
)
DETERMINISTIC = (
    Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "runtime.deterministic: cuBLAS then splits sums in one way"),
    Variable("NCCL_ALGO", "^NVLS,NVLSTree", "runtime.deterministic: sums inside the switch have no fixed order"),
)


def wanted_variables(experiment: Experiment | None) -> tuple[Variable, ...]:
    """What a run of `experiment` sets; None: of any with default settings."""
    if experiment is not None and experiment.runtime.device == "cpu":
        return (Variable(HIDDEN_GPUS, "", "runtime.device=cpu: megatron-core takes a GPU wherever it sees one"),)
    is_deterministic = experiment is None or experiment.runtime.deterministic
    return ON_GPU + (DETERMINISTIC if is_deterministic else ())


def set_variables(experiment: Experiment) -> None:
    """Set what the user has not. Before torch is imported: a driver that is up has read its own already."""
    if experiment.runtime.device == "cpu":
        compute_on_cpu()
        return
    for variable in wanted_variables(experiment):
        if not any(name in os.environ for name in variable.names):
            os.environ[variable.name] = variable.value


def compute_on_cpu() -> None:
    """Hide the GPUs from this process and those that it starts.

    Raises ConfigError where torch has found one already.
    """
    os.environ[HIDDEN_GPUS] = ""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        rule = "this process has a GPU already, and megatron-core takes it"
        raise ConfigError(
            "this machine", [Problem("runtime.device", "cpu", rule, f"set {HIDDEN_GPUS}= before Python starts")]
        )


def recorded(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of the variables that are set, and what else steers the same libraries, by name."""
    ours = {HIDDEN_GPUS, *(name for variable in ON_GPU + DETERMINISTIC for name in variable.names)}
    prefixes = ("NCCL_", "NVTE_", "CUBLAS_", "TORCH_NCCL_", "NVIDIA_TF32", "TORCH_ALLOW_TF32", "OMP_NUM_THREADS")
    return {name: environment[name] for name in sorted(environment) if name in ours or name.startswith(prefixes)}


def variable_rows(
    experiment: Experiment | None, environment: Mapping[str, str] = os.environ
) -> list[tuple[str, str, str]]:
    """(name, value, who set it and why) of what a run will have."""
    found = recorded(environment)
    rows = []
    for variable in wanted_variables(experiment):
        given = next((name for name in variable.names if name in found and name != HIDDEN_GPUS), None)
        rows.append(
            (given, found[given], "as you set it") if given else (variable.name, variable.value, variable.reason)
        )
    seen = {name for name, *_ in rows}
    return rows + [(name, value, "as you set it") for name, value in found.items() if name not in seen]


def keep_freed_memory() -> None:
    """Make malloc keep freed blocks instead of giving them back to the system at once (glibc; elsewhere nothing
    happens).

    A training step on CPU frees and takes the same large blocks again and again, and fresh pages cost a fault each:
    measured about 6% of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h
        for name, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(name, value)
