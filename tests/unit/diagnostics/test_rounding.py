"""Rounding noise reaches every matmul of the model, by a unit in the last place."""

from __future__ import annotations

import torch

from hunyuan_pretrain.diagnostics.rounding import PRODUCTS, rounding_noise
from hunyuan_pretrain.model.packed_attention import document_blocks
from tests.helpers.tiny import build, tiny_model


def test_noise_reaches_every_matmul_and_is_gone_afterwards() -> None:
    model = build(tiny_model(), dtype="bf16")
    named = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert set(PRODUCTS) <= named, "a product of this name is in no model"
    attention = model.decoder.layers[0].self_attention
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(96, heads, 8, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2))
    blocks = document_blocks([0, 20, 96])
    outputs, gradients, attend = [], [], attention.core_attention
    for seed in (None, 1, 1, 2):
        if seed is None:
            output = attention.core_attention(q, k, v, blocks)
        else:
            with rounding_noise([model], seed):
                output = attention.core_attention(q, k, v, blocks)
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output.float().square().sum(), q)[0])
    assert attention.core_attention is attend
    exact, first, again, other = outputs
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(gradients[0], gradients[1]), "the gradient that goes back is rounded too"
    for noisy in (first, other):
        moved = noisy != exact
        assert 0.3 < moved.float().mean() < 0.7
        assert ((noisy - exact).abs() <= 2.0**-7 * exact.abs())[moved].all()
