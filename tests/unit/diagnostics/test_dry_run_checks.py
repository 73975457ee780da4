"""What a dry run finds in records that differ, without running anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hunyuan_pretrain.diagnostics.dry_run import BuiltRank, even_rows, ranks_to_build
from hunyuan_pretrain.diagnostics.dry_run_checks import (
    Ranks,
    checkpoint_problems,
    collective_problems,
    exchange_problems,
    message_problems,
)
from hunyuan_pretrain.parallel.fake_world import WORLD, Record
from hunyuan_pretrain.parallel.sharding import Part, Placement

TP, EP, PP = "TENSOR_MODEL_PARALLEL_GROUP", "EXPERT_MODEL_PARALLEL_GROUP", "PIPELINE_MODEL_PARALLEL_GROUP"
REDUCED = Record(TP, "all_reduce", "float32", (8,), None, None, "layer 0, forward (a.py:1 f)")
GATHERED = REDUCED._replace(kind="all_gather", sizes=(32,), place="layer 1, forward (a.py:2 g)")


def ranks_of(calls: dict[int, list[Record]], groups: dict[str, list[tuple[int, ...]]], pipeline: int = 1) -> Ranks:
    """The ranks that were built, with these calls."""
    world_size = 1 + max(rank for of_kind in groups.values() for members in of_kind for rank in members)
    each = world_size // pipeline
    built = [BuiltRank(rank, rank // each, groups, calls=of_rank) for rank, of_rank in calls.items()]
    return Ranks(built, world_size, pipeline)


FOUR = {TP: [(0, 1, 2, 3)]}


def test_ranks_that_issue_the_same_calls_have_no_problem() -> None:
    assert not [*collective_problems(ranks_of({rank: [REDUCED, GATHERED] for rank in range(4)}, FOUR))]


def test_a_rank_that_skips_a_collective_is_named_with_what_the_others_issue() -> None:
    calls = {rank: [REDUCED, GATHERED] for rank in range(4)} | {2: [GATHERED]}
    assert [*collective_problems(ranks_of(calls, FOUR))] == [
        "rank 2, call 1 of tensor model parallel group [ranks 0, 1, 2, 3]: issues all_gather of 32 float32 in layer 1, "
        "forward (a.py:2 g), but ranks 0, 1, 3 issue all_reduce of 8 float32 in layer 0, forward (a.py:1 f)"
    ]


def test_a_rank_that_skips_the_last_collective_is_named() -> None:
    calls = {rank: [REDUCED, GATHERED] for rank in range(4)} | {3: [REDUCED]}
    (told,) = collective_problems(ranks_of(calls, FOUR))
    assert told.startswith("rank 3, call 2 of tensor model parallel group [ranks 0, 1, 2, 3]: issues no more calls")


@pytest.mark.parametrize("change", [{"sizes": (9,)}, {"dtype": "bfloat16"}, {"peer": 1}])
def test_another_size_dtype_or_root_is_a_problem(change: dict[str, Any]) -> None:
    calls = {rank: [REDUCED] for rank in range(4)} | {1: [REDUCED._replace(**change)]}
    (told,) = collective_problems(ranks_of(calls, FOUR))
    assert told.startswith("rank 1, call 1")


def test_ranks_that_were_not_built_count_as_the_first_of_their_pipeline_rank() -> None:
    groups = {TP: [(0, 1, 2, 3), (4, 5, 6, 7)]}
    ranks = ranks_of({0: [REDUCED], 3: [REDUCED], 4: [GATHERED], 7: [REDUCED]}, groups, pipeline=2)
    (told,) = collective_problems(ranks)
    assert "rank 7 (pipeline rank 1), call 1" in told
    assert "but ranks 4, 5, 6 issue all_gather" in told


def exchange(sent: tuple[int, ...], received: tuple[int, ...]) -> Record:
    return Record(EP, "all_to_all", "float32", (sum(received),), None, (sent, received), "layer 0, forward (a.py:1 f)")


def test_rows_that_are_not_expected_are_a_problem() -> None:
    groups = {EP: [(0, 1)]}
    agree = {0: [exchange((3, 5), (3, 2))], 1: [exchange((2, 4), (5, 4))]}
    assert not [*exchange_problems(ranks_of(agree, groups))]
    (told,) = exchange_problems(ranks_of(agree | {1: [exchange((2, 4), (6, 4))]}, groups))
    assert "rank 0, call 1 of expert model parallel group [ranks 0, 1]: sends 5 rows to rank 1, which expects 6" in told


def test_equal_parts_are_compared_with_ranks_that_were_not_built() -> None:
    groups = {EP: [(0, 1, 2, 3)]}
    four = (4,) * 4
    (told,) = exchange_problems(ranks_of({0: [exchange(four, four)], 3: [exchange(four, (5,) * 4)]}, groups))
    assert "sends 4 rows to rank 3, which expects 5" in told


def message(kind: str, peer: int, size: int = 8, group: str = PP) -> Record:
    return Record(group, kind, "bfloat16", (size,), peer, None, "a step (p2p.py:1 f)")


@pytest.mark.parametrize("group", [PP, WORLD])
def test_messages_pair_in_order_and_size(group: str) -> None:
    groups = {PP: [(0, 2), (1, 3)], WORLD: [(0, 1, 2, 3)]}
    to, back = (1, 0) if group == PP else (2, 0)
    first = [message("send", to, 8, group), message("send", to, 9, group)]
    second = [message("recv", back, 8, group), message("recv", back, 9, group)]
    assert not [*message_problems(ranks_of({0: first, 2: second}, groups, pipeline=2))]
    (told, same) = message_problems(ranks_of({0: first, 2: second[::-1]}, groups, pipeline=2))
    pair = "rank {} (pipeline rank {}) and rank {} (pipeline rank {}), message 1: the first issues"
    assert told.startswith(pair.format(0, 0, 2, 1) + " send of 8")
    assert same.startswith(pair.format(2, 1, 0, 0) + " recv of 9")
    (told, _) = message_problems(ranks_of({0: first, 2: second[:1]}, groups, pipeline=2))
    assert "message 2: the first issues send of 9 bfloat16" in told
    assert told.endswith("the second issues no more calls")


def placement(index: int, replica: int = 0) -> dict[str, Placement]:
    part = Part((slice(0, 2),), (slice(2 * index, 2 * index + 2),), ((0, index, 2),), (2,), (2,))
    return {"w": Placement("w", (2,), (4,), (part,), (0, 0, replica))}


def test_each_part_of_a_parameter_has_exactly_one_writer() -> None:
    def found(*placements: dict[str, Placement]) -> list[str]:
        built = BuiltRank(0, 0, {}, placements={rank: [one] for rank, one in enumerate(placements)})
        return [*checkpoint_problems([built])]

    assert found(placement(0), placement(1), placement(0, 1)) == []
    assert found(placement(0), placement(0, 1)) == ["w, (4,): ranks hold 1 of its 2 parts"]
    assert found(placement(0), placement(0), placement(1)) == [
        "w, (4,): ranks 0, 1 write part (0,) of (2,); exactly one rank has to"
    ]
    assert found(placement(0, 1), placement(1)) == [
        "w, (4,): no rank writes part (0,) of (2,); exactly one rank has to"
    ]
    wider = {"w": replace(placement(1)["w"], whole_shape=(6,))}
    assert found(placement(0), wider) == ["w: rank 1 holds a part of ((6,), (2,)), others of ((4,), (2,))"]


def test_the_first_and_the_last_rank_of_each_pipeline_rank_are_built() -> None:
    assert ranks_to_build(16, 2) == list(range(16))
    assert ranks_to_build(64, 2) == [0, 31, 32, 63]
    assert ranks_to_build(32, 32) == list(range(32))


def test_rows_are_dealt_to_the_experts_in_turn() -> None:
    assert even_rows(10, 4) == [3, 3, 2, 2]
    assert even_rows(8, 4) == [2, 2, 2, 2]
