"""RoPE and head norm of queries, keys and values in one tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.model.norm import qkv_rope_norm, rope_norm, rope_table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_queries_and_keys_of_one_tensor_have_the_bits_of_each_alone(dtype: torch.dtype) -> None:
    """2 key/value heads with 3 query heads each; the keys have no weight."""
    T, G, R, H = 5, 2, 3, 16
    generator = torch.Generator().manual_seed(0)
    qkv_TGXH = torch.randn(T, G, R + 2, H, generator=generator).to(dtype).requires_grad_()
    weights = tuple(torch.randn(H, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    grads = [torch.randn(T, heads, H, generator=generator).to(dtype) for heads in (G * R, G, G)]
    table, eps = rope_table(torch.arange(T), 10_000.0, H), 1e-5
    each: tuple[Tensor, ...] = (
        rope_norm(qkv_TGXH[:, :, :R].flatten(1, 2), table, weights, eps),
        rope_norm(qkv_TGXH[:, :, R], table, None, eps),
        qkv_TGXH[:, :, R + 1],
    )
    together = qkv_rope_norm(qkv_TGXH, table, weights, eps)
    for a, b in zip(together, each, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(torch.autograd.grad(out, (qkv_TGXH, *weights), grads) for out in (together, each)), strict=True):
        assert torch.equal(a, b)
