"""The mixture-of-experts FFN: dispatch of tokens to experts over the expert-parallel ranks, the experts, the
combination.

Dispatch and combination are gathers in both directions, forward and backward, by the two index maps of the RoutingPlan;
no scatter adds into a row, so the result does not depend on the order of threads.

Shapes: T tokens of this rank, D hidden, K top-k, E experts, e experts of this rank, R rows (places in experts), F
expert ffn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.routing import RoutingPlan
from hunyuan_pretrain.parallel.collectives import all_gather_rows, exchange_rows
from hunyuan_pretrain.parallel.sharding import mark_divided
from hunyuan_pretrain.runtime.handover import to_device

Splits = int | list[int]
"""Rows of each local expert: one number for all, or one each."""


def _take(rows_RD: Tensor, index: Tensor, has_gaps: bool) -> Tensor:
    """rows_RD[index]; with gaps, an index of R means a row of zeros."""
    if not has_gaps:
        return rows_RD.index_select(0, index)
    taken = rows_RD.index_select(0, index.clamp(max=rows_RD.shape[0] - 1))
    return taken.masked_fill_((index == rows_RD.shape[0])[:, None], 0)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, plan: RoutingPlan) -> Tensor:
        ctx.plan = plan
        return _take(hidden_TD, plan.token_R, not plan.is_permutation)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        row_TK = ctx.plan.row_TK
        grad_TKD = _take(grad_RD, row_TK.reshape(-1), not ctx.plan.is_permutation).view(*row_TK.shape, -1)
        return (grad_TKD.squeeze(1) if row_TK.shape[1] == 1 else grad_TKD.sum(1)), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor, plan: RoutingPlan) -> Tensor:
        taken_TKD = _take(rows_RD, plan.row_TK.reshape(-1), not plan.is_permutation).view(*weight_TK.shape, -1)
        ctx.plan = plan
        ctx.save_for_backward(taken_TKD, weight_TK)
        output_TKD = taken_TKD * weight_TK[..., None].to(rows_RD.dtype)
        return output_TKD.squeeze(1) if weight_TK.shape[1] == 1 else output_TKD.sum(1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        taken_TKD, weight_TK = ctx.saved_tensors
        T, K = weight_TK.shape
        grad_weight_TK = torch.matmul(taken_TKD.float(), grad_TD.float()[..., None]).squeeze(-1)
        grad_TKD = grad_TD[:, None] * weight_TK[..., None].to(grad_TD.dtype)
        choice_R = _choice_of_row(ctx.plan, T, K)
        return _take(grad_TKD.view(T * K, -1), choice_R, not ctx.plan.is_permutation), grad_weight_TK, None


def _choice_of_row(plan: RoutingPlan, T: int, K: int) -> Tensor:
    """(R,) index into the T * K choices of the one that each row serves; T * K where the row stayed empty."""
    if K == 1:
        return plan.token_R
    choice_R = torch.full((plan.token_R.shape[0] + 1,), T * K, dtype=torch.int64, device=plan.token_R.device)
    choice_R[plan.row_TK.reshape(-1)] = torch.arange(T * K, device=plan.token_R.device)
    return choice_R[:-1]


class _GroupedLinearFunction(torch.autograd.Function):
    """y = x W_i^T for the rows of each expert; with a main_grad the weight gradient is added into it by the product
    itself."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_eOI: Tensor, splits: Splits, accumulate: bool) -> Tensor:
        ctx.splits, ctx.accumulate, ctx.weight = splits, accumulate, weight_eOI
        ctx.save_for_backward(x_RI, weight_eOI)
        e, output_size, _ = weight_eOI.shape
        if isinstance(splits, int):
            return torch.bmm(x_RI.view(e, splits, -1), weight_eOI.transpose(1, 2)).view(-1, output_size)
        y_RO = x_RI.new_empty(x_RI.shape[0], output_size)
        for x, y, weight_OI in zip(x_RI.split(splits), y_RO.split(splits), weight_eOI, strict=True):
            torch.mm(x, weight_OI.t(), out=y)
        return y_RO

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RI, weight_eOI = ctx.saved_tensors
        splits, (e, _, input_size) = ctx.splits, weight_eOI.shape
        main_grad: Tensor | None = ctx.weight.main_grad if ctx.accumulate else None
        target = (
            main_grad if main_grad is not None and main_grad.dtype == grad_RO.dtype else torch.zeros_like(weight_eOI)
        )
        if isinstance(splits, int):
            grad_eRO, x_eRI = grad_RO.view(e, splits, -1), x_RI.view(e, splits, -1)
            grad_x_RI = torch.bmm(grad_eRO, weight_eOI).view(-1, input_size)
            target.baddbmm_(grad_eRO.transpose(1, 2), x_eRI)
        else:
            grad_x_RI = torch.empty_like(x_RI)
            pieces = (grad_RO.split(splits), x_RI.split(splits), grad_x_RI.split(splits), weight_eOI, target)
            for grad, x, grad_x, weight_OI, target_OI in zip(*pieces, strict=True):
                torch.mm(grad, weight_OI, out=grad_x)
                target_OI.addmm_(grad.t(), x)
        if main_grad is None:
            return grad_x_RI, target, None, None
        if target is not main_grad:
            main_grad.add_(target)
        # core's hook then skips its own addition; the returned tensor is never read
        ctx.weight.grad_added_to_main_grad = True
        return grad_x_RI, torch.empty_like(weight_eOI), None, None


