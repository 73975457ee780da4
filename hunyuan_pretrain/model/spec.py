"""Which class fills each slot of the model; the only place that chooses.

A `Spec` holds constructors. `local_spec` takes megatron-core's own tensor-parallel linears and this project's grouped
linear and runs everywhere; `emulated_fp8_spec` takes the same, which compute in emulated FP8 during a training step
(model.fp8.training_step); model/transformer_engine.py has the one of Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from hunyuan_pretrain.model.experts import GroupedLinear, Splits
from hunyuan_pretrain.model.fp8 import Fp8Product
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.norm import RMSNorm
from hunyuan_pretrain.model.packed_attention import Block, packed_attention
from hunyuan_pretrain.parallel.sharding import mark_divided

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
    norm: NormFactory = RMSNorm
    """(config, size)."""
    input_norm: NormFactory = RMSNorm
    """The norm whose output nothing but the projection of the attention reads."""
    column_parallel_linear_after_norm: Callable[..., torch.nn.Module] | None = None
    """That projection, constructed with the norm as last argument; None: column_parallel_linear, which has no part in
    the norm."""
    core_attention: Callable[[HunyuanConfig], CoreAttention] = lambda config: packed_attention
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


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Core's column-parallel linear; in emulated FP8 during a training step."""

    fp8: Fp8Product

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(T, D) of this rank's tokens -> (whole T, O / ranks), None."""
        if not self.fp8.is_active:
            with self.fp8.as_kept(self.weight):
                return super().forward(input_, *args, **kwargs)
        # quantised when it is gathered: one scale for the tokens of all ranks, as Transformer Engine's reduced amax
        # gives
        whole_TD = (
            gather_from_sequence_parallel_region(input_, group=self.tp_group) if self.sequence_parallel else input_
        )
        return self.fp8(whole_TD, self.weight), None


class Fp8RowParallelLinear(RowParallelLinear):
    """Core's row-parallel linear; in emulated FP8 during a training step."""

    fp8: Fp8Product

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, I / ranks) -> (this rank's share of T, D), None."""
        if not self.fp8.is_active:
            with self.fp8.as_kept(self.weight):
                return super().forward(input_)
        partial_TD = self.fp8(input_, self.weight)
        return reduce_scatter_to_sequence_parallel_region(
            partial_TD, group=self.tp_group
        ) if self.sequence_parallel else partial_TD, None


class Fp8GroupedLinear(GroupedLinear):
    """The grouped linear; in emulated FP8 during a training step."""

    fp8: Fp8Product

    def forward(self, x_RI: Tensor, splits: Splits) -> Tensor:
        """(R, I) -> (R, O), rows sorted by expert."""
        if not self.fp8.is_active:
            with self.fp8.as_kept(self.weight):
                return super().forward(x_RI, splits)
        return self.fp8(x_RI, self.weight, splits)


def _column(
    config: HunyuanConfig,
    input_size: int,
    output_size: int,
    groups: ProcessGroupCollection,
    *,
    linear_class: type[ColumnParallelLinear] = ColumnParallelLinear,
) -> torch.nn.Module:
    linear = linear_class(
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        tp_group=groups.tp,
    )
    mark_divided(linear.weight, 0)
    return linear


def _row(
    config: HunyuanConfig,
    input_size: int,
    output_size: int,
    groups: ProcessGroupCollection,
    *,
    linear_class: type[RowParallelLinear] = RowParallelLinear,
) -> torch.nn.Module:
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


def emulated_fp8_spec() -> Spec:
    """The same layers, computing in the FP8 recipe of config.number_formats during a training step."""
    return Spec(
        column_parallel_linear=_in_fp8(partial(_column, linear_class=Fp8ColumnParallelLinear), is_expert=False),
        row_parallel_linear=_in_fp8(partial(_row, linear_class=Fp8RowParallelLinear), is_expert=False),
        column_parallel_grouped_linear=_in_fp8(partial(Fp8GroupedLinear, partition_dim=1), is_expert=True),
        row_parallel_grouped_linear=_in_fp8(partial(Fp8GroupedLinear, partition_dim=2), is_expert=True),
    )


def _in_fp8(make: LinearFactory, is_expert: bool) -> LinearFactory:
    def make_in_fp8(
        config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection
    ) -> torch.nn.Module:
        linear = make(config, input_size, output_size, groups)
        num_experts = config.num_moe_experts // groups.ep.size() if is_expert else 1
        formats = config.number_formats
        accumulate, device = config.gradient_accumulation_fusion, weight_device(config)
        assert formats.recipe is not None
        linear.fp8 = Fp8Product(formats.recipe, num_experts, is_expert, accumulate, device, formats.fp8_parameters)
        return linear

    return make_in_fp8


def choose_spec(config: HunyuanConfig, layer: int) -> Spec:
    """The spec of a layer, counted from 0 over the whole model."""
    if config.uses_transformer_engine:
        # imported where it is used only: it is an optional package, and loading it takes seconds
        from hunyuan_pretrain.model.transformer_engine import transformer_engine_spec

        return transformer_engine_spec(config, layer)
    return emulated_fp8_spec() if config.number_formats.is_fp8_layer(layer, config.num_layers) else local_spec()
