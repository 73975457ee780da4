"""`plan --calibrate`: the speed of the machine at hand as a hardware profile, in the format of plan/profiles/*.yaml.

Each rank times the same work on its GPU, or on the CPU where there is none; the slowest rank's seconds count, because a
step waits for it. What cannot be measured from a program, such as peaks and watts, is taken over from another profile.
Single kernels are measured, not a step: kernels between the matmuls and launches are slower in one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.diagnostics.calibrated_profile import Figure, Shape, nearest, profile
from hunyuan_pretrain.plan.hardware import Format, Hardware
from hunyuan_pretrain.plan.new_experiment import check_new, write_new
from hunyuan_pretrain.runtime.device import Machine, probe

SERIES = 5
"""The fastest of so many counts, after one to warm up: what else the machine does makes a series slower."""
FORMATS: tuple[Format, ...] = ("bf16", "fp8")
FP8_CAPABILITY = (8, 9)
LAYERS = 32


@dataclass(frozen=True)
class Sizes:
    """How much work is timed."""

    matmuls: tuple[Shape, ...]
    """The first one gives the rate of a large matmul."""
    copied_bytes: int
    host_bytes: int
    swiglu: tuple[int, int]
    """Rows, and values of a result."""
    message_bytes: int
    calls: int
    """Of each operation in a series."""


GPU_SIZES = Sizes(
    # a cube; Hunyuan-Large's projections and experts, with the tokens of 4 sequences, and with the rows of an expert
    (Shape(8192, 8192, 8192), Shape(16384, 6400, 36608), Shape(16384, 18304, 6400), Shape(1024, 6400, 36608)),
    2**31,
    2**29,
    (16384, 18304),
    2**28,
    10,
)
CPU_SIZES = Sizes((Shape(256, 256, 256), Shape(64, 256, 512)), 2**22, 0, (256, 512), 2**18, 3)
"""For a look at the format, and for tests."""


class Ranks(NamedTuple):
    """The process groups of this rank: GPUs that reach each other over NVLink, and those that do not. None: alone."""

    near: dist.ProcessGroup | None
    far: dist.ProcessGroup | None


def calibrate(output: Path, hardware: str = "") -> list[tuple[str, str, str]]:
    """Measure, and let rank 0 write the profile. `hardware`: the profile that gives what cannot be measured; default:
    the one of this GPU. Returns rows of (figure, value, source); on other ranks [].

    Communicates: all ranks that the environment names. Raises ConfigError: `output` exists or cannot be written, no
    profile for this GPU, a number of ranks that does not fill NVLink's domains.
    """
    rank, machine = int(os.environ.get("RANK", "0")), probe()
    device = torch.device("cpu")
    if machine.gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    base = nearest(machine.gpus[device.index].name if device.type == "cuda" else None, hardware)
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    if rank == 0:
        check_new(output, "plan", "--calibrate")  # before the measurement
    ranks = _join(base, device)
    seconds = _slowest({**_compute(sizes, device, machine), **_communicate(ranks, sizes, device)}, device)
    figures = {**_read(device), **_figures(seconds, sizes, base, ranks, device, machine)}
    if ranks != Ranks(None, None):  # joined above; another job of this process is not ours to leave
        dist.destroy_process_group()
    if rank > 0:
        return []
    text, rows = profile(base, figures, _where(device, machine), _rates(seconds, sizes))
    write_new(output, text, "plan", "--calibrate")
    return rows


def _where(device: torch.device, machine: Machine) -> str:
    if device.type == "cuda":
        return machine.gpus[device.index].name
    count = torch.get_num_threads()
    return f"CPU with {count} thread{'s' if count > 1 else ''}"


# --- timing -----------------------------------------------------------------------------------------------------------


def _seconds(
    operation: Callable[[], object], device: torch.device, calls: int, group: dist.ProcessGroup | None
) -> float:
    """Of one call. `group`: ranks that begin each series together."""
    series = []
    for _ in range(SERIES + 1):
        if group is not None:
            dist.barrier(group)
        _wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            operation()
        _wait(device)
        series.append((time.perf_counter() - started) / calls)
    return min(series[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compute(sizes: Sizes, device: torch.device, machine: Machine) -> dict[str, float]:
    """Name -> seconds of one call on this rank."""
    timed = partial(_seconds, device=device, calls=sizes.calls, group=None)
    found = {}
    for shape in sizes.matmuls:
        a, b = (torch.randn(size, device=device, dtype=torch.bfloat16) for size in (shape.left, shape.right))
        found[f"bf16 {shape}"] = timed(partial(torch.mm, a, b))
        if device.type == "cuda" and machine.gpus[device.index].capability >= FP8_CAPABILITY:
            found[f"fp8 {shape}"] = timed(_fp8_product(a, b))
    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = timed(partial(target.copy_, source))
    del source, target
    found["swiglu"] = timed(_wide_swiglu(sizes, device, machine))
    found["launches"] = timed(_small_layers(device, machine))
    if device.type == "cuda":
        pinned = torch.ones(sizes.host_bytes, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(pinned, device=device)
        found["to device"] = timed(partial(there.copy_, pinned, non_blocking=True))
        found["to host"] = timed(partial(pinned.copy_, there, non_blocking=True))
    return found


def _fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """a @ b with one scale per tensor. The kernel wants the right operand column by column."""
    a8, b8 = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return partial(torch._scaled_mm, a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _swiglu_of_a_run(machine: Machine) -> Callable[[Tensor], Tensor]:
    """The function that a run would use here."""
    if machine.has_triton:
        from hunyuan_pretrain.model.kernels.swiglu import swiglu

        return swiglu

    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()

    from hunyuan_pretrain.model.swiglu import swiglu as plain

    return plain


def _wide_swiglu(sizes: Sizes, device: torch.device, machine: Machine) -> Callable[[], object]:
    """SwiGLU forward and backward: strided operands, and most of the bytes between the matmuls."""
    swiglu, (rows, width) = _swiglu_of_a_run(machine), sizes.swiglu
    x = torch.randn(rows, 2 * width, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(swiglu(x), x, grad)


def _swiglu_bytes(sizes: Sizes, machine: Machine) -> int:
    """Read and written, as plan.traffic counts: by one kernel each way, or by torch's operations."""
    rows, width = sizes.swiglu
    return rows * width * 2 * (3 + 5 if machine.has_triton else 5 + 11)


