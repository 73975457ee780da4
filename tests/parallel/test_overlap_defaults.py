"""What overlaps by default changes no number: losses, norms and weights are bitwise those without any overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

pytestmark = pytest.mark.slow
STEPS = 3
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "sharded optimizer": ({}, "bf16"),
    "plain optimizer": ({"use_distributed_optimizer": False}, "fp32"),
    "expert parallel, recomputed": ({"expert_model_parallel_size": 2, "recompute": "cla_group"}, "bf16"),
    "only experts are reduced": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, "bf16"),
    "context parallel": ({"context_parallel_size": 2}, "fp32"),
}
OFF = {"overlap_grad_reduce": False, "overlap_param_gather": False}


def numbers_of(jobs: list[Experiment]) -> list[list[Any]]:
    """Of each job: what overlaps, losses and norms of every step, and this rank's weights after the last."""
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
    from hunyuan_pretrain.train.optimizer import gather_parameters
    from hunyuan_pretrain.train.step import train_step

    found = []
    for job in jobs:
        run = setup.prepare(job)
        config = run.wrapped[0].ddp_config
        numbers: list[Any] = [(config.overlap_grad_reduce, config.overlap_param_gather)]
        for step in range(STEPS):
            apply_learning_rate(run, step)
            result = train_step(run, run.schedule.stage(step), step)
            numbers.append((result.loss, result.grad_norm))
        gather_parameters(run.wrapped)
        numbers.append([weight.detach().float().numpy().copy() for weight in run.chunks[0].parameters()])
        setup.leave(run)
        found.append(numbers)
    return found


@pytest.fixture(scope="module")
def numbers(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """Case -> numbers of rank 0, by default and without overlap."""
    folder, jobs = tmp_path_factory.mktemp("overlap"), []
    for number, (parallel, dtype) in enumerate(CASES.values()):
        for is_default in (True, False):
            fields = experiment_fields(
                corpus,
                folder / f"{number}_{is_default}",
                STEPS,
                precision={"dtype": dtype},
                parallel=parallel | ({} if is_default else OFF),
            )
            fields["runtime"] |= {"probes": False}
            jobs.append(Experiment.model_validate(fields))
    found = fork_ranks(2, numbers_of, jobs)[0]
    return {name: found[2 * number : 2 * number + 2] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_the_default_overlap_changes_no_bit(numbers: dict[str, list[list[Any]]], name: str) -> None:
    (overlapped, *default), (nothing, *expected) = numbers[name]
    assert overlapped == (True, CASES[name][0].get("use_distributed_optimizer", True))
    assert nothing == (False, False)
    assert default[:-1] == expected[:-1]
    assert all(
        torch.equal(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(default[-1], expected[-1], strict=True)
    )
