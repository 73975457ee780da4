"""The layers that run everywhere: megatron-core's tensor-parallel linears, and this project's grouped linear and norm.

Shapes: T tokens, I input, O output.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from hunyuan_pretrain.model.functions import plain_functions
from hunyuan_pretrain.model.grouped_linear import GroupedLinear
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.norm import RMSNorm
from hunyuan_pretrain.model.spec import Spec
from hunyuan_pretrain.parallel.sharding import mark_sharded


def local_spec() -> Spec:
    """The spec that needs neither Transformer Engine nor a GPU."""
    return Spec(
        column_parallel_linear=column_parallel_linear,
        row_parallel_linear=row_parallel_linear,
        column_parallel_grouped_linear=partial(GroupedLinear, partition_dim=1),
        row_parallel_grouped_linear=partial(GroupedLinear, partition_dim=2),
        norm=RMSNorm,
        input_norm=RMSNorm,
        functions=plain_functions(),
    )


def column_parallel_linear(
    config: HunyuanConfig,
    input_size: int,
    output_size: int,
    groups: ProcessGroupCollection,
    *,
    linear_class: type[ColumnParallelLinear] = ColumnParallelLinear,
) -> torch.nn.Module:
    """(T, I) -> (T, O / ranks): core's linear, its output sharded over the tensor-parallel ranks."""
    linear = linear_class(
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        tp_group=groups.tp,
    )
    mark_sharded(linear.weight, 0)
    return linear


def row_parallel_linear(
    config: HunyuanConfig,
    input_size: int,
    output_size: int,
    groups: ProcessGroupCollection,
    *,
    linear_class: type[RowParallelLinear] = RowParallelLinear,
) -> torch.nn.Module:
    """(T, I / ranks) -> (T, O): core's linear, its input sharded over the tensor-parallel ranks; sums their results."""
    linear = linear_class(
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=groups.tp,
    )
    mark_sharded(linear.weight, 1)
    return linear
