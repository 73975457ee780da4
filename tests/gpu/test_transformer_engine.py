"""Transformer Engine's own kernels on a GPU: against the local spec in bf16, and a step in every FP8 recipe. `make test-gpu` runs them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel, build_model
from hunyuan_pretrain.model.packed_attention import context_blocks, document_blocks, packed_attention
from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed
from hunyuan_pretrain.runtime.device import attends_to_packed_documents, missing_for_fp8, probe
from tests.helpers.tiny import packed_inputs, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODEL = tiny_model(hidden_size=128, ffn_hidden_size=256, moe_ffn_hidden_size=128, padded_vocab_size=512, moe_routing_group_tokens=128)
LENGTHS = (100, 28, 60, 68)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@cache
def groups() -> Any:
    initialize_distributed("nccl", 60)
    return build_groups(ParallelConfig(), 60)


def built(engine: bool, recipe: str | None = None, has_fp8_parameters: bool = False) -> HunyuanModel:
    precision = PrecisionConfig(dtype="bf16", fp8_recipe=recipe, fp8_parameters=has_fp8_parameters)
    (model,) = build_model(transformer_config(MODEL, ParallelConfig(), precision, use_transformer_engine=engine), groups(), 1)
    return model


def inputs() -> dict[str, Any]:
    found = packed_inputs(MODEL, LENGTHS)
    key = found["key"]
    found["key"] = key._replace(group_n=torch.arange(2, device="cuda"), num_global_groups=2)
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def step(model: HunyuanModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    from hunyuan_pretrain.model.transformer_engine import training_step

    model.zero_grad()
    with training_step([model], groups()):
        loss, _ = model(**inputs())
        loss.backward()
    return loss.item(), {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def median_error(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of the gradients' relative errors the one in the middle: a token that goes to another expert moves single ones by more."""
    return float(torch.stack([(mine[name] - theirs[name]).norm() / theirs[name].norm() for name in theirs]).median())


def test_a_bf16_step_equals_that_of_the_local_spec() -> None:
    (loss, gradients), (other_loss, others) = step(built(engine=True)), step(built(engine=False))
    assert loss == pytest.approx(other_loss, rel=2e-3)
    assert median_error(gradients, others) < 0.02


def skip_unless_supported(recipe: str) -> None:
    machine = probe()
    need = missing_for_fp8(recipe, machine.gpus[0].capability, machine.cuda)
    if need:
        pytest.skip(f"{recipe} needs {need}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_fp8_step_is_finite_and_close_to_bf16(recipe: str) -> None:
    skip_unless_supported(recipe)
    model = built(engine=True, recipe=recipe)
    for _ in range(2):  # scales of the delayed recipe are 1 in the first step
        loss, gradients = step(model)
    other_loss, others = step(built(engine=True))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert loss == pytest.approx(other_loss, rel=0.02)
    assert median_error(gradients, others) < 0.3


@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_parameters_in_fp8_only_take_the_same_step(recipe: str) -> None:
    """Experts, which are a parameter each then, put together again."""
    skip_unless_supported(recipe)
    (loss, gradients), (other_loss, others) = (step(built(True, recipe, is_kept)) for is_kept in (True, False))
    assert loss == other_loss
    for name, gradient in others.items():
        experts = [gradients[f"{name}{expert}"] for expert in range(MODEL.num_moe_experts)] if f"{name}0" in gradients else []
        torch.testing.assert_close(torch.stack(experts) if experts else gradients[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.skipif(
    torch.cuda.is_available() and not attends_to_packed_documents(), reason="Transformer Engine has no attention for packed documents here"
)
@pytest.mark.parametrize("ranges", [None, [(0, 64), (192, 256)], [(64, 192)]])
def test_attention_equals_the_local_one(ranges: list[tuple[int, int]] | None) -> None:
    from hunyuan_pretrain.model.transformer_engine_attention import PackedAttention

    borders = [0, 100, 128, 188, 256]
    blocks = document_blocks(borders) if ranges is None else context_blocks(borders, ranges)
    attention = PackedAttention(built(engine=True).config)
    shapes = ((blocks[-1].q_end, 4), (256, 2), (256, 2))
    q, k, v = (torch.randn(*shape, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    grad = torch.randn_like(q)
    results = []
    for attend in (attention, packed_attention):
        output = attend(q, k, v, blocks)
        results.append([output, *torch.autograd.grad(output, (q, k, v), grad)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
