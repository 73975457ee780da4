"""What a dry run has to satisfy, and the rows that tell its result.

    collectives    all ranks of a group issue the same ones in the same order: kind, dtype, size, root
    exchanges      what one rank sends in an all-to-all is what the other receives
    messages       what one rank sends to another is received in the same order, with the same dtype and size
    checkpoint     the parts of all ranks cover each parameter exactly once, besides replicas
    memory         weights and gradients take the bytes that the plan says
    traffic        a rank sends what the plan says

Not compared: the operation of a reduction (sum, max), and the order of calls of different groups.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import zip_longest

from hunyuan_pretrain.config.derived import grid
from hunyuan_pretrain.diagnostics.dry_run import BuiltRank, DryRun
from hunyuan_pretrain.parallel.fake_world import WORLD, Record
from hunyuan_pretrain.plan.communication import communication_per_rank
from hunyuan_pretrain.plan.counts import memory_of_ranks

SHOWN_RANKS = 8
"""Ranks that a message lists."""


class Ranks:
    """All ranks of a job. A rank that was not built has the record of the first rank of its pipeline rank."""

    def __init__(self, built: list[BuiltRank], world_size: int, pipeline_size: int) -> None:
        self.built = {of_rank.rank: of_rank for of_rank in built}
        self.pipeline_size, self.each = pipeline_size, world_size // pipeline_size

    @classmethod
    def of(cls, ran: DryRun) -> Ranks:
        """Those of a dry run."""
        return cls(ran.ranks, ran.world_size, ran.experiment.parallel.pipeline_model_parallel_size)

    def source(self, rank: int) -> int | None:
        """The rank whose record a rank has; None if that one failed."""
        first = rank // self.each * self.each
        return rank if rank in self.built else first if first in self.built else None

    def partner(self, rank: int, pipeline_rank: int) -> int:
        """The rank at the same place of another pipeline rank."""
        return rank % self.each + pipeline_rank * self.each

    @cached_property
    def collectives(self) -> dict[int, dict[str, list[Record]]]:
        """Built rank -> kind of group -> its collectives."""
        return {
            rank: _by_group(record for record in built.calls if not record.is_message)
            for rank, built in self.built.items()
        }

    def name(self, rank: int) -> str:
        """How messages name a rank."""
        return f"rank {rank} (pipeline rank {rank // self.each})" if self.pipeline_size > 1 else f"rank {rank}"


def find_problems(ran: DryRun) -> list[str]:
    """Everything that prevents the job, one line each; starts with the errors of single ranks."""
    ranks = Ranks.of(ran)
    found = [*collective_problems(ranks), *exchange_problems(ranks), *message_problems(ranks)]
    if not ran.problems:  # a rank that failed leaves gaps
        found += checkpoint_problems(ran.ranks)
    return [*ran.problems, *dict.fromkeys([*found, *memory_problems(ran), *traffic_problems(ran)])]


def _by_group(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.group, []).append(record)
    return found


def _groups(ranks: Ranks) -> Iterator[tuple[str, tuple[int, ...], dict[int, list[int]]]]:
    """(kind, members, built rank -> the members with its record) of one group of each composition."""
    if not ranks.built:
        return
    for kind, groups in next(iter(ranks.built.values())).membership.items():
        seen = set()
        for members in groups:
            sources: dict[int, list[int]] = {}
            for rank in members:
                source = ranks.source(rank)
                if source is not None:
                    sources.setdefault(source, []).append(rank)
            if len(members) > 1 and (key := frozenset(sources)) not in seen:
                seen.add(key)
                yield kind, members, sources


# --- communication ----------------------------------------------------------------------------------------------------


def collective_problems(ranks: Ranks) -> Iterator[str]:
    """The first call of each group in which its ranks differ; the ranks in the minority are named."""
    for kind, members, sources in _groups(ranks):
        calls = {source: ranks.collectives[source].get(kind, []) for source in sources}
        for number, row in enumerate(zip_longest(*calls.values()), start=1):
            of_source = dict(zip(calls, row, strict=True))
            weight: Counter[object] = Counter()
            for source, record in of_source.items():
                weight[record and record.what()] += len(sources[source])
            if len(weight) == 1:
                continue
            usual = weight.most_common(1)[0][0]
            other = next(record for record in of_source.values() if (record and record.what()) == usual)
            odd = next(source for source, record in of_source.items() if (record and record.what()) != usual)
            agreed = [rank for source, record in of_source.items() if record == other for rank in sources[source]]
            yield (
                f"{ranks.name(odd)}, call {number} of {_group_name(kind, members)}: {_issues(of_source[odd])}, but "
                f"{_listed(agreed)} {_issues(other, len(agreed))}"
            )
            break


def exchange_problems(ranks: Ranks) -> Iterator[str]:
    """All-to-alls in which the rows that one rank sends are not those that the other expects. Where parts have several
    sizes, built ranks are compared only: they depend on the position of a rank."""
    for kind, members, sources in _groups(ranks):
        place = {rank: index for index, rank in enumerate(members)}
        owners = {rank: source for source, mine in sources.items() for rank in mine}
        calls = {source: ranks.collectives[source].get(kind, []) for source in sources}
        for number, row in enumerate(zip(*calls.values(), strict=False), start=1):
            of_source = dict(zip(calls, row, strict=True))
            splits = {source: record.splits for source, record in of_source.items() if record.splits}
            if len(splits) != len(of_source):
                continue
            is_even = all(len({*sent, *received}) == 1 for sent, received in splits.values())
            known = [rank for rank in members if rank in owners and (is_even or rank == owners[rank])]
            if is_even:
                known = [mine[0] for mine in sources.values()]
            fault = next(
                (
                    (a, b)
                    for a in known
                    for b in known
                    if splits[owners[a]][0][place[b]] != splits[owners[b]][1][place[a]]
                ),
                None,
            )
            if fault:
                a, b = fault
                sent, wanted = splits[owners[a]][0][place[b]], splits[owners[b]][1][place[a]]
                yield (
                    f"{ranks.name(a)}, call {number} of {_group_name(kind, members)}: sends {sent:,} rows to rank {b}, "
                    f"which expects {wanted:,}: {of_source[owners[a]]}"
                )
                break


def message_problems(ranks: Ranks) -> Iterator[str]:
    """The first message of each pair of ranks that is sent and not received, or the reverse, or has another size."""
    for rank, built in ranks.built.items():
        for kind, records in _by_group(record for record in built.calls if record.is_message).items():
            for peer in sorted({record.peer for record in records if record.peer is not None}):
                pipeline_rank = peer // ranks.each if kind == WORLD else peer
                partner = ranks.partner(rank, pipeline_rank)
                source = ranks.source(partner)
                if source is None:
                    continue
                back = ranks.partner(source, built.pipeline_rank) if kind == WORLD else built.pipeline_rank
                theirs = [record for record in ranks.built[source].calls if record.group == kind]
                for mine_is, theirs_is in (("send", "recv"), ("recv", "send")):
                    mine_calls = [record for record in records if (record.kind, record.peer) == (mine_is, peer)]
                    their_calls = [record for record in theirs if (record.kind, record.peer) == (theirs_is, back)]
                    yield from _unpaired(ranks, rank, partner, mine_calls, their_calls)


def _unpaired(ranks: Ranks, rank: int, partner: int, mine: list[Record], theirs: list[Record]) -> Iterator[str]:
    for number, (one, other) in enumerate(zip_longest(mine, theirs), start=1):
        if one is None or other is None or (one.dtype, one.sizes) != (other.dtype, other.sizes):
            yield (
                f"{ranks.name(rank)} and {ranks.name(partner)}, message {number}: the first {_issues(one)}, the second "
                f"{_issues(other)}"
            )
            return


def _issues(record: Record | None, number: int = 1) -> str:
    s = "s" if number == 1 else ""
    return f"issue{s} no more calls" if record is None else f"issue{s} {record}"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:SHOWN_RANKS]))
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {shown}{more}"


def _group_name(kind: str, members: tuple[int, ...]) -> str:
    name = kind if kind == WORLD else kind.replace("_GROUP", "").lower().replace("_", " ") + " group"
    return f"{name} [{_listed(list(members))}]"


# --- checkpoint -------------------------------------------------------------------------------------------------------


def checkpoint_problems(ranks: list[BuiltRank]) -> Iterator[str]:
    """Parameters whose parts, over all ranks, have a gap, or are written by two ranks, or differ in shape."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    writers: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for rank, chunks in sorted((rank, chunks) for built in ranks for rank, chunks in built.placements.items()):
        for placement in (placement for chunk in chunks for placement in chunk.values()):
            for part in placement.parts:
                shape = placement.whole_shape, part.counts
                if shapes.setdefault(placement.name, shape) != shape:
                    yield f"{placement.name}: rank {rank} holds a part of {shape}, others of {shapes[placement.name]}"
                piece = tuple(at.start // length for at, length in zip(part.whole, part.lengths, strict=True))
                of_piece = writers.setdefault(placement.name, {}).setdefault(piece, [])
                if not any(placement.replica):
                    of_piece.append(rank)
    for name, of_name in writers.items():
        whole, counts = shapes[name]
        if len(of_name) != math.prod(counts):
            yield f"{name}, {whole}: ranks hold {len(of_name)} of its {math.prod(counts)} parts"
        for piece, ranks_of_piece in of_name.items():
            if len(ranks_of_piece) != 1:
                who = _listed(ranks_of_piece) + " write" if ranks_of_piece else "no rank writes"
                yield f"{name}, {whole}: {who} part {piece} of {counts}; exactly one rank has to"


# --- the plan ---------------------------------------------------------------------------------------------------------


def memory_problems(ran: DryRun) -> Iterator[str]:
    """Ranks whose weights or gradients take other bytes than the plan says."""
    ranks, experiment = Ranks.of(ran), ran.experiment
    parts = experiment.model, experiment.parallel, experiment.precision, ran.world_size
    for built in ran.ranks:
        planned = memory_of_ranks(*parts, built.pipeline_rank, experiment.optimizer, experiment.tuning)[
            built.rank % ranks.each
        ]
        for what, found, plan in (
            ("weights", built.weight_bytes, planned.weights),
            ("gradients", built.gradient_bytes, planned.gradients),
        ):
            if found != plan:
                yield f"{ranks.name(built.rank)}: its {what} take {found:,} bytes, by the plan {plan:,}"


def traffic_problems(ran: DryRun) -> Iterator[str]:
    """Ranks that communicate something else than the plan says."""
    ranks, experiment = Ranks.of(ran), ran.experiment
    for built in ran.ranks:
        for stage, found in zip(ran.stages, built.traffic, strict=True):
            plan = communication_per_rank(
                experiment.model,
                experiment.parallel,
                experiment.precision,
                stage,
                ran.world_size,
                built.pipeline_rank,
                ran.loss_chunk_tokens,
                experiment.tuning,
            )
            not_planned = ("ep", "expert_tp") if experiment.tuning.lora is None else ("ep", "expert_tp", "tp")
            for axis, kind in sorted(found.keys() | plan.messages.keys()):
                one, other = (tuple(of.get((axis, kind), (0, 0))) for of in (found, plan.messages))
                is_planned = plan.is_exact or axis not in not_planned
                if one != other and is_planned:
                    yield (
                        f"{ranks.name(built.rank)}, stage {stage.name}: {kind} over {axis}: {one[0]:,} calls that send "
                        f"{one[1]:,} bytes, by the plan {other[0]:,} calls and {other[1]:,} bytes"
                    )


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# --- what is printed --------------------------------------------------------------------------------------------------


def rows(ran: DryRun) -> list[tuple[str, str, str]]:
    """(name, value, note) of what ran."""
    ranks = Ranks.of(ran)
    dp = grid(ran.experiment.parallel, ran.world_size).dp
    each = [stage.global_batch_sequences // (stage.micro_batch_sequences * dp) for stage in ran.stages]
    per_stage = [stage.global_batch_sequences for stage in ran.stages]
    found = [
        ("ranks built", f"{len(ran.ranks)} of {ran.world_size:,}", f"{_listed([built.rank for built in ran.ranks])}"),
        ("steps", f"{len(ran.stages)}", f"of {', '.join(f'{size:,}' for size in per_stage)} sequences"),
        ("micro-batches", f"{max(each)}", "of each rank in a step, at most"),
    ]
    counts: dict[str, Counter[str]] = {}
    for calls in ranks.collectives.values():
        for kind, records in calls.items():
            of_rank = Counter(record.kind for record in records)
            counts[kind] = counts.get(kind, Counter()) | of_rank
    for kind, of_kind in counts.items():
        members = next(iter(ranks.built.values())).membership[kind]
        size = max(len(group) for group in members)
        found.append(
            (
                _group_name(kind, ()).partition(" [")[0],
                _number(sum(of_kind.values()), "call"),
                f"groups of {size:,} ranks; at most, by one rank: "
                + ", ".join(f"{name} {number:,}" for name, number in of_kind.items()),
            )
        )
    sends = [sum(record.kind == "send" for record in built.calls) for built in ran.ranks]
    if any(sends):
        found.append(("messages", f"{max(sends):,} sent", "at most, by one rank"))
    sent = [
        sum(messages.bytes for (_, kind), messages in traffic.items() if kind != "recv")
        for built in ran.ranks
        for traffic in built.traffic
    ]
    found.append(("sent", f"{max(sent, default=0) / 2**30:.3g} GiB", "at most, by one rank in one of these steps"))
    keys = {
        placement.name
        for built in ran.ranks
        for chunks in built.placements.values()
        for chunk in chunks
        for placement in chunk.values()
    }
    parts = sum(len(chunk) for built in ran.ranks for chunks in built.placements.values() for chunk in chunks)
    found.append(("checkpoint", f"{len(keys):,} parameters", f"in {parts:,} parts on {ran.world_size:,} ranks"))
    if ran.ranks:
        most = max(ran.ranks, key=lambda built: built.weight_bytes + built.gradient_bytes)
        found.append(
            (
                "memory",
                f"{(most.weight_bytes + most.gradient_bytes) / 2**30:.3g} GiB",
                f"weights and gradients of {ranks.name(most.rank)}, which has the most of those built",
            )
        )
    return found
