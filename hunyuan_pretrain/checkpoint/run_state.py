"""What a checkpoint holds of a rank besides weights and optimizer: random generators, and scales of the delayed FP8
recipe."""

from __future__ import annotations

from typing import Any

# isort: split
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from hunyuan_pretrain.model.engines import scaling_state
from hunyuan_pretrain.model.fp8.quantise import dtype_of
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.runtime.seeding import generator_state


def scaling_recipe(model: HunyuanModel) -> list[Any] | None:
    """What must be equal for a run to use a checkpoint's scales; None if the run has no scales that outlive a step."""
    formats = model.config.precision
    recipe = formats.recipe
    if recipe is None or not recipe.is_delayed:
        return None
    backward_dtype = str(dtype_of(recipe, "dy"))
    return [recipe.margin, recipe.history_steps, recipe.takes_max, backward_dtype, *formats.layers_in_bf16]


def sharded_scales(chunks: list[HunyuanModel]) -> dict[str, ShardedTensor]:
    """The state of the delayed recipe. All ranks that share a tensor hold the same state; an expert's state is on the
    expert's ranks."""
    groups, found = chunks[0].groups, {}
    for name, tensor in scaling_state(chunks).items():
        is_expert = ".experts." in name
        offsets = [(tensor.dim() - 1, groups.ep.rank(), groups.ep.size())] if is_expert else []
        replica = (
            (0, groups.expt_tp.rank(), groups.expt_dp.rank())
            if is_expert
            else (0, groups.tp.rank(), groups.dp_cp.rank())
        )
        found[name] = ShardedTensor.from_rank_offsets(f"fp8.{name}", tensor, *offsets, replica_id=replica)
    return found


def generator_object() -> ShardedObject:
    """The generators' state of this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return ShardedObject("generators", generator_state(), (world,), (rank,), replica_id=0)
