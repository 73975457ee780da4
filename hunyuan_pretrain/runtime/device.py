"""Probes the machine's hardware and optional packages; no other file does.

Nothing here imports megatron. Optional packages are looked up, not imported. Only `probe(thorough=True)` imports
Transformer Engine, in a separate process, because a broken installation raises on import and leaves partly loaded
modules behind.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

import psutil
import torch

ApexState = Literal["nvidia", "wrong", "absent"]


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]
    """Compute capability, (9, 0) on Hopper."""
    memory_gib: float


@dataclass(frozen=True)
class Machine:
    """What `probe` found."""

    python: str
    torch: str
    cuda: str | None
    """CUDA version that torch was built with; None for a CPU build."""
    gpus: tuple[Gpu, ...]
    cores: int
    """Cores that this process may use."""
    memory_gib: float
    """Memory that this process may use: the machine's, or the container's limit if lower."""
    megatron_core: str | None
    transformer_engine: str | None
    transformer_engine_error: str | None
    """Why an installed Transformer Engine cannot be used; None if it can be, or is absent."""
    apex: ApexState
    """"wrong": a package named apex that is not NVIDIA's, such as the one on PyPI."""
    flash_attn: str | None
    flash_attn_3: str | None
    triton: str | None
    wandb: str | None
    tensorboard: str | None

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """The device that runtime.device=auto selects."""
        return "cuda" if self.gpus else "cpu"

    @property
    def has_transformer_engine(self) -> bool:
        """Transformer Engine is installed, can be loaded, and has a GPU to run on."""
        return self.transformer_engine is not None and self.transformer_engine_error is None and bool(self.gpus)

    @property
    def has_triton(self) -> bool:
        """Triton is installed and has GPUs whose tensor cores know bf16 and TF32, as the kernels need."""
        return self.triton is not None and bool(self.gpus) and all(gpu.capability >= (8, 0) for gpu in self.gpus)


def probe(thorough: bool = False) -> Machine:
    """Probe this machine. Takes about a millisecond once torch is imported.

    `thorough` also imports Transformer Engine, if installed, in another process: takes some seconds, but is conclusive.
    """
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(properties.name, (properties.major, properties.minor), properties.total_memory / 2**30))
    engine = version_of("transformer-engine")
    return Machine(
        python=sys.version.split()[0],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpus=tuple(gpus),
        cores=usable_cores(),
        memory_gib=usable_memory_bytes() / 2**30,
        megatron_core=version_of("megatron-core"),
        transformer_engine=engine,
        transformer_engine_error=transformer_engine_error(thorough) if engine else None,
        apex=apex_state(),
        flash_attn=version_of("flash-attn"),
        flash_attn_3=version_of("flash-attn-3"),
        triton=version_of("triton"),
        wandb=version_of("wandb"),
        tensorboard=version_of("tensorboard"),
    )


def major_minor(version: str) -> tuple[int, int]:
    """Major and minor version: (2, 11) for "2.11.0+abc"; (0, 0) if there are none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, None if absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def apex_state() -> ApexState:
    """Whether `import apex` would find NVIDIA's package: only NVIDIA's has the compiled module amp_C."""
    if PathFinder.find_spec("amp_C") is not None:
        return "nvidia"
    return "wrong" if PathFinder.find_spec("apex") is not None else "absent"


def transformer_engine_error(thorough: bool) -> str | None:
    """Why the installed Transformer Engine cannot be loaded, None if no reason was found. Only `thorough` loads it."""
    package = PathFinder.find_spec("transformer_engine")  # cpu_megatron may have hidden it from `import`
    if package is None or not package.submodule_search_locations:
        return "its distribution is installed without the package transformer_engine"
    # The compiled extension is inside the package or, if built from source, next to it. It cannot be imported by name
    # before the package has loaded it: hence files, not find_spec.
    folders = [Path(place) for place in package.submodule_search_locations]
    name = "transformer_engine_torch*.so"
    if not any([*folder.rglob(name), *folder.parent.glob(name)] for folder in folders):
        return "its compiled extension for torch is missing, and megatron-core fails on import with it in this state"
    if not thorough:
        return None
    run = subprocess.run(
        [sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True, text=True, timeout=300
    )
    return (
        None
        if run.returncode == 0
        else f"it cannot be loaded: {(run.stderr.strip().splitlines() or ['no message'])[-1]}"
    )


def usable_cores() -> int:
    """Cores that this process may use, from its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read_cgroup("cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdecimal() and period.isdecimal() else cores


def usable_memory_bytes() -> int:
    """Memory of the machine, or the container's limit if lower, in bytes."""
    total = int(psutil.virtual_memory().total)
    limit = read_cgroup("memory.max")
    return min(total, int(limit)) if limit.isdecimal() else total


def read_cgroup(name: str) -> str:
    """A limit of this process's container (cgroup v2); "" if there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""


def libraries() -> dict[str, str]:
    """Versions of the interpreter and of the libraries inside torch, and of packages that only have to be the same on
    all ranks."""
    found: dict[str, object] = {
        "python": sys.version.split()[0],
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "triton": version_of("triton"),
        "hunyuan-pretrain": version_of("hunyuan-pretrain"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def gpu_state(index: int | None) -> str:
    """Model, memory, driver, clocks and power limit of a GPU in words; "none" without one."""
    if index is None:
        return "none"
    properties = torch.cuda.get_device_properties(index)
    uuid = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
    size = f"{properties.total_memory / 2**30:.1f} GiB"
    capability = f"compute {properties.major}.{properties.minor}"
    return "; ".join([properties.name, size, capability, *settings_of_gpu(uuid)])


SM_CLOCK, MEMORY_CLOCK = 1, 2
"""nvmlClockType_t."""


def settings_of_gpu(uuid: str, library: str = "libnvidia-ml.so.1") -> list[str]:
    """Driver, highest and set clocks and power limit of a GPU, from NVML, which comes with the driver; what it does not
    tell is left out."""
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != 0:
            return []
        driver, handle = ctypes.create_string_buffer(96), ctypes.c_void_p()
        nvml.nvmlSystemGetDriverVersion(driver, 96)
        found = [f"driver {driver.value.decode()}"]
        if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return found
        for name, ask, kind, scale, unit in (
            ("SM clock at most", nvml.nvmlDeviceGetMaxClockInfo, (SM_CLOCK,), 1, "MHz"),
            ("memory clock at most", nvml.nvmlDeviceGetMaxClockInfo, (MEMORY_CLOCK,), 1, "MHz"),
            ("SM clock set to", nvml.nvmlDeviceGetApplicationsClock, (SM_CLOCK,), 1, "MHz"),
            ("power limit", nvml.nvmlDeviceGetEnforcedPowerLimit, (), 1000, "W"),
        ):
            value = ctypes.c_uint()
            if ask(handle, *kind, ctypes.byref(value)) == 0:
                found.append(f"{name} {value.value // scale} {unit}")
        return found
    except (OSError, AttributeError):  # no driver, or one without such a function
        return []


def versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers depend on, for its record."""
    names = ("torch", "megatron-core", "transformer-engine", "flash-attn", "flash-attn-3", "numpy")
    return {name: version for name in names if (version := version_of(name)) is not None}