def grouped_shape(
    config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection, partition_dim: int
) -> tuple[int, int, int]:
    """(e, O, I) of this rank's part of the weights of all experts; partition_dim is divided over the expert-tensor
    ranks."""
    shape = [config.num_moe_experts // groups.ep.size(), output_size, input_size]
    shape[partition_dim] //= groups.expt_tp.size()
    return shape[0], shape[1], shape[2]


def mark_experts(weight: Any, groups: ProcessGroupCollection, partition_dim: int) -> None:
    """Say of a weight that it is of routed experts, and divided along partition_dim if there are expert-tensor
    ranks."""
    # core reduces the gradients of such weights over the expert-data-parallel group
    weight.allreduce = groups.expt_dp.size() == groups.dp_cp.size()
    weight.is_routed_expert = True
    # true of a whole expert too: its gradient norm is to be counted on every tensor-parallel rank, which holds other
    # experts or other shards, and not only on the first
    mark_divided(weight, partition_dim)


def grouped_weight(
    config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection, partition_dim: int
) -> Any:
    """This rank's part of the weights of all experts as one parameter, uninitialised."""
    shape = grouped_shape(config, input_size, output_size, groups, partition_dim)
    weight: Any = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=weight_device(config)))
    mark_experts(weight, groups, partition_dim)
    return weight


class GroupedLinear(torch.nn.Module):
    """One weight matrix for each expert of this rank, (e, O, I), of which expert-tensor ranks share O (partition_dim 1)
    or I (2)."""

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

    def forward(self, x_RI: Tensor, splits: Splits) -> Tensor:
        """(R, I) -> (R, O), rows sorted by expert."""
        return _GroupedLinearFunction.apply(
            x_RI, self.weight, splits, self.accumulate and hasattr(self.weight, "main_grad")
        )


class RowPadding(NamedTuple):
    """Rows of zeros after those of each expert; P: rows with them."""

    splits: Splits
    row_P: Tensor  # row at each place, R where it is a row of zeros
    place_R: Tensor  # place of each row


