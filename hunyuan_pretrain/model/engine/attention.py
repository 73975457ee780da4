"""Transformer Engine's attention for packed documents, used instead of model/packed_attention.py where it has a kernel.

Shapes: T tokens, S key rows, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.pytorch.utils import get_device_compute_capability

from hunyuan_pretrain.model.engine.fp8 import without_fp8
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.packed_attention import Block, packed_attention
from hunyuan_pretrain.model.spec import CoreAttention
from hunyuan_pretrain.runtime.device import major_minor, version_of
from hunyuan_pretrain.runtime.handover import handed_over, to_device
from hunyuan_pretrain.runtime.policy import attends_to_packed_documents

DETERMINISTIC_SCORES = 1 << 30
"""A bound on documents x heads x longest queries x longest keys of a call. At or above it, Transformer Engine newer
than 2.11 has no deterministic attention for packed documents on Hopper without flash-attn: cuDNN's backward pass takes
some 128 bytes for each. 2.20 rejects such a call; 2.11 did not."""
NO_KERNEL = (
    "Transformer Engine has no deterministic attention on this GPU for documents as long as some here: this project's "
    "own attention computes them (runtime.deterministic=false, or flash-attn, lets Transformer Engine compute them)"
)


def core_attention(config: HunyuanConfig) -> CoreAttention:
    """Transformer Engine's attention where it has a kernel for packed documents, else the one of the local spec."""
    if config.params_dtype == torch.bfloat16 and config.kv_channels % 8 == 0 and attends_to_packed_documents():
        return PackedAttention(config)
    return packed_attention


class PackedAttention:
    """`packed_attention` with one kernel call for all blocks. Not a module: it has no parameters and no state to
    save."""

    name = "Transformer Engine"

    def __init__(self, config: HunyuanConfig) -> None:
        # without a kernel it would silently hold the scores of all queries and keys; now it fails instead
        os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
        ranks = config.tensor_model_parallel_size
        if config.parallel.context_parallel_method == "all_to_all":  # ranks trade tokens for heads
            ranks *= config.parallel.context_parallel_size
        self.kernel = te.DotProductAttention(
            config.num_attention_heads // ranks,
            config.kv_channels,
            num_gqa_groups=config.num_query_groups // ranks,
            qkv_format="thd",
            attn_mask_type="padding_causal",
        )
        self.has_bound = (
            self.kernel.deterministic
            and get_device_compute_capability() == (9, 0)
            and major_minor(version_of("transformer-engine") or "") > (2, 11)
            and version_of("flash-attn") is None
        )

    def __call__(self, q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, blocks: Sequence[Block]) -> Tensor:
        """Returns (T, N, H), contiguous; `blocks` as in `packed_attention`. Communicates nothing."""
        documents = _documents(tuple(blocks), q_TNH.device)
        num_scores = len(blocks) * q_TNH.shape[1] * documents.longest_q * documents.longest_k
        if self.has_bound and num_scores >= DETERMINISTIC_SCORES:
            warnings.warn(NO_KERNEL, stacklevel=1)
            return packed_attention(q_TNH, k_SGH, v_SGH, blocks)
        if documents.keys != ((0, k_SGH.shape[0]),):
            k_SGH, v_SGH = (torch.cat([x[start:end] for start, end in documents.keys]) for x in (k_SGH, v_SGH))
        # Transformer Engine infers a layout from offsets and from whether keys and values have equal strides. It checks
        # neither which strides these are nor those of the queries, and its kernel sees only pointers and shapes. It
        # always recognises contiguous tensors at the start of their memory.
        qkv = handed_over(
            "Transformer Engine's attention", q_TNH, k_SGH, v_SGH, dtype=torch.bfloat16, starts_memory=True
        )
        with without_fp8():
            output = self.kernel(
                *qkv,
                cu_seqlens_q=documents.cu_seqlens_q,
                cu_seqlens_kv=documents.cu_seqlens_k,
                max_seqlen_q=documents.longest_q,
                max_seqlen_kv=documents.longest_k,
                attn_mask_type=documents.mask,
            )
        return handed_over("the output projection", output.view(q_TNH.shape))[0]


class _Documents(NamedTuple):
    """Blocks as the kernel takes them: queries and keys of a block follow those of the previous block."""

    cu_seqlens_q: Tensor  # int32 (blocks + 1,)
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int
    mask: str
    keys: tuple[tuple[int, int], ...]
    """Ranges of the keys that the blocks see, in order. Concatenated, they are the keys that cu_seqlens_k delimits."""


@lru_cache(maxsize=4)
def _documents(blocks: tuple[Block, ...], device: torch.device) -> _Documents:
    """Cached: all layers of a micro-batch have the same blocks."""
    cu_seqlens_q, cu_seqlens_k = [0], [0]
    keys: list[tuple[int, int]] = []
    for block in blocks:
        cu_seqlens_q.append(block.q_end)
        cu_seqlens_k.append(cu_seqlens_k[-1] + block.k_end - block.k_start)
        if keys and keys[-1][1] == block.k_start:
            keys[-1] = keys[-1][0], block.k_end
        else:
            keys.append((block.k_start, block.k_end))
    is_square = cu_seqlens_q == cu_seqlens_k
    return _Documents(
        to_device(torch.tensor(cu_seqlens_q, dtype=torch.int32), device),
        to_device(torch.tensor(cu_seqlens_k, dtype=torch.int32), device),
        max(block.q_end - block.q_start for block in blocks),
        max(block.k_end - block.k_start for block in blocks),
        "padding_causal" if is_square else "padding_causal_bottom_right",
        tuple(keys),
    )
