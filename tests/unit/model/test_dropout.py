"""Dropout: masks are a pure function of their key, the same forward, backward and in any share of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.config.schema import LoraConfig, ModelConfig, ParallelConfig, PrecisionConfig, TuningConfig
from hunyuan_pretrain.config.tuning import linears_of_layer
from hunyuan_pretrain.model import packed_attention
from hunyuan_pretrain.model.dropout import (
    ADAPTERS,
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    PROBABILITIES,
    Rates,
    dropout_of,
    dropped,
)
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel, build_model
from hunyuan_pretrain.model.lora import is_zero_at_first
from hunyuan_pretrain.model.packed_attention import context_blocks, document_blocks
from hunyuan_pretrain.model.routing import EVALUATION, RoutingPlan, TrainingRouting
from tests.helpers import tiny

KEY = torch.tensor(1 << 40)
TOKENS = torch.arange(700)


def mask(rate: float, channels: int = 90, key: Tensor = KEY, tokens: Tensor = TOKENS, first: int = 0) -> Tensor:
    return dropped(torch.ones(len(tokens), channels), key, tokens, rate, first) != 0


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.2, 0.5, 0.9])
def test_so_many_are_dropped_and_the_mean_stays(rate: float) -> None:
    output = dropped(torch.ones(len(TOKENS), 90), KEY, TOKENS, rate)
    spread = (rate * (1 - rate) / output.numel()) ** 0.5
    assert (output == 0).float().mean().item() == pytest.approx(rate, abs=4 * spread)
    assert output.max().item() == pytest.approx(1 / (1 - rate), rel=2e-4 / (1 - rate))
    assert len(output.unique()) == 2


def test_elements_tokens_and_keys_are_independent() -> None:
    """The share of elements that two masks both keep is that of independent draws."""
    one = mask(0.5, 96)
    others = [mask(0.5, 96, KEY + 1), one.roll(1, 0), *(one.roll(shift, 1) for shift in (1, 2, 3, 4))]
    for other in others:
        assert (one & other).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_a_part_of_tokens_or_channels_has_the_part_of_the_mask() -> None:
    whole = mask(0.3)
    some = torch.tensor([600, 3, 77])
    assert torch.equal(mask(0.3, tokens=some), whole[some])
    for first, channels in ((0, 45), (45, 45), (30, 7), (88, 2)):
        assert torch.equal(mask(0.3, channels, first=first), whole[:, first : first + channels])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_same_mask_and_no_mask_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(700, 90, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    output = dropped(x, KEY, TOKENS, 0.2)
    kept: Any = output.grad_fn
    assert sum(tensor.numel() for tensor in kept.saved_tensors) == len(TOKENS) + 1
    output.backward(torch.ones_like(output))
    assert x.grad is not None
    assert torch.equal(x.grad, dropped(torch.ones_like(x), KEY, TOKENS, 0.2).detach())
    assert torch.equal(output == 0, x.grad == 0)


def test_without_a_rate_or_in_evaluation_there_is_none() -> None:
    x = torch.randn(3, 4)
    assert dropped(x, KEY, TOKENS[:3], 0.0) is x
    training = TrainingRouting(1, 2, torch.arange(2), 2)
    assert dropout_of(training, Rates(), 4, 0, 1) is None
    assert dropout_of(EVALUATION, Rates(0.2, 0.1), 4, 0, 1) is None


def test_every_place_layer_step_and_seed_has_another_mask_and_ranks_share_one() -> None:
    def masks(seed: int, step: int, rank: int = 0, size: int = 1) -> list[Tensor]:
        found = dropout_of(TrainingRouting(seed, step, torch.arange(8, 16), 16), Rates(0.5, 0.5), 4, rank, size)
        assert found is not None
        x_TC = torch.ones(32 // size, 24)
        hidden = [found.hidden(x_TC, layer, place) for layer in (0, 1) for place in (EMBEDDING, ATTENTION, EXPERTS)]
        return [*hidden, *(found.adapter(x_TC, 0, place, None) for place in (0, 1))]

    assert 1 + max(EMBEDDING, ATTENTION, EXPERTS, PROBABILITIES) == ADAPTERS
    drawn = [*masks(1, 0), *masks(1, 1), *masks(2, 0)]
    assert len({one.numpy().tobytes() for one in drawn}) == len(drawn)
    parts = [masks(1, 0, rank, 2) for rank in (0, 1)]
    for whole, halves in zip(masks(1, 0), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(halves), whole)


# --- attention --------------------------------------------------------------------------------------------------------


def by_hand(qkv: list[Tensor], cu_seqlens: list[int], masks: list[Tensor]) -> Tensor:
    """Of each document: softmax, then the mask (N, n, n), then the values; with autograd."""
    found = []
    for start, end, mask_Nnn in zip(cu_seqlens, cu_seqlens[1:], masks, strict=False):
        q, k, v = (x[start:end].transpose(0, 1) for x in qkv)
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(
            torch.ones(end - start, end - start).triu(1) > 0, -torch.inf
        )
        found.append((scores.softmax(-1) * mask_Nnn @ v).transpose(0, 1))
    return torch.cat(found)


def test_attention_drops_probabilities_the_same_in_pieces_and_on_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula with the masks written out; then in pieces, for rows of one rank, and for some heads."""
    attend: Callable[..., Tensor] = packed_attention.packed_attention
    generator = torch.Generator().manual_seed(1)
    T, cu_seqlens = 96, [0, 20, 64, 71, 96]
    qkv = [torch.randn(T, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    found = dropout_of(TrainingRouting(1, 0, torch.arange(24, 48), 48), Rates(attention=0.3), 4, 0, 1)
    assert found is not None
    drop, blocks = found.probabilities(2, 0), document_blocks(cu_seqlens)
    assert drop is not None
    masks = [
        drop(torch.ones(1, 4, block.q_end - block.q_start, block.q_end - block.q_start), block.q_start, 0)[0]
        for block in blocks
    ]
    share = torch.cat([(one == 0).flatten() for one in masks]).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(masks[1][0], masks[1][1])
    output_gradient = torch.randn(T, 4, 8, generator=generator, dtype=torch.float64)
    expected = with_gradients(lambda *qkv: by_hand(list(qkv), cu_seqlens, masks), qkv, output_gradient)
    for pieces in (256, 16):
        monkeypatch.setattr(packed_attention, "DROPPED_QUERIES", pieces)
        actual = with_gradients(lambda *qkv: attend(*qkv, blocks, drop), qkv, output_gradient)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
    heads = found.probabilities(2, 2)
    some = attend(qkv[0][:, 2:], *(x[:, 1:] for x in qkv[1:]), blocks, heads)
    torch.testing.assert_close(some, expected[0][:, 2:])
    ranges = [(8, 32), (68, 92)]
    rows = torch.cat([torch.arange(*one) for one in ranges])
    mine = found._replace(token_U=found.token_U[rows]).probabilities(2, 0)
    of_rank = attend(qkv[0][rows], *qkv[1:], context_blocks(cu_seqlens, ranges), mine)
    torch.testing.assert_close(of_rank, expected[0][rows])


def with_gradients(attend: Callable[..., Tensor], qkv: list[Tensor], output_gradient: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in qkv]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, output_gradient)]


