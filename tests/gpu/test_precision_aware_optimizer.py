"""Transformer Engine's Adam with bf16 moments and split main weights, on a GPU: the numbers of the CPU's Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint.split_weights import join, remainder_of, round_into
from hunyuan_pretrain.runtime.device import probe
from hunyuan_pretrain.train.optimizer import sum_of_squares
from tests.helpers.precision_aware_cases import both_adams, differences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("formats", [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")])
def test_the_kernel_computes_what_a_cpu_computes(formats: tuple[str, str]) -> None:
    if not probe().has_transformer_engine:
        pytest.skip("needs Transformer Engine")
    (held,) = both_adams([formats], 12, "cuda")
    assert differences(formats, *held) == []


def test_main_weights_are_split_as_on_a_cpu() -> None:
    """int32 to int16 keeps the lower half."""
    found: list[Any] = []
    for device in ("cuda", "cpu"):
        bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(1))
        main = bits.to(device, torch.int32).view(torch.float32)
        main = torch.where(main.isfinite(), main, 1.0)
        weight, remainder, again = torch.empty_like(main, dtype=torch.bfloat16), remainder_of(main), main.clone()
        round_into(weight, main.clone())
        join(weight, remainder, again)
        assert torch.equal(again, main)
        found.append([weight.cpu(), remainder.cpu()])
    assert torch.equal(found[0][0].view(torch.int16), found[1][0].view(torch.int16))
    assert torch.equal(found[0][1], found[1][1])


def test_the_norm_of_gradients_in_two_formats() -> None:
    gradients = [torch.randn(1000, device="cuda"), torch.randn(3, 7, device="cuda").bfloat16()]
    expected = sum(gradient.double().square().sum() for gradient in gradients)
    assert sum_of_squares(gradients).item() == pytest.approx(expected.item(), rel=1e-6)
