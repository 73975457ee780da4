"""Counts what a rank communicates: every collective and message, by the axis of its process group and its kind.

They are counted in torch's dispatcher: whatever function megatron-core or torch calls, under whatever name it was
imported, it ends in one operator of torch's namespace `c10d`. An operator of that namespace that this file does not
know is an error, not a gap.

The bytes of a call are those that this rank has to send under the algorithm that sends the fewest (ring, pairwise
exchange; Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH"), in a group of n ranks,
rounded up to whole bytes:

    all_gather, reduce_scatter    (n - 1) / n of the whole tensor
    all_reduce                    2 (n - 1) / n of the tensor
    all_to_all                    what goes to other ranks; (n - 1) / n of the tensor if the parts are equal
    send                          the tensor
    recv                          the tensor, which is received, not sent: left out of all sums
    broadcast, reduce             (n - 1) / n of the tensor, the average over the ranks
    gather, scatter               gather: what a rank other than the root sends; scatter: what the root sends
    barrier                       0

A group of one rank communicates nothing and is not counted.

Tensors have to be what NCCL reads, contiguous, whoever the caller is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_pretrain.runtime.handover import handed_over


class Messages(NamedTuple):
    """Calls of one kind over one axis."""

    calls: int
    bytes: int


Traffic = dict[tuple[str, str], Messages]
"""(axis, kind) -> messages of this rank."""

AXES = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "ep": ("ep", "tp_ep"),
    "expert_tp": ("expt_tp",),
    "dp": ("dp", "dp_cp", "intra_dp_cp"),
    "expert_dp": ("expt_dp", "intra_expt_dp"),
    "embedding": ("embd", "pos_embd"),
}
"""Axis -> its groups in core's ProcessGroupCollection. Gradients are reduced over dp_cp, which counts as dp. Any other
group, such as the one of all ranks, is "other"; but point-to-point messages over it count as pp (with two pipeline
ranks core sends half of them that way)."""


class Call(NamedTuple):
    """A call of an operator of torch's namespace c10d."""

    name: str
    kind: str
    group: dist.ProcessGroup
    values: dict[str, Any]
    """Its arguments by name."""

    def tensors(self, *names: str) -> list[Tensor]:
        """The tensors of the first of these arguments that the operator has."""
        return list(_tensors([next((self.values[name] for name in names if name in self.values), ())]))


