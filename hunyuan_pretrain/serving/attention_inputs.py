"""What an attention layer of Hunyuan-Large hands to a kernel that knows neither CLA nor norms after RoPE.

RoPE comes first, then RMSNorm per head. A borrowing layer attends to its owner's keys with its own key norm weight w_k.
RoPE preserves a vector's length, so the normalised key k_hat is the same for all layers of a CLA group, and
(w_q * q_hat) . (w_k * k_hat) = (w_q * w_k * q_hat) . k_hat. So the owner's k_hat, without weight, is the only key that
is cached, and each layer's query carries both of its weights. Everything is computed in fp32 and rounded once, as in
checkpoint/modeling_hunyuan.py.

T tokens, N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""cos and sin, each (T, 1, H), fp32."""


def inverse_frequencies(head_dim: int, base: float) -> Tensor:
    """(H/2,) on the CPU, so that the bits are the same on every device."""
    return 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim))


def rope_of(positions_T: Tensor, inverse_frequencies: Tensor) -> Rope:
    """The rotation of each position. fp32: at 256K positions another precision changes the model."""
    angles = positions_T.float().view(-1, 1, 1) * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def query(q_TNH: Tensor, rope: Rope, norm_weights: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """Rotated, and if norm_weights (of query and key norm, (H,) each) are given normalised and scaled by both."""
    rotated = _rotate(q_TNH.float(), rope)
    if norm_weights is not None:
        query_weight, key_weight = norm_weights
        rotated = query_weight.float() * key_weight.float() * _unit_rms(rotated, eps)
    return rotated.to(q_TNH.dtype)


def key(k_TGH: Tensor, rope: Rope, has_norm: bool, eps: float) -> Tensor:
    """k_hat: rotated, and if the model has key norms normalised, without a weight."""
    rotated = _rotate(k_TGH.float(), rope)
    return (_unit_rms(rotated, eps) if has_norm else rotated).to(k_TGH.dtype)


def _rotate(x_TxH: Tensor, rope: Rope) -> Tensor:
    cos, sin = rope
    first, second = x_TxH.chunk(2, dim=-1)
    return x_TxH * cos + torch.cat((-second, first), dim=-1) * sin


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
