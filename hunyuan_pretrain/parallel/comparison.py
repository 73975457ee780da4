"""What the ranks of a job have found, compared by messages whose size does not depend on the number of ranks.

Texts travel only where ranks differ, or where one has something to say: from rank 0, and from the first ranks that do.
Two exceptions grow with the ranks, by 8 bytes each: the list of those that differ, and only if there are any.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.parallel.collectives import all_gather_rows

MOST_FACTS = 16
"""Room for facts in the message that compares them: it has to have one size, whatever code a rank runs."""
LONGEST_TEXT = 4000
BARRIERS = 5


class Difference(NamedTuple):
    """A fact in which ranks differ from rank 0."""

    name: str
    ranks: list[int]
    texts: tuple[str, str]
    """What rank 0 has, and what the first of `ranks` has."""

    def named_ranks(self) -> str:
        """The ranks in words."""
        return named(self.ranks)


def named(ranks: Sequence[int]) -> str:
    """The first ranks, and how many more there are."""
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def differences(facts: Mapping[str, str | None]) -> list[Difference]:
    """The facts in which any rank differs from rank 0; the same list on every rank.

    facts: name -> text, at most MOST_FACTS, in the same order on all ranks; None where another rank of this node
    speaks for this one. Communicates: all ranks; 520 bytes each if all agree.
    """
    assert len(facts) <= MOST_FACTS
    names, device = list(facts), _device()
    mine = torch.zeros(MOST_FACTS, 4, dtype=torch.int64)
    for number, text in enumerate(facts.values()):
        digest = hashlib.sha256((text or "").encode()).digest()
        mine[number] = torch.frombuffer(bytearray(digest), dtype=torch.int64)
    first = mine.to(device, copy=True)
    dist.broadcast(first, src=0)
    is_other = (mine != first.cpu()).any(dim=1).tolist()
    is_silent = [text is None for text in facts.values()]
    word = sum(1 << n for n in range(MOST_FACTS) if is_other[n] and not (n < len(names) and is_silent[n]))
    of_ranks = _all_if_any(word)
    found = []
    for number in range(MOST_FACTS):
        if ranks := [rank for rank, other in enumerate(of_ranks) if other >> number & 1]:
            name = names[number] if number < len(names) else "what is compared"
            text = (facts.get(name) or "")[:LONGEST_TEXT]
            found.append(Difference(name, ranks, (told_by(0, text), told_by(ranks[0], text))))
    return found


def clocks_off(limit_s: float) -> list[tuple[int, float]]:
    """(rank, seconds) of ranks whose clock differs from rank 0's by more than `limit_s`; the same list on every rank.

    All ranks are inside an all-reduce at one moment: none leaves before the last has entered. So that moment lies
    between the times at which a rank enters and leaves, on every rank's clock; if two such intervals do not overlap,
    the clocks differ at least by the gap. A late rank widens an interval, and causes no false alarm. What escapes is a
    difference shorter than an all-reduce. Communicates: all ranks, 88 bytes each if no clock is off.
    """
    inside, one = torch.zeros(BARRIERS, 2, dtype=torch.float64), torch.ones(1, device=_device())
    for barrier in range(BARRIERS):
        entered = time.time()
        dist.all_reduce(one)
        one.item()  # waits for the device
        inside[barrier] = torch.tensor([entered, time.time()], dtype=torch.float64)
    first = inside.to(_device(), copy=True)
    dist.broadcast(first, src=0)
    first = first.cpu()
    gaps = torch.maximum(inside[:, 0] - first[:, 1], first[:, 0] - inside[:, 1])
    gap = float(gaps.max())
    return [
        (rank, millis / 1000)
        for rank, millis in enumerate(_all_if_any(int(1000 * gap) if gap > limit_s else 0))
        if millis
    ]


def worst_of_ranks(values: Sequence[float]) -> list[tuple[float, int]]:
    """(largest value, first rank that has it) of each position; not a number counts as infinity. Communicates: all
    ranks, 16 bytes for each value."""
    mine = torch.tensor([float("inf") if value != value else value for value in values], dtype=torch.float64)
    largest = _reduced(mine, dist.ReduceOp.MAX)
    rank, ranks = _place()
    where = torch.where(mine == largest, rank, ranks).to(torch.int64)
    return list(zip(largest.tolist(), _reduced(where, dist.ReduceOp.MIN).tolist(), strict=True))


def sums_of_ranks(*values: int) -> list[int]:
    """The sum of each value over all ranks. Communicates: all ranks, 8 bytes for each value."""
    return [int(value) for value in _reduced(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.SUM).tolist()]


def texts_of_ranks(mine: str | None, most: int = 20) -> list[tuple[int, str]]:
    """(rank, text) of the first `most` ranks that have something to say; the same list on every rank. Communicates: all
    ranks; 8 bytes if there is none, else also the texts, one after the other."""
    (rank, ranks), found = _place(), list[tuple[int, str]]()
    while len(found) < most:
        is_told = mine is None or any(rank == other for other, _ in found)
        speaker = int(_reduced(torch.tensor([ranks if is_told else rank]), dist.ReduceOp.MIN).item())
        if speaker == ranks:
            break
        found.append((speaker, told_by(speaker, mine or "")))
    return found


def told_by(speaker: int, text: str) -> str:
    """The text of one rank, on every rank. Communicates: all ranks."""
    if _place()[1] == 1:
        return text
    told = [text]
    dist.broadcast_object_list(told, src=speaker)
    return told[0]


def _all_if_any(value: int) -> list[int]:
    """The values of all ranks; [] if all are 0."""
    if not int(_reduced(torch.tensor([value]), dist.ReduceOp.MAX).item()):
        return []
    world = dist.group.WORLD
    assert world is not None
    return [int(found) for found in all_gather_rows(torch.tensor([value], device=_device()), world).tolist()]


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if _place()[1] == 1:  # it may have lost its GPU
        return values
    on_device = values.to(_device(), copy=True)
    dist.all_reduce(on_device, op=operation)
    return on_device.cpu()


def _place() -> tuple[int, int]:
    """(rank, number of ranks); a process without ranks is one alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
