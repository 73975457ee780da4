"""Training steps in emulated FP8, and what the delayed recipe remembers between them.

No state is kept here: each `Fp8Matmul` of the model knows whether a step is open, and holds its scales. The functions
have the same names as in model/engine/fp8.py; model/engines.py chooses.

Shapes: e experts of this rank (1 for a linear layer), H steps of history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.model.fp8.emulated import Fp8Matmul
from hunyuan_pretrain.runtime.handover import handed_over


def matmuls(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Fp8Matmul]]:
    """Yields (name of the layer, its `Fp8Matmul`) for this rank's model chunks."""
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, Fp8Matmul):
                yield name.rpartition(".")[0], module


def scaling_state(models: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """As `scaling_state` of model/engines.py. Not copies: do not modify them."""
    return scaling_tensors(models)


def scaling_tensors(models: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """The tensors that layers read and write: "layer.operand.history" (H, e) and "layer.operand.scale" (e,)."""
    return {
        f"{layer}.{operand}.{kind}": tensor
        for layer, matmul in matmuls(models)
        if matmul.recipe.is_delayed
        for operand, scale in matmul.delayed.items()
        for kind, tensor in (("history", scale.history_He), ("scale", scale.scale_e))
    }


def load_scaling_state(models: Sequence[torch.nn.Module], state: dict[str, Tensor]) -> None:
    """Write what `scaling_state` of the same layers returned. Raises KeyError if an entry is missing."""
    for name, tensor in scaling_tensors(models).items():
        tensor.copy_(state[name])


@contextmanager
def training_step(models: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> Iterator[None]:
    """As `training_step` of model/engines.py: opens a step in every `Fp8Matmul`, closes it, then updates the delayed
    scales."""
    found = [matmul for _, matmul in matmuls(models)]
    for matmul in found:
        matmul.begin_step()
    try:
        yield
    finally:
        for matmul in found:
            matmul.end_step()
    _update_scales(found, groups)


def _update_scales(found: list[Fp8Matmul], groups: ProcessGroupCollection) -> None:
    for is_expert, shared_by in ((False, groups.tp_dp_cp), (True, groups.expt_tp_dp)):
        mine = [matmul for matmul in found if matmul.is_expert == is_expert and matmul.recipe.is_delayed]
        delayed: list[Any] = [scale for matmul in mine for scale in matmul.delayed.values()]
        if not delayed:
            continue
        current = torch.cat([scale.history_He[0] for scale in delayed])
        if shared_by.size() > 1:
            handed_over("all_reduce", current, is_written=True)
            dist.all_reduce(current, op=dist.ReduceOp.MAX, group=shared_by)
        for scale, amax_e in zip(delayed, current.split([scale.scale_e.numel() for scale in delayed]), strict=True):
            scale.history_He[0] = amax_e
            scale.update()