# --- in the model -----------------------------------------------------------------------------------------------------


def result(model: ModelConfig, rates: Rates, **parallel: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a micro-batch."""
    whole, inputs = tiny.build(model, **parallel), tiny.packed_inputs(model)
    loss, _ = whole(replace(inputs, dropout=rates))
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in whole.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("recompute", ["norms", "cla_group"])
def test_recomputed_layers_drop_the_same(recompute: str) -> None:
    model = tiny.tiny_model()
    loss, gradients = result(model, Rates(0.2, attention=0.1))
    again, recomputed = result(model, Rates(0.2, attention=0.1), recompute=recompute)
    assert loss != result(model, Rates())[0]
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_hidden_states_are_dropped_at_the_embedding_and_after_both_branches() -> None:
    """Against the sums written out, with the masks of `dropped` and the outputs of the branches."""
    model = tiny.tiny_model()
    whole = tiny.build(model)
    seen: dict[str, Tensor] = {}
    layer = whole.decoder.layers[0]
    layer.self_attention.register_forward_hook(lambda _, args, output: seen.update(attention=output[0]))
    layer.mlp.register_forward_hook(lambda _, args, output: seen.update(residual=args[1], experts=output[0]))
    layer.register_forward_hook(lambda _, args, output: seen.update(input=args[0], output=output[0]))
    whole.embedding.register_forward_hook(lambda _, args, output: seen.update(embedding=output))
    inputs = replace(tiny.packed_inputs(model), dropout=Rates(0.3))
    with torch.no_grad():
        whole(inputs)
    dropout = dropout_of(inputs.routing, inputs.dropout, model.moe_routing_group_tokens, 0, 1)
    assert dropout is not None
    assert torch.equal(seen["input"], dropout.hidden(seen["embedding"], 0, EMBEDDING))
    assert not seen["residual"].any()
    middle = seen["input"] + dropout.hidden(seen["attention"], 0, ATTENTION)
    assert torch.equal(seen["output"], middle + dropout.hidden(seen["experts"], 0, EXPERTS))


# --- inputs of adapters -----------------------------------------------------------------------------------------------

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model: ModelConfig, **parallel: Any) -> HunyuanModel:
    """With adapters of every linear layer whose B is not 0."""
    tuning = TuningConfig(lora=LoraConfig(rank=4, alpha=8, dropout=0.3, target_modules=EVERY))
    config = transformer_config(model, ParallelConfig(**parallel), PrecisionConfig(dtype="fp32"), tuning=tuning)
    (whole,) = build_model(config, tiny.world_of_one(), 1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, one in whole.named_parameters():
            if is_zero_at_first(name):
                one.normal_(std=0.1, generator=generator)
    return whole


def test_adapters_read_inputs_with_dropout_and_rows_of_experts_have_the_masks_of_their_choices() -> None:
    """Against the products written out, per row, in a layer that borrows keys and values; some slots are empty, some
    choices are dropped."""
    model = tiny.tiny_model(moe_router_topk=2, moe_expert_capacity_factor=1.1, recycle_routing=False)
    whole, inputs = adapted(model), replace(tiny.packed_inputs(model), dropout=Rates(adapter=0.3))
    layer, plans, calls = whole.decoder.layers[1], list[RoutingPlan](), dict[str, tuple[Any, Tensor]]()
    layer.mlp.experts.register_forward_hook(lambda _, args, output: plans.append(args[1]))
    linears = linears_of_layer(model, 1)
    for linear in linears:
        layer.get_submodule(linear.name).register_forward_hook(
            lambda _, args, output, name=linear.name: calls.update({name: (args, output)})
        )
    with torch.no_grad():
        whole(inputs)
    (plan,), T = plans, len(inputs.tokens_T)
    numbers_R, expert_R = torch.full((plan.num_rows,), -1), torch.arange(4).repeat_interleave(plan.num_rows // 4)
    for choice, row in enumerate(plan.row_TK.flatten().tolist()):
        if row < plan.num_rows:
            numbers_R[row] = choice
    assert (numbers_R == -1).any()
    assert (plan.row_TK == plan.num_rows).any()
    dropout = dropout_of(inputs.routing, inputs.dropout, model.moe_routing_group_tokens, 0, 1)
    assert dropout is not None
    for place, linear in enumerate(linears):
        module, (args, output) = layer.get_submodule(linear.name), calls[linear.name]
        is_filled, number = (numbers_R >= 0, numbers_R) if linear.is_routed else (slice(None), torch.arange(T))
        mask = dropout.of_rows(number).adapter(torch.ones_like(args[0]), 1, place, 0)[is_filled]
        assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
        plain = module.forward(*args)
        found = (output - plain if linear.is_routed else output[0] - plain[0])[is_filled]
        x = args[0][is_filled] * mask
        expected = []
        for part in linear.parts:
            a, b = module.adapter.get_submodule(part)()
            if linear.is_routed:
                a, b = a[expert_R[is_filled]], b[expert_R[is_filled]]
            expected.append(2.0 * (b @ (a @ x[..., None])).squeeze(-1))
        torch.testing.assert_close(found, torch.cat(expected, dim=-1), atol=1e-6, rtol=1e-4)
    first, second = (dropout.of_rows(torch.tensor([number])).adapter(torch.ones(1, 32), 1, 2, 0) for number in (6, 7))
    assert not torch.equal(first, second)  # the same token


@pytest.mark.parametrize("recompute", ["swiglu+norms", "selective", "cla_group"])
def test_recomputed_experts_have_the_masks_of_their_own_micro_batch(recompute: str) -> None:
    """Another one is computed before the backward pass, as pipeline schedules do."""
    model = tiny.tiny_model(moe_router_topk=2)

    def gradients(**parallel: Any) -> dict[str, Tensor | None]:
        whole, inputs = adapted(model, **parallel), replace(tiny.packed_inputs(model), dropout=Rates(adapter=0.3))
        loss, _ = whole(inputs)
        whole(replace(inputs, routing=inputs.routing._replace(step=6)))
        loss.backward()
        return {name: one.grad for name, one in whole.named_parameters()}

    kept, again = gradients(), gradients(recompute=recompute)
    assert sum(one is not None for one in kept.values()) > 40
    for name, gradient in kept.items():
        assert gradient is None or torch.equal(gradient, again[name]), name
