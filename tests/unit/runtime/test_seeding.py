"""Generators: seeded by experiment and rank, saved and restored."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hunyuan_pretrain.runtime.seeding import (
    generator_state,
    restore_generator_state,
    seed_generators,
    use_deterministic_algorithms,
)


def draw() -> tuple[float, float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item(), np.random.standard_normal()


def test_the_same_seed_and_rank_repeat_the_numbers_and_any_others_change_them():
    drawn = {}
    for seed, rank in ((1, 0), (1, 1), (2, 0), (1, 0)):
        seed_generators(seed, rank)
        numbers = draw()
        assert drawn.setdefault((seed, rank), numbers) == numbers
    assert len({number for numbers in drawn.values() for number in numbers}) == 12


def test_a_large_seed_is_accepted():
    seed_generators(2**31, 1000)


def test_state_is_restored_in_the_middle_of_a_stream():
    """numpy caches a second normal number for the next call; that is state too."""
    seed_generators(3, 0)
    draw()
    random.gauss(0, 1)
    state = generator_state()
    expected = [draw(), draw(), random.gauss(0, 1)]
    seed_generators(4, 0)
    restore_generator_state(state)
    assert [draw(), draw(), random.gauss(0, 1)] == expected


def test_the_state_survives_torch_save(tmp_path):
    """Loaded without unpickling arbitrary classes, as a checkpoint is."""
    seed_generators(5, 0)
    torch.save(generator_state(), tmp_path / "state.pt")
    expected = draw()
    restore_generator_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_the_largest_seed_of_an_experiment_seeds_every_generator():
    seed_generators(2**63, 7)
    first = draw()
    seed_generators(2**63, 7)
    assert draw() == first


def test_an_operation_without_a_deterministic_implementation_is_refused():
    was = torch.are_deterministic_algorithms_enabled()
    try:
        use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 1]]]), 1)
        use_deterministic_algorithms(False)
        torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 1]]]), 1)
    finally:
        use_deterministic_algorithms(was)