def _small_layers(device: torch.device, machine: Machine) -> Callable[[], object]:
    """Linear layers and SwiGLU forward and backward, so small that the host's time to launch kernels is what counts."""
    swiglu = _swiglu_of_a_run(machine)
    x = torch.randn(16, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(16, 32, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(LAYERS)]
    grad = torch.ones_like(x)

    def run() -> object:
        y = x
        for weight in weights:
            y = swiglu(torch.mm(y, weight))
        return torch.autograd.grad(y, [x, *weights], grad)

    return run


def _launches(machine: Machine) -> int:
    """Kernels of `_small_layers`: in each layer three products, and SwiGLU's."""
    return LAYERS * (3 + 2 if machine.has_triton else 3 + 6)


# --- ranks ------------------------------------------------------------------------------------------------------------


def _join(base: Hardware, device: torch.device) -> Ranks:
    """Join the job that torchrun started, if any."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(None, None)
    domain = base.nvlink_domain_gpus
    if domain <= base.node_gpus:  # otherwise it spans nodes
        domain = min(domain, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    near = min(domain, world)
    if world % near:
        rule = f"{world} ranks do not fill domains of {near} GPUs joined by NVLink"
        raise ConfigError("plan", [Problem("--calibrate", Problem.NO_VALUE, rule, f"start a multiple of {near} ranks")])
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mine, sets = dist.get_rank(), [list(range(first, first + near)) for first in range(0, world, near)]
    sets += [list(range(first, world, near)) for first in range(near)]
    groups = [(dist.new_group(members), members) for members in sets]  # every rank creates all of them
    joined = [group for group, members in groups if mine in members]
    return Ranks(joined[0] if near > 1 else None, joined[1] if world > near else None)


def _communicate(ranks: Ranks, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Name -> seconds of one collective, of `message_bytes` and of the smallest size, in both groups."""
    found = {}
    for name, group in ranks._asdict().items():
        if group is None:
            continue
        count = sizes.message_bytes // 4 // group.size() * group.size()
        for size, kind in ((count, ""), (group.size(), " latency")):
            sent = torch.zeros(size, device=device)
            received = torch.empty_like(sent)
            timed = partial(_seconds, device=device, calls=sizes.calls, group=group)
            found[f"{name} all-reduce{kind}"] = timed(partial(dist.all_reduce, sent, group=group))
            found[f"{name} all-to-all{kind}"] = timed(partial(dist.all_to_all_single, received, sent, group=group))
    return found


def _slowest(seconds: dict[str, float], device: torch.device) -> dict[str, float]:
    """The same on the slowest rank. All ranks time the same."""
    if not dist.is_initialized():
        return seconds
    slowest = torch.tensor(list(seconds.values()), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(seconds, slowest.tolist(), strict=True))


# --- figures ----------------------------------------------------------------------------------------------------------


def _read(device: torch.device) -> dict[str, Figure]:
    """What the driver says."""
    if device.type == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "num_sms": Figure(properties.multi_processor_count, "torch.cuda.get_device_properties"),
        "memory_bytes": Figure(properties.total_memory, "torch.cuda.get_device_properties"),
    }


