"""Rounding noise: runs a model with its matmuls rounded as another legal summation order would round them.

Every matmul output, and the gradient that flows back into it, moves by -1, 0 or +1 unit in the last place, with
probabilities 1/4, 1/2, 1/4. This is the error of one bf16 sum of two rounded parts, such as a matmul split over two
ranks; its standard deviation, 0.7 units, is 2.4 times that of a single rounding. The draw is a function of the value
and the seed: it needs no state, and a recomputed activation gets the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from hunyuan_pretrain.model.attention import SelfAttention
from hunyuan_pretrain.model.attention_backends import CoreAttention

PRODUCTS = ("linear_qkv", "linear_q", "linear_proj", "linear_fc1", "linear_fc2")
"""Modules whose outputs are rounded sums. Core attention's output is one too, but core attention is a function."""


def moved(x: Tensor, seed: int) -> Tensor:
    """A bf16 `x` with about half of its values replaced by a neighbour. Zeros, infinities, and tensors of other dtypes
    are unchanged."""
    if x.dtype != torch.bfloat16:
        return x
    bits = x.contiguous().view(torch.int16).int()
    magnitude = bits & 0x7FFF
    # two rounds of a multiplicative hash of the 16 bits; the top bits of the product are the mixed ones
    mixed = ((magnitude + 40503 * (seed + 1)) * 40503) & 0xFFFF
    mixed = ((mixed ^ (mixed >> 7)) * 40503) & 0xFFFF
    step = (mixed >> 15) - ((mixed >> 14) & 1)  # two fair bits: -1, 0, 0, +1
    is_moved = (magnitude > 0x0080) & (magnitude < 0x7F7F)
    return torch.where(is_moved, bits + step, bits).to(torch.int16).view(torch.bfloat16).view(x.shape)


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: int) -> Tensor:
        ctx.seed = seed
        return moved(x, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return moved(grad, ctx.seed), None


@contextmanager
def rounding_noise(chunks: Sequence[torch.nn.Module], seed: int) -> Iterator[None]:
    """Inside this context, the matmuls of these models are rounded differently, as `seed` determines."""

    def disturb(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_Noise.apply(output[0], seed), *output[1:])
        return _Noise.apply(output, seed)

    modules = [(name.rpartition(".")[2], module) for model in chunks for name, module in model.named_modules()]
    attentions = [(module, module.core_attention) for _, module in modules if isinstance(module, SelfAttention)]
    hooks = [module.register_forward_hook(disturb) for name, module in modules if name in PRODUCTS]
    for module, attend in attentions:
        module.core_attention = partial(_disturbed, attend, seed)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, attend in attentions:
            module.core_attention = attend


def _disturbed(attend: CoreAttention, seed: int, *inputs: Any) -> Tensor:
    return cast(Tensor, _Noise.apply(attend(*inputs), seed))
