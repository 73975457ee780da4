"""The function of each attention backend in config/attention.py, and the one that a layer calls.

All take the arguments of `packed_attention` and return what it returns, within rounding. Optional packages are imported
only for a backend that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.config.attention import AttentionChoice, BackendName
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.packed_attention import Block, batched_attention, is_uniform, packed_attention
from hunyuan_pretrain.model.varlen_attention import flash_attn_2, flash_attn_3, torch_varlen

CoreAttention = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""(queries (T, N, H), keys and values (S, G, H), blocks: Blocks) -> (T, N, H), contiguous. Only backends that read
boundaries from memory (config.attention) take `Documents`."""


class Heads(NamedTuple):
    """Heads of one rank."""

    queries: int
    groups: int
    width: int


def heads_of(config: HunyuanConfig) -> Heads:
    """The heads that attention sees on one rank; with all_to_all, ranks trade tokens for heads."""
    ranks = config.tensor_model_parallel_size
    if config.parallel.context_parallel_method == "all_to_all":
        ranks *= config.parallel.context_parallel_size
    return Heads(config.num_attention_heads // ranks, config.num_query_groups // ranks, config.kv_channels)


def _cudnn(heads: Heads) -> CoreAttention:
    from hunyuan_pretrain.model.engine.attention import PackedAttention  # optional package

    return PackedAttention(*heads)


def _cudnn_batched(heads: Heads) -> CoreAttention:
    from hunyuan_pretrain.model.engine.attention import BatchedAttention  # optional package

    return BatchedAttention(*heads)


BUILDERS: dict[BackendName, Callable[[Heads], CoreAttention]] = {
    "cudnn": _cudnn,
    "flash_attn_3": lambda heads: flash_attn_3(),
    "flash_attn_2": lambda heads: flash_attn_2(),
    "torch_varlen": lambda heads: torch_varlen(),
    "per_document": lambda heads: packed_attention,
    "cudnn_batched": _cudnn_batched,
    "torch_batched": lambda heads: batched_attention,
}
"""Each raises ImportError if its package cannot be loaded. A backend for uniform micro-batches takes no others."""


class ByMicroBatch:
    """Two backends, one of them for micro-batches whose documents all have one length. The host decides, from the
    lengths."""

    def __init__(self, choice: AttentionChoice, packed: CoreAttention, uniform: CoreAttention) -> None:
        self.choice, self.packed, self.uniform = choice, packed, uniform
        self.name = " and ".join(choice)

    def __call__(self, q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, blocks: Sequence[Block]) -> Tensor:
        attend = self.uniform if is_uniform(blocks, len(k_SGH)) else self.packed
        return attend(q_TNH, k_SGH, v_SGH, blocks)


def core_attention(config: HunyuanConfig) -> CoreAttention:
    """The attention of a layer, as `config.attention` says."""
    choice, heads = config.attention, heads_of(config)
    packed = BUILDERS[choice.packed](heads)
    if choice.uniform == choice.packed:
        return packed
    return ByMicroBatch(choice, packed, BUILDERS[choice.uniform](heads))


def use_attention(chunks: Iterable[torch.nn.Module], choice: AttentionChoice) -> None:
    """Change the backend of every attention layer of these models. Raises ImportError if its package cannot be
    loaded."""
    layers: list[Any] = [module for model in chunks for module in model.modules() if hasattr(module, "core_attention")]
    for layer in layers:
        layer.config.attention = choice
        layer.core_attention = core_attention(layer.config)
