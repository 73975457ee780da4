"""The layers that an engine provides for the model; model/engines.py chooses the engine.

A `Spec` holds constructors: of the layers that run everywhere (model/local_layers.py), of the same layers in emulated
FP8 during a training step (model/fp8/emulated.py), or of Transformer Engine's (model/engine/layers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from hunyuan_pretrain.model.functions import Functions
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig

LinearFactory = Callable[[HunyuanConfig, int, int, ProcessGroupCollection], torch.nn.Module]
NormFactory = Callable[[HunyuanConfig, int], torch.nn.Module]


@dataclass(frozen=True)
class Spec:
    """Constructors of the model's linear layers and norms, and the functions between them.

    Those of linear layers take (config, input size, output size, groups), with the sizes of the whole weight.
    """

    column_parallel_linear: LinearFactory
    row_parallel_linear: LinearFactory
    column_parallel_grouped_linear: LinearFactory
    row_parallel_grouped_linear: LinearFactory
    norm: NormFactory
    """(config, size). The norm takes x and a branch (None: nothing), (T, D) each, and returns the norm of their sum and
    the sum, for what reads it next; model.norm.add_rms_norm."""
    input_norm: NormFactory
    """The norm whose output only the input projection of the attention reads."""
    functions: Functions
    column_parallel_linear_after_norm: Callable[..., torch.nn.Module] | None = None
    """That projection, with the norm as last argument of its constructor; None: column_parallel_linear, with the norm
    left as a separate layer."""
    row_multiple: Callable[[], int] = lambda: 1
    """Returns the number that the row count of each expert must currently be a multiple of."""

    def linear_after(
        self,
        norm: torch.nn.Module,
        config: HunyuanConfig,
        input_size: int,
        output_size: int,
        groups: ProcessGroupCollection,
    ) -> torch.nn.Module:
        """The column-parallel linear that is the only reader of `norm`'s output."""
        if self.column_parallel_linear_after_norm is None:
            return self.column_parallel_linear(config, input_size, output_size, groups)
        return self.column_parallel_linear_after_norm(config, input_size, output_size, groups, norm)
