"""The functions between the matmuls, and the two sets of them.

`plain_functions` are torch's operations and run everywhere. model/kernels/ has the same functions as Triton kernels,
which read and write each number once; model/engines.py chooses between the two sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hunyuan_pretrain.model.cross_entropy import ChunkLoss, chunk_loss
from hunyuan_pretrain.model.gating import GatingFunction, gating
from hunyuan_pretrain.model.norm import HeadWeights, RMSNormFunction, add_rms_norm, qkv_rope_norm, rope_norm
from hunyuan_pretrain.model.permutation import combine, permute
from hunyuan_pretrain.model.recycle_routing import Assign, assign_within_capacity
from hunyuan_pretrain.model.router_logits import router_logits
from hunyuan_pretrain.model.routing import RoutingPlan
from hunyuan_pretrain.model.swiglu import swiglu


class Functions(NamedTuple):
    """Arguments, shapes and results are those of the plain functions."""

    add_rms_norm: RMSNormFunction
    rope_norm: Callable[[Tensor, tuple[Tensor, Tensor], HeadWeights, float | None], Tensor]
    qkv_rope_norm: Callable[[Tensor, tuple[Tensor, Tensor], HeadWeights, float | None], tuple[Tensor, Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    router_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    permute: Callable[[Tensor, RoutingPlan], tuple[Tensor, Tensor]]
    combine: Callable[[Tensor, Tensor, RoutingPlan, Tensor, Tensor], Tensor]
    assign: Assign
    """Without gradients."""
    gating: GatingFunction
    chunk_loss: ChunkLoss
    """Computes its gradient itself."""


def plain_functions() -> Functions:
    """The functions that need nothing but torch."""
    return Functions(
        add_rms_norm,
        rope_norm,
        qkv_rope_norm,
        swiglu,
        router_logits,
        permute,
        combine,
        assign_within_capacity,
        gating,
        chunk_loss,
    )
