"""A checkpoint of one layout goes on under another: weights, moments and update count, data and routing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.layouts import Trace, leave, merge, train_steps
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import experiment_fields
from tests.parallel.test_layouts import assert_close

pytestmark = pytest.mark.slow
SAVED, STEPS = 2, 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "1 rank, plain optimizer": (1, {"use_distributed_optimizer": False}),
    "DP 2": (2, {}),
    "EP 2": (2, {"expert_model_parallel_size": 2}),
    "EP 2, plain optimizer": (2, {"expert_model_parallel_size": 2, "use_distributed_optimizer": False}),
}
CHANGES = [
    ("EP 2", "1 rank"),
    ("EP 2, plain optimizer", "1 rank, plain optimizer"),
    ("DP 2", "1 rank, plain optimizer"),
    ("EP 2", "DP 2"),
    ("1 rank", "EP 2"),
    ("1 rank", "EP 2, plain optimizer"),
]


def save_all(jobs: list[dict[str, Any]]) -> list[Trace]:
    """Train to STEPS without a break, saving after SAVED; returns the steps after it."""
    from hunyuan_pretrain.checkpoint import save_load
    from hunyuan_pretrain.train import setup

    traces = []
    for fields in jobs:
        run = setup.prepare(Experiment.model_validate(fields))
        train_steps(run, range(SAVED))
        save_load.save(run.run_dir, SAVED, run.model, run.optimizer, None)
        traces.append(train_steps(run, range(SAVED, STEPS)))
        leave(run)
    return traces


def resume_all(jobs: list[dict[str, Any]]) -> list[Trace]:
    from hunyuan_pretrain.train import setup

    traces = []
    for fields in jobs:
        run = setup.prepare(Experiment.model_validate(fields))
        assert run.first_step == SAVED, "it resumes"
        traces.append(train_steps(run, range(SAVED, STEPS)))
        leave(run)
    return traces


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | tuple[str, str], Trace]:
    """layout -> trace without a break; (saved, resumed) -> trace after the change. One job for each number of ranks and phase."""
    folder, found = tmp_path_factory.mktemp("runs"), {}

    def fields(layout: str, name: str) -> dict[str, Any]:
        # a large epsilon, so that the sign of noise is no update
        optimizer = {"lr": 1e-2, "adam_eps": 1e-3}
        return experiment_fields(corpus, folder / name, STEPS, parallel=LAYOUTS[layout][1], optimizer=optimizer)

    for size in (1, 2):
        layouts = [layout for layout in LAYOUTS if LAYOUTS[layout][0] == size]
        ranks = run_ranks(size, save_all, [fields(layout, layout) for layout in layouts])
        found |= {layout: merge([rank[number] for rank in ranks]) for number, layout in enumerate(layouts)}
    for size in (1, 2):
        changes = [change for change in CHANGES if LAYOUTS[change[1]][0] == size]
        for change in changes:
            shutil.copytree(folder / change[0] / "checkpoints", folder / " to ".join(change) / "checkpoints")
        ranks = run_ranks(size, resume_all, [fields(change[1], " to ".join(change)) for change in changes])
        found |= {change: merge([rank[number] for rank in ranks]) for number, change in enumerate(changes)}
    return found


@pytest.mark.parametrize("change", CHANGES, ids=" to ".join)
def test_next_losses_and_parameters_are_the_same_under_another_layout(runs, change):
    """Parameters after two more steps depend on both moments and on the update count."""
    expected, actual = runs[change[0]], runs[change]
    for mine, theirs in zip(actual.records, expected.records, strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)
    for name, parameter in expected.parameters.items():
        assert_close(actual.parameters[name], parameter, name)
