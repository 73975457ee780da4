"""Rules for the architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.nearest import nearest_divisors, nearest_even, nearest_multiples
from hunyuan_pretrain.config.schema import ModelConfig


def hidden_size_splits_into_heads(model: ModelConfig) -> Iterator[Problem]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.kv_channels is None and hidden % heads:
        hint = f"{nearest_multiples(hidden, heads)}, or set model.kv_channels"
        yield Problem(
            "model.hidden_size", hidden, f"{heads} heads, {hidden} % {heads} != 0 and model.kv_channels is null", hint
        )


def heads_split_into_query_groups(model: ModelConfig) -> Iterator[Problem]:
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        yield Problem(
            "model.num_query_groups", groups, f"{heads} heads, {heads} % {groups} != 0", nearest_divisors(groups, heads)
        )


def head_dim_is_even(model: ModelConfig) -> Iterator[Problem]:
    width = model.head_dim
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        return
    if width < 4 or width % 2:
        path = "model.kv_channels" if model.kv_channels else "model.num_attention_heads"
        value = model.kv_channels or model.num_attention_heads
        yield Problem(
            path,
            value,
            f"head width {width} must be even and at least 4, since RoPE rotates pairs",
            nearest_even(width),
        )


def layers_split_into_cla_groups(model: ModelConfig) -> Iterator[Problem]:
    layers, share = model.num_layers, model.cla_share_factor
    if layers % share:
        hint = f"{nearest_multiples(layers, share)}, or cla_share_factor 1"
        yield Problem("model.num_layers", layers, f"CLA groups of {share} layers, {layers} % {share} != 0", hint)


def topk_is_within_experts(model: ModelConfig) -> Iterator[Problem]:
    topk, experts = model.moe_router_topk, model.num_moe_experts
    if topk > experts:
        yield Problem(
            "model.moe_router_topk",
            topk,
            f"more than the {experts} experts of model.num_moe_experts",
            f"use 1 to {experts}",
        )


def recycling_needs_a_capacity(model: ModelConfig) -> Iterator[Problem]:
    if model.recycle_routing and model.moe_expert_capacity_factor is None:
        rule = "without a capacity no expert is ever full, so nothing can be recycled"
        yield Problem(
            "model.recycle_routing",
            True,
            rule,
            "set model.moe_expert_capacity_factor, such as 1.0, or recycle_routing false",
        )


MODEL_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (
    hidden_size_splits_into_heads,
    heads_split_into_query_groups,
    head_dim_is_even,
    layers_split_into_cla_groups,
    topk_is_within_experts,
    recycling_needs_a_capacity,
)
