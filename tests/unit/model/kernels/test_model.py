"""A model whose functions between the matmuls are kernels trains as one with the plain functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.functions import plain_functions
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import build_model
from hunyuan_pretrain.model.kernels import kernel_functions
from hunyuan_pretrain.model.routing import EVALUATION, TrainingRouting
from tests.helpers.tiny import packed_inputs, tiny_model, world_of_one

DROPS: dict[str, Any] = {"moe_router_topk": 2, "recycle_routing": False, "moe_expert_capacity_factor": 0.75}


def step(model: ModelConfig, device: str, use_kernels: bool, dropless: bool, recompute: Any) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    groups = world_of_one()
    config = transformer_config(
        model, ParallelConfig(recompute=recompute), PrecisionConfig(dtype="fp32"), use_kernels=use_kernels
    )
    (whole,) = build_model(config, groups, 1)
    inputs = packed_inputs(model)
    assert isinstance(inputs.routing, TrainingRouting)
    training = inputs.routing._replace(group_n=inputs.routing.group_n.to(device))
    tensors = {name: getattr(inputs, name).to(device) for name in ("tokens_T", "labels_T", "positions_T")}
    assert inputs.loss_weight_T is not None
    tensors["loss_weight_T"] = inputs.loss_weight_T.to(device)
    loss, _ = whole(replace(inputs, **tensors, routing=EVALUATION if dropless else training))
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in whole.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "dropless", "recompute"),
    [({}, False, "none"), (DROPS, False, "cla_group"), ({"moe_router_topk": 2}, True, "selective")],
    ids=["top 1", "dropped choices and empty slots, recomputed", "dropless top 2, recomputed experts"],
)
def test_loss_and_gradients_are_those_of_the_plain_functions(
    changes: dict[str, Any], dropless: bool, recompute: str, device: str
) -> None:
    model = tiny_model(num_layers=2, **changes)
    plain, kernels = (step(model, device, use_kernels, dropless, recompute) for use_kernels in (False, True))
    for name, expected in plain.items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(kernels[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_recomputed_norms_and_activations_have_the_same_bits(device: str) -> None:
    model = tiny_model(num_layers=2)
    kept, recomputed = (step(model, device, True, False, recompute) for recompute in ("none", "swiglu+norms"))
    for name, expected in kept.items():
        assert torch.equal(recomputed[name], expected), name


def test_every_function_is_a_kernel() -> None:
    plain, kernels = plain_functions(), kernel_functions()
    for name in plain._fields:
        assert getattr(kernels, name) is not getattr(plain, name)
