"""Who waits for whom: from what the ranks of a job tell, a report that names the ranks that hang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

SHOWN = 8


class Silent(NamedTuple):
    """A rank that does not answer."""

    last_seen: str | None
    """What it has told in time: where it is, on which machine; None if it has never told anything."""
    failure: str | None = None
    """The error with which it has ended, if it could tell."""


def describe(accounts: Mapping[int, Mapping[str, Any]], silent: Mapping[int, Silent]) -> list[str]:
    """The lines of a report. accounts: `whereabouts.account` of each rank that answers, with its `name`."""
    lines = [_silent_line(rank, silent[rank]) for rank in sorted(silent)[:SHOWN]]
    if len(silent) > SHOWN:
        lines.append(f"{len(silent) - SHOWN} more ranks do not answer")
    waits = _waits(accounts)
    for wait in waits[:SHOWN]:
        lines += wait.lines(accounts, silent)
    exchanging = [rank for rank, told in accounts.items() if told["is_in_exchange"]]
    if exchanging:
        lines.append(
            "waiting for a message of another pipeline stage: "
            + "; ".join(f"{accounts[rank]['name']} in {accounts[rank]['place']}" for rank in exchanging[:SHOWN])
        )
    waiting = {rank for wait in waits for rank in wait.waiting} | set(exchanging)
    idle = [rank for rank in accounts if rank not in waiting]
    for rank in idle[:SHOWN] if waiting and not silent else ():
        lines.append(f"{accounts[rank]['name']} waits for no rank: it is {_is_at(accounts[rank])}")
    if not (silent or idle or any(wait.differs for wait in waits)):
        lines.append("all ranks answer and wait: for each other, or for the network")
    return lines


class _Wait:
    """A collective that has not ended."""

    def __init__(self, group: str, number: int, accounts: Mapping[int, Mapping[str, Any]]) -> None:
        told = {rank: one["groups"][group] for rank, one in accounts.items() if group in one["groups"]}
        self.calls = {rank: {call[0]: tuple(call[1:3]) for call in one["calls"]} for rank, one in told.items()}
        self.waiting = [
            rank for rank, one in told.items() if any(call[0] == number and call[3] for call in one["calls"])
        ]
        first = told[self.waiting[0]]
        self.number, self.ranks, self.description = number, first["ranks"], first["description"] or "a group"
        self.operation, self.place = self.calls[self.waiting[0]][number]
        self.differs = self._first_difference()

    def lines(self, accounts: Mapping[int, Mapping[str, Any]], silent: Mapping[int, Silent]) -> list[str]:
        name = f"number {self.number} of {self.description} ({_ranks(self.ranks)})"
        verb = "wait" if len(self.waiting) > 1 else "waits"
        found = [f"{_ranks(self.waiting)} {verb} in {self.operation}, {name}, called in {self.place}"]
        absent = [rank for rank in self.ranks if max(self.calls.get(rank, {0: ()})) < self.number]
        for rank in absent[:SHOWN]:
            calls = self.calls.get(rank, {})
            last = f"; its last there is number {max(calls)}, {' in '.join(calls[max(calls)])}" if calls else ""
            name = accounts[rank]["name"] if rank in accounts else f"rank {rank}"
            is_at = f": it is {_is_at(accounts[rank])}" if rank in accounts else " and does not answer"
            found.append(f"  {name} has not called it{is_at}{last}")
        return found + self.differs

    def _first_difference(self) -> list[str]:
        """The first number under which the ranks have called different collectives, or in different places."""
        known = [rank for rank in self.ranks if rank in self.calls]
        numbers = sorted(set().union(*(self.calls[rank] for rank in known)))
        for number in numbers:
            called = {rank: self.calls[rank][number] for rank in known if number in self.calls[rank]}
            if len(set(called.values())) > 1:
                counted = Counter(called.values()).most_common()
                texts = [
                    f"{_ranks(rank for rank, call in called.items() if call == one)}: {' in '.join(one)}"
                    for one, _ in counted
                ]
                return [f"  the first that differs is number {number}: " + "; ".join(texts)]
        return []


def _waits(accounts: Mapping[int, Mapping[str, Any]]) -> list[_Wait]:
    """Of each group the oldest collective that has not ended."""
    oldest: dict[str, int] = {}
    for told in accounts.values():
        for group, one in told["groups"].items():
            for number, *_, is_waiting in one["calls"]:
                if is_waiting and number:
                    oldest[group] = min(number, oldest.get(group, number))
    return [_Wait(group, number, accounts) for group, number in oldest.items()]


def _silent_line(rank: int, one: Silent) -> str:
    if one.failure is not None:
        return f"rank {rank} has failed: {one.failure}"
    seen = f"; it was last seen {one.last_seen}" if one.last_seen else ""
    return f"rank {rank} does not answer: it is stopped or has ended, or its machine is gone{seen}"


def _is_at(told: Mapping[str, Any]) -> str:
    return f"in {told['place']}" + (f" ({told['at']})" if told["at"] else "")


def _ranks(ranks: Iterable[int]) -> str:
    """Such as rank 3, or ranks 0, 1, 4 to 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    texts = [
        str(run[0]) if len(run) == 1 else f"{run[0]}{', ' if run[1] == run[0] + 1 else ' to '}{run[1]}" for run in runs
    ]
    more = [f"{len(texts) - SHOWN} more ranges"] if len(texts) > SHOWN else []
    single = len(runs) == 1 and len(runs[0]) == 1
    return f"rank{'' if single else 's'} " + ", ".join(texts[:SHOWN] + more)
