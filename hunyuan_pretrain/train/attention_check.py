"""How attention is compared with another implementation: the same inputs, forward and backward, and the difference
that rounding explains. Used by the probe and by the choice of a backend before training, and by tests.

Shapes: T query rows, S key rows, N query heads, G key/value heads, H head dim, n queries of a block, P its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hunyuan_pretrain.model.attention_backends import CoreAttention
from hunyuan_pretrain.model.packed_attention import Block
from hunyuan_pretrain.runtime.seeding import fp32_matmuls

ROUNDINGS = {"output": 5, "gradient of q": 10, "gradient of k": 10, "gradient of v": 10}
"""Roundings to the run's dtype on the way to each result, counted over both implementations; each is at most half an
eps. Output: softmax weights and result, in packed_attention also the results of both parts of a document. Gradients:
the output gradient that they start from, those of the weights and scores, and the result."""


def allowed_difference(roundings: int, dtype: torch.dtype, num_terms: int) -> float:
    """Error bound of so many roundings to `dtype` plus fp32 sums of `num_terms` terms (Higham 2002, section 3.1)."""
    return (roundings * torch.finfo(dtype).eps + num_terms * torch.finfo(torch.float32).eps) / 2


class Compared:
    """A core attention that also runs a reference on its inputs and records the differences. The reference is not
    rounded to TF32, except where a backend is its own reference: then both runs are the same."""

    def __init__(self, backend: CoreAttention, reference: CoreAttention) -> None:
        self.both = backend, reference
        self.differences: dict[str, Tensor] = {}
        """Largest over all calls, relative to the norm: per row for the output, as a whole for each gradient."""

    def __call__(self, q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, blocks: Sequence[Block]) -> Tensor:
        # contiguous, like a gradient that a GEMM produces
        grad_TNH = (
            torch.sin(torch.arange(q_TNH.numel(), device=q_TNH.device, dtype=torch.float32))
            .view(q_TNH.shape)
            .to(q_TNH.dtype)
        )
        results = []
        for attend in self.both:
            q, k, v = (x.detach().requires_grad_() for x in (q_TNH, k_SGH, v_SGH))  # with their strides
            with torch.enable_grad(), nullcontext() if attend is self.both[0] else fp32_matmuls():
                output_TNH = attend(q, k, v, blocks)
                results.append([output_TNH.detach(), *torch.autograd.grad(output_TNH, (q, k, v), grad_TNH)])
        for name, a, b in zip(ROUNDINGS, *results, strict=True):
            rows = (len(a), -1) if name == "output" else (1, -1)
            a, b = a.float().reshape(rows), b.float().reshape(rows)
            difference = ((a - b).norm(dim=1) / b.norm(dim=1)).max()
            self.differences[name] = torch.maximum(difference, self.differences.get(name, difference))
        return results[0][0]


def plain_softmax(q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Attention by its definition: fp32, a mask, all scores of a block in memory, differentiated by autograd."""
    outs = []
    for block in blocks:
        q_nNH = q_TNH[block.q_start : block.q_end].float()
        k_PNH, v_PNH = (
            x[block.k_start : block.k_end].float().repeat_interleave(q_TNH.shape[1] // x.shape[1], dim=1)
            for x in (k_SGH, v_SGH)
        )
        n, P = len(q_nNH), len(k_PNH)
        is_hidden_nP = torch.ones(n, P, dtype=torch.bool, device=q_TNH.device).triu(1 + P - n)
        scores_NnP = torch.einsum("tnh,snh->nts", q_nNH, k_PNH) * q_TNH.shape[-1] ** -0.5
        outs.append(torch.einsum("nts,snh->tnh", scores_NnP.masked_fill(is_hidden_nP, -torch.inf).softmax(-1), v_PNH))
    return torch.cat(outs).to(q_TNH.dtype)
