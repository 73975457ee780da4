"""fp32 main weights as bf16 weights and 16 more bits: nothing is lost."""

from __future__ import annotations

import torch

from hunyuan_pretrain.checkpoint.split_weights import join, remainder_of, round_into


def split(main: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, remainder = torch.empty_like(main, dtype=torch.bfloat16), remainder_of(main)
    round_into(weight, main.clone())
    return weight, remainder


def joined(weight: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    main = torch.empty(weight.shape)
    join(weight, remainder, main)
    return main


def test_every_pair_of_halves_of_a_number_is_restored() -> None:
    """All lower halves, below upper halves of both signs: zero, the smallest, powers of two, the largest finite."""
    lower = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for upper in (0x0000, 0x0001, 0x3F7F, 0x3F80, 0x42F7, 0x7F7E, 0x7F7F):
        for sign in (0, -(2**31)):
            main = (torch.tensor(upper << 16, dtype=torch.int32) + (lower & 0xFFFF) + sign).view(torch.float32)
            weight, remainder = split(main)
            assert torch.equal(joined(weight, remainder).view(torch.int32), main.view(torch.int32))
            tie = (main.view(torch.int32) & 0xFFFF) == 0x8000
            assert torch.equal(weight[~tie], main.bfloat16()[~tie]), "rounded to nearest"
            assert (weight[tie].float().abs() > main[tie].abs()).all(), "a tie is rounded away from zero"


def test_a_weight_without_a_remainder_is_its_own_main_weight() -> None:
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(joined(weight, None), weight.float())
    assert torch.equal(joined(weight, torch.zeros(1000, dtype=torch.int16)), weight.float())
