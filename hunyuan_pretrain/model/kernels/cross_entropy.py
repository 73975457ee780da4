"""Loss of a chunk of logits, and their gradient in their place, in two kernels.

Bytes per logit of b bytes: the first kernel reads it for the maximum and the sum of a token; the second reads it again
and writes the gradient: 3 b. Less is possible only where all logits of a token fit on the chip: the sum must be known
before the first gradient. Between the two, tensor-parallel ranks reduce three fp32 numbers per token.

Shapes: c tokens of a chunk, V ids of this rank. In kernels: B ids of a block.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from hunyuan_pretrain.model.cross_entropy import reduced
from hunyuan_pretrain.model.kernels.rows import check_layout

BLOCK = 4096
"""Ids of a block: with 8 warps, 16 of each thread, in two loads of 16 bytes of bf16."""


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    logits, label, maximum, sums, num_tokens, logits_row, first_id, V: tl.constexpr, B: tl.constexpr
):
    """A program reads a token's logits: their maximum; the label's logit (0 if another rank has it) less the maximum,
    and the sum of exp(logit - maximum), into (2, c)."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * logits_row
    largest, total = -3.4e38, 0.0  # not -inf: a block of logits that are all -inf would make exp(-inf + inf) nan
    for first in range(0, V, B):
        column = first + tl.arange(0, B)
        logit_B = tl.load(row + column, mask=column < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(logit_B, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(logit_B - new), 0)
        largest = new
    own = tl.load(label + token) - first_id
    is_mine = (own >= 0) & (own < V)
    label_logit = tl.load(row + own, mask=is_mine, other=0.0).to(tl.float32)
    tl.store(maximum + token, largest)
    tl.store(sums + token, tl.where(is_mine, label_logit - largest, 0.0))
    tl.store(sums + num_tokens + token, total)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits, label, maximum, total, weight, logits_row, first_id, V: tl.constexpr, B: tl.constexpr
):
    """A program replaces a block of a token's logits by weight * (softmax - 1 at the label), rounded once."""
    across: tl.constexpr = (V + B - 1) // B
    token = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * B + tl.arange(0, B)
    place = logits + token * logits_row + column
    logit_B = tl.load(place, mask=column < V, other=0.0).to(tl.float32)
    factor = tl.load(weight + token)
    grad_B = tl.exp(logit_B - tl.load(maximum + token)) * (factor / tl.load(total + token))
    grad_B -= tl.where(column == tl.load(label + token) - first_id, factor, 0.0)
    tl.store(place, grad_B, mask=column < V)


@torch.no_grad()
def chunk_loss(
    logits_cV: Tensor, label_c1: Tensor, weight_c1: Tensor, first_id: int, tp_group: dist.ProcessGroup, needs_grad: bool
) -> Tensor:
    """As model.cross_entropy.chunk_loss; without needs_grad the logits stay. Raises ValueError if their rows are not
    contiguous."""
    check_layout("the cross-entropy kernel", "logits", logits_cV, logits_cV.device)
    c, V = logits_cV.shape
    # a view may have any stride: of a column, or 0 where one number stands for all
    label_c, weight_c = label_c1.flatten().contiguous(), weight_c1.flatten().float().contiguous()
    max_c = torch.empty(c, dtype=torch.float32, device=logits_cV.device)
    sums_2c = torch.empty(2, c, dtype=torch.float32, device=logits_cV.device)
    shape = {"V": V, "B": min(BLOCK, triton.next_power_of_2(V)), "num_warps": 8}
    if c:
        _sum_kernel[(c,)](logits_cV, label_c, max_c, sums_2c, c, logits_cV.stride(0), first_id, **shape)
    if tp_group.size() > 1:
        own_c = max_c.clone()
        reduced(max_c, tp_group, dist.ReduceOp.MAX)
        is_mine_c = (label_c >= first_id) & (label_c < first_id + V)
        sums_2c[0] += torch.where(is_mine_c, own_c - max_c, 0.0)
        sums_2c[1] *= (own_c - max_c).exp()
        reduced(sums_2c, tp_group, dist.ReduceOp.SUM)
    label_logit_c, total_c = sums_2c
    if needs_grad and c:
        _gradient_kernel[(c * triton.cdiv(V, shape["B"]),)](
            logits_cV, label_c, max_c, total_c, weight_c, logits_cV.stride(0), first_id, **shape
        )
    return ((total_c.log() - label_logit_c) * weight_c).sum()
