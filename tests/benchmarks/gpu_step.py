"""Whole optimizer steps on one GPU, this project beside megatron-core's GPTModel, with the card's ceilings measured in
the same run.

    python -m tests.benchmarks.gpu_step [--parts ceilings,attention,large,...] [--steps 6] [--out FILE] [--dry]

Parts: ceilings (products in bf16 and FP8, a copy), attention (every backend; tests/benchmarks/gpu_attention.py), large
and large4 (Hunyuan-Large's width, 2 and 4 layers), bench (a small model), long (one sequence of 256K tokens). Each runs
in a process of its own with a time-out; what was measured before a time-out or a crash is kept, and after a crash the
part goes on with the next contender. All parts together should take under 6 minutes, and cannot take more than 9.

For each contender: the median step, tokens/s, TFLOP/s (6 x active parameters x tokens, without attention), peak memory,
the loss, and the GPU's time in one step by group of kernels, from torch.profiler. GPTModel runs with its fused kernels
(GPT_FUSIONS); if it fails with them, it runs without, and the report gives the error. Only the contender of that name
uses deterministic algorithms, as runs do by default; beside it one sees what they cost. The part `long` takes 2 steps,
whose attention alone takes seconds.

--dry: tiny sizes on a CPU, with the tests' stand-ins for Transformer Engine's kernels and Triton's interpreter. It
checks that everything runs; the figures are void.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import pkgutil
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks import gpu_attention

ROOT = Path(__file__).parents[2]
PARTS = {"ceilings": 45, "attention": 60, "large": 125, "bench": 120, "large4": 105, "long": 75}
"""Name -> time-out in seconds."""
WARM_UP = 3
KERNEL_GROUPS = (
    ("copies", r"memcpy|memset"),
    ("attention", r"fmha|flash|sdpa|compute_dot_do|attention"),
    ("optimizer, gradient norm", r"multi_tensor|adam|l2norm"),
    ("FP8 quantising", r"quantiz|cast_transpose|block_scal|amax|mxfp8|float8"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|splitk|::mm|addmm|bmm"),
    ("RMSNorm", r"rmsnorm|layernorm|ln_fwd|ln_bwd"),
    ("routing, gathers", r"index|gather|scatter|sort|scan|cumsum|topk|radix|permut"),
    ("compiled by torch", r"^triton_"),
    ("elementwise, reductions", r"elementwise|vectorized|reduce|softmax|aten::|at::native"),
)
"""The first pattern that a kernel's name has decides; before them come this project's own kernels, by name."""


# --- one part, in a process of its own --------------------------------------------------------------------------------


def worker(part: str, names: list[str], num_steps: int, is_dry: bool) -> None:
    """Print one line of JSON before and after each contender."""
    warnings.filterwarnings("ignore")
    if is_dry:
        from tests.helpers import gpt_on_cpu, transformer_engine_stub

        transformer_engine_stub.install((10, 0))
        gpt_on_cpu.install()
    from hunyuan_pretrain.runtime import cpu_megatron
    from hunyuan_pretrain.runtime.environment import keep_freed_memory

    cpu_megatron.install()
    if part == "ceilings":
        say({"finished": "ceilings", "result": ceilings(is_dry)})
        return
    if part == "attention":
        for line in gpu_attention.lines(names, is_dry):
            say(line)
        return
    from hunyuan_pretrain.parallel.groups import destroy_groups, initialize_distributed
    from tests.benchmarks.gpu_contenders import DRY, SHAPES, contenders

    if is_dry:
        keep_freed_memory()
    initialize_distributed("gloo" if is_dry else "nccl", 600)
    shape = DRY if is_dry else SHAPES[part]
    steps = (1, min(num_steps, 2)) if part == "long" else (WARM_UP, num_steps)
    if is_dry:  # its times are void, and interpreted kernels are slow
        steps = (0, 1)
    for contender in contenders(part, supported_recipes(is_dry), has_graphs=not is_dry):
        if contender.name in names:
            say({"started": contender.name})
            say({"finished": contender.name, "result": measured(contender, shape, steps, is_dry)})
            if kept_gib() > 4:
                say({"restart": f"{contender.name} left {kept_gib():.1f} GiB behind"})
                break
    destroy_groups()


def kept_gib() -> float:
    """GPU memory of this process that is still in use after a contender."""
    import torch

    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def measured(contender: Any, shape: Any, steps: tuple[int, int], is_dry: bool) -> dict[str, Any]:
    """Figures of one contender, or its error, from (warm-up, measured) steps. GPTModel is tried with its fusions
    first."""
    from tests.benchmarks.gpu_contenders import GPT_FUSIONS

    without: dict[str, Any] = {}
    if contender.is_gpt and not is_dry:  # the stand-ins have no such kernels
        found = attempt(contender, shape, steps, GPT_FUSIONS)
        if "error" not in found:
            return found
        without = {"error_with_fusions": found["error"]}
    return attempt(contender, shape, steps, {}) | without


def attempt(contender: Any, shape: Any, steps: tuple[int, int], fusions: dict[str, Any]) -> dict[str, Any]:
    import torch

    from hunyuan_pretrain.parallel.groups import leave_layout
    from hunyuan_pretrain.runtime.seeding import seed_generators, use_deterministic_algorithms

    is_cuda = torch.cuda.is_available()
    warm_up, num_steps = steps
    use_deterministic_algorithms(contender.is_deterministic)
    seed_generators(1, 0)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        step, active = contender.build(shape, fusions)
        seconds, losses = [], []
        built = time.perf_counter() - began
        for _ in range(warm_up + num_steps):
            started = time.perf_counter()
            losses.append(step())  # reading the loss waits for the GPU
            seconds.append(time.perf_counter() - started)
        return {
            "step_ms": 1000 * statistics.median(seconds[warm_up:]),
            "steps_ms": [1000 * second for second in seconds],
            "build_s": built,
            "tokens": shape.tokens,
            "active_parameters": active,
            "loss": losses[-1],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
            # what a CUDA graph works in counts as allocated only while it is recorded
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if is_cuda else None,
            "fusions": fusions if contender.is_gpt else None,
            "kernels": profiled(step),
        }
    except Exception as error:  # the report says what failed, and the other contenders still run
        return {"error": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc()[-3000:]}
    finally:
        step = None  # type: ignore[assignment]  # frees the model
        gc.collect()  # NCCL waits for graphs that hold its work
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.default_stream())
        leave_layout()
        forget_fp8()
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()


def forget_fp8() -> None:
    """Transformer Engine keeps the scales of every module of the process in one place."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def supported_recipes(is_dry: bool) -> list[str]:
    """The FP8 recipes that this GPU has kernels for."""
    from hunyuan_pretrain.config.recipe import RECIPES
    from hunyuan_pretrain.runtime.device import probe
    from hunyuan_pretrain.runtime.policy import missing_for_fp8

    machine = probe()
    if is_dry:
        return list(RECIPES)
    return [
        name
        for name, recipe in RECIPES.items()
        if not missing_for_fp8(recipe, machine.gpus[0].capability, machine.cuda)
    ]