def row_padding(splits: Splits, multiple: int, num_rows: int, device: torch.device) -> RowPadding:
    """Each expert's rows filled up to a multiple of `multiple`."""
    rows_e = [splits] * (num_rows // splits if splits else 0) if isinstance(splits, int) else splits
    padded_e = [-(-rows // multiple) * multiple for rows in rows_e]
    shifts_e = [sum(padded_e[:expert]) - sum(rows_e[:expert]) for expert in range(len(rows_e))]
    shift_R = to_device(torch.tensor(shifts_e, dtype=torch.int64).repeat_interleave(torch.tensor(rows_e)), device)
    place_R = torch.arange(num_rows, device=device) + shift_R
    row_P = torch.full((sum(padded_e),), num_rows, dtype=torch.int64, device=device)
    row_P[place_R] = torch.arange(num_rows, device=device)
    return RowPadding(padded_e[0] if isinstance(splits, int) and padded_e else padded_e, row_P, place_R)


class _Regather(torch.autograd.Function):
    """x[index], where an index of one past the end is a row of zeros; `back` is the inverse map, by which the gradient
    is gathered.

    torch's own gradient of a gather adds into rows, in an order that it has to sort for where it must be the same every
    time.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, index_P: Tensor, back_R: Tensor, has_gaps: bool) -> Tensor:
        ctx.back_R, ctx.has_gaps = back_R, has_gaps
        return _take(x_RD, index_P, has_gaps)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None, None]:
        return _take(grad_PD, ctx.back_R, ctx.has_gaps), None, None, None


def _inverse(index_P: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) the place of each row in an index without repetitions; len(index_P) for a row that is not in it."""
    back_R = index_P.new_full((num_rows,), index_P.shape[0])
    back_R[index_P] = torch.arange(index_P.shape[0], device=index_P.device)
    return back_R


class _SwigluFunction(torch.autograd.Function):
    """silu(gate) * up of [gate, up] along the last dim; keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x_TF: Tensor) -> Tensor:
        ctx.save_for_backward(x_TF)
        gate, up = x_TF.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> Tensor:
        (x_TF,) = ctx.saved_tensors
        gate, up = x_TF.chunk(2, dim=-1)
        grad = torch.empty_like(x_TF)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), grad_TF, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_TF * up, gate, grad_input=grad_gate)
        return grad


swiglu = _SwigluFunction.apply


class SharedExpert(torch.nn.Module):
    """The expert that every token visits: SwiGLU FFN, gate and up projection in one matrix."""

    def __init__(self, config: HunyuanConfig, spec: Any, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.recompute = config.parallel.recompute == "selective"
        self.linear_fc1 = spec.column_parallel_linear(config, config.hidden_size, 2 * config.ffn_hidden_size, groups)
        self.linear_fc1.weight.is_gated = True
        self.linear_fc2 = spec.row_parallel_linear(config, config.ffn_hidden_size, config.hidden_size, groups)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return _kept_input_only(self._ffn, hidden_TD) if self.recompute else self._ffn(hidden_TD)

    def _ffn(self, hidden_TD: Tensor) -> Tensor:
        return self.linear_fc2(swiglu(self.linear_fc1(hidden_TD)[0]))[0]


def _kept_input_only(ffn: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """ffn(*inputs), of which the backward pass keeps the inputs and computes the rest again; not under
    torch.no_grad."""
    if not torch.is_grad_enabled():
        return ffn(*inputs)
    return checkpoint(ffn, *inputs, use_reentrant=True, preserve_rng_state=False)


class RoutedExperts(torch.nn.Module):
    """The routed experts of this rank."""

    def __init__(self, config: HunyuanConfig, spec: Any, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.ep_group, self.etp_group = groups.ep, groups.expt_tp
        self.num_experts = config.num_moe_experts
        self.recompute = config.parallel.recompute == "selective"
        self.row_multiple = spec.row_multiple
        self.linear_fc1 = spec.column_parallel_grouped_linear(
            config, config.hidden_size, 2 * config.moe_ffn_hidden_size, groups
        )
        for weight in self.linear_fc1.parameters():
            weight.is_gated = True
        self.linear_fc2 = spec.row_parallel_grouped_linear(
            config, config.moe_ffn_hidden_size, config.hidden_size, groups
        )

    def forward(self, hidden_TD: Tensor, plan: RoutingPlan) -> Tensor:
        """Combined output (T, D) of the experts that `plan` names, for tokens that no other rank of this stage holds.

        Communicates: expert-parallel group, two all-to-alls each way; expert-tensor-parallel group, an all-gather and a
        reduce-scatter of what those brought.
        """
        rows_RD = _Dispatch.apply(hidden_TD, plan)
        output_RD = (
            self._exchange_fixed(rows_RD, plan.num_rows // self.num_experts)
            if plan.rows_E is None
            else self._exchange_counted(rows_RD, plan.rows_E)
        )
        return _Combine.apply(output_RD, plan.weight_TK, plan)

    def _experts(self, rows_RD: Tensor, splits: Splits) -> Tensor:
        if self.etp_group.size() == 1:
            return self._ffn(rows_RD, splits)
        if isinstance(splits, int):
            return self._shared_fixed(rows_RD, splits)
        return self._shared_counted(rows_RD, splits)

    def _ffn(self, rows_RD: Tensor, splits: Splits) -> Tensor:
        return _kept_input_only(self._ffn_now, rows_RD, splits) if self.recompute else self._ffn_now(rows_RD, splits)

    def _ffn_now(self, rows_RD: Tensor, splits: Splits) -> Tensor:
        multiple = self.row_multiple()
        if all(rows % multiple == 0 for rows in ([splits] if isinstance(splits, int) else splits)):
            return self.linear_fc2(swiglu(self.linear_fc1(rows_RD, splits)), splits)
        padding = row_padding(splits, multiple, rows_RD.shape[0], rows_RD.device)
        padded_PD = _Regather.apply(rows_RD, padding.row_P, padding.place_R, True)
        output_PD = self.linear_fc2(swiglu(self.linear_fc1(padded_PD, padding.splits)), padding.splits)
        return _Regather.apply(output_PD, padding.place_R, padding.row_P, True)

    def _shared_fixed(self, rows_RD: Tensor, rows: int) -> Tensor:
        """Ranks that share experts put their rows together, compute partial sums of them all, and each gets back the
        sums of its own."""
        etp, D = self.etp_group.size(), rows_RD.shape[1]
        e = rows_RD.shape[0] // rows
        whole = (
            gather_from_sequence_parallel_region(rows_RD, group=self.etp_group).view(etp, e, rows, D).transpose(0, 1)
        )
        output = self._ffn(whole.reshape(-1, D), etp * rows).view(e, etp, rows, D).transpose(0, 1)
        return reduce_scatter_to_sequence_parallel_region(output.reshape(-1, D), group=self.etp_group)

    def _shared_counted(self, rows_RD: Tensor, rows_e: list[int]) -> Tensor:
        """The same without a capacity: the ranks' rows differ in number, so each sends as many as the longest, the rest
        zeros."""
        etp, e, R = self.etp_group.size(), len(rows_e), rows_RD.shape[0]
        mine_1e = to_device(torch.tensor([rows_e]), rows_RD.device)
        counts_pe: list[list[int]] = all_gather_rows(mine_1e, self.etp_group).tolist()
        longest = max(sum(counts_e) for counts_e in counts_pe)
        padded = torch.nn.functional.pad(rows_RD, (0, 0, 0, longest - R))
        whole = gather_from_sequence_parallel_region(padded, group=self.etp_group)
        # where each rank's rows of each expert lie in `whole`; the experts want expert after expert
        index = torch.arange(etp * longest).view(etp, longest)
        by_rank = [row[: sum(counts_e)].split(counts_e) for row, counts_e in zip(index, counts_pe, strict=True)]
        order_R = to_device(
            torch.cat([by_rank[rank][expert] for expert in range(e) for rank in range(etp)]), rows_RD.device
        )
        back_P = _inverse(order_R, etp * longest)
        output = self._ffn(
            _Regather.apply(whole, order_R, back_P, True), [sum(counts) for counts in zip(*counts_pe, strict=True)]
        )
        return reduce_scatter_to_sequence_parallel_region(
            _Regather.apply(output, back_P, order_R, True), group=self.etp_group
        )[:R]

    def _exchange_fixed(self, rows_RD: Tensor, rows: int) -> Tensor:
        """Every rank sends the same number of rows to every expert: shapes are known, no counts travel."""
        ep = self.ep_group.size()
        if ep == 1:
            return self._experts(rows_RD, rows)
        e, D = self.num_experts // ep, rows_RD.shape[1]
        received = all_to_all(self.ep_group, rows_RD).view(ep, e, rows, D).transpose(0, 1).reshape(-1, D)
        output = self._experts(received, ep * rows).view(e, ep, rows, D).transpose(0, 1).reshape(-1, D)
        return all_to_all(self.ep_group, output)

    def _exchange_counted(self, rows_RD: Tensor, rows_E: Tensor) -> Tensor:
        """Without a capacity the ranks first tell each other how many rows they send to each expert."""
        ep = self.ep_group.size()
        if ep == 1:
            return self._experts(rows_RD, rows_E.tolist())
        e = self.num_experts // ep
        sent_pe = rows_E.view(ep, e)
        received_pe = exchange_rows(sent_pe, self.ep_group)
        # the one time that the host waits for this layer: sizes of the exchange and of the products are in its hands
        sent, received = torch.stack((sent_pe, received_pe)).tolist()
        sent_p, received_p = ([sum(rows_e) for rows_e in rows_pe] for rows_pe in (sent, received))
        by_rank = all_to_all(self.ep_group, rows_RD, received_p, sent_p)
        # rows arrive rank after rank, each sorted by expert; the experts want expert after expert
        experts = torch.arange(e, device=rows_RD.device).repeat(ep)
        order_R = experts.repeat_interleave(received_pe.reshape(-1), output_size=sum(received_p)).argsort(stable=True)
        back_R = _inverse(order_R, order_R.shape[0])
        output = self._experts(
            _Regather.apply(by_rank, order_R, back_R, False), [sum(rows) for rows in zip(*received, strict=True)]
        )
        return all_to_all(self.ep_group, _Regather.apply(output, back_R, order_R, False), sent_p, received_p)
