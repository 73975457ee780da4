"""Ranks that are killed at random moments and started again: the losses are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.runtime.logging import CLOCK_FIELDS
from tests.helpers.ranks import forking
from tests.helpers.runs import experiment_fields, metrics, write_experiment

STEPS, SAVE_EVERY = 24, 2
SECONDS_TO_SAVE = 5.0
"""How long a rank that has lost another one may live; the launcher gives it 30."""


def rank(number: int, ranks: int, port: int, config: Path, output: Path) -> None:
    """`hunyuan-pretrain train` as a rank, its output in a file."""
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.argv = ["hunyuan-pretrain", "train", str(config)]
    from hunyuan_pretrain.cli import main

    main()


class Job:
    """The ranks of one start."""

    def __init__(self, config: Path, ranks: int, output: Path) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks: list[BaseProcess] = [
            forking().Process(target=rank, args=(number, ranks, self._store.port, config, output))
            for number in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    def kill(self, victim: int) -> None:
        """kill -9 of one rank; the others are then told, and ended, as a launcher does it."""
        self.ranks[victim].kill()
        self.ranks[victim].join()
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()

    def finish(self) -> list[int | None]:
        """Exit statuses."""
        for process in self.ranks:
            process.join(240)
            process.kill()
        return [process.exitcode for process in self.ranks]


def fields_of(corpus: Path, run_dir: Path, steps: int = STEPS) -> dict[str, Any]:
    checkpoint = {"save_every_steps": SAVE_EVERY, "keep_last": 2, "async_save": True}
    return experiment_fields(corpus, run_dir, steps, model__num_layers=2, checkpoint=checkpoint, runtime__probes=False)


def losses(run_dir: Path) -> list[dict[str, Any]]:
    """Everything that was logged and does not depend on time or machine."""
    return [{key: value for key, value in one.items() if key not in CLOCK_FIELDS} for one in metrics(run_dir)]


def undisturbed(corpus: Path, folder: Path, ranks: int, steps: int = STEPS) -> list[dict[str, Any]]:
    config = write_experiment(folder / "straight.yaml", fields_of(corpus, folder / "straight", steps))
    assert Job(config, ranks, folder / "straight.txt").finish() == [0] * ranks, (folder / "straight.txt").read_text()
    return losses(folder / "straight")


def killed_at_random(corpus: Path, folder: Path, kills: int, ranks: int, seed: int, steps: int) -> list[str]:
    """Train with that many kills, at moments that a seed draws: while the ranks start, and in or after any step.
    Returns when each was, in steps that were then logged."""
    draw, run_dir, when = random.Random(seed), folder / "killed", list[str]()
    config = write_experiment(folder / "killed.yaml", fields_of(corpus, run_dir, steps))
    for _ in range(kills):
        job, victim = Job(config, ranks, folder / "killed.txt"), draw.randrange(ranks)
        began, seen = time.monotonic(), len(metrics(run_dir))
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0.0, 1.5))
        else:
            target = seen % SAVE_EVERY + draw.randrange(1, SAVE_EVERY + 2)
            while len(metrics(run_dir)) < min(seen + target, steps - 1) and time.monotonic() < began + 60:
                assert job.ranks[victim].is_alive(), (folder / "killed.txt").read_text()
                time.sleep(0.002)
            time.sleep(draw.uniform(0.0, 0.1))
        job.kill(victim)
        when.append(f"rank {victim} at {len(metrics(run_dir))}")
    assert Job(config, ranks, folder / "killed.txt").finish() == [0] * ranks, (folder / "killed.txt").read_text()
    return when


def test_ranks_killed_at_random_moments_leave_the_loss_curve_bitwise(corpus, tmp_path):
    """A few kills; tests/benchmarks/kills.py does it with more."""
    when = killed_at_random(corpus, tmp_path, kills=3, ranks=2, seed=4, steps=12)
    assert losses(tmp_path / "killed") == undisturbed(corpus, tmp_path, 2, 12), when


@pytest.mark.slow
def test_another_number_of_data_parallel_ranks_after_a_kill_gives_the_same_losses(corpus, tmp_path):
    """4 ranks, then 2, then 4: the same sequences and draws. Sums over micro-batches and ranks have another order,
    which changes the last bits of a gradient in fp32; nine steps of Adam carry that on, hence the tolerance."""
    config = write_experiment(tmp_path / "killed.yaml", fields_of(corpus, tmp_path / "killed", 9))
    for ranks, until in ((4, 3), (2, 6)):
        job = Job(config, ranks, tmp_path / "killed.txt")
        while len(metrics(tmp_path / "killed")) < until:
            assert job.ranks[0].is_alive(), (tmp_path / "killed.txt").read_text()
            time.sleep(0.005)
        job.kill(ranks - 1)
    assert Job(config, 4, tmp_path / "killed.txt").finish() == [0] * 4, (tmp_path / "killed.txt").read_text()
    said = (tmp_path / "killed.txt").read_text()
    assert said.count("2 ranks on CPU") == 1
    found, straight = losses(tmp_path / "killed"), undisturbed(corpus, tmp_path, 4, 9)
    assert [one["step"] for one in found] == [one["step"] for one in straight]
    for one, other in zip(found, straight, strict=True):
        for key in ("loss", "balance_loss", "grad_norm", "cumulative_tokens"):
            assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)
