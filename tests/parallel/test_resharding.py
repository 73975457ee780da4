"""A checkpoint of one layout resumes under another: weights, moments and update count, data and routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.layouts import Layout, Outcome, trace_in_jobs, until_failure

pytestmark = pytest.mark.slow
SAVED, STEPS = 2, 4

ONE = Layout(optimizer="plain")
TENSOR = Layout(tp=2, ep=2)
INTERLEAVED = Layout(pp=2, vpp=2, micro_batch=1)
UNEVEN = Layout(pp=2, pipeline=(2, 6), optimizer="plain")
DIVIDED_EXPERTS = Layout(dp=2, etp=2)
TENSOR_PIPELINE = Layout(tp=2, pp=2, ep=2)
FOUR_AXES = Layout(tp=2, dp=2, ep=2, etp=2, optimizer="plain")
CONTEXT = Layout(cp=2, ep=2)
OFFLOADED = Layout(dp=2, ep=2, optimizer="half offloaded")
BF16 = Layout(dp=2, ep=2, model="bf16")
BF16_OFFLOADED = Layout(dp=2, ep=2, model="bf16", optimizer="half offloaded")
BF16_SPLIT = Layout(dp=2, model="bf16", optimizer="precision-aware", overlap="everything")
CHANGES = [
    # saved, resumed
    (TENSOR, INTERLEAVED),
    (INTERLEAVED, TENSOR),
    (ONE, FOUR_AXES),
    (TENSOR_PIPELINE, ONE),
    (FOUR_AXES, TENSOR_PIPELINE),
    (DIVIDED_EXPERTS, UNEVEN),
    (UNEVEN, Layout(dp=2, ep=2)),
    (TENSOR, CONTEXT),
    (CONTEXT, ONE),
    (ONE, Layout(tp=2, etp=2, optimizer="plain", overlap="gradients")),
    (OFFLOADED, OFFLOADED),
    (OFFLOADED, UNEVEN),
    (INTERLEAVED, OFFLOADED),
    (BF16, Layout(dp=2, ep=2, model="bf16", optimizer="plain")),
    (BF16, BF16_OFFLOADED),
    (BF16_OFFLOADED, BF16),
    (BF16_SPLIT, BF16_SPLIT),
]
"""In bf16 only the optimizer changes: under another layout, sums of bf16 numbers differ by more than fp32's tolerance.
Not between split main weights and others: the two Adams differ in the last bit of a main weight, which decides a few
roundings to bf16. tests/unit/train/test_precision_aware_optimizer.py compares what is loaded."""

Work = list[tuple[bool, Experiment]]
"""(whether this run saves rather than resumes, its experiment)."""


def name_of(change: tuple[Layout, Layout]) -> str:
    return f"{change[0]} to {change[1]}"


def train_all(work: Work) -> list[Outcome]:
    """Traces of the steps after SAVED: of an uninterrupted run, which saves after SAVED, or of one that resumes
    there."""
    from hunyuan_pretrain.checkpoint import save_load
    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.train import setup

    def train(job: tuple[bool, Experiment]) -> list[Any]:
        saves, experiment = job
        run = setup.prepare(experiment)
        if saves:
            trace_steps(run, range(SAVED))
            save_load.save(run.run_dir, SAVED, run.chunks, run.optimizer, None)
        else:
            assert run.first_step == SAVED, "it resumes"
        traces = trace_steps(run, range(SAVED, STEPS))
        setup.leave(run)
        return traces

    return until_failure(work, train)


@pytest.fixture(scope="module")
def traces(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout | tuple[Layout, Layout], Outcome]:
    """layout -> its steps without interruption; (saved, resumed) -> the steps after the change."""
    folder = tmp_path_factory.mktemp("runs")
    saving = list(dict.fromkeys(saved for saved, _ in CHANGES))
    run_dirs: dict[Any, Path] = {key: folder / str(number) for number, key in enumerate([*saving, *CHANGES])}
    for change in CHANGES:  # the resumed run finds the checkpoints where the saving run will have put them
        run_dirs[change].mkdir()
        (run_dirs[change] / "checkpoints").symlink_to(run_dirs[change[0]] / "checkpoints")

    found: dict[Any, Outcome] = {}

    def run(world_size: int, saves: bool, resumes: bool) -> None:
        keys: list[Any] = [layout for layout in saving if saves and layout.world_size == world_size]
        keys += [change for change in CHANGES if resumes and change[1].world_size == world_size]
        work = [
            (
                isinstance(key, Layout),
                (key if isinstance(key, Layout) else key[1]).experiment(corpus, run_dirs[key], STEPS),
            )
            for key in keys
        ]
        found.update(zip(keys, trace_in_jobs(world_size, train_all, work), strict=True))

    # resuming runs come after saving ones; one job of four ranks is enough for both, and starting one takes long
    run(1, saves=True, resumes=False)
    run(2, saves=True, resumes=False)
    run(4, saves=True, resumes=True)
    run(2, saves=False, resumes=True)
    run(1, saves=False, resumes=True)
    return found


def check(traces: dict[Any, Outcome], change: tuple[Layout, Layout]) -> None:
    """Compare losses, gradients, routing, moments and parameters of the next steps."""
    from hunyuan_pretrain.diagnostics.parity import compare

    expected, actual = traces[change[0]], traces[change]
    assert not isinstance(expected, str), expected
    assert not isinstance(actual, str), actual
    assert len(actual) == STEPS - SAVED
    found = [difference for difference in compare(actual, expected) if not difference.is_within]
    assert not found, f"{len(found)} differences, first: {found[:8]}"
    assert [trace.shares for trace in actual] == [trace.shares for trace in expected]


@pytest.mark.parametrize("change", CHANGES, ids=name_of)
def test_next_steps_are_the_same_under_another_layout(traces, change):
    check(traces, change)


def test_reshard_tp2pp1_to_tp1pp2(traces):
    check(traces, (TENSOR, INTERLEAVED))


def test_the_changes_cover_every_axis():
    """Each size is dropped by some change and introduced by another, and so is the distributed optimizer."""
    for axis in ("tp", "pp", "vpp", "ep", "etp", "dp"):
        steps = {getattr(resumed, axis) - getattr(saved, axis) for saved, resumed in CHANGES}
        assert min(steps) < 0 < max(steps), axis
    optimizers = {(saved.optimizer, resumed.optimizer) for saved, resumed in CHANGES}
    assert optimizers >= {
        ("plain", "distributed"),
        ("distributed", "plain"),
        ("half offloaded", "plain"),
        ("distributed", "half offloaded"),
    }
    assert not [problem for change in CHANGES for layout in change for problem in layout.problems()]
