"""Which class fills each slot of the model; the only place that chooses.

A `Spec` holds constructors. `local_spec` takes megatron-core's own tensor-parallel linears and this project's grouped linear
and runs everywhere; model/transformer_engine.py has the one of Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from hunyuan_pretrain.model.experts import GroupedLinear
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.norm import RMSNorm
from hunyuan_pretrain.model.packed_attention import Block, packed_attention
from hunyuan_pretrain.parallel.sharding import mark_divided

LinearFactory = Callable[[HunyuanConfig, int, int, ProcessGroupCollection], torch.nn.Module]
NormFactory = Callable[[HunyuanConfig, int], torch.nn.Module]
CoreAttention = Callable[[Tensor, Tensor, Tensor, Sequence[Block]], Tensor]


@dataclass(frozen=True)
class Spec:
    """Constructors (config, input size, output size, groups) of the model's matrix products; sizes are those of the whole weight.

    And of what else an engine may have kernels of its own for.
    """

    column_parallel_linear: LinearFactory
    row_parallel_linear: LinearFactory
    column_parallel_grouped_linear: LinearFactory
    row_parallel_grouped_linear: LinearFactory
    norm: NormFactory = RMSNorm
    """(config, size)."""
    input_norm: NormFactory = RMSNorm
    """The norm whose output nothing but the projection of the attention reads."""
    column_parallel_linear_after_norm: Callable[..., torch.nn.Module] | None = None
    """That projection, constructed with the norm as last argument; None: column_parallel_linear, which has no part in the norm."""
    core_attention: Callable[[HunyuanConfig], CoreAttention] = lambda config: packed_attention
    row_multiple: Callable[[], int] = lambda: 1
    """Returns what the number of rows of each expert has to be a multiple of at this time."""

    def linear_after(
        self, norm: torch.nn.Module, config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection
    ) -> torch.nn.Module:
        """The column-parallel linear that alone reads the output of `norm`."""
        if self.column_parallel_linear_after_norm is None:
            return self.column_parallel_linear(config, input_size, output_size, groups)
        return self.column_parallel_linear_after_norm(config, input_size, output_size, groups, norm)


def _column(config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection) -> torch.nn.Module:
    linear = ColumnParallelLinear(
        input_size, output_size, config=config, init_method=config.init_method, bias=False, gather_output=False, tp_group=groups.tp
    )
    mark_divided(linear.weight, 0)
    return linear


def _row(config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection) -> torch.nn.Module:
    linear = RowParallelLinear(
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=groups.tp,
    )
    mark_divided(linear.weight, 1)
    return linear


def local_spec() -> Spec:
    """The spec that needs neither Transformer Engine nor a GPU."""
    return Spec(
        column_parallel_linear=_column,
        row_parallel_linear=_row,
        column_parallel_grouped_linear=partial(GroupedLinear, partition_dim=1),
        row_parallel_grouped_linear=partial(GroupedLinear, partition_dim=2),
    )


def choose_spec(config: HunyuanConfig, layer: int) -> Spec:
    """The spec of a layer, counted from 0 over the whole model."""
    if config.uses_transformer_engine:
        # imported where it is used only: it is an optional package, and loading it takes seconds
        from hunyuan_pretrain.model.transformer_engine import transformer_engine_spec

        return transformer_engine_spec(config, layer)
    return local_spec()
