"""The state of AdamW as fp32 tensors in the shapes and under the names of the parameters, whatever layout and optimizer class holds it.

Core's own form is not used: it cannot be read under another expert-parallel size, mixes up parameter groups that differ only in
their rate, and fails for torch's Adam and for models whose routers are fp32 among bf16 weights. Settings of parameter groups are not saved
at all: they are those of the running experiment.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import hunyuan_pretrain.model  # noqa: F401  makes megatron importable

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.sharding import Placement, sharded_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def full_moments(chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> Iterator[tuple[str, dict[str, Tensor], Placement]]:
    """(name, state, placement) of every parameter of this rank: both moments, and the fp32 weight where the model's is bf16, each in the
    parameter's full local shape.

    Communicates: data-parallel groups of the parameters, if the distributed optimizer has divided the state among their ranks.
    """
    pieces = {parameter: (part, main, first) for part, parameter, main, first in _pieces(optimizer)}
    is_divided = any(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)
    for model, name, parameter, place in _parameters(chunks):
        group = model.groups.expt_dp if getattr(parameter, "is_routed_expert", False) else model.groups.dp_cp
        tensors = {kind: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device) for kind in _kinds(parameter)}
        if parameter in pieces:
            part, main, first = pieces[parameter]
            for kind, tensor in tensors.items():
                # before the first update there are no moments: zero
                mine = main if kind == "main" else part.optimizer.state[main].get(kind)
                if mine is not None:
                    tensor.view(-1)[first : first + mine.numel()] = mine.detach().reshape(-1)
        if is_divided and group.size() > 1:
            for tensor in tensors.values():
                dist.all_reduce(tensor, group=group)  # every element is on one rank, the others add zero
        yield name, tensors, place


def sharded_optimizer_state(chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> dict[str, dict[str, ShardedBase]]:
    """What `full_moments` returns, for megatron's distributed checkpoints."""
    return {
        name: {kind: sharded_tensor(f"optimizer.{kind}.{name}", tensor, place) for kind, tensor in tensors.items()}
        for name, tensors, place in full_moments(chunks, optimizer)
    }


def wanted_optimizer_state(chunks: list[HunyuanModel]) -> dict[str, dict[str, ShardedBase]]:
    """What to read for `restore_optimizer_state`: the same tensors, uninitialised."""
    return {
        name: {
            kind: sharded_tensor(f"optimizer.{kind}.{name}", torch.empty_like(parameter, dtype=torch.float32), place)
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
    for part, parameter, main, first in _pieces(optimizer):
        tensors = {kind: tensor.view(-1)[first : first + main.numel()].view_as(main) for kind, tensor in loaded[names[parameter]].items()}
        if "main" in tensors:
            main.copy_(tensors["main"])
        state = {kind: tensors[kind].clone() for kind in MOMENTS}
        if isinstance(part.optimizer, torch.optim.Adam):
            state["step"] = torch.tensor(float(num_updates), device=main.device)
        part.optimizer.state[main] = state
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.Adam):  # the fused ones of Apex and Transformer Engine count for a group
            for group in part.optimizer.param_groups:
                group["step"] = num_updates


def _kinds(parameter: Tensor) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else ("main", *MOMENTS)


def _parameters(chunks: list[HunyuanModel]) -> Iterator[tuple[HunyuanModel, str, torch.nn.Parameter, Placement]]:
    for model in chunks:
        places = model.placements()
        for name, parameter in model.named_parameters():
            yield model, name, parameter, places[name]


def _pieces(optimizer: MegatronOptimizer) -> Iterator[tuple[Any, torch.nn.Parameter, Tensor, int]]:
    """(optimizer, model parameter, the tensor that it updates for it, first element of the parameter in that tensor) on this rank."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            parameters = chain(*part.model_float16_groups, *part.model_fp32_groups)
            mains = chain(*part.shard_fp32_from_float16_groups, *part.shard_fp32_groups)
            for parameter, main in zip(parameters, mains, strict=True):
                yield part, parameter, main, part._get_model_param_range_map(parameter)["param"].start
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for parameter, main in zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True):
                yield part, parameter, main, 0
            for parameter in chain(*part.fp32_from_fp32_groups):
                yield part, parameter, parameter, 0
        else:
            for parameter in part.get_parameters():
                yield part, parameter, parameter, 0
