"""Placement of the ranks' shards of a parameter: together they make up the whole, and exactly one copy of each shard is
the first."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan_pretrain.parallel.sharding import placement_of, sharded_tensor


class Group:
    """What `placement_of` needs from a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def ranks_of(tp: int = 1, dp: int = 1, ep: int = 1, etp: int = 1) -> list[Any]:
    """Groups of every rank. The dense and the expert rank grid have the same ranks but are split independently, as in
    core."""
    world = tp * dp
    assert world % (ep * etp) == 0
    expert_dp = world // (ep * etp)
    return [
        SimpleNamespace(
            tp=Group(rank % tp, tp),
            dp_cp=Group(rank // tp, dp),
            expt_tp=Group(rank % etp, etp),
            ep=Group(rank // etp % ep, ep),
            expt_dp=Group(rank // (etp * ep), expert_dp),
        )
        for rank in range(world)
    ]


def parameter_of(shape: tuple[int, ...], **marks: Any) -> torch.Tensor:
    """A rank's tensor with the attributes that its module sets on it."""
    parameter = torch.zeros(shape)
    for name, value in marks.items():
        setattr(parameter, name, value)
    return parameter


COLUMN = {"tensor_model_parallel": True, "partition_dim": 0}
ROW = {"tensor_model_parallel": True, "partition_dim": 1}
GATED = COLUMN | {"is_gated": True}
EXPERT_FC1 = {"is_routed_expert": True, "tensor_model_parallel": True, "partition_dim": 1, "is_gated": True}
EXPERT_FC2 = {"is_routed_expert": True, "tensor_model_parallel": True, "partition_dim": 2}
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, int], tuple[int, ...]]] = {
    # marks, shape of a rank's tensor, layout, shape of the whole one
    "a norm": ({}, (6,), {"tp": 2, "dp": 2}, (6,)),
    "a router": ({}, (4, 6), {"tp": 2, "dp": 2, "ep": 4}, (4, 6)),
    "column": (COLUMN, (3, 5), {"tp": 4, "dp": 2}, (12, 5)),
    "column, one rank": (COLUMN, (3, 5), {"dp": 2}, (3, 5)),
    "row": (ROW, (3, 5), {"tp": 4}, (3, 20)),
    "gate and up": (GATED, (4, 5), {"tp": 2, "dp": 2}, (8, 5)),
    "gate and up, one rank": (GATED, (4, 5), {"dp": 2}, (4, 5)),
    "experts": (EXPERT_FC2, (2, 3, 5), {"dp": 4, "ep": 2}, (4, 3, 5)),
    "experts of tensor-parallel ranks": (EXPERT_FC1, (2, 4, 5), {"tp": 2, "ep": 2}, (4, 4, 5)),
    "divided experts, fc1": (EXPERT_FC1, (2, 4, 5), {"tp": 2, "dp": 4, "ep": 2, "etp": 2}, (4, 8, 5)),
    "divided experts, fc2": (EXPERT_FC2, (2, 4, 5), {"tp": 2, "dp": 4, "ep": 2, "etp": 2}, (4, 4, 10)),
    "divided experts without expert parallelism": (EXPERT_FC1, (4, 4, 5), {"dp": 2, "etp": 2}, (4, 8, 5)),
}


@pytest.mark.parametrize(("marks", "shape", "layout", "whole_shape"), CASES.values(), ids=CASES)
def test_the_shards_of_all_ranks_make_up_the_whole_tensor(marks, shape, layout, whole_shape):
    """Shard a whole tensor and reassemble it: nothing is missing, and copies hold the same shard."""
    whole = np.arange(np.prod(whole_shape)).reshape(whole_shape)
    found, homes = np.full(whole_shape, -1), np.zeros(whole_shape, int)
    for groups in ranks_of(**layout):
        placement = placement_of("weight", parameter_of(shape, **marks), groups)
        assert placement.whole_shape == whole_shape
        local = np.full(shape, -1)
        for part in placement.parts:
            local[part.local] = whole[part.whole]
        assert (local >= 0).all(), "every element of a rank's tensor has its place"
        for part in placement.parts:
            found[part.whole] = local[part.local]
            homes[part.whole] += placement.replica == (0, 0, 0)
    assert np.array_equal(found, whole)
    assert (homes == 1).all(), "each element has one rank whose copy is written to a checkpoint"