def _figures(
    seconds: dict[str, float], sizes: Sizes, base: Hardware, ranks: Ranks, device: torch.device, machine: Machine
) -> dict[str, Figure]:
    """Dotted name in a profile -> figure."""
    where, large = f"measured on {_where(device, machine)}", sizes.matmuls[0]
    found = {}
    for number_format in FORMATS:
        if taken := seconds.get(f"{number_format} {large}"):
            rate, peak = large.flops / taken, getattr(base, f"peak_{number_format}_flops_per_s")
            source = f"{where}: {rate / 1e12:.4g} TFLOP/s in a product of {large}"
            found[f"achieved.{number_format}"] = Figure(rate / peak, source)
    rate = 2 * sizes.copied_bytes / seconds["copy"]
    source = f"{where}: {rate / 1e12:.3g} TB/s read and written by a copy"
    found["achieved.memory"] = Figure(rate / base.memory_bytes_per_s, source)
    rate = _swiglu_bytes(sizes, machine) / seconds["swiglu"]
    source = f"{where}: {rate / 1e12:.3g} TB/s in SwiGLU, forward and backward; other kernels of a step may reach less"
    found["achieved.elementwise"] = Figure(rate / base.memory_bytes_per_s, source)
    source = f"{where}: small linear layers and SwiGLU, forward and backward; a step's other Python comes on top"
    found["host_launch_s"] = Figure(seconds["launches"] / _launches(machine), source)
    if "to host" in seconds:
        rate = sizes.host_bytes / max(seconds["to host"], seconds["to device"])
        source = f"{where}: {rate / 1e9:.3g} GB/s, pinned, the slower direction"
        found["achieved.host"] = Figure(rate / base.host_bytes_per_s, source)
    for link, group in (("nvlink", ranks.near), ("network", ranks.far)):
        if group is not None:
            name = "near" if link == "nvlink" else "far"
            found |= dict(_link_figures(link, name, group.size(), seconds, sizes, base, where))
    return found


def _link_figures(
    link: str, name: str, ranks: int, seconds: dict[str, float], sizes: Sizes, base: Hardware, where: str
) -> Iterator[tuple[str, Figure]]:
    """The rate is that of the slower collective, of what a rank sends in a ring and to each other rank."""
    size = sizes.message_bytes // 4 // ranks * ranks * 4
    reduced = 2 * size * (ranks - 1) / ranks / seconds[f"{name} all-reduce"]
    exchanged = size * (ranks - 1) / ranks / seconds[f"{name} all-to-all"]
    backend = dist.get_backend()
    source = (
        f"{where}, {backend}, {ranks} ranks: {reduced / 1e9:.3g} GB/s in an all-reduce, {exchanged / 1e9:.3g} in an "
        "all-to-all; the lower"
    )
    yield f"achieved.{link}", Figure(min(reduced, exchanged) / getattr(base, f"{link}_bytes_per_s"), source)
    small = [seconds[f"{name} {kind} latency"] for kind in ("all-reduce", "all-to-all")]
    yield f"{link}_latency_s", Figure(max(small), f"{where}, {backend}, {ranks} ranks: the slower small collective")


def _rates(seconds: dict[str, float], sizes: Sizes) -> list[tuple[Format, Shape, float]]:
    """(format, shape, FLOP/s) of every matmul."""
    return [
        (number_format, shape, shape.flops / taken)
        for number_format in FORMATS
        for shape in sizes.matmuls
        if (taken := seconds.get(f"{number_format} {shape}"))
    ]
