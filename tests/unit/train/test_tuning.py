"""Frozen weights take no memory beyond their own: what a run holds is what the plan counts, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint import save_load
from hunyuan_pretrain.checkpoint.stored import INDEX, read_index
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.train.as_planned import held, parameters_of, planned
from hunyuan_pretrain.train.step import train_step
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TUNINGS: dict[str, dict[str, Any]] = {
    "attention": {"trainable": ["*.self_attention.*"]},
    "no routers": {"freeze_router": True},
    "lora": {"lora": {"rank": 4, "alpha": 8, "target_modules": ALL}},
}


@pytest.mark.parametrize("precision", [{"dtype": "fp32"}, {"dtype": "bf16", "grad_reduce_in_fp32": False}], ids=str)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_run_holds_what_the_plan_counts(corpus: Path, tmp_path: Path, tuning: str, precision: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"model__num_layers": 2, "precision": precision, "parallel": {"recompute": "cla_group"}}
    fields = experiment_fields(corpus, tmp_path / "run", 2, tuning=TUNINGS[tuning], **settings)
    run = on_this_rank(fields)
    stage = run.loader.order.stage(0)
    train_step(run, stage, 0)
    expected, found = planned(run.experiment, [stage], 1, 0, False), held(run)
    run.loader.close()
    assert parameters_of(run) == expected.parameters
    assert found == expected.kept
    whole = planned(Experiment.model_validate(fields | {"tuning": {}}), [stage], 1, 0, False).kept
    assert found.gradients < whole.gradients
    assert found.optimizer < whole.optimizer
    for parameter in run.chunks[0].parameters():
        assert hasattr(parameter, "main_grad") == parameter.requires_grad


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted_with_frozen_weights(corpus: Path, tmp_path: Path, dtype: str) -> None:
    """Bit by bit; the checkpoint has every weight, and moments of the trained ones only."""
    fields = experiment_fields(
        corpus, tmp_path / "run", 3, tuning=TUNINGS["attention"], model__num_layers=2, precision={"dtype": dtype}
    )
    whole, first, second = (on_this_rank(fields) for _ in range(3))
    for run, steps in ((whole, (0, 1, 2)), (first, (0, 1))):
        for step in steps:
            train_step(run, run.loader.order.stage(step), step)
    folder = save_load.save(tmp_path / "run", 2, first.chunks, first.optimizer, None)
    assert save_load.load(folder, second.chunks, second.optimizer) == 2
    train_step(second, second.loader.order.stage(2), 2)
    trained = 0
    for (name, expected), found in zip(whole.chunks[0].named_parameters(), second.chunks[0].parameters(), strict=True):
        assert torch.equal(expected, found), name
        trained += expected.requires_grad
    index = read_index((folder / INDEX).read_bytes(), {path.name: path.stat().st_size for path in folder.iterdir()})
    assert sum(name.startswith("optimizer.exp_avg.") for name in index.tensors) == trained
    for run in (whole, first, second):
        run.loader.close()