def test_each_rank_has_its_half_of_gate_and_of_up():
    """Rank 1 of 2: rows 2 to 3 are its gate, from the upper half of the whole; rows 6 to 7 its up."""
    _, groups = ranks_of(tp=2)
    gate, up = placement_of("weight", parameter_of((4, 5), **GATED), groups).parts
    assert (gate.local[0], gate.whole[0]) == (slice(0, 2), slice(2, 4))
    assert (up.local[0], up.whole[0]) == (slice(2, 4), slice(6, 8))


def test_experts_are_sharded_by_number_and_internally():
    """Rank 3 of expert parallelism 2 times expert-tensor parallelism 2: experts 2 and 3, second half of each input."""
    groups = ranks_of(dp=4, ep=2, etp=2)[3]
    (part,) = placement_of("weight", parameter_of((2, 4, 5), **EXPERT_FC2), groups).parts
    assert part.whole == (slice(2, 4), slice(0, 4), slice(5, 10))


def test_separate_expert_parameters_are_placed_as_in_one_parameter():
    """Local expert 1 of 2, with its halves of gate and up; its name in a checkpoint is that of all experts together."""
    for groups in ranks_of(dp=4, ep=2, etp=2):
        together = placement_of("fc1.weight", parameter_of((2, 4, 5), **EXPERT_FC1), groups)
        alone = placement_of(
            "fc1.weight1",
            parameter_of((4, 5), **EXPERT_FC1 | {"partition_dim": 0, "expert": 1, "num_experts": 2}),
            groups,
        )
        assert (alone.name, alone.whole_shape, alone.replica) == ("fc1.weight", together.whole_shape, together.replica)
        assert alone.local_shape == (1, 4, 5)
        for mine, theirs in zip(alone.parts, together.parts, strict=True):
            assert mine.local[1:] == theirs.local[1:]
            assert mine.whole[1:] == theirs.whole[1:]
            assert mine.whole[0] == slice(theirs.whole[0].start + 1, theirs.whole[0].stop)
        data = torch.arange(20.0).view(4, 5)
        entry = sharded_tensor("optimizer.main.", data, alone)
        pieces = entry.build() if hasattr(entry, "build") else [entry]
        assert {piece.key for piece in pieces} == {"optimizer.main.fc1.weight"}
        assert torch.equal(torch.cat([piece.data for piece in pieces], dim=1)[0], data)


def test_a_copy_on_another_stage_is_never_the_home():
    for groups in ranks_of(tp=2, dp=2):
        assert placement_of("weight", parameter_of((3, 5), **COLUMN), groups, is_copy=True).replica[0] == 1


@pytest.mark.parametrize(("marks", "shape", "layout", "whole_shape"), CASES.values(), ids=CASES)
def test_checkpoints_get_the_same_placements(marks, shape, layout, whole_shape):
    """What megatron is given for each shard: global shape and offset; two shards are read back as one tensor."""
    for groups, fill in zip(ranks_of(**layout), range(100), strict=False):
        parameter = parameter_of(shape, **marks)
        placement = placement_of("weight", parameter, groups)
        data = torch.arange(parameter.numel()).view(shape) + 1000.0 * fill
        entry = sharded_tensor("", data, placement)
        pieces = entry.build() if hasattr(entry, "build") else [entry]
        for piece, part in zip(pieces, placement.parts, strict=True):
            assert piece.global_shape == whole_shape
            assert piece.global_offset == tuple(where.start for where in part.whole)
            assert torch.equal(piece.data, data[part.local])
            assert piece.replica_id == placement.replica
        if len(pieces) > 1:
            assert torch.equal(entry.merge_fn([piece.data for piece in pieces]), data)


def test_homes_are_unique_for_every_small_layout():
    for tp, dp, ep, etp in product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2)):
        if (tp * dp) % (ep * etp):
            continue
        homes = [
            placement_of("weight", parameter_of((2, 4, 4), **EXPERT_FC1), groups)
            for groups in ranks_of(tp, dp, ep, etp)
        ]
        assert sum(placement.replica == (0, 0, 0) for placement in homes) == ep * etp
