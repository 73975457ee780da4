"""Linear layers and experts whose matmuls have the operands that Transformer Engine's have in FP8, on any machine.

A forward matmul and its two gradients read six quantised operands: x and w; dY and w; dY and x. Values are rounded to
FP8 and multiplied by their inverse scales (quantise.py). The matmul itself is computed in fp32 and rounded to the dtype
of x, as the FP8 kernels accumulate in fp32.

One difference: the output of the norm that Transformer Engine fuses into a projection is rounded to bf16 here before it
is quantised; its kernel for the delayed recipe skips that rounding.

A delayed scale changes once per optimizer step, after its last micro-batch, from the largest value over the global
batch and all ranks that hold the tensor. So it depends neither on the layout nor on how a batch is split.

Shapes: b independent matrices (experts; 1 for a linear layer), R rows, C columns, I input, O output, e experts of this
rank, T tokens, D hidden; X, Y, Z of any matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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

from hunyuan_pretrain.config.recipe import OPERANDS, Operand, Recipe
from hunyuan_pretrain.model.expert_rows import RowSplits
from hunyuan_pretrain.model.fp8.quantise import DelayedScale, quantize, to_fp32
from hunyuan_pretrain.model.grouped_linear import GroupedLinear
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.local_layers import column_parallel_linear, local_spec, row_parallel_linear
from hunyuan_pretrain.model.spec import LinearFactory, Spec


class Fp8Matmul(torch.nn.Module):
    """y = x W^T of one linear layer or of the experts of this rank, with quantised operands; holds no weight.

    `weight` is (O, I), or (e, O, I) with the row count of each expert in `splits`.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_experts: int,
        is_expert: bool,
        accumulate: bool,
        device: torch.device | str,
        has_fp8_parameters: bool = False,
    ) -> None:
        super().__init__()
        self.recipe, self.is_expert, self.accumulate, self.has_fp8_parameters = (
            recipe,
            is_expert,
            accumulate,
            has_fp8_parameters,
        )
        self._weights: dict[tuple[int, bool], Tensor] | None = None
        """Quantised weights of the open step, by first expert and direction; None outside of a step."""
        self.watch: Callable[[Operand, Tensor, Tensor], None] | None = None
        """Called with (operand, scaled values before rounding, FP8 values) for every quantised tensor."""
        if recipe.is_delayed:
            self.delayed: Any = torch.nn.ModuleDict(
                {operand: DelayedScale(recipe, operand, num_experts, device) for operand in OPERANDS}
            )

    def forward(self, x_RI: Tensor, weight: Tensor, splits: RowSplits | None = None) -> Tensor:
        """(R, I) -> (R, O), in the dtype of x. Communicates nothing."""
        return _Fp8MatmulFunction.apply(x_RI, weight, splits or RowSplits.equal(1, x_RI.shape[0]), self)

    @contextmanager
    def as_kept(self, weight: torch.nn.Parameter) -> Iterator[None]:
        """Inside, with gradients disabled, `weight` has the values that a parameter in FP8 only would hold."""
        if not self.has_fp8_parameters or torch.is_grad_enabled():
            yield
            return
        exact = weight.data
        weight_eOI = exact if exact.dim() == 3 else exact[None]
        weight.data = (
            self.operand(weight_eOI, "w", False, slice(0, len(weight_eOI)), False).to(exact.dtype).view_as(exact)
        )
        try:
            yield
        finally:
            weight.data = exact

    def operand(self, x_bRC: Tensor, operand: Operand, along_rows: bool, experts: slice, is_first_use: bool) -> Tensor:
        """The fp32 values of x_bRC's FP8 numbers, quantised for a sum over columns, or (along_rows) over rows."""
        # a weight is constant during a step; with square blocks or a single scale, both directions are the same
        is_same_both_ways = self.recipe.block_shape("w", False) == self.recipe.block_shape("w", True)
        key = (experts.start, along_rows and not is_same_both_ways)
        if operand == "w" and self._weights is not None and key in self._weights:
            return self._weights[key]
        scale_b = None
        if self.recipe.is_delayed:
            delayed = self.delayed[operand]
            if is_first_use:
                delayed.observe(x_bRC, experts)
            scale_b = delayed.scale_e[experts]
        scaled, values, inverse = quantize(x_bRC, self.recipe, operand, along_rows, scale_b)
        if self.watch is not None and is_first_use:
            self.watch(operand, scaled, values)
        _, R, C = x_bRC.shape
        b, num_r, r, num_c, c = values.shape
        found = to_fp32(values).mul_(inverse).view(b, num_r * r, num_c * c)[:, :R, :C]
        if operand == "w" and self._weights is not None:
            self._weights[key] = found
        return found

    @property
    def is_in_step(self) -> bool:
        """Whether the layer computes in FP8 now."""
        return self._weights is not None

    def begin_step(self) -> None:
        """Compute in FP8 from now on."""
        self._weights = {}

    def end_step(self) -> None:
        """Compute without FP8, and drop the quantised weights, which are about to change."""
        self._weights = None


def _pieces(splits: RowSplits) -> Iterator[tuple[slice, slice, int]]:
    """Yields (experts, rows of x, number of matrices) that can be computed together: all experts if their splits are
    equal, else one at a time."""
    num_experts = len(splits.rows_e)
    if splits.are_equal:
        yield slice(0, num_experts), slice(0, splits.num_rows), num_experts
        return
    start = 0
    for expert, count in enumerate(splits.rows_e):
        yield slice(expert, expert + 1), slice(start, start + count), 1
        start += count


