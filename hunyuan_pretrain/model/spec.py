"""Which class fills each slot of the model; the only place that chooses.

A `Spec` holds constructors. `local_spec` takes megatron-core's own tensor-parallel linears and this project's grouped linear
and runs everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from hunyuan_pretrain.model.experts import GroupedLinear
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.parallel.sharding import mark_divided

LinearFactory = Callable[[HunyuanConfig, int, int, ProcessGroupCollection], torch.nn.Module]


@dataclass(frozen=True)
class Spec:
    """Constructors (config, input size, output size, groups) of the model's matrix products; sizes are those of the whole weight."""

    column_parallel_linear: LinearFactory
    row_parallel_linear: LinearFactory
    column_parallel_grouped_linear: LinearFactory
    row_parallel_grouped_linear: LinearFactory


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
    return local_spec()
