"""Frozen weights take no memory beyond their own: what a run holds is what the plan counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