def _matrices(rows_RC: Tensor, b: int) -> Tensor:
    """The concatenated rows of b matrices, as (b, R / b, C)."""
    return rows_RC.view(b, rows_RC.shape[0] // b, rows_RC.shape[1])


class _Fp8MatmulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight: Tensor, splits: RowSplits, matmul: Fp8Matmul) -> Tensor:
        ctx.splits, ctx.matmul, ctx.weight = splits, matmul, weight
        x_RI = x_RI.contiguous()
        ctx.save_for_backward(x_RI, weight)
        weight_eOI = weight if weight.dim() == 3 else weight[None]
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_eOI.shape[1])
        for experts, part, b in _pieces(splits):
            x_bRI = matmul.operand(_matrices(x_RI[part], b), "x", False, experts, True)
            w_bOI = matmul.operand(weight_eOI[experts], "w", False, experts, True)
            y_RO[part] = _matmul(x_bRI, w_bOI.transpose(1, 2), x_RI.dtype).flatten(0, 1)
        return y_RO

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RI, weight = ctx.saved_tensors
        matmul: Fp8Matmul = ctx.matmul
        weight_eOI = weight if weight.dim() == 3 else weight[None]
        main_grad: Tensor | None = getattr(ctx.weight, "main_grad", None) if matmul.accumulate else None
        target = main_grad if main_grad is not None else torch.zeros_like(weight)
        target_eOI = target if target.dim() == 3 else target[None]
        grad_RO, grad_x_RI = grad_RO.contiguous(), torch.empty_like(x_RI)
        for experts, part, b in _pieces(ctx.splits):
            x_bRI, grad_bRO = (_matrices(rows[part], b) for rows in (x_RI, grad_RO))
            dy_bRO = matmul.operand(grad_bRO, "dy", False, experts, True)
            w_bOI = matmul.operand(weight_eOI[experts], "w", True, experts, False)
            grad_x_RI[part] = _matmul(dy_bRO, w_bOI, x_RI.dtype).flatten(0, 1)
            dy_bRO = matmul.operand(grad_bRO, "dy", True, experts, False)
            x_bRI = matmul.operand(x_bRI, "x", True, experts, False)
            # the kernels add into an fp32 main_grad in fp32, without rounding to the dtype of x
            target_eOI[experts] += _matmul(dy_bRO.transpose(1, 2), x_bRI, target.dtype)
        if main_grad is None:
            return grad_x_RI, target, None, None
        ctx.weight.grad_added_to_main_grad = True
        return grad_x_RI, torch.empty_like(weight), None, None


def _matmul(a_bXY: Tensor, b_bYZ: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, accumulated in fp32 (wider where dtype is), rounded to dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.bmm(a_bXY.to(wide), b_bYZ.to(wide)).to(dtype)


# --- the layers -------------------------------------------------------------------------------------------------------


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Core's column-parallel linear; in emulated FP8 during a training step."""

    fp8: Fp8Matmul

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(T, D) of this rank's tokens -> ((all T, O / ranks), None)."""
        if not self.fp8.is_in_step:
            with self.fp8.as_kept(self.weight):
                return super().forward(input_, *args, **kwargs)
        # quantised after the gather: one scale for the tokens of all ranks, which Transformer Engine gets from its
        # reduced amax
        whole_TD = (
            gather_from_sequence_parallel_region(input_, group=self.tp_group) if self.sequence_parallel else input_
        )
        return self.fp8(whole_TD, self.weight), None


class Fp8RowParallelLinear(RowParallelLinear):
    """Core's row-parallel linear; in emulated FP8 during a training step."""

    fp8: Fp8Matmul

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, I / ranks) -> ((this rank's share of T, D), None)."""
        if not self.fp8.is_in_step:
            with self.fp8.as_kept(self.weight):
                return super().forward(input_)
        partial_TD = self.fp8(input_, self.weight)
        return reduce_scatter_to_sequence_parallel_region(
            partial_TD, group=self.tp_group
        ) if self.sequence_parallel else partial_TD, None


class Fp8GroupedLinear(GroupedLinear):
    """The grouped linear; in emulated FP8 during a training step."""

    fp8: Fp8Matmul

    def forward(self, x_RI: Tensor, splits: RowSplits) -> Tensor:
        """(R, I) -> (R, O), rows sorted by expert."""
        if not self.fp8.is_in_step:
            with self.fp8.as_kept(self.weight):
                return super().forward(x_RI, splits)
        return self.fp8(x_RI, self.weight, splits)


def emulated_fp8_spec() -> Spec:
    """The local spec's layers, which compute in the FP8 recipe of config.precision during a training step."""
    column = partial(column_parallel_linear, linear_class=Fp8ColumnParallelLinear)
    row = partial(row_parallel_linear, linear_class=Fp8RowParallelLinear)
    return replace(
        local_spec(),
        column_parallel_linear=_in_fp8(column, is_expert=False),
        row_parallel_linear=_in_fp8(row, is_expert=False),
        column_parallel_grouped_linear=_in_fp8(partial(Fp8GroupedLinear, partition_dim=1), is_expert=True),
        row_parallel_grouped_linear=_in_fp8(partial(Fp8GroupedLinear, partition_dim=2), is_expert=True),
    )


def _in_fp8(make: LinearFactory, is_expert: bool) -> LinearFactory:
    def make_in_fp8(
        config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection
    ) -> torch.nn.Module:
        linear = make(config, input_size, output_size, groups)
        num_experts = config.num_moe_experts // groups.ep.size() if is_expert else 1
        formats = config.precision
        accumulate, device = config.gradient_accumulation_fusion, weight_device(config)
        assert formats.recipe is not None
        linear.fp8 = Fp8Matmul(formats.recipe, num_experts, is_expert, accumulate, device, formats.fp8_parameters)
        return linear

    return make_in_fp8
