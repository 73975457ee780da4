"""`doctor --cluster` names the rank or node that is slow, and no other; what it measures is what it says."""

from __future__ import annotations

import os
import time
from itertools import combinations
from typing import Any
from unittest.mock import patch

import pytest

from hunyuan_pretrain.diagnostics import cluster
from hunyuan_pretrain.diagnostics.cluster import Found, Place
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import run

SIZE = 2**16


@pytest.mark.parametrize("units", [2, 3, 4, 7, 8, 33])
def test_in_the_tournament_each_meets_each_other_once(units: int) -> None:
    met = []
    for pairs in cluster.rounds(units):
        playing = [unit for pair in pairs for unit in pair]
        assert len(playing) == len(set(playing)) >= units - 1
        met += [tuple(sorted(pair)) for pair in pairs]
    assert sorted(met) == list(combinations(range(units), 2))


def judged(slow: dict[tuple[int, int], float], units: int, per_node: int = 1, noise_s: float = 1e-6) -> list[str]:
    """What is called slow if all pairs have a rate of 1 but some."""
    place = Place(0, units * per_node, 0, per_node)
    hosts = [f"h{rank // per_node}" for rank in range(place.world)]
    of_pairs = dict.fromkeys(combinations(range(units), 2), 1e9) | slow
    return cluster._judged(of_pairs, place, hosts, SIZE, noise_s)[1]


def test_a_slow_node_is_named_and_not_its_partners() -> None:
    for units in (3, 4, 8):
        pairs = {pair: 2e8 for pair in combinations(range(units), 2) if 1 in pair}
        assert judged(pairs, units, per_node=8) == ["node h1 exchanges at 20% of the median rate"]
    assert judged({}, 8) == judged({}, 2) == []
    assert judged({(0, 3): 5e8}, 8, noise_s=1e-3) == []
    assert judged({(0, 3): 5e8}, 8) == ["node h0 with node h3 exchanges at 50% of the median rate"]


def doctored() -> tuple[list[str], list[Found]]:
    """What is measured with all four ranks in order, with messages of rank 2 held up, and with rank 1 computing slowly;
    each rank is a node."""
    import torch
    import torch.distributed as dist

    rank = os.environ["RANK"]
    with patch.dict(os.environ, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"n{rank}"}):
        place, device = cluster.join()
        cluster.NOISE_S = {"cpu": 0.15}  # of a machine that runs other tests at the same time
        exchange, product = dist.batch_isend_irecv, torch.mm

        def held_up(messages: Any) -> Any:
            time.sleep(0.3)
            return exchange(messages)

        def slowly(*matrices: Any) -> Any:
            time.sleep(0.3)
            return product(*matrices)

        with patch.object(dist, "batch_isend_irecv", held_up if rank == "2" else exchange):
            found = [cluster.measure(place, device, [SIZE])]
        with (
            patch.object(torch, "mm", slowly if rank == "1" else product),
            patch.object(cluster, "_tournament", lambda *arguments: ([], [])),
        ):
            found.append(cluster.measure(place, device, [SIZE]))
        ranks = cluster.rows_of_ranks(place, device)
        cluster.end()
        return [figure for _, figure, _ in ranks], found


def test_the_slow_rank_is_named() -> None:
    ranks = fork_ranks(4, doctored)
    assert all(found == ranks[0][1] for _, found in ranks), "all ranks come to the same"
    rows, (held_up, slow) = ranks[0]
    assert rows[0] == "4 on 4 nodes"
    named = [line.partition(" exchanges at ")[0] for line in held_up.slow if " exchanges at " in line]
    assert named == ["node n2"]
    assert [what.partition(" of ")[0] for what, _, _ in held_up.rows[1:3]] == ["all-reduce", "all-to-all"]
    assert "6 pairs" in held_up.rows[3]
    assert any(line.startswith("rank 1 on n1 computes at ") for line in slow.slow)
    assert not any("rank 3" in line or "rank 0" in line for line in slow.slow)


def test_bus_bandwidth_is_that_of_nccl_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(cluster, "_together", lambda operation, device: 0.001)
    reduced, exchanged = cluster._collectives(4 * 10**6, Place(0, 4, 0, 4), torch.device("cpu"))
    assert reduced[1] == "6 GB/s bus bandwidth"  # 4 GB/s x 2 x 3 / 4
    assert exchanged[1] == "3 GB/s bus bandwidth"


def test_the_command_compares_and_measures_the_ranks_of_a_job() -> None:
    status, out, err = run("doctor", "--cluster", "--message-bytes", str(SIZE), ranks=2)
    assert "2 on 1 node" in out
    assert "all-reduce of 64 KiB, 2 ranks" in out
    assert "NCCL_SOCKET_IFNAME" in out
    assert "differs" not in err
    assert (status == 0) == ("slow: " not in err)


def test_a_size_without_ranks_is_a_mistake() -> None:
    status, _, err = run("doctor", "--message-bytes", "64")
    assert status == 2
    assert "--message-bytes goes with --cluster only" in err
