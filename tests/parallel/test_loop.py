"""The training loop on N ranks, with validation and saving between steps: the metrics match one rank, and a resumed run
is bitwise identical.

diagnostics.parity assembles gradients and parameters after every step; this test does not, so communication that
overlaps with the next step stays overlapped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import EvaluationSet, Experiment
from hunyuan_pretrain.runtime.logging import CLOCK_FIELDS
from hunyuan_pretrain.runtime.stop import StopRequest
from tests.helpers.layouts import CONTEXT_PARALLEL_SIZES, Layout, Outcome, trace_in_jobs, until_failure
from tests.helpers.runs import metrics

pytestmark = pytest.mark.slow
SAVED, STEPS = 3, 4

LAYOUTS = [
    Layout(dp=2, ep=2, overlap="everything"),
    Layout(tp=2, etp=2),
    Layout(pp=2, overlap="everything", pipeline=(2, 6)),
    Layout(pp=2, vpp=2, micro_batch=1, optimizer="plain"),
    Layout(cp=2, overlap="everything"),
]
LAYOUTS = [layout for layout in LAYOUTS if layout.cp in CONTEXT_PARALLEL_SIZES]
RESUMED = [layout for layout in LAYOUTS if layout.overlap == "everything"]
"""Layouts whose weights are not complete right after a step."""


def train_all(jobs: list[Experiment]) -> list[Outcome]:
    """Train every run with the loop; the metrics are in metrics.jsonl."""
    from hunyuan_pretrain.train import loop, setup

    def train(experiment: Experiment) -> list[Any]:
        run = setup.prepare(experiment)
        loop._train(run, StopRequest())
        setup.leave(run)
        return []

    return until_failure(jobs, train)


def experiment(corpus: Path, run_dir: Path, layout: Layout) -> Experiment:
    """Saved after step 3 and after the last; validated after every second step, on 5 and on 3 sequences, which no
    layout divides evenly."""
    made = layout.experiment(corpus, run_dir, STEPS)
    evaluation = made.evaluation.model_copy(
        update={
            "data": str(corpus / "heldout"),
            "sets": (EvaluationSet(name="some", path=str(corpus / "heldout"), max_sequences=3),),
            "max_sequences": 5,
            "every_steps": 2,
            "micro_batch_sequences": layout.micro_batch,
        }
    )
    checkpoint = made.checkpoint.model_copy(update={"save_every_steps": SAVED})
    runtime = made.runtime.model_copy(update={"probes": False})
    return made.model_copy(update={"evaluation": evaluation, "checkpoint": checkpoint, "runtime": runtime})


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, tuple[Path, Path]]:
    """layout -> run directories of the uninterrupted run and of one that resumes from its checkpoint after step
    SAVED."""
    folder = tmp_path_factory.mktemp("loop")
    layouts = list(dict.fromkeys([layout.reference for layout in LAYOUTS] + LAYOUTS))
    run_dirs = {layout: (folder / str(number), folder / f"{number}_resumed") for number, layout in enumerate(layouts)}
    for straight, resumed in run_dirs.values():
        saved = Path("checkpoints", f"step_{SAVED:07d}")
        (resumed / "checkpoints").mkdir(parents=True)
        (resumed / saved).symlink_to(straight / saved)
    for world_size in (1, 2):
        of_size = [layout for layout in layouts if layout.world_size == world_size]
        jobs = [experiment(corpus, run_dirs[layout][0], layout) for layout in of_size]
        jobs += [experiment(corpus, run_dirs[layout][1], layout) for layout in of_size if layout in RESUMED]
        failures = [outcome for outcome in trace_in_jobs(world_size, train_all, jobs) if outcome]
        assert not failures, failures[0]
    return run_dirs


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in CLOCK_FIELDS} for record in metrics(run_dir)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_metrics_match_one_rank(runs, layout):
    """Losses, norms of the gradient and of its parts, shares, entropies, and losses of training and validation over the
    same number of tokens and bytes; the load in validation does not count padding."""
    from hunyuan_pretrain.diagnostics.parity import TOLERANCE

    actual, expected = records(runs[layout][0]), records(runs[layout.reference][0])
    assert [record["step"] for record in expected] == [1, 2, 2, 3, 4, 4], "two validations"
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            is_sum = name.endswith(("loss", "grad_norm", "bits_per_byte", "entropy"))
            assert mine[name] == (pytest.approx(value, rel=TOLERANCE) if is_sum else value), (theirs["step"], name)


def test_the_parts_of_the_gradient_are_the_whole_and_bits_are_those_of_the_text(runs):
    """Of one rank, which the other layouts equal; every part, as a tied output layer is the embedding."""
    from hunyuan_pretrain.train.logged_numbers import PARTS

    for record in (record for record in records(runs[LAYOUTS[0].reference][0]) if "loss" in record):
        norms = [record[f"{part}_grad_norm"] for part in PARTS if part not in ("output_layer", "other")]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-6)
        assert min(norms) > 0
        bits = record["loss"] / math.log(2) / record["bits_per_byte"]
        assert 1 < bits < 8, "bytes of text per target token"


@pytest.mark.parametrize("layout", RESUMED, ids=str)
def test_a_resumed_run_is_bitwise_identical(runs, layout):
    """From a checkpoint saved right after a step, with no validation in between."""
    straight, resumed = (records(run_dir) for run_dir in runs[layout])
    assert [record["step"] for record in resumed] == [STEPS, STEPS], "training and validation"
    assert resumed == [record for record in straight if record["step"] > SAVED]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_is_as_planned(runs, layout):
    """Also of a process that resumes one step before the end."""
    for run_dir in runs[layout][: 2 if layout in RESUMED else 1]:
        log = (run_dir / "log.txt").read_text()
        assert log.count(" as planned: parameters of this rank ") == 1
        assert "(planned " not in log, "every figure is exact"
        assert "compared with the plan" not in log
