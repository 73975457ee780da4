"""Causal attention within packed documents, for all rows of a micro-batch or for those of one context-parallel rank.

The work is a list of blocks. The queries of a block are consecutive tokens of one document; each sees the document's
keys up to itself. A causal flash kernel takes as many queries as keys, so a block whose document begins before its
first query needs two calls: unmasked on the earlier keys, causal on the block's own. Their results are merged by
logsumexp. The backward pass gives the merged output and logsumexp to the backward kernel of each part, which then
returns that part of the exact gradient (Ring Attention, arXiv 2310.01889).

Shapes: T query rows of this rank, S key rows (T without context parallelism), N query heads, G key/value heads, H head
dim, n queries of a block, P keys of a kernel call, B sequences of L tokens. The leading 1 is the kernels' batch dim.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hunyuan_pretrain.config.derived import DROPPED_QUERIES
from hunyuan_pretrain.runtime.handover import handed_over


class Block(NamedTuple):
    """The queries [q_start, q_end) are the tokens of the last q_end - q_start keys of [k_start, k_end); each sees the
    keys up to its own."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


def document_blocks(cu_seqlens: Sequence[int]) -> list[Block]:
    """One block per document, where queries and keys both cover all rows."""
    return [Block(start, end, start, end) for start, end in pairwise(cu_seqlens)]


