"""What each layout costs on two ranks: tokens/s of this trainer and of megatron-core's GPTModel, same shapes, same
layout, in one run.

    python tests/benchmarks/layouts.py [--rounds 3] [--steps 2] [--only dp2 tp2]

Two single-threaded processes over gloo, compared with one single-threaded process; model, tokens and steps are those of
train_step.py. The two trainers take turns, layout after layout, and the median over the rounds counts. On one machine
the ranks share memory bandwidth, and gloo copies through the loopback device: the ratio between the two trainers is
meaningful, but the speed-up over one rank says little about a cluster. megatron-core has no context parallelism without
Transformer Engine; for sequence parallelism it gets a norm that supports it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import train_step
from train_step import TOKENS, Step, megatron_gpt, ours

TENSOR = {"tensor_model_parallel_size": 2}
Job = Callable[[], tuple[Step, int, int]]
LAYOUTS: dict[str, tuple[int, Job, Job | None]] = {
    # name: ranks, ours, megatron-core's
    "1 rank": (1, lambda: ours(2), lambda: megatron_gpt()),
    "dp2": (2, lambda: ours(2), lambda: megatron_gpt()),
    "ep2": (2, lambda: ours(2, expert_model_parallel_size=2), lambda: megatron_gpt(expert_model_parallel_size=2)),
    "tp2": (
        2,
        lambda: ours(2, sequence_parallel=True, expert_tensor_parallel_size=2, **TENSOR),
        lambda: megatron_gpt(sequence_parallel=True, expert_tensor_parallel_size=2, **TENSOR),
    ),
    "tp2 ep2": (
        2,
        lambda: ours(2, sequence_parallel=True, expert_model_parallel_size=2, **TENSOR),
        lambda: megatron_gpt(
            sequence_parallel=True, expert_model_parallel_size=2, expert_tensor_parallel_size=1, **TENSOR
        ),
    ),
    "pp2": (
        2,
        lambda: ours(2, 2, pipeline_model_parallel_size=2),
        lambda: megatron_gpt(2, pipeline_model_parallel_size=2),
    ),
    "cp2 all_gather": (2, lambda: ours(2, context_parallel_size=2), None),
    "cp2 all_to_all": (2, lambda: ours(2, context_parallel_size=2, context_parallel_method="all_to_all"), None),
}


def worker(name: str, is_ours: bool) -> None:
    """One rank: answer every line on stdin (a number of steps) with the seconds of each, as JSON."""
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    train_step.THREADS = 1
    _, mine, peer = LAYOUTS[name]
    job = mine if is_ours else peer
    assert job is not None
    step, _, _ = job()
    print(json.dumps({"loss": step()}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def start(name: str, is_ours: bool) -> list[subprocess.Popen[str]]:
    """Start the ranks of one job, which wait for requests after their first step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks, processes = LAYOUTS[name][0], []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = (
            os.environ
            | {key: str(value) for key, value in place.items()}
            | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        )
        command = [sys.executable, __file__, "--worker", name, *(["--ours"] if is_ours else [])]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    return processes


def ask(processes: list[subprocess.Popen[str]], steps: int) -> list[float]:
    """Seconds of each of `steps` steps; the ranks run them together."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    answers = [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]
    return answers[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.ours)
        return
    print(f"{'layout':16} {'ours tokens/s':>14} {'GPTModel tokens/s':>18} {'ratio':>6}")
    for name in arguments.only:  # one layout after the other: all jobs at once would not fit in memory
        jobs = {is_ours: start(name, is_ours) for is_ours in (True, False) if is_ours or LAYOUTS[name][2] is not None}
        seconds: dict[bool, list[float]] = {is_ours: [] for is_ours in jobs}
        for round_number in range(arguments.rounds + 1):  # the first round warms up
            for is_ours, processes in jobs.items():
                found = ask(processes, arguments.steps)
                seconds[is_ours] += found if round_number else []
        for processes in jobs.values():
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
            for process in processes:
                process.wait()
        mine, peer = (
            TOKENS / statistics.median(seconds[is_ours]) if is_ours in seconds else None for is_ours in (True, False)
        )
        assert mine is not None
        against = f"{peer:18,.0f} {mine / peer:6.2f}" if peer else f"{'-':>18} {'-':>6}"
        print(f"{name:16} {mine:14,.0f} {against}", flush=True)


if __name__ == "__main__":
    main()
