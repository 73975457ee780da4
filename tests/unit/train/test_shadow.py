"""shadow: the figures of an FP8 recipe next to the run's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.diagnostics.shadow import (
    OperandLoss,
    Shadow,
    WeightError,
    conclusion,
    count_lost,
    shadow_experiment,
    table,
)
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

STEPS = 3


def fields(corpus: Path, run_dir: Path, recipe: str | None = None, **changes: Any) -> dict[str, Any]:
    found = experiment_fields(corpus, run_dir, steps=4, **changes)
    found["model"] |= {"ffn_hidden_size": 64, "moe_ffn_hidden_size": 48}
    found["precision"] = {"dtype": "fp32", "fp8_recipe": recipe}
    found["evaluation"] = {"data": None}
    found["logging"] |= {"wandb": "disabled", "tensorboard": False}
    return found


def test_lost_values_are_counted() -> None:
    # 448 is the largest value of E4M3; 464 is halfway to the next, and rounds down to it
    scaled = torch.tensor([448.0, 464.0, 464.5, -1000.0, 1.0, 0.0, 2.0**-10, 2.0**-10 * 1.01, -(2.0**-11)])
    values = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert count_lost(scaled, values).tolist() == [8, 2, 2], "values that are not zero, saturated, flushed"
    wide = torch.tensor([57344.0, 61440.0, 61441.0])
    assert count_lost(wide, wide.clamp(-57344, 57344).to(torch.float8_e5m2)).tolist() == [3, 1, 0]


def run_of_all(work: list[dict[str, Any]], recipe: str) -> Any:
    """(report of shadow on the first run, traces of training the others)."""
    from hunyuan_pretrain.diagnostics.parity import trace_layout
    from hunyuan_pretrain.diagnostics.shadow import shadow

    first, *others = work
    report = shadow(Experiment.model_validate(first), recipe, None, STEPS)
    return report, [trace_layout(Experiment.model_validate(one), STEPS) for one in others]


@pytest.mark.parametrize(("recipe", "ranks"), [("blockwise", 1), ("delayed", 2)])
def test_figures_match_training(corpus: Path, tmp_path: Path, recipe: str, ranks: int) -> None:
    """Losses are bitwise identical to runs with and without the recipe, and the first gradients differ as those runs'
    gradients do."""
    changes: dict[str, Any] = {"parallel": {"expert_model_parallel_size": ranks}}
    work = [
        fields(corpus, tmp_path / "never", None, **changes),
        fields(corpus, tmp_path / "plain", None, **changes),
        fields(corpus, tmp_path / "recipe", recipe, **changes),
    ]
    report, (plain, with_recipe) = fork_ranks(ranks, run_of_all, work, recipe)[0]
    assert not (tmp_path / "never").exists(), "nothing is written to the run"
    assert report.losses == [trace.scalars["loss"] for trace in plain]
    assert report.recipe_losses == [trace.scalars["loss"] for trace in with_recipe]
    assert report.same_weight_losses[0] == report.recipe_losses[0]
    assert report.same_weight_losses[0] != report.losses[0]
    assert {row.name for row in report.weights} == set(plain[0].gradients)
    assert [row.cosine for row in report.weights] == sorted(row.cosine for row in report.weights)
    assert {row.operand for row in report.operands} == {"x", "w", "dy"}
    assert set(report.rerouted) == {0, 1, 2, 3}
    assert 0 < max(report.rerouted.values()) < 0.5
    json.dumps(report.__dict__, default=lambda value: value.__dict__)


def first_step(corpus: Path, folder: Path, recipe: str) -> Any:
    from hunyuan_pretrain.diagnostics.parity import trace_layout
    from hunyuan_pretrain.diagnostics.shadow import shadow

    report = shadow(Experiment.model_validate(fields(corpus, folder / "never")), recipe, None, 1)
    traces = [
        trace_layout(Experiment.model_validate(fields(corpus, folder / str(name), name)), 1)[0]
        for name in (None, recipe)
    ]
    return report, [trace.gradients for trace in traces]


def test_gradients_are_compared_at_the_same_weights(corpus: Path, tmp_path: Path) -> None:
    report, (plain, quantised) = fork_ranks(1, first_step, corpus, tmp_path, "tensorwise")[0]
    for row in report.weights:
        exact, found = plain[row.name].astype(np.float64), quantised[row.name].astype(np.float64)
        cosine = (exact * found).sum() / np.linalg.norm(exact) / np.linalg.norm(found)
        assert row.cosine == pytest.approx(cosine, abs=1e-9)
        assert row.relative_error == pytest.approx(np.linalg.norm(exact - found) / np.linalg.norm(exact), rel=1e-6)
        assert np.isnan(row.batch_noise), "of one batch there is no noise"


def after_its_end(corpus: Path, folder: Path) -> tuple[str, bool]:
    """What shadow reports for a finished run, and whether the run is unchanged."""
    from hunyuan_pretrain.diagnostics.shadow import shadow
    from hunyuan_pretrain.train.loop import train

    experiment = Experiment.model_validate(fields(corpus, folder))
    train(experiment)
    before = {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}
    try:
        shadow(experiment, "tensorwise", "e4m3", 5)
        said = ""
    except ConfigError as error:
        said = str(error)
    return said, before == {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_at_its_end_has_no_step_left(corpus: Path, tmp_path: Path) -> None:
    """Shadow starts from the newest checkpoint, and leaves the run unchanged."""
    said, is_unchanged = fork_ranks(1, after_its_end, corpus, tmp_path / "run")[0]
    assert "has no step left: 4 of 4 are done (choose another run_dir to start from the beginning)" in said
    assert is_unchanged


def test_settings_of_another_recipe_are_dropped(corpus: Path, tmp_path: Path) -> None:
    found = fields(corpus, tmp_path, "delayed")
    found["precision"] |= {"fp8_amax_history_len": 16, "fp8_format": "e4m3", "num_layers_at_start_in_bf16": 1}
    experiment = Experiment.model_validate(found)
    same = shadow_experiment(experiment, "delayed", None, tmp_path).precision
    assert (same.fp8_amax_history_len, same.fp8_format) == (16, "e4m3")
    other = shadow_experiment(experiment, "blockwise", "hybrid", tmp_path).precision
    assert (other.fp8_amax_history_len, other.fp8_format, other.num_layers_at_start_in_bf16) == (None, "hybrid", 1)
    found["model"]["moe_ffn_hidden_size"] = 64
    found["precision"] |= {"fp8_parameters": True}
    kept = shadow_experiment(Experiment.model_validate(found), "mxfp8", None, tmp_path).precision
    assert not kept.fp8_parameters, "a recipe that has none can be looked at"


def test_a_model_that_fp8_cannot_multiply_is_refused(corpus: Path, tmp_path: Path) -> None:
    experiment = Experiment.model_validate(fields(corpus, tmp_path))
    with pytest.raises(ConfigError, match=r"under mxfp8: 1 problem\n.*moe_ffn_hidden_size 48 is 48"):
        shadow_experiment(experiment, "mxfp8", None, tmp_path)


def test_the_report_is_readable() -> None:
    report = Shadow("blockwise", "bf16", 7, [2.0, 1.5], [2.1, 1.6], [2.05, 1.5])
    report.weights = [WeightError("a", 0.9, 0.4, 0.8), WeightError("b", 0.99, 0.1, 1.0)]
    report.operands = [OperandLoss("a", "dy", 0.0, 0.25)]
    report.rerouted = {0: 0.01}
    tables = dict(table(report))
    assert tables["loss"][1] == ("8", "2.0000", "2.1000", "+0.1000", "+0.05000")
    assert tables["gradients, worst first"][1] == ("a", "0.90000", "0.4000", "0.800")
    assert tables["quantised operands, worst first"][1] == ("a", "dy", "0.000%", "25.000%")
    assert tables["tokens sent to another expert"][1] == ("0", "1.000%")
    assert conclusion(report) == (
        "blockwise against bf16, 2 steps: loss +0.1000 in the last step, +0.1000 on average; smallest gradient "
        "cosine 0.9000 (a); "
        "gradient errors are at most 0.50 of the batch noise"
    )
