"""An export of a random model that is larger than the memory it may take: seconds and memory by part.

    python tests/benchmarks/large_export.py WORK [--layers 42] [--processes 2] [--memory-gb 6]

Makes a run with random weights in WORK/run, if it is not there: of 42 layers, it has 5.2 billion parameters, 20.7 GB in
fp32. Exports it in bf16 to WORK/out, which is removed afterwards. Each process may take `--memory-gb` of data
(RLIMIT_DATA, which counts every private page, and not the pages of files); `peak` is the largest resident memory of all
processes together, looked up ten times a second, with pages that they share counted in each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

WIDTH = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "ffn_hidden_size": 2304,
    "moe_ffn_hidden_size": 2304,
    "num_moe_experts": 16,
    "padded_vocab_size": 32768,
}


def make(run_dir: Path, layers: int) -> None:
    """Write the random run."""
    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()
    from tests.helpers.random_checkpoint import write_random_run

    write_random_run(run_dir, {**WIDTH, "num_layers": layers})


def export(run_dir: Path, output: Path, processes: int, limit: int) -> None:
    """Export under the limit, and print the seconds of each part as JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from hunyuan_pretrain.runtime.environment import prepare

    prepare(None)
    from hunyuan_pretrain.checkpoint import certificate, export_run, hf_export
    from hunyuan_pretrain.checkpoint.workers import to_stderr

    parts: dict[str, float] = {}
    for module, name in (
        (export_run, "verified_weights"),
        (hf_export, "_write_weights"),
        (certificate, "continue_greedily"),
        (certificate, "compare_layers"),
        (certificate, "_digests"),
    ):
        setattr(module, name, timed(getattr(module, name), name, parts))
    found = export_run.export_run(run_dir, output, dtype="bf16", processes=processes, say=to_stderr)
    figures = {"layers": found["layers"]["median_relative_difference"], "logits": found["median_relative_difference"]}
    print(json.dumps({"seconds": parts, "whole": found["loaded_as_a_whole"], "differences": figures}))


def timed(function: Callable[..., Any], name: str, parts: dict[str, float]) -> Callable[..., Any]:
    """The same function, which adds its seconds to `parts`."""

    def run(*arguments: Any, **options: Any) -> Any:
        begin = time.monotonic()
        try:
            return function(*arguments, **options)
        finally:
            parts[name] = round(time.monotonic() - begin, 1)

    return run


def watch(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Largest resident memory of the process and its children together, and of one of them, until it ends."""
    together = alone = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        try:
            for one in (root, *root.children(recursive=True)):
                sizes.append(one.memory_info().rss)
        except psutil.NoSuchProcess:
            pass
        together, alone = max(together, sum(sizes)), max(alone, *sizes, 0)
        time.sleep(0.1)
    return together, alone


def main() -> None:
    """Make the run, export it in a process of its own, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=42)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--memory-gb", type=float, default=6.0)
    parser.add_argument("--export-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    run_dir, output = options.work / "run", options.work / "out"
    if options.export_only:
        export(run_dir, output, options.processes, int(options.memory_gb * 1e9))
        return
    if not run_dir.exists():
        make(run_dir, options.layers)
    size = sum(path.stat().st_size for path in run_dir.rglob("*.distcp"))
    command = [sys.executable, __file__, str(options.work), "--export-only", "--processes", str(options.processes)]
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [*command, "--memory-gb", str(options.memory_gb)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    together, alone = watch(process)
    assert process.stdout is not None
    told = process.stdout.read()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.monotonic() - begin
    shutil.rmtree(output, ignore_errors=True)
    if process.returncode:
        sys.exit(process.returncode)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    print(told.splitlines()[-1])
    print(
        f"{size / 1e9:.1f} GB in {seconds:.0f} s, {cpu:.0f} CPU s: {size / seconds / 1e6:.0f} MB of checkpoint a second"
    )
    print(f"peak {together / 1e9:.2f} GB together, {alone / 1e9:.2f} GB in one process")


if __name__ == "__main__":
    main()
