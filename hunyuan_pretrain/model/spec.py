"""The slots of the model that an engine fills; model/engines.py chooses which.

A `Spec` holds constructors: of the layers that run everywhere (model/local_layers.py), of the same ones that compute in
emulated FP8 during a training step (model/fp8/emulated.py), or of Transformer Engine's (model/engine/layers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.packed_attention import Block

LinearFactory = Callable[[HunyuanConfig, int, int, ProcessGroupCollection], torch.nn.Module]
NormFactory = Callable[[HunyuanConfig, int], torch.nn.Module]
CoreAttention = Callable[[Tensor, Tensor, Tensor, Sequence[Block]], Tensor]


@dataclass(frozen=True)
class Spec:
    """Constructors (config, input size, output size, groups) of the model's matrix products; sizes are those of the
    whole weight.

    And of what else an engine may have kernels of its own for.
    """

    column_parallel_linear: LinearFactory
    row_parallel_linear: LinearFactory
    column_parallel_grouped_linear: LinearFactory
    row_parallel_grouped_linear: LinearFactory
    norm: NormFactory
    """(config, size)."""
    input_norm: NormFactory
    """The norm whose output nothing but the projection of the attention reads."""
    core_attention: Callable[[HunyuanConfig], CoreAttention]
    column_parallel_linear_after_norm: Callable[..., torch.nn.Module] | None = None
    """That projection, constructed with the norm as last argument; None: column_parallel_linear, which has no part in
    the norm."""
    row_multiple: Callable[[], int] = lambda: 1
    """Returns what the number of rows of each expert has to be a multiple of at this time."""

    def linear_after(
        self,
        norm: torch.nn.Module,
        config: HunyuanConfig,
        input_size: int,
        output_size: int,
        groups: ProcessGroupCollection,
    ) -> torch.nn.Module:
        """The column-parallel linear that alone reads the output of `norm`."""
        if self.column_parallel_linear_after_norm is None:
            return self.column_parallel_linear(config, input_size, output_size, groups)
        return self.column_parallel_linear_after_norm(config, input_size, output_size, groups, norm)
