"""cuDNN's attention through Transformer Engine: for packed documents, and for sequences of one length.

Shapes: T tokens, S key rows, N query heads, G key/value heads, H head dim, B sequences of L tokens.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.pytorch.utils import get_device_compute_capability

from hunyuan_pretrain.config.attention import DETERMINISTIC_SCORES, SCORES_UNBOUNDED_TO
from hunyuan_pretrain.model.engine.fp8 import without_fp8
from hunyuan_pretrain.model.packed_attention import Block, is_uniform, packed_attention
from hunyuan_pretrain.model.varlen_attention import Blocks, Documents, documents_of, seen_rows
from hunyuan_pretrain.runtime.device import major_minor, version_of
from hunyuan_pretrain.runtime.handover import handed_over

NO_KERNEL = (
    "cuDNN has no deterministic attention on this GPU for documents as many and as long as in some micro-batches: this "
    "project's own attention computes them (runtime.deterministic=false lets cuDNN compute them, and "
    "runtime.attention_backend chooses another kernel)"
)
ONLY_CUDNN = {"NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0", "NVTE_FUSED_ATTN": "1"}
READER = "Transformer Engine's attention"


class PackedAttention:
    """`packed_attention` with one call of cuDNN's kernel for all blocks. Not a module: it has no parameters and no
    state to save."""

    name = "cudnn"

    def __init__(self, num_heads: int, num_groups: int, head_dim: int) -> None:
        self.kernel = _cudnn_kernel(num_heads, num_groups, head_dim, "thd", "padding_causal")
        self.has_bound = (
            self.kernel.deterministic
            and get_device_compute_capability() == (9, 0)
            and major_minor(version_of("transformer-engine") or "") > SCORES_UNBOUNDED_TO
        )

    def __call__(self, q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, blocks: Blocks) -> Tensor:
        """Returns (T, N, H), contiguous; `blocks` as in `packed_attention`. Communicates nothing."""
        documents = documents_of(blocks, q_TNH.device)
        num_documents = len(documents.cu_seqlens_q) - 1
        num_scores = num_documents * q_TNH.shape[1] * documents.longest_q * documents.longest_k
        if self.has_bound and num_scores >= DETERMINISTIC_SCORES:
            assert not isinstance(blocks, Documents), "config.attention excludes this backend from recorded steps"
            warnings.warn(NO_KERNEL, stacklevel=1)
            return packed_attention(q_TNH, k_SGH, v_SGH, blocks)
        # Transformer Engine infers a layout from offsets and from whether keys and values have equal strides. It checks
        # neither which strides these are nor those of the queries, and its kernel sees only pointers and shapes. It
        # always recognises contiguous tensors at the start of their memory.
        qkv = handed_over(READER, q_TNH, *seen_rows(documents, k_SGH, v_SGH), dtype=torch.bfloat16, starts_memory=True)
        with without_fp8(), _only_cudnn():
            output = self.kernel(
                *qkv,
                cu_seqlens_q=documents.cu_seqlens_q,
                cu_seqlens_kv=documents.cu_seqlens_k,
                max_seqlen_q=documents.longest_q,
                max_seqlen_kv=documents.longest_k,
                attn_mask_type="padding_causal" if documents.is_square else "padding_causal_bottom_right",
            )
        return handed_over("the output projection", output.view(q_TNH.shape))[0]


class BatchedAttention:
    """`batched_attention` by cuDNN's kernel for sequences of one length, which has no offsets to follow."""

    name = "cudnn_batched"

    def __init__(self, num_heads: int, num_groups: int, head_dim: int) -> None:
        self.kernel = _cudnn_kernel(num_heads, num_groups, head_dim, "bshd", "causal")

    def __call__(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, blocks: Sequence[Block]) -> Tensor:
        """Returns (T, N, H), contiguous; `blocks` as in `batched_attention`. Communicates nothing."""
        assert is_uniform(blocks, len(k_TGH)), "documents of one length are computed as a batch, others are not"
        qkv = handed_over(READER, q_TNH, k_TGH, v_TGH, dtype=torch.bfloat16, starts_memory=True)
        with without_fp8(), _only_cudnn():
            output_BLX = self.kernel(*(x.unflatten(0, (len(blocks), -1)) for x in qkv))
        return handed_over("the output projection", output_BLX.reshape(q_TNH.shape))[0]


def _cudnn_kernel(num_heads: int, num_groups: int, head_dim: int, layout: str, mask: str) -> te.DotProductAttention:
    return te.DotProductAttention(
        num_heads, head_dim, num_gqa_groups=num_groups, qkv_format=layout, attn_mask_type=mask
    )


@contextmanager
def _only_cudnn() -> Iterator[None]:
    """Where cuDNN has no kernel, Transformer Engine would take flash-attn's, or hold the scores of all queries and
    keys; inside the context it raises ValueError instead. It reads these variables in each call that differs from the
    one before; megatron-core refuses other values for its own models."""
    before = {name: os.environ.get(name) for name in ONLY_CUDNN}
    os.environ.update(ONLY_CUDNN)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
