"""Where a rank's part of each parameter lies in the whole parameter: the single source for initialisation, checkpoints
and comparisons.

A parameter describes its own sharding, by attributes that its module sets:
    tensor_model_parallel, partition_dim   sharded over the tensor-parallel ranks along that dim (core's own names)
    is_gated                               its partition_dim holds two halves, gate and up, each sharded separately
    is_routed_expert                       its first dim is sharded over the expert-parallel ranks, and partition_dim
                                           over the expert-tensor-parallel ones
    is_same_in_experts                     with is_routed_expert: partition_dim is not sharded after all; the
                                           expert-tensor-parallel ranks hold copies, all but the first marked `shared`
    expert, num_experts                    it holds only this one of the rank's num_experts experts, without the first
                                           dim; its name is that of the whole parameter, followed by the number
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

Offset = tuple[int, int, int]
"""(dim, index, count): piece `index` of `count` equal ones along `dim`."""


class Part(NamedTuple):
    """A rectangle of a parameter: its slices in this rank's tensor and in the whole one, its offsets and lengths, and
    the number of such pieces along each dim."""

    local: tuple[slice, ...]
    whole: tuple[slice, ...]
    offsets: tuple[Offset, ...]
    lengths: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """This rank's part of one parameter."""

    name: str
    """Of the whole parameter."""
    local_shape: tuple[int, ...]
    """Of this rank's tensor; (1, ...) for one expert alone."""
    whole_shape: tuple[int, ...]
    parts: tuple[Part, ...]
    """One, or two for a sharded gate and up projection."""
    replica: tuple[int, int, int]
    """All zero on exactly one of the ranks that hold the same part."""


def mark_sharded(weight: Tensor, dim: int) -> None:
    """Mark `weight` as sharded along `dim`: the ranks of a group (tensor-parallel, or expert-tensor-parallel for
    experts) hold different parts of it.

    megatron-core's gradient norm counts an unmarked weight on the first rank only. Core 0.16 marks a weight only if it
    initialises it itself, 0.19 always.
    """
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1  # type: ignore[attr-defined]


def placement_of(name: str, parameter: Tensor, groups: ProcessGroupCollection, is_copy: bool = False) -> Placement:
    """The placement of this rank's `parameter`. `is_copy`: another pipeline stage holds the original of the same
    parameter."""
    is_expert = getattr(parameter, "is_routed_expert", False)
    alone: int | None = getattr(parameter, "expert", None)
    is_sharded = getattr(parameter, "tensor_model_parallel", False) and not getattr(
        parameter, "is_same_in_experts", False
    )
    group, data_group = (groups.expt_tp, groups.expt_dp) if is_expert else (groups.tp, groups.dp_cp)
    rank, size = group.rank(), group.size()
    experts = 1 if alone is None else parameter.num_experts  # type: ignore[attr-defined]
    expert: tuple[Offset, ...] = (
        ((0, groups.ep.rank() * experts + (alone or 0), groups.ep.size() * experts),) if is_expert else ()
    )
    local_shape = tuple(parameter.shape) if alone is None else (1, *parameter.shape)
    cuts: list[tuple[Offset, ...]] = [()]
    if is_sharded and size > 1:
        dim = int(parameter.partition_dim) + len(local_shape) - parameter.dim()  # type: ignore[attr-defined]
        is_gated = getattr(parameter, "is_gated", False)
        cuts = [((dim, rank, 2 * size),), ((dim, size + rank, 2 * size),)] if is_gated else [((dim, rank, size),)]
    parts = [_part(local_shape, (*expert, *cut), number, len(cuts)) for number, cut in enumerate(cuts)]
    whole_shape = [length * count for length, count in zip(parts[0].lengths, parts[0].counts, strict=True)]
    replica = (int(is_copy), 0 if is_sharded or is_expert else rank, data_group.rank())
    return Placement(
        name if alone is None else name.removesuffix(str(alone)), local_shape, tuple(whole_shape), tuple(parts), replica
    )


def _part(shape: tuple[int, ...], offsets: tuple[Offset, ...], number: int, num_parts: int) -> Part:
    """Part `number` of `num_parts` equal parts of a local tensor of `shape`, split along the dim of the last offset."""
    indices, counts, lengths, starts = [0] * len(shape), [1] * len(shape), list(shape), [0] * len(shape)
    for dim, index, count in offsets:
        indices[dim], counts[dim] = index, count
    if num_parts > 1:
        dim = offsets[-1][0]
        lengths[dim] //= num_parts
        starts[dim] = number * lengths[dim]
    local = tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
    whole = tuple(slice(index * length, (index + 1) * length) for index, length in zip(indices, lengths, strict=True))
    return Part(local, whole, offsets, tuple(lengths), tuple(counts))


def sharded_tensor(prefix: str, data: Tensor, placement: Placement) -> ShardedTensor | ShardedTensorFactory:
    """`data`, of the shape of the parameter with this `placement`, for megatron's distributed checkpoints, under prefix
    + the parameter's name.

    A tensor read from one has `placement.local_shape`.
    """
    key, data = prefix + placement.name, data.view(placement.local_shape)

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        assert flattened_range is None
        return [
            ShardedTensor.from_rank_offsets(key, data[part.local].contiguous(), *part.offsets, replica_id=replica_id)
            for part in placement.parts
        ]

    if len(placement.parts) == 1:
        return build(key, data, placement.replica, None)[0]
    dim = placement.parts[0].offsets[-1][0]
    return ShardedTensorFactory(key, data, build, lambda parts: torch.cat(parts, dim=dim), placement.replica)
