"""Which part of each parameter this rank's optimizer updates, and where it keeps its state, for any optimizer class."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

# isort: split
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor


class Piece(NamedTuple):
    """The part of one parameter that this rank's optimizer updates."""

    parameter: torch.nn.Parameter
    main: Tensor
    """fp32: the parameter itself, a part of it, or a copy, which may be offloaded to the host. bf16: a part of the
    parameter, whose fp32 value is split."""
    owner: torch.optim.Optimizer
    """The optimizer whose state has the moments under the key `main`."""
    first: int = 0
    """Index of its first element in the flattened parameter."""

    @property
    def is_split(self) -> bool:
        """Whether the fp32 main weight is `main` and the remainder in the optimizer's state."""
        return self.main.dtype != torch.float32

    def store(self, name: str, value: Tensor, is_own: bool = False) -> None:
        """Put a moment (fp32) or a remainder into the optimizer's state, in the format it keeps there: a copy, or with
        `is_own` the tensor itself, where it has that format."""
        if hasattr(self.owner, "set_scaled_state"):
            self.owner.set_scaled_state(self.main, name, value)
        elif is_own and (value.dtype, value.device) == (self.main.dtype, self.main.device):
            self.owner.state[self.main][name] = value
        else:
            self.owner.state[self.main][name] = torch.empty_like(self.main).copy_(value)

    def part_of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor in the parameter's shape, as a view in the shape of `main`."""
        return tensor.detach().view(-1)[self.first : self.first + self.main.numel()].view_as(self.main)


def pieces_of(optimizer: MegatronOptimizer) -> Iterator[Piece]:
    """Every piece of this rank's optimizer."""
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer):
            is_offloaded = isinstance(inner, HybridDeviceOptimizer)
            # then the inner optimizer has the main weights, and the distributed one none
            has_no_main = is_offloaded or splits_main_weights(part)
            parameters = chain(*part.model_float16_groups, *part.model_fp32_groups)
            shards = chain(
                *(part.shard_float16_groups if has_no_main else part.shard_fp32_from_float16_groups),
                *part.shard_fp32_groups,
            )
            owners = _owners(inner) if is_offloaded else {}
            for parameter, shard in zip(parameters, shards, strict=True):
                main = inner.param_to_inner_param[shard] if is_offloaded else shard
                yield Piece(
                    parameter,
                    main,
                    owners[main] if is_offloaded else inner,
                    part._get_model_param_range_map(parameter)["param"].start,
                )
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for parameter, main in zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True):
                yield Piece(parameter, main, inner)
            for parameter in chain(*part.fp32_from_fp32_groups):
                yield Piece(parameter, parameter, inner)
        else:
            for parameter in part.get_parameters():
                yield Piece(parameter, parameter, inner)


def splits_main_weights(part: MegatronOptimizer) -> bool:
    """Whether this part's main weights are split (checkpoint.split_weights)."""
    is_offloaded = isinstance(part.optimizer, HybridDeviceOptimizer)
    return part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and not is_offloaded


def _owners(optimizer: HybridDeviceOptimizer) -> dict[Tensor, torch.optim.Optimizer]:
    """Weight on the host or the device -> the sub-optimizer of the offloaded optimizer that updates it."""
    return {
        weight: owner
        for owner in optimizer.sub_optimizers
        for group in owner.param_groups
        for weight in group["params"]
    }