def context_blocks(cu_seqlens: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[Block]:
    """The blocks of a rank whose queries are the rows of these (start, end) ranges, concatenated, and whose keys are
    all rows."""
    blocks: list[Block] = []
    row = 0
    for start, end in ranges:
        document = bisect_right(cu_seqlens, start) - 1
        while start < end:
            stop = min(end, cu_seqlens[document + 1])
            blocks.append(Block(row, row + stop - start, cu_seqlens[document], stop))
            row, start, document = row + stop - start, stop, document + 1
    return blocks


def is_uniform(blocks: Sequence[Block], num_keys: int) -> bool:
    """Whether the blocks are documents of one length that cover queries and keys. Of documents of several lengths it
    reads few."""
    length = blocks[0].q_end
    return blocks[-1].k_end == num_keys and all(
        block == (length * number, length * (number + 1), length * number, length * (number + 1))
        for number, block in enumerate(blocks)
    )


class Drop(Protocol):
    """Drops the same probabilities each time, by query, head and key."""

    def __call__(self, weights_1NnP: Tensor, first_query: int, first_key: int) -> Tensor:
        """(1, N, n, P) numbers, one for each probability, with dropped ones 0 and the others scaled. first_query: its
        row; first_key: its place in its document."""


def packed_attention(
    q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, blocks: Sequence[Block], drop: Drop | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(H)) v of each block, without a (T, S) mask. Returns (T, N, H), contiguous. Communicates
    nothing.

    Blocks are in query order and cover every query. Query head n reads key/value head n // (N / G). Keys that no query
    sees get a zero gradient. Any strides are accepted, but tensors whose last dim is not contiguous are copied. Raises
    ValueError if dtypes or devices differ. drop: of the probabilities; flash kernels draw their own masks, so torch's
    operations compute attention then.
    """
    blocks = blocks if drop is None else [part for block in blocks for part in _pieces(block)]
    assert [*(block.q_start for block in blocks), q_TNH.shape[0]] == [0, *(block.q_end for block in blocks)], (
        "blocks leave queries out"
    )
    return _PackedAttention.apply(
        *handed_over("flash attention", q_TNH, k_SGH, v_SGH, knows_strides=True), blocks, drop
    )


def _pieces(block: Block) -> Iterator[Block]:
    """The block in blocks of at most DROPPED_QUERIES queries."""
    own_key = block.k_end - (block.q_end - block.q_start)
    for start in range(block.q_start, block.q_end, DROPPED_QUERIES):
        end = min(start + DROPPED_QUERIES, block.q_end)
        yield Block(start, end, block.k_start, own_key + end - block.q_start)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, blocks: Sequence[Block], drop: Drop | None
    ) -> Tensor:
        kernel = _kernel(q_TNH)
        q_1NTH, k_1GSH, v_1GSH = _by_head(q_TNH, k_SGH, v_SGH)
        outs_nNH, logsumexps = [], []
        for block in blocks:
            q_1NnH = q_1NTH.narrow(2, *_queries(block))
            parts = [
                _of_part(kernel, drop, block, keys).forward(
                    q_1NnH, k_1GSH.narrow(2, *keys), v_1GSH.narrow(2, *keys), causal
                )
                for keys, causal in _parts(block)
            ]
            out_1NnH, logsumexp_1Nn = parts[0] if len(parts) == 1 else _merge(*parts)
            outs_nNH.append(out_1NnH[0].transpose(0, 1))
            logsumexps.append(logsumexp_1Nn)
        out_TNH = torch.cat(outs_nNH)
        ctx.blocks, ctx.drop = blocks, drop
        ctx.save_for_backward(q_TNH, k_SGH, v_SGH, out_TNH, *logsumexps)
        return out_TNH

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_SGH, v_SGH, out_TNH, *logsumexps = ctx.saved_tensors
        kernel = _kernel(q_TNH)
        grad_1NTH, q_1NTH, k_1GSH, v_1GSH, out_1NTH = _by_head(grad_TNH.contiguous(), q_TNH, k_SGH, v_SGH, out_TNH)
        # blocks that cover all keys in order need no sum; others share keys or skip some
        ends = [0, *(block.k_end for block in ctx.blocks)]
        is_sum = ends != [*(block.k_start for block in ctx.blocks), k_SGH.shape[0]]
        sum_dtype = torch.promote_types(k_SGH.dtype, torch.float32)
        sums_kv = [torch.zeros(x.shape, dtype=sum_dtype, device=x.device) for x in (k_SGH, v_SGH)] if is_sum else []
        grads_q: list[Tensor] = []
        grads_kv: list[list[Tensor]] = [[], []]
        for block, logsumexp_1Nn in zip(ctx.blocks, logsumexps, strict=True):
            grad_1NnH, q_1NnH, out_1NnH = (x.narrow(2, *_queries(block)) for x in (grad_1NTH, q_1NTH, out_1NTH))
            grad_q_nNH: Tensor | None = None
            for keys, causal in _parts(block):
                kv_1GPH = k_1GSH.narrow(2, *keys), v_1GSH.narrow(2, *keys)
                one = _of_part(kernel, ctx.drop, block, keys)
                grads = one.backward(grad_1NnH, q_1NnH, *kv_1GPH, out_1NnH, logsumexp_1Nn, causal)
                grad_nNH, *grad_kv_PGH = (x[0].transpose(0, 1) for x in grads)
                grad_q_nNH = grad_nNH if grad_q_nNH is None else grad_q_nNH + grad_nNH
                for number, grad_PGH in enumerate(grad_kv_PGH):
                    if is_sum:
                        sums_kv[number].narrow(0, *keys).add_(grad_PGH)
                    else:
                        grads_kv[number].append(grad_PGH)
            assert grad_q_nNH is not None
            grads_q.append(grad_q_nNH)
        grad_k_SGH, grad_v_SGH = (x.to(k_SGH.dtype) for x in sums_kv) if is_sum else (torch.cat(x) for x in grads_kv)
        return torch.cat(grads_q), grad_k_SGH, grad_v_SGH, None, None


def _of_part(kernel: _Kernel, drop: Drop | None, block: Block, keys: tuple[int, int]) -> _Kernel:
    """The kernel for a block's queries and these keys; with dropout, torch's operations with their mask."""
    if drop is None:
        return kernel
    mask = partial(drop, first_query=block.q_start, first_key=keys[0] - block.k_start)
    return _Kernel(partial(_plain, mask=mask), partial(_plain_backward, mask=mask))


def batched_attention(q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, blocks: Sequence[Block]) -> Tensor:
    """`packed_attention` in one kernel call, for documents of one length: `is_uniform` must hold."""
    assert is_uniform(blocks, len(k_TGH)), "documents of one length are computed as a batch, others are not"
    qkv = handed_over("flash attention", q_TNH, k_TGH, v_TGH, knows_strides=True)
    return _BatchedAttention.apply(*qkv, len(blocks))


class _BatchedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, num_sequences: int) -> Tensor:
        q_BNLH, k_BGLH, v_BGLH = (_as_batch(x, num_sequences) for x in (q_TNH, k_TGH, v_TGH))
        out_BNLH, logsumexp_BNL = _kernel(q_TNH).forward(q_BNLH, k_BGLH, v_BGLH, True)
        out_TNH = out_BNLH.transpose(1, 2).reshape(q_TNH.shape).contiguous()
        ctx.num_sequences = num_sequences
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH, out_TNH, logsumexp_BNL)
        return out_TNH

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_TNH, k_TGH, v_TGH, out_TNH, logsumexp_BNL = ctx.saved_tensors
        inputs = (grad_TNH.contiguous(), q_TNH, k_TGH, v_TGH, out_TNH)
        grads = _kernel(q_TNH).backward(*(_as_batch(x, ctx.num_sequences) for x in inputs), logsumexp_BNL, True)
        grad_q, grad_k, grad_v = (x.transpose(1, 2).flatten(0, 1) for x in grads)
        return grad_q, grad_k, grad_v, None


def _as_batch(x_TNH: Tensor, num_sequences: int) -> Tensor:
    return x_TNH.unflatten(0, (num_sequences, -1)).transpose(1, 2)


def _by_head(*tensors_TNH: Tensor) -> list[Tensor]:
    return [x_TNH.transpose(0, 1)[None] for x_TNH in tensors_TNH]


def _queries(block: Block) -> tuple[int, int]:
    """First row and number of rows, as Tensor.narrow takes them."""
    return block.q_start, block.q_end - block.q_start


def _parts(block: Block) -> Iterator[tuple[tuple[int, int], bool]]:
    """Yields ((first key, number of keys), is_causal) for each kernel call of a block."""
    own = block.q_end - block.q_start
    earlier = block.k_end - block.k_start - own
    if earlier:
        yield (block.k_start, earlier), False
    yield (block.k_end - own, own), True


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(output, logsumexp) of attention to the keys of both parts, combined in the logsumexp's dtype, fp32 or wider."""
    (first_1NnH, first_1Nn), (second_1NnH, second_1Nn) = first, second
    logsumexp_1Nn = torch.logaddexp(first_1Nn, second_1Nn)
    out_1NnH = first_1NnH * (first_1Nn - logsumexp_1Nn).exp()[..., None]
    out_1NnH.addcmul_(second_1NnH.to(out_1NnH.dtype), (second_1Nn - logsumexp_1Nn).exp()[..., None])
    return out_1NnH.to(first_1NnH.dtype), logsumexp_1Nn


class _Kernel(NamedTuple):
    """Attention of (B, N, n, H) queries to (B, G, P, H) keys and values; is_causal only with n = P."""

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    """(q, k, v, is_causal) -> output, logsumexp (B, N, n)."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(output gradient, q, k, v, output, logsumexp, is_causal) -> gradients of q, k and v."""


Mask = Callable[[Tensor], Tensor]
"""(B, N, n, P) numbers, one for each probability -> the same with dropped ones 0 and the others scaled."""


def _kernel(q_TNH: Tensor) -> _Kernel:
    if q_TNH.device.type == "cpu":
        return _Kernel(_flash_cpu, _flash_cpu_backward)
    has_flash = (
        q_TNH.device.type == "cuda" and q_TNH.dtype in (torch.bfloat16, torch.float16) and q_TNH.shape[-1] % 8 == 0
    )
    return _Kernel(_flash_cuda, _flash_cuda_backward) if has_flash else _Kernel(_plain, _plain_backward)


# Flash kernels support grouped queries natively; the CPU's since pytorch pull request 157893 of July 2025.


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)