# --- kernels of a step ------------------------------------------------------------------------------------------------


def profiled(step: Any) -> dict[str, Any]:
    """Milliseconds and launches of one step by group of kernels, and the 25 longest kernels. On a CPU the operations
    stand for kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    is_cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    own = own_kernels()
    groups: dict[str, dict[str, float]] = {}
    rows = []
    for event in profiler.key_averages():
        if event.device_type != kind:
            continue
        milliseconds = (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1000
        group = groups.setdefault(group_of(event.key, own), {"ms": 0.0, "launches": 0})
        group["ms"] += milliseconds
        group["launches"] += event.count
        rows.append((milliseconds, event.count, event.key[:160]))
    return {
        "busy_ms": sum(group["ms"] for group in groups.values()),
        "launches": sum(group["launches"] for group in groups.values()),
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1]["ms"])),
        "longest": sorted(rows, reverse=True)[:25],
    }


def group_of(kernel: str, own: set[str]) -> str:
    """The group of a kernel, by its name."""
    if kernel in own:
        return "this project's kernels"
    return next((group for group, pattern in KERNEL_GROUPS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def own_kernels() -> set[str]:
    """Names of the Triton kernels in hunyuan_pretrain/model/kernels/."""
    from triton.runtime.jit import KernelInterface

    from hunyuan_pretrain.model import kernels

    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    return {
        value.fn.__name__ for module in modules for value in vars(module).values() if isinstance(value, KernelInterface)
    }


# --- ceilings of the card ---------------------------------------------------------------------------------------------


def ceilings(is_dry: bool) -> dict[str, Any]:
    """TFLOP/s of n^3 products in bf16 and FP8, and TB/s read and written by a copy."""
    import torch

    from tests.benchmarks.gpu_contenders import device

    n, copied = (64, 2**16) if is_dry else (8192, 2**32)
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copied, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    found: dict[str, Any] = {
        "bf16_tflops": 2 * n**3 / fastest(lambda: torch.mm(a, b)) / 1e12,
        "copy_tb_per_s": 2 * copied / fastest(lambda: target.copy_(source)) / 1e12,
        "fp8_tflops": None,
        "size": n,
    }
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device())
        seconds = fastest(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
        found["fp8_tflops"] = 2 * n**3 / seconds / 1e12
    return found


def fastest(operation: Any) -> float:
    """Seconds of the fastest of 5 series of 10 calls."""
    import torch

    series = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            operation()
        torch.cuda.synchronize()
        series.append((time.perf_counter() - started) / 10)
    return min(series[1:])


# --- all parts --------------------------------------------------------------------------------------------------------


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Results of a part by contender. Starts its process again after a crash, without what was tried already."""
    from tests.benchmarks.gpu_contenders import contenders

    if part in ("ceilings", "attention"):
        waiting = ["ceilings"] if part == "ceilings" else gpu_attention.names()
    else:
        able = contenders(part, supported_recipes(arguments.dry), has_graphs=not arguments.dry)
        waiting = [contender.name for contender in able]
    deadline = time.monotonic() + (600 if arguments.dry else PARTS[part])
    results: dict[str, Any] = {}
    while waiting and time.monotonic() < deadline:
        lines, failure = run_worker(part, waiting, arguments, deadline - time.monotonic())
        for line in lines:
            if "finished" in line:
                results[line["finished"]] = line["result"]
                print(line_of(line["finished"], line["result"]), flush=True)
        waiting = [name for name in waiting if name not in results]
        if waiting and not any("restart" in line for line in lines):
            begun = next((line["started"] for line in reversed(lines) if "started" in line), waiting[0])
            failed = begun if begun in waiting else waiting[0]
            results[failed] = {"error": failure or "its process ended without a result"}
            print(line_of(failed, results[failed]), flush=True)
            waiting.remove(failed)
    return results | {name: {"error": f"not started: the time-out of {part}"} for name in waiting}