class TrafficCounter(TorchDispatchMode):
    """Counts what this rank communicates inside `with TrafficCounter(groups) as counter:`, including in backward
    passes, and slows it down.

    `counter.traffic` holds the counts so far. Raises NotImplementedError for an operator that this file does not know,
    and ValueError for a tensor that NCCL would misread, even where gloo would not.
    """

    def __init__(self, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.traffic: Traffic = {}
        self.num_calls = 0
        """Including those of groups of one rank."""
        self._axes: dict[str, str] = {}
        for axis, names in AXES.items():
            for group in (getattr(groups, name, None) for name in names):
                if isinstance(group, dist.ProcessGroup):
                    self._axes.setdefault(group.group_name, axis)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        names = (
            {argument.name for argument in func._schema.arguments}
            if func.namespace in ("c10d", "_c10d_functional")
            else set()
        )
        if not names & {"process_group", "group_name"}:
            return func(*args, **(kwargs or {}))
        call = _read(func._schema, args, kwargs or {})
        self._count(call)
        return self.carry_out(call, func, args, kwargs or {})

    def carry_out(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that has been counted, and return what its operator returns."""
        return func(*args, **kwargs)

    def _count(self, call: Call) -> None:
        kind, values, group = call.kind, call.values, call.group
        sizes = _OPERATORS[call.name][1](values, group)
        self.num_calls += len(sizes)
        if group.size() == 1:
            return
        axis = self._axes.get(group.group_name, "other")
        if kind in ("send", "recv") and axis == "other":
            axis = "pp"
        for size in sizes:
            before = self.traffic.get((axis, kind), Messages(0, 0))
            self.traffic[axis, kind] = Messages(before.calls + 1, before.bytes + _sent(kind, size, group.size()))


def _read(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    name = schema.name.removeprefix("c10d::")
    if name not in _OPERATORS:
        raise NotImplementedError(f"{schema.name} communicates and is not counted; add it to {__name__}")
    values = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    for tensor in _tensors(values.values()):
        handed_over(schema.name, tensor, is_written=True)
    return Call(name, _OPERATORS[name][0], dist.ProcessGroup.unbox(values["process_group"]), values)


def _sent(kind: str, size: int, n: int) -> int:
    """Bytes that this rank sends in a call on `size` bytes in a group of n ranks; see the top of this file."""
    if kind in ("send", "recv", "gather", "scatter", "all_to_all", "barrier"):
        return size
    return -(-size * (n - 1) * (2 if kind == "all_reduce" else 1) // n)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors in `values`, nested lists and tuples included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _bytes(tensors: Tensor | Sequence[Any]) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(_bytes(tensor) for tensor in tensors)


Sizes = Callable[[dict[str, Any], dist.ProcessGroup], list[int]]


def _one(argument: str) -> Sizes:
    """One call, on the whole argument."""
    return lambda values, group: [_bytes(values[argument])]


def _each(argument: str) -> Sizes:
    """One call per tensor of an argument: torch has coalesced several calls."""
    return lambda values, group: [_bytes(tensor) for tensor in values[argument]]


def _exchanged(values: dict[str, Any], group: dist.ProcessGroup) -> list[int]:
    """Bytes that go to other ranks when the rows of a tensor are exchanged, in equal parts if no sizes are given."""
    size, splits = _bytes(values["input"]), values["input_split_sizes"]
    own = size * splits[group.rank()] // max(sum(splits), 1) if splits else size // group.size()
    return [size - own]


def _exchanged_list(values: dict[str, Any], group: dist.ProcessGroup) -> list[int]:
    return [_bytes(values["input_tensors"]) - _bytes(values["input_tensors"][group.rank()])]


def _gathered(values: dict[str, Any], group: dist.ProcessGroup) -> list[int]:
    return [0 if group.rank() == values["root_rank"] else _bytes(values["input_tensors"])]


def _scattered(values: dict[str, Any], group: dist.ProcessGroup) -> list[int]:
    return [_bytes(values["input_tensors"]) * (group.size() - 1) // group.size()]


_OPERATORS: dict[str, tuple[str, Sizes]] = {
    "allreduce_": ("all_reduce", _one("tensors")),
    "allreduce_coalesced_": ("all_reduce", _each("tensors")),
    "_allgather_base_": ("all_gather", _one("output_tensor")),
    "allgather_into_tensor_coalesced_": ("all_gather", _each("outputs")),
    "allgather_": ("all_gather", _one("output_tensors")),
    "allgather_coalesced_": ("all_gather", _one("output_lists")),
    "_reduce_scatter_base_": ("reduce_scatter", _one("input_tensor")),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _each("inputs")),
    "reduce_scatter_": ("reduce_scatter", _one("input_tensors")),
    "alltoall_base_": ("all_to_all", _exchanged),
    "alltoall_": ("all_to_all", _exchanged_list),
    "send": ("send", _one("tensors")),
    "recv_": ("recv", _one("tensors")),
    "recv_any_source_": ("recv", _one("tensors")),
    "broadcast_": ("broadcast", _one("tensors")),
    "reduce_": ("reduce", _one("tensors")),
    "gather_": ("gather", _gathered),
    "scatter_": ("scatter", _scattered),
    "barrier": ("barrier", lambda values, group: [0]),
    "monitored_barrier_": ("barrier", lambda values, group: [0]),
}
"""Operator of torch's namespace c10d -> kind, and the sizes in bytes of the calls that it makes."""
