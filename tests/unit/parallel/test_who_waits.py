"""Reports about ranks that hang, from what they tell; and what they tell, from torch's record."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.parallel.who_waits import Silent, _ranks, describe


def told(rank: int, groups: dict[str, Any], place: str = "step 4, forward of layer 2", **more: Any) -> dict[str, Any]:
    return {"name": f"rank {rank} (n, process {rank})", "place": place, "at": "f, x.py:1", "groups": groups} | {
        "is_in_exchange": False,
        **more,
    }


def group(ranks: list[int], *calls: tuple[int, str, str, bool], description: str = "TP") -> dict[str, Any]:
    waits = {"ranks": ranks} if any(call[3] for call in calls) else {}
    return {"description": description, "calls": [list(call) for call in calls], **waits}


def test_the_rank_that_waits_for_no_other_is_named() -> None:
    """0 waits for 1 in one group, 1 waits for 2 in another, 2 computes."""
    accounts = {
        0: told(0, {"a": group([0, 1], (7, "all_reduce [4] Float", "step 4, forward of layer 2", True))}),
        1: told(
            1, {"b": group([1, 2], (3, "all_to_all [8] Float", "step 4, forward of layer 1", True), description="EP")}
        ),
        2: told(2, {"b": group([1, 2], (2, "all_to_all [8] Float", "step 4, forward of layer 0", False))}),
    }
    assert describe(accounts, {}) == [
        "rank 0 waits in all_reduce [4] Float, number 7 of TP (ranks 0, 1), called in step 4, forward of layer 2",
        "  rank 1 (n, process 1) has not called it: it is in step 4, forward of layer 2 (f, x.py:1)",
        "rank 1 waits in all_to_all [8] Float, number 3 of EP (ranks 1, 2), called in step 4, forward of layer 1",
        "  rank 2 (n, process 2) has not called it: it is in step 4, forward of layer 2 (f, x.py:1); its last there is "
        "number 2, all_to_all [8] Float in step 4, forward of layer 0",
        "rank 2 (n, process 2) waits for no rank: it is in step 4, forward of layer 2 (f, x.py:1)",
    ]


def test_another_collective_under_the_same_number_is_named() -> None:
    call = "all_reduce [4] Float"
    accounts = {rank: told(rank, {"a": group([0, 1, 2], (5, call, "step 2, optimizer", True))}) for rank in (0, 2)}
    accounts[1] = told(1, {"a": group([0, 1, 2], (5, "all_gather [4] Float", "step 2, optimizer", True))})
    assert describe(accounts, {})[1] == (
        "  the first that differs is number 5: ranks 0, 2: all_reduce [4] Float in step 2, optimizer; rank 1: "
        "all_gather [4] Float in step 2, optimizer"
    )


def test_if_all_answer_and_wait_in_the_same_collective_the_report_says_so() -> None:
    call = (5, "all_reduce [4] Float", "step 2, optimizer", True)
    accounts = {rank: told(rank, {"a": group([0, 1], call)}) for rank in (0, 1)}
    assert describe(accounts, {})[-1] == "all ranks answer and wait: for each other, or for the network"


def test_silent_and_failed_ranks_come_first_and_stages_that_wait_for_a_message_are_listed() -> None:
    accounts = {0: told(0, {}, is_in_exchange=True)}
    silent = {1: Silent("in step 3, optimizer, at 1:2:3 UTC, on n, process 7"), 2: Silent(None, "ValueError: x, on m")}
    assert describe(accounts, silent) == [
        "rank 1 does not answer: it is stopped or has ended, or its machine is gone; it was last seen in step 3, "
        "optimizer, at 1:2:3 UTC, on n, process 7",
        "rank 2 has failed: ValueError: x, on m",
        "waiting for a message of another pipeline stage: rank 0 (n, process 0) in step 4, forward of layer 2",
    ]


def test_a_report_on_thousands_of_ranks_stays_short() -> None:
    call = (5, "all_reduce [4] Float", "step 2, optimizer", True)
    ranks = list(range(2048))
    accounts = {rank: told(rank, {"a": group(ranks, call)}) for rank in ranks[::2]}
    found = describe(accounts, {rank: Silent(None) for rank in ranks[1::2]})
    assert sum(map(len, found)) < 4000
    assert "1016 more ranks do not answer" in found


def test_ranges_of_ranks() -> None:
    assert [_ranks(one) for one in ([3], [0, 1], [0, 1, 2, 5])] == ["rank 3", "ranks 0, 1", "ranks 0 to 2, 5"]


def entry(**changes: Any) -> dict[str, Any]:
    """A call as torch 2.13 writes it, over NCCL."""
    return {
        "collective_seq_id": 3,
        "input_dtypes": ["BFloat16"],
        "input_sizes": [[8, 4]],
        "is_p2p": False,
        "op_id": 3,
        "output_dtypes": ["BFloat16"],
        "output_sizes": [[8, 4]],
        "p2p_seq_id": 0,
        "pg_id": 1,
        "process_group": ["1", "TENSOR_MODEL_PARALLEL_GROUP"],
        "profiling_name": "nccl:all_reduce",
        "record_id": 0,
        "retired": False,
        "state": "scheduled",
        "time_created_ns": 2_000,
        "timeout_ms": 600_000,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "is_waiting"),
    [
        ({}, True),
        ({"state": "started"}, True),
        ({"state": "completed", "retired": True}, False),
        ({"state": "started", "retired": True}, True),  # it has timed out
        ({"profiling_name": "gloo:all_reduce"}, True),
        ({"profiling_name": "gloo:all_reduce", "retired": True}, False),  # gloo has no other states
    ],
)
def test_which_calls_of_the_record_have_not_ended(monkeypatch, changes, is_waiting) -> None:
    record = json.dumps({"version": "2.10", "entries": [entry(**changes)]}).encode()
    monkeypatch.setattr(whereabouts, "_flight_record", lambda: record)
    (call,) = whereabouts.calls()
    assert call.is_waiting is is_waiting
    assert call[:4] == ("1", "TENSOR_MODEL_PARALLEL_GROUP", 3, "all_reduce [8, 4] BFloat16")


def test_a_call_is_placed_by_the_mark_before_it(monkeypatch) -> None:
    """Over NCCL the host is far ahead of the collective that hangs."""
    monkeypatch.setattr(
        whereabouts,
        "_marks",
        whereabouts.deque(
            [
                whereabouts.Mark(0, None, "start"),
                whereabouts.Mark(1_000, 4, "forward", 2),
                whereabouts.Mark(3_000, 5, "optimizer"),
            ]
        ),
    )
    monkeypatch.setattr(whereabouts, "_flight_record", lambda: json.dumps({"entries": [entry()]}).encode())
    monkeypatch.setattr(whereabouts, "_ranks_of_groups", lambda: [])
    found = whereabouts.account()
    assert found["place"] == "step 5, optimizer"
    call = [3, "all_reduce [8, 4] BFloat16", "step 4, forward of layer 2", True]
    assert found["groups"] == {"1": {"description": "TENSOR_MODEL_PARALLEL_GROUP", "calls": [call], "ranks": []}}
    assert whereabouts.waits() == "all_reduce [8, 4] BFloat16 of TENSOR_MODEL_PARALLEL_GROUP"


def test_a_rank_that_goes_on_is_not_quiet() -> None:
    whereabouts.forward(3)
    assert not whereabouts.is_quiet(600)
    assert whereabouts.is_quiet(0)
    assert str(whereabouts.place()).endswith("forward of layer 3")
