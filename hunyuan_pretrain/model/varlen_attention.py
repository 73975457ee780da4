"""FlashAttention for packed documents in one kernel call: torch's, and the packages flash-attn (2) and flash-attn-3.

A kernel call takes the rows of all documents, their running sums of lengths on the GPU and the longest lengths on the
host, so no layer waits for the GPU. Where a document has more keys than queries, the causal mask ends at its last query
and last key (flash-attn 2.1 and later).

Shapes: T query rows, S key rows, K key rows that some query sees, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.model.packed_attention import Block
from hunyuan_pretrain.runtime.handover import handed_over, to_device


class Documents(NamedTuple):
    """Blocks as kernels take them: queries and keys of a block follow those of the previous block."""

    cu_seqlens_q: Tensor  # int32 (blocks + 1,)
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int
    is_square: bool
    """Every block has as many keys as queries."""
    keys: tuple[tuple[int, int], ...]
    """Ranges of the keys that the blocks see, in order. Concatenated, they are the keys that cu_seqlens_k delimits."""


Blocks = Sequence[Block] | Documents


def documents_of(blocks: Blocks, device: torch.device) -> Documents:
    """The blocks, as kernels take them."""
    return blocks if isinstance(blocks, Documents) else _documents(tuple(blocks), device)


def recorded_documents(cu_seqlens: Tensor, num_tokens: int, longest: int) -> Documents:
    """Documents for a recorded step: their boundaries are read in each replay from `cu_seqlens`, int32 on the device.

    They start at 0 and end at `num_tokens`, which may be repeated: documents at the end then have no tokens. None is
    longer than `longest`.
    """
    return Documents(cu_seqlens, cu_seqlens, longest, longest, True, ((0, num_tokens),))


def padded(cu_seqlens: Sequence[int], num_documents: int) -> Tensor:
    """int32 (num_documents + 1,) on the CPU: boundaries, for `recorded_documents`."""
    return torch.tensor([*cu_seqlens, *[cu_seqlens[-1]] * (num_documents + 1 - len(cu_seqlens))], dtype=torch.int32)


@lru_cache(maxsize=4)
def _documents(blocks: tuple[Block, ...], device: torch.device) -> Documents:
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
    return Documents(
        to_device(torch.tensor(cu_seqlens_q, dtype=torch.int32), device),
        to_device(torch.tensor(cu_seqlens_k, dtype=torch.int32), device),
        max(block.q_end - block.q_start for block in blocks),
        max(block.k_end - block.k_start for block in blocks),
        cu_seqlens_q == cu_seqlens_k,
        tuple(keys),
    )


def seen_rows(documents: Documents, *tensors_SGH: Tensor) -> list[Tensor]:
    """(K, G, H) rows of keys or values in the order of the blocks; the tensors themselves if that is all of them."""
    return [
        x if documents.keys == ((0, len(x)),) else torch.cat([x[start:end] for start, end in documents.keys])
        for x in tensors_SGH
    ]


class VarlenAttention:
    """`packed_attention` by one call of a FlashAttention kernel; bf16 on a GPU. Not a module: it has no parameters."""

    def __init__(self, name: str, attend: Callable[[Tensor, Tensor, Tensor, Documents], Tensor]) -> None:
        self.name, self.attend = name, attend

    def __call__(self, q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, blocks: Blocks) -> Tensor:
        """Returns (T, N, H), contiguous; `blocks` as in `packed_attention`. Communicates nothing."""
        documents = documents_of(blocks, q_TNH.device)
        rows = q_TNH, *seen_rows(documents, k_SGH, v_SGH)
        q_TNH, k_KGH, v_KGH = handed_over(self.name, *rows, dtype=torch.bfloat16, knows_strides=True)
        return self.attend(q_TNH, k_KGH, v_KGH, documents).contiguous()


def torch_varlen() -> VarlenAttention:
    """torch's copy of FlashAttention-2. Its backward pass is deterministic if torch's algorithms are."""
    return VarlenAttention("torch_varlen", _torch_varlen)


def _torch_varlen(q_TNH: Tensor, k_KGH: Tensor, v_KGH: Tensor, documents: Documents) -> Tensor:
    dropout, is_causal, returns_mask = 0.0, True, False
    return torch.ops.aten._flash_attention_forward(
        q_TNH, k_KGH, v_KGH, *documents[:4], dropout, is_causal, returns_mask
    )[0]


def flash_attn_2() -> VarlenAttention:
    """The package flash-attn. Raises ImportError if it cannot be loaded."""
    return VarlenAttention("flash_attn_2", _of_package(import_module("flash_attn")))


def flash_attn_3() -> VarlenAttention:
    """The package flash-attn-3. Raises ImportError if it cannot be loaded."""
    try:
        module = import_module("flash_attn_interface")
    except ModuleNotFoundError:  # some builds have it inside their package only
        module = import_module("flash_attn_3.flash_attn_interface")
    return VarlenAttention("flash_attn_3", _of_package(module))


def _of_package(module: Any) -> Callable[[Tensor, Tensor, Tensor, Documents], Tensor]:
    def attend(q_TNH: Tensor, k_KGH: Tensor, v_KGH: Tensor, documents: Documents) -> Tensor:
        found = module.flash_attn_varlen_func(
            q_TNH,
            k_KGH,
            v_KGH,
            *documents[:4],
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return found[0] if isinstance(found, tuple) else found  # early versions of 3 return the logsumexp too

    return attend
