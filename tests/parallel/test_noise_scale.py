"""The gradient noise scale on N ranks: the same squared norms as one rank finds over the same sequences, and the same
learning rates in an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.derived import LEAST_MEASUREMENTS
from hunyuan_pretrain.config.rules import check
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.runtime.logging import CLOCK_FIELDS
from hunyuan_pretrain.runtime.stop import StopRequest
from tests.helpers.layouts import Layout, Outcome, trace_in_jobs, until_failure
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields, metrics

pytestmark = pytest.mark.slow

LAYOUTS = [
    Layout(dp=2, overlap="everything"),
    Layout(dp=2, ep=2),
    Layout(tp=2, ep=2, overlap="gradients"),
    Layout(tp=2, etp=2, optimizer="plain"),
    Layout(pp=2, overlap="everything"),
    Layout(dp=2, optimizer="plain"),
    Layout(dp=4, ep=2, micro_batch=1),
    Layout(dp=2, pp=2, micro_batch=1, optimizer="plain"),
    Layout(dp=2, tp=2, ep=2, overlap="everything"),
]
TOLERANCE = 1e-5
"""fp32 gradients that are added in another order."""


def measured(layout: Layout, corpus: Path, folder: Path) -> Experiment:
    made = layout.experiment(corpus, folder)
    optimizer = made.optimizer.model_copy(update={"measure_noise_scale_every_steps": 1})
    return made.model_copy(update={"optimizer": optimizer})


def measure(jobs: list[Experiment]) -> list[Outcome]:
    """Of the first step of each experiment: the numbers, and the sequences of this rank's first micro-batch."""
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.step import launch_step

    def first_step(experiment: Experiment) -> list[Any]:
        run = setup.prepare(experiment)
        first = run.loader.micro_batches(0)[0].sequence_ids.tolist()
        found = launch_step(run, run.schedule.stage(0), 0).result().noise
        setup.leave(run)
        return [found, first]

    return until_failure(jobs, first_step)


def measure_every_micro_batch(experiments: list[Experiment]) -> dict[tuple[int, ...], list[float]]:
    """On one rank with fresh weights: sequences of a micro-batch -> the numbers with this one as the first."""
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.step import compute_gradients

    found: dict[tuple[int, ...], list[float]] = {}
    for experiment in experiments:
        run = setup.prepare(experiment)
        batches = run.loader.micro_batches(0)
        for number, batch in enumerate(batches):
            rotated = batches[number:] + batches[:number]
            run.loader.micro_batches = lambda step, rotated=rotated: rotated
            compute_gradients(run, run.schedule.stage(0), 0)
            found[tuple(batch.sequence_ids.tolist())] = run.noise.squares().tolist()
        setup.leave(run)
    return found


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], list[float]]:
    folder = tmp_path_factory.mktemp("one")
    jobs = [measured(Layout(micro_batch=width), corpus, folder / str(width)) for width in (1, 2, 4)]
    return fork_ranks(1, measure_every_micro_batch, jobs)[0]


@pytest.fixture(scope="module")
def on_ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, list[Any]]:
    """layout -> what each rank returned."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for size in (2, 4):
        layouts = [layout for layout in LAYOUTS if layout.world_size == size]
        jobs = [measured(layout, corpus, folder / f"{size}_{number}") for number, layout in enumerate(layouts)]
        for job in jobs:
            check(job, size)
        for layout, by_rank in zip(layouts, zip(*fork_ranks(size, measure, jobs), strict=True), strict=True):
            found[layout] = by_rank
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_n_ranks_measure_what_one_rank_measures(one_rank, on_ranks, layout) -> None:
    by_rank = on_ranks[layout]
    assert all(isinstance(found, list) for found in by_rank), by_rank
    numbers = by_rank[0][0]
    assert all(found[0] == numbers for found in by_rank), "the same on all ranks"
    small_dense, small_experts, *big = numbers
    firsts = sorted({tuple(found[1]) for found in by_rank})
    assert len(firsts) == layout.dp
    replicas = layout.world_size // (layout.ep * layout.etp * layout.pp)
    share = layout.dp // replicas  # data-parallel ranks whose tokens reach the same copy of an expert
    together = [tuple(sum(firsts[at : at + share], ())) for at in range(0, layout.dp, share)]
    assert small_dense == pytest.approx(sum(one_rank[first][0] for first in firsts) / layout.dp, rel=TOLERANCE)
    assert small_experts == pytest.approx(sum(one_rank[union][1] for union in together) / replicas, rel=TOLERANCE)
    assert big == pytest.approx(one_rank[firsts[0]][2:], rel=TOLERANCE)


STEPS = 14


def run_of(corpus: Path, run_dir: Path, is_used: bool = True) -> Experiment:
    fields = experiment_fields(corpus, run_dir, 5, model__num_layers=2)
    fields["stages"][0]["tokens"] *= LEAST_MEASUREMENTS
    fields["optimizer"] |= {"measure_noise_scale_every_steps": 1}
    if is_used:
        fields["optimizer"]["expert_lr_noise_scale_tokens"] = "measured"
    fields["parallel"] = {"expert_model_parallel_size": 2}
    fields["checkpoint"] = {"save_every_steps": 1}
    fields["logging"]["log_every_steps"] = 2
    fields["runtime"]["probes"] = False
    return Experiment.model_validate(fields)


def train_all(jobs: list[Experiment]) -> list[Outcome]:
    from hunyuan_pretrain.train import loop, setup

    def train(experiment: Experiment) -> list[Any]:
        run = setup.prepare(experiment)
        loop._train(run, StopRequest())
        setup.leave(run)
        return []

    return until_failure(jobs, train)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in CLOCK_FIELDS} for record in metrics(run_dir)]


def test_a_resumed_run_uses_the_same_measured_value(corpus: Path, tmp_path: Path) -> None:
    """Interrupted within the first stage, at its end, and within the second, which uses what the first measured."""
    straight, saved = tmp_path / "straight", (9, 10, 11)
    for step in saved:
        (tmp_path / str(step) / "checkpoints").mkdir(parents=True)
        name = Path("checkpoints", f"step_{step:07d}")
        (tmp_path / str(step) / name).symlink_to(straight / name)
    jobs = [run_of(corpus, straight), *(run_of(corpus, tmp_path / str(step)) for step in saved)]
    for job in jobs:
        check(job, 2)
    failures = [outcome for outcome in trace_in_jobs(2, train_all, jobs) if outcome]
    assert not failures, failures[0]
    whole = records(straight)
    ratios = [record["expert_learning_rate"] / record["learning_rate"] for record in whole]
    assert [record["step"] for record in whole] == list(range(2, STEPS + 1, 2))
    assert ratios[:5] == pytest.approx([0.31] * 5)
    assert ratios[5] != pytest.approx(0.31, rel=1e-3), "the second stage uses a measured value"
    assert ratios[5] == pytest.approx(ratios[6]), "and keeps it"
    assert all(record["noise_scale_tokens"] > 0 for record in whole)
    for step in saved:
        assert records(tmp_path / str(step)) == [record for record in whole if record["step"] > step], step