def run_worker(
    part: str, names: list[str], arguments: argparse.Namespace, timeout_s: float
) -> tuple[list[dict[str, Any]], str]:
    """(lines of JSON, why it ended early)."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu_step", "--worker", part, "--names", json.dumps(names)]
    command += ["--steps", str(arguments.steps), *(["--dry"] if arguments.dry else [])]
    environment = os.environ | {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it deterministic algorithms refuse every product
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if arguments.dry:
        environment |= {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    why = ""
    try:
        out, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        why = f"the time-out of {part}"
    if process.returncode and not why:
        why = (errors.strip().splitlines() or ["no message"])[-1]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], why


def line_of(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name:52} failed: {result['error']}"
    if "step_ms" not in result:
        return f"{name:52} {json.dumps(result)}"
    speed = result["tokens"] / result["step_ms"] * 1000
    teraflops = 6 * result["active_parameters"] * speed / 1e12
    return (
        f"{name:52} {result['step_ms']:8.1f} ms {speed:10,.0f} tokens/s {teraflops:7.1f} TFLOP/s "
        f"{result['peak_gib'] or 0:6.1f} GiB, busy {result['kernels']['busy_ms']:.1f} ms in "
        f"{result['kernels']['launches']:.0f} kernels, loss {result['loss']:.3f}"
    )


def machine(is_dry: bool) -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    from hunyuan_pretrain.runtime.device import version_of

    packages = ("megatron-core", "transformer-engine", "triton", "flash-attn", "flash-attn-3")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "figures_are_void": is_dry,
        **{name: version_of(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="names, with commas")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each contender")
    parser.add_argument("--out", type=Path, default=Path("gpu_step.json"))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--names", type=json.loads, default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.names, arguments.steps, arguments.dry)
        return
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: one of {', '.join(PARTS)}")
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        sys.exit("gpu_step.py: this machine has no usable CUDA device; --dry runs tiny sizes on the CPU")
    report: dict[str, Any] = {"machine": machine(arguments.dry), "parts": {}}
    for part in parts:
        print(f"# {part}", flush=True)
        started = time.monotonic()
        report["parts"][part] = {"results": run_part(part, arguments), "seconds": time.monotonic() - started}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any("error" in result for part in report["parts"].values() for result in part["results"].values()):
        sys.exit("gpu_step.py: something failed; the report has the errors")


if __name__ == "__main__":
    main()
