"""What a step's numbers become."""

from __future__ import annotations

import pytest
import torch

from hunyuan_pretrain.config.schema import ModelConfig, StageConfig
from hunyuan_pretrain.model.router import STATISTICS
from hunyuan_pretrain.plan.counts import flops_per_token
from hunyuan_pretrain.train.metrics import routing_record, step_line, step_record
from hunyuan_pretrain.train.step import StepResult
from tests.helpers.tiny import tiny_model

STAGE = StageConfig(name="decay", tokens=640, sequence_length=64, global_batch_sequences=2, lr_end=1.0, data=({"path": "x"},))
PROMISED = {
    "step",
    "stage",
    "loss",
    "balance_loss",
    "grad_norm",
    "learning_rate",
    "expert_learning_rate",
    "tokens_per_s",
    "model_flops_per_s",
    "expert_load",
    "overflow_share",
    "recycled_share",
    "dropped_share",
}


def statistics(model: ModelConfig) -> torch.Tensor:
    """Two layers of 128 tokens in 4 routing groups; in layer 0 32 choices overflow, of which 24 are recycled and 8 dropped."""
    sums = {"overflow": [32, 0], "recycled": [24, 0], "dropped": [8, 0], "balance_loss": [8, 4], "z_loss": [12, 4], "tokens": [128, 128]}
    choices = torch.tensor([[64, 32, 32, 0], [32, 32, 32, 32]]) * model.moe_router_topk
    return torch.cat([choices, torch.tensor([sums[name] for name in STATISTICS]).T], dim=1).double()


def record(model: ModelConfig) -> dict:
    return step_record(model, STAGE, 4, StepResult(2.5, 0.7, 120, statistics(model)), 1e-3, 3.1e-4, seconds=0.5)


def test_the_record_has_what_is_promised():
    model = tiny_model()
    found = record(model)
    assert found.keys() >= PROMISED
    assert (found["step"], found["stage"], found["loss"], found["grad_norm"], found["target_tokens"]) == (5, "decay", 2.5, 0.7, 120)
    assert (found["learning_rate"], found["expert_learning_rate"]) == (1e-3, 3.1e-4)
    assert found["tokens_per_s"] == 256
    assert found["model_flops_per_s"] == 256 * flops_per_token(model, 64).total


@pytest.mark.parametrize("topk", [1, 2])
def test_loads_are_shares_of_choices_and_sum_to_one(topk):
    found = record(tiny_model(moe_router_topk=topk))
    assert found["expert_load"] == [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]
    assert [sum(layer) for layer in found["expert_load"]] == [1.0, 1.0]
    assert found["max_expert_load"] == 2.0, "times the even share"


def test_overflow_is_what_was_recycled_and_what_was_dropped():
    found = record(tiny_model())
    assert found["overflow_share"] == [0.25, 0.0]
    assert found["recycled_share"] == [0.1875, 0.0]
    assert found["dropped_share"] == [0.0625, 0.0]
    assert (found["mean_recycled_share"], found["mean_dropped_share"]) == (0.09375, 0.03125)


def test_balance_loss_is_the_mean_over_groups_and_layers():
    assert record(tiny_model())["balance_loss"] == (8 / 4 + 4 / 4) / 2
    assert "z_loss" not in record(tiny_model())
    assert record(tiny_model(moe_z_loss_coeff=0.1))["z_loss"] == (12 / 4 + 4 / 4) / 2


def test_evaluation_has_no_router_losses():
    assert "balance_loss" not in routing_record(tiny_model(), statistics(tiny_model()), None)


def test_the_line_for_a_person():
    line = step_line(record(tiny_model()), 10)
    assert line.startswith("step 5/10 [decay] loss 2.5000 balance 1.500 grad norm 0.700 lr 1.00e-03 load 2.00 recycled 9.4% 256 tokens/s ")
