"""The grouped linear layer: one weight matrix for each expert of this rank, applied to the rows of that expert.

Shapes: R rows of experts, I input size, O output size, e experts of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.model.expert_rows import RowSplits
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.parallel.sharding import mark_sharded


class GroupedLinear(torch.nn.Module):
    """One weight matrix for each expert of this rank, (e, O, I). Expert-tensor ranks shard O (partition_dim 1) or I
    (2)."""

    def __init__(
        self,
        config: HunyuanConfig,
        input_size: int,
        output_size: int,
        groups: ProcessGroupCollection,
        *,
        partition_dim: int,
    ) -> None:
        super().__init__()
        self.accumulate = config.gradient_accumulation_fusion
        self.weight = grouped_weight(config, input_size, output_size, groups, partition_dim)

    def forward(self, x_RI: Tensor, splits: RowSplits) -> Tensor:
        """(R, I) -> (R, O), rows sorted by expert."""
        return _GroupedMatmul.apply(x_RI, self.weight, splits, self.accumulate and hasattr(self.weight, "main_grad"))


def grouped_matmul(x_RI: Tensor, weight_eOI: Tensor, splits: RowSplits) -> Tensor:
    """(R, O): y = x W_i^T for the rows of each expert, sorted by expert."""
    return _GroupedMatmul.apply(x_RI, weight_eOI, splits, False)


class _GroupedMatmul(torch.autograd.Function):
    """y = x W_i^T for the rows of each expert. With equal splits all experts are one batched GEMM. A weight gradient
    for a main_grad is added into it, by the GEMM where their dtypes agree."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_eOI: Tensor, splits: RowSplits, accumulate: bool) -> Tensor:
        ctx.splits, ctx.accumulate, ctx.weight = splits, accumulate, weight_eOI
        # of frozen weights there is no gradient that reads the input
        ctx.save_for_backward(x_RI if ctx.needs_input_grad[1] else None, weight_eOI)
        e, output_size, _ = weight_eOI.shape
        if splits.are_equal:
            return torch.bmm(x_RI.view(e, splits.rows_e[0], -1), weight_eOI.transpose(1, 2)).view(-1, output_size)
        y_RO = x_RI.new_empty(x_RI.shape[0], output_size)
        rows_e = list(splits.rows_e)
        for x, y, weight_OI in zip(x_RI.split(rows_e), y_RO.split(rows_e), weight_eOI, strict=True):
            torch.mm(x, weight_OI.t(), out=y)
        return y_RO

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_RI, weight_eOI = ctx.saved_tensors
        if x_RI is None:
            return _add_gradients(grad_RO, None, weight_eOI, ctx.splits, None), None, None, None
        main_grad: Tensor | None = ctx.weight.main_grad if ctx.accumulate else None
        target = (
            main_grad if main_grad is not None and main_grad.dtype == grad_RO.dtype else torch.zeros_like(weight_eOI)
        )
        grad_x_RI = _add_gradients(grad_RO, x_RI, weight_eOI, ctx.splits, target)
        if main_grad is None:
            return grad_x_RI, target, None, None
        if target is not main_grad:
            main_grad.add_(target)
        # core's hook then skips its own addition; the returned tensor is never read
        ctx.weight.grad_added_to_main_grad = True
        return grad_x_RI, torch.empty_like(weight_eOI), None, None


def _add_gradients(
    grad_RO: Tensor, x_RI: Tensor | None, weight_eOI: Tensor, splits: RowSplits, weight_grad_eOI: Tensor | None
) -> Tensor:
    """Returns the gradient (R, I) of x; adds the weight's into weight_grad_eOI. With None for x there is none."""
    e, _, input_size = weight_eOI.shape
    if splits.are_equal:
        grad_eRO = grad_RO.view(e, splits.rows_e[0], -1)
        grad_x_RI = torch.bmm(grad_eRO, weight_eOI).view(-1, input_size)
        if x_RI is not None and weight_grad_eOI is not None:
            weight_grad_eOI.baddbmm_(grad_eRO.transpose(1, 2), x_RI.view(e, splits.rows_e[0], -1))
        return grad_x_RI
    grad_x_RI = grad_RO.new_empty(grad_RO.shape[0], input_size)
    rows_e = list(splits.rows_e)
    for grad, grad_x, weight_OI in zip(grad_RO.split(rows_e), grad_x_RI.split(rows_e), weight_eOI, strict=True):
        torch.mm(grad, weight_OI, out=grad_x)
    if x_RI is not None and weight_grad_eOI is not None:
        for grad, x, weight_grad_OI in zip(grad_RO.split(rows_e), x_RI.split(rows_e), weight_grad_eOI, strict=True):
            weight_grad_OI.addmm_(grad.t(), x)
    return grad_x_RI


# --- weights ----------------------------------------------------------------------------------------------------------


def grouped_weight(
    config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection, partition_dim: int
) -> Any:
    """This rank's shard of all expert weights as one parameter, uninitialised."""
    shape = grouped_shape(config, input_size, output_size, groups, partition_dim)
    weight: Any = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=weight_device(config)))
    mark_experts(weight, groups, partition_dim)
    return weight


def grouped_shape(
    config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection, partition_dim: int
) -> tuple[int, int, int]:
    """(e, O, I) of this rank's shard of all expert weights; partition_dim is sharded over the expert-tensor ranks."""
    shape = [config.num_moe_experts // groups.ep.size(), output_size, input_size]
    shape[partition_dim] //= groups.expt_tp.size()
    return shape[0], shape[1], shape[2]


def mark_experts(weight: Any, groups: ProcessGroupCollection, partition_dim: int) -> None:
    """Mark a weight as one of routed experts, sharded along partition_dim over the expert-tensor ranks."""
    # core reduces the gradients of such weights over the expert-data-parallel group
    weight.allreduce = groups.expt_dp.size() == groups.dp_cp.size()
    weight.is_routed_expert = True
    # unsharded experts too: every tensor-parallel rank holds other experts or shards, so the gradient norm has to count
    # them on every rank, not on the first only
    mark_sharded(weight, partition_dim)
