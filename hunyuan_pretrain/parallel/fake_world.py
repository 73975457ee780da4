"""One process in the place of any rank of a job: its process groups, and a record of what it would communicate.

Tensors are meta tensors, which have shapes and no memory. Groups are torch's fake ones, which need no other process.
Calls of collectives and messages are recorded in torch's dispatcher and carried out nowhere, so results keep the shapes
that the caller allocated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import ParallelConfig
from hunyuan_pretrain.parallel import groups as rank_groups
from hunyuan_pretrain.parallel.traffic import Call, TrafficCounter

try:  # private parts of torch, which a version may move
    from torch._C import _current_autograd_node as current_autograd_node  # noqa: F401
    from torch._C._autograd import _get_sequence_nr as next_autograd_node  # noqa: F401
    from torch._C._distributed_c10d import FakeWork
    from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
except ImportError as error:
    missing = Problem("torch", torch.__version__, f"lacks what a dry run needs: {error}", "plan without --dry-run")
    raise ConfigError("dry run", [missing]) from error

WORLD = "all ranks"
BACKEND = "recorded"
"""torch's fake backend under a name of its own, because that one does not take meta tensors."""

Membership = dict[str, list[tuple[int, ...]]]
"""Kind of group, in core's words -> the ranks of each group of that kind, in group order."""


class Record(NamedTuple):
    """One collective, or one message, of one rank."""

    group: str
    """Kind of group, a key of Membership."""
    kind: str
    """As in parallel.traffic: all_reduce, send, ..."""
    dtype: str
    sizes: tuple[int, ...]
    """Elements: of the tensor, the whole one if ranks hold shards of it; one per tensor of a coalesced call."""
    peer: int | None
    """Rank in the group that is sent to, received from, or the root."""
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Rows to and from each rank of an all-to-all with given splits."""
    place: str
    """What the rank was doing."""

    @property
    def is_message(self) -> bool:
        """Whether two ranks take part, not the whole group."""
        return self.kind in ("send", "recv")

    def what(self) -> tuple[str, str, tuple[int, ...] | None, int | None]:
        """What all ranks of the group have to agree on. With splits, ranks exchange different numbers of rows."""
        return self.kind, self.dtype, None if self.splits else self.sizes, None if self.is_message else self.peer

    def __str__(self) -> str:
        sizes = "+".join(f"{size:,}" for size in self.sizes)
        root = f", root {self.peer}" if self.peer is not None and not self.is_message else ""
        return f"{self.kind} of {sizes} {self.dtype}{root} in {self.place}"


class Recorder(TrafficCounter):
    """Records the calls of this rank inside `with Recorder(groups, place) as recorder:`, in order, in
    `recorder.calls`, and counts them as its base does. No call is carried out. `place` returns what the rank is
    doing."""

    def __init__(self, groups: ProcessGroupCollection, place: Callable[[], str]) -> None:
        super().__init__(groups)
        self.calls: list[Record] = []
        self._place = place

    def carry_out(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call.group.size() > 1:
            self.calls.append(self._record(call))
        results = [
            dist.Work.boxed(FakeWork()) if str(result.type).endswith("c10d.Work") else _written(call)
            for result in func._schema.returns
        ]
        return results[0] if len(results) == 1 else tuple(results)

    def _record(self, call: Call) -> Record:
        whole = ("input_tensor", "inputs", "input_tensors") if call.kind == "reduce_scatter" else ()
        tensors = call.tensors(*whole, "tensors", "output_tensor", "outputs", "output_tensors", "output", "tensor")
        splits = tuple(tuple(call.values.get(name) or ()) for name in ("input_split_sizes", "output_split_sizes"))
        peer = next((call.values[name] for name in ("dst", "src", "root_rank") if name in call.values), None)
        return Record(
            kind_of_group(call.group),
            call.kind,
            str(tensors[0].dtype).removeprefix("torch."),
            tuple(tensor.numel() for tensor in tensors),
            peer,
            (splits[0], splits[1]) if any(splits) else None,
            f"{self._place()} ({_caller()})",
        )


def _written(call: Call) -> Any:
    """What an operator returns beside its work: the argument that it writes."""
    names = ("output_tensor", "output_tensors", "tensors")
    return next(call.values[name] for name in names if name in call.values)


def _caller() -> str:
    """The function of this project, or of megatron-core, that communicates."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("hunyuan_pretrain.", "megatron.core.")) and name not in _PASSED_OVER:
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"


_PASSED_OVER = {__name__, "hunyuan_pretrain.parallel.traffic", "hunyuan_pretrain.parallel.collectives"}


def kind_of_group(group: dist.ProcessGroup) -> str:
    """The key of `Membership` for a group that `as_rank` made."""
    return WORLD if group.group_name == dist.group.WORLD.group_name else group.group_desc  # type: ignore[union-attr]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner.name` is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def as_rank(
    rank: int, world_size: int, parallel: ParallelConfig, timeout_s: int
) -> Iterator[tuple[ProcessGroupCollection, Membership]]:
    """Inside, this process is `rank` of `world_size` ranks, with the groups of the layout. Also yields all groups of
    the world.

    torch.distributed and core's groups are process-wide and are left at the end. Raises RuntimeError if the process is
    a rank already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process that is a rank cannot stand for another one")
    membership: Membership = {WORLD: [tuple(range(world_size))]}
    create = rank_groups.parallel_state.create_group

    def create_own(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        # groups of other ranks only: real ranks all take part in making them, here it would take seconds
        membership.setdefault(kwargs["group_desc"], []).append(tuple(ranks))
        return create(ranks, *args, **kwargs) if rank in ranks else dist.GroupMember.NON_GROUP_MEMBER

    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create_fake_pg, extended_api=True, devices=["cpu", "meta"])
    defaults = dist.Backend.default_device_backend_map
    defaults["meta"] = BACKEND  # registering sets it the first time
    try:
        dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
        with replaced(rank_groups.parallel_state, "create_group", create_own):
            groups = rank_groups.build_groups(parallel, timeout_s)
        yield groups, membership
    finally:
        rank_groups.destroy_groups()
        defaults.pop("meta")


def positions(groups: list[tuple[int, ...]]) -> dict[int, tuple[int, int]]:
    """Rank -> (its position in its group, the group's size)."""
    return {rank: (index, len(members)) for members in groups for index, rank in enumerate(members)}
