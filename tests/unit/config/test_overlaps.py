"""Which communication of the data-parallel ranks overlaps where the settings leave it open."""

from __future__ import annotations

from typing import Any

import pytest

from hunyuan_pretrain.config.derived import grid, overlaps
from hunyuan_pretrain.config.schema import ParallelConfig

PLAIN = {"use_distributed_optimizer": False}


@pytest.mark.parametrize(
    ("settings", "num_ranks", "expected"),
    [
        ({}, 2, (True, True)),
        ({}, 1, (False, False)),
        (PLAIN, 2, (True, False)),
        ({"overlap_grad_reduce": False}, 2, (False, False)),
        ({"overlap_param_gather": False}, 2, (True, False)),
        ({"overlap_grad_reduce": True}, 1, (True, False)),
        ({"overlap_param_gather": True}, 1, (True, True)),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, 2, (True, True)),
        ({"overlap_grad_reduce": False, "overlap_param_gather": False}, 8, (False, False)),
    ],
)
def test_null_overlaps_where_several_ranks_hold_the_same_weights(
    settings: dict[str, Any], num_ranks: int, expected: tuple[bool, bool]
) -> None:
    found = overlaps(ParallelConfig(**settings), num_ranks)
    assert (found.grad_reduce, found.param_gather) == expected


def test_a_recorded_step_waits_for_no_gather_from_outside() -> None:
    found = overlaps(ParallelConfig(), 2, is_recorded=True)
    assert (found.grad_reduce, found.param_gather) == (True, False)


@pytest.mark.parametrize(
    ("tp", "ep", "etp", "world_size", "copies"),
    [(2, 1, 1, 2, 2), (2, 2, 1, 2, 1), (2, 1, 2, 2, 1), (1, 2, 1, 2, 2), (2, 1, 1, 4, 4), (2, 4, 1, 4, 2)],
)
def test_gradients_of_the_experts_alone_are_reason_enough(tp: int, ep: int, etp: int, world_size: int, copies: int):
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    ranks = grid(parallel, world_size)
    assert ranks.most_copies == copies
    assert overlaps(parallel, ranks.most_copies).grad_reduce == (copies > 1)
