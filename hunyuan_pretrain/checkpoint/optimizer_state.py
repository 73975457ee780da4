"""The state of AdamW as fp32 tensors in the shapes and under the names of the parameters, whatever layout and optimizer class holds it.

Core's own form is not used: it cannot be read under another expert-parallel size, mixes up parameter groups that differ only in
their rate, and fails for torch's Adam and for models whose routers are fp32 among bf16 weights. Settings of parameter groups are not saved
at all: they are those of the running experiment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import hunyuan_pretrain.model  # noqa: F401  makes megatron importable

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from hunyuan_pretrain.model.fp8_parameters import written_values
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.sharding import Placement, sharded_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")

Moments = tuple[str, dict[str, Tensor], Placement]


def full_moments(chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> Iterator[Moments]:
    """(name, state, placement) of every parameter of this rank: both moments, and the fp32 weight where the model's is bf16, each in the
    parameter's full local shape.

    Communicates: data-parallel groups of the parameters, if the distributed optimizer has divided the state among their ranks.
    """
    pieces = {piece.parameter: piece for piece in _pieces(optimizer)}
    is_divided = any(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)
    for model, name, parameter, place in _parameters(chunks):
        group = model.groups.expt_dp if getattr(parameter, "is_routed_expert", False) else model.groups.dp_cp
        tensors = {kind: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device) for kind in _kinds(parameter)}
        if parameter in pieces:
            piece = pieces[parameter]
            for kind, tensor in tensors.items():
                # before the first update there are no moments: zero
                mine = piece.main if kind == "main" else piece.owner.state[piece.main].get(kind)
                if mine is not None:
                    piece.part_of(tensor).copy_(mine.detach())
        if is_divided and group.size() > 1:
            for tensor in tensors.values():
                dist.all_reduce(tensor, group=group)  # every element is on one rank, the others add zero
        yield name, tensors, place


def sharded_optimizer_state(moments: Iterable[Moments]) -> dict[str, dict[str, ShardedBase]]:
    """What `full_moments` returns, for megatron's distributed checkpoints."""
    return {
        name: {kind: sharded_tensor(f"optimizer.{kind}.", tensor, place) for kind, tensor in tensors.items()}
        for name, tensors, place in moments
    }


def wanted_optimizer_state(chunks: list[HunyuanModel]) -> dict[str, dict[str, ShardedBase]]:
    """What to read for `restore_optimizer_state`: the same tensors, uninitialised."""
    return {
        name: {
            kind: sharded_tensor(f"optimizer.{kind}.", torch.empty(parameter.shape, device=parameter.device), place)
            for kind in _kinds(parameter)
        }
        for _, name, parameter, place in _parameters(chunks)
    }


@torch.no_grad()
def restore_optimizer_state(
    chunks: list[HunyuanModel], optimizer: MegatronOptimizer, loaded: dict[str, dict[str, Tensor]], num_updates: int
) -> None:
    """Copy this rank's share of what was read into the optimizer, and set the number of updates made. The model is loaded before."""
    names = {parameter: name for _, name, parameter, _ in _parameters(chunks)}
    for piece in _pieces(optimizer):
        tensors = {kind: piece.part_of(tensor) for kind, tensor in loaded[names[piece.parameter]].items()}
        piece.main.copy_(tensors["main"] if "main" in tensors else piece.part_of(piece.parameter))
        state = {kind: torch.empty_like(piece.main).copy_(tensors[kind]) for kind in MOMENTS}
        if isinstance(piece.owner, torch.optim.Adam):
            state["step"] = torch.tensor(float(num_updates), device=piece.main.device)
        else:  # the fused ones of Apex and Transformer Engine count for a group
            for group in piece.owner.param_groups:
                group["step"] = num_updates
        piece.owner.state[piece.main] = state
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_sub_optimizers_state_to_hdo()  # as after every step


@torch.no_grad()
def reload_weights(optimizer: MegatronOptimizer) -> None:
    """Copy this rank's weights, which something else has written, into what the optimizer updates in their place.

    Core's reload_model_params forgets the offloaded copies of fp32 weights.
    """
    for piece in _pieces(optimizer):
        piece.main.copy_(piece.part_of(written_values(piece.parameter)))


def _kinds(parameter: Tensor) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else ("main", *MOMENTS)


def _parameters(chunks: list[HunyuanModel]) -> Iterator[tuple[HunyuanModel, str, torch.nn.Parameter, Placement]]:
    for model in chunks:
        places = model.placements()
        for name, parameter in model.named_parameters():
            yield model, name, parameter, places[name]


class _Piece(NamedTuple):
    """What the optimizer of this rank updates of one parameter."""

    parameter: torch.nn.Parameter
    main: Tensor
    """fp32; the parameter itself, a part of it, or a copy, which may be on the host (offloaded)."""
    owner: torch.optim.Optimizer
    """Whose state has the moments, under `main`."""
    first: int = 0
    """Element of the parameter with which it begins."""

    def part_of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor in the parameter's shape, as a view in the shape of `main`."""
        return tensor.detach().view(-1)[self.first : self.first + self.main.numel()].view_as(self.main)


def _pieces(optimizer: MegatronOptimizer) -> Iterator[_Piece]:
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer):
            is_offloaded = isinstance(inner, HybridDeviceOptimizer)
            parameters = chain(*part.model_float16_groups, *part.model_fp32_groups)
            # with core's offloaded optimizer the distributed one has no main weights
            shards = chain(*(part.shard_float16_groups if is_offloaded else part.shard_fp32_from_float16_groups), *part.shard_fp32_groups)
            owners = _owners(inner) if is_offloaded else {}
            for parameter, shard in zip(parameters, shards, strict=True):
                main = inner.param_to_inner_param[shard] if is_offloaded else shard
                yield _Piece(
                    parameter, main, owners[main] if is_offloaded else inner, part._get_model_param_range_map(parameter)["param"].start
                )
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for parameter, main in zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True):
                yield _Piece(parameter, main, inner)
            for parameter in chain(*part.fp32_from_fp32_groups):
                yield _Piece(parameter, parameter, inner)
        else:
            for parameter in part.get_parameters():
                yield _Piece(parameter, parameter, inner)


def _owners(optimizer: HybridDeviceOptimizer) -> dict[Tensor, torch.optim.Optimizer]:
    """Weight on the host or the device -> the one of the offloaded optimizer's own optimizers that updates it."""
    return {weight: owner for owner in optimizer.sub_optimizers for group in owner.param_groups for weight in group["params"]}
