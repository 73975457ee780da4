"""Hardware profiles: what a GPU, its links and its host can do, and which share of that real kernels reach.

The profiles are YAML files, plan/profiles/*.yaml, in the wheel too; each figure has its source in a comment. A file of
your own can build on one of them (`base:`). Speeds are of one GPU and one direction.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.load import read_file, validate
from hunyuan_pretrain.config.schema import Section, setting

PROFILES = Path(__file__).parent / "profiles"

Format = Literal["bf16", "fp8", "mxfp8"]
"""What a matmul multiplies. fp8: one scale per tensor or per block in fp32; mxfp8: Blackwell's block scales."""


class Achieved(Section):
    """Shares of the peaks that kernels and collectives reach."""

    bf16: PositiveFloat = setting("A large matmul (8192^3) in bf16, of peak_bf16_flops_per_s.")
    fp8: PositiveFloat = setting("The same in FP8, of peak_fp8_flops_per_s.")
    mxfp8: PositiveFloat = setting("The same in mxfp8, of peak_mxfp8_flops_per_s.")
    attention_forward: PositiveFloat = setting(
        "Flash attention of causal documents of some thousand tokens, of peak_bf16_flops_per_s; only pairs that the "
        "mask allows count."
    )
    attention_backward: PositiveFloat = setting("Its backward pass; 5 matmuls where the forward pass has 2.")
    memory: PositiveFloat = setting("A copy of a large tensor, read and written, of memory_bytes_per_s.")
    elementwise: PositiveFloat = setting(
        "The kernels between the matmuls, of memory_bytes_per_s: strided operands, reductions, small tensors."
    )
    nvlink: PositiveFloat = setting("Collectives of NCCL, of nvlink_bytes_per_s.")
    network: PositiveFloat = setting("Collectives of NCCL, of network_bytes_per_s.")
    host: PositiveFloat = setting("Copies between pinned host memory and device, of host_bytes_per_s.")


class Hardware(Section):
    """A GPU in its server."""

    name: str = setting("Name in the plan.")
    peak_bf16_flops_per_s: PositiveFloat = setting("Dense bf16, without sparsity.", unit="FLOP/s")
    peak_fp8_flops_per_s: PositiveFloat = setting("Dense FP8, without sparsity.", unit="FLOP/s")
    peak_mxfp8_flops_per_s: PositiveFloat | None = setting(
        "Dense mxfp8, without sparsity; null: the GPU has no such units.", unit="FLOP/s"
    )
    num_sms: PositiveInt = setting("Streaming multiprocessors; each computes one tile of a matmul at a time.")
    memory_bytes: PositiveFloat = setting("Device memory as the driver reports it.", unit="bytes")
    memory_bytes_per_s: PositiveFloat = setting("Bandwidth of the device memory.", unit="bytes/s")
    nvlink_bytes_per_s: PositiveFloat = setting("NVLink bandwidth.", unit="bytes/s")
    nvlink_domain_gpus: PositiveInt = setting("GPUs that reach each other over NVLink.", unit="GPUs")
    nvlink_latency_s: NonNegativeFloat = setting("Of one message.", unit="seconds")
    node_gpus: PositiveInt = setting("GPUs that share one host.", unit="GPUs")
    network_bytes_per_s: PositiveFloat = setting("Bandwidth of the network adapter of each GPU.", unit="bytes/s")
    network_latency_s: NonNegativeFloat = setting("Of one message.", unit="seconds")
    host_bytes_per_s: PositiveFloat = setting("Bandwidth between host memory and device.", unit="bytes/s")
    host_memory_bytes: PositiveFloat = setting("Memory of a host.", unit="bytes")
    storage_bytes_per_s: PositiveFloat = setting(
        "Of each server to shared storage, while all servers write a checkpoint.", unit="bytes/s"
    )
    gpu_hours_between_failures: PositiveFloat = setting(
        "Mean between interruptions that end the job: hours between them, times its GPUs.", unit="hours"
    )
    restart_s: NonNegativeFloat = setting("From a failure to the first step after it.", unit="seconds")
    power_w: PositiveFloat = setting("Of one GPU with its share of the server, at full load.", unit="watts")
    kernel_gap_s: NonNegativeFloat = setting("Between two kernels of a busy queue, nothing runs.", unit="seconds")
    host_launch_s: NonNegativeFloat = setting("The host's time for each kernel it launches.", unit="seconds")
    achieved: Achieved

    def matmul_flops_per_s(self, number_format: Format) -> float:
        """Of a large matmul. Raises ConfigError if the GPU cannot compute in this format."""
        peak = getattr(self, f"peak_{number_format}_flops_per_s")
        if peak is None:
            rule = f"{self.name} does not compute in {number_format}"
            hint = "use precision.fp8_recipe=blockwise, or hardware that does"
            raise ConfigError("hardware", [Problem(f"peak_{number_format}_flops_per_s", Problem.NO_VALUE, rule, hint)])
        return float(peak * getattr(self.achieved, number_format))

    @property
    def copy_bytes_per_s(self) -> float:
        """Bytes read and written by a kernel that only streams."""
        return self.memory_bytes_per_s * self.achieved.memory

    @property
    def elementwise_bytes_per_s(self) -> float:
        """Bytes read and written by the kernels between the matmuls."""
        return self.memory_bytes_per_s * self.achieved.elementwise

    @property
    def host_copy_bytes_per_s(self) -> float:
        """Bytes copied between host and device."""
        return self.host_bytes_per_s * self.achieved.host


def names() -> list[str]:
    """Names of the profiles that come with the project."""
    return sorted((path.stem for path in PROFILES.glob("*.yaml")), key=str.lower)


def load(name_or_file: str | Path) -> Hardware:
    """A profile by name, or by the path of a YAML file. Raises ConfigError: an unknown name, an unreadable file, a
    missing or misspelt figure."""
    text = str(name_or_file)
    known = {name.lower(): name for name in names()}
    if text.lower() in known:
        path = PROFILES / f"{known[text.lower()]}.yaml"
    elif text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
    else:
        near = [name for name in known if name.startswith(text.lower())] or difflib.get_close_matches(
            text.lower(), known, 1
        )
        hint = (f"did you mean {known[near[0]]}? " if near else "") + f"known: {', '.join(names())}; or a YAML file"
        raise ConfigError("--hardware", [Problem("name", text, "unknown hardware", hint)])
    return validate(Hardware, read_file(path, ()))