def _flash_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, logsumexp, 0.0, is_causal
    )


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[:2]


def _flash_cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # for dropout, which is off
    saved = (grad, q, k, v, out, logsumexp.contiguous(), None, None, q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(*saved, 0.0, is_causal, seed, seed)


def _unmasked(weights: Tensor) -> Tensor:
    return weights


def _plain(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Mask = _unmasked) -> tuple[Tensor, Tensor]:
    """For what flash kernels reject, such as fp32 on a GPU, or do not have: dropout with a given mask. Holds all scores
    of a call, and a causal mask for them."""
    scores = _plain_scores(q, k, is_causal)
    logsumexp = scores.logsumexp(-1)
    weights = (scores - logsumexp[..., None]).exp()
    return (mask(weights) @ _for_every_query_head(v, q)).to(q.dtype), logsumexp


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    mask: Mask = _unmasked,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (_plain_scores(q, k, is_causal) - logsumexp[..., None]).exp()
    grad, out, wide_q = (x.to(weights.dtype) for x in (grad, out, q))
    grad_scores = mask(grad @ _for_every_query_head(v, q).mT) - (grad * out).sum(-1, keepdim=True)
    grad_scores = grad_scores * weights * q.shape[-1] ** -0.5
    grad_k, grad_v = (
        x.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype) for x in (grad_scores.mT @ wide_q, mask(weights).mT @ grad)
    )
    return (grad_scores @ _for_every_query_head(k, q)).to(q.dtype), grad_k, grad_v


def _plain_scores(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    keys = _for_every_query_head(k, q)
    scores = q.to(keys.dtype) @ keys.mT * q.shape[-1] ** -0.5
    if is_causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return scores


def _for_every_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(q.shape[1] // x.shape[1], dim=1)
