"""The mixture-of-experts FFN of a layer: router, routed experts and the shared expert.

Shapes: T tokens of this rank, D hidden, K top-k, e experts of this rank, R rows of experts, P rows with padding, F
twice an expert's FFN size (gate and up), X numbers of packed router statistics (model.routing.RouterStatistics).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hunyuan_pretrain.model.dispatch import Dispatch
from hunyuan_pretrain.model.dropout import Dropout
from hunyuan_pretrain.model.expert_rows import RowSplits, moved, row_padding
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.lora import drop_inputs, drops_inputs
from hunyuan_pretrain.model.recompute import free_until_backward, keep_input_as_given
from hunyuan_pretrain.model.router import Router
from hunyuan_pretrain.model.routing import Routing, RoutingPlan
from hunyuan_pretrain.model.spec import Spec
from hunyuan_pretrain.runtime.streams import SideStream


class MixtureOfExperts(torch.nn.Module):
    """residual + shared_expert(x) + weighted sum of the routed experts of x."""

    def __init__(self, config: HunyuanConfig, layer: int, spec: Spec, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.router = Router(config, layer, spec.functions)
        self.experts = RoutedExperts(config, spec, groups, drops_inputs(config, layer, "mlp.experts."))
        self.shared_experts = SharedExpert(config, spec, groups, drops_inputs(config, layer, "mlp.shared_experts."))
        self.permute, self.combine = spec.functions.permute, spec.functions.combine
        self.overlaps_shared_expert = config.parallel.overlap_shared_expert and not config.use_cpu_initialization

    def forward(
        self, hidden_TD: Tensor, residual_TD: Tensor, routing: Routing, dropout: Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns ((T, D), packed router statistics (X,)). One function adds the residual and both kinds of experts,
        so that a kernel can read and write each of them once. `dropout` is of the inputs of adapters."""
        plan, loss, statistics_X, hidden_TD = self.router(hidden_TD, routing)
        if loss is not None and torch.is_grad_enabled():
            # Only the last pipeline stage computes a loss; the others pass on activations alone. So core's scaler
            # injects the gradient of each layer's router loss here, where the backward pass reaches the combine
            # weights, with the scale that the schedule gives the loss.
            plan = plan._replace(weight_TK=MoEAuxLossAutoScaler.apply(plan.weight_TK, loss))
        rows_RD, hidden_TD = self.permute(hidden_TD, plan)
        if self.overlaps_shared_expert:
            side = SideStream(hidden_TD.device)
            # before the routed experts: so in the backward pass the host launches theirs, with the exchange, first
            drawn_from = [] if dropout is None else dropout.tensors
            shared_TD = side.run(partial(self.shared_experts, dropout=dropout), hidden_TD, *drawn_from)
            rows_RD = self.experts(rows_RD, plan, dropout)
            side.join(shared_TD)
        else:  # in the order in which weights are registered, and so gathered
            rows_RD = self.experts(rows_RD, plan, dropout)
            shared_TD = self.shared_experts(hidden_TD, dropout)
        return self.combine(rows_RD, plan.weight_TK, plan, shared_TD, residual_TD), statistics_X


class RoutedExperts(torch.nn.Module):
    """The routed experts of this rank."""

    def __init__(self, config: HunyuanConfig, spec: Spec, groups: ProcessGroupCollection, drops_inputs: bool) -> None:
        super().__init__()
        self.drops_inputs = drops_inputs
        self.dispatch = Dispatch(config.num_moe_experts, groups)
        self.swiglu = spec.functions.swiglu
        parts = config.parallel.recomputed_parts
        self.recompute, self.recompute_swiglu = "selective" in parts, "swiglu" in parts
        self.row_multiple = spec.row_multiple
        self.linear_fc1 = spec.column_parallel_grouped_linear(
            config, config.hidden_size, 2 * config.moe_ffn_hidden_size, groups
        )
        for weight in self.linear_fc1.parameters():
            weight.is_gated = True  # type: ignore[attr-defined]  # for checkpoints
        self.linear_fc2 = spec.row_parallel_grouped_linear(
            config, config.moe_ffn_hidden_size, config.hidden_size, groups
        )
        if self.recompute_swiglu:
            keep_input_as_given(self.linear_fc2)

    def forward(self, rows_RD: Tensor, plan: RoutingPlan, dropout: Dropout | None = None) -> Tensor:
        """(R, D): the output of each row of `plan`, for rows of tokens that no other rank of this stage holds.

        Communicates: as Dispatch.
        """
        number_R1 = dropout.numbers(plan) if dropout is not None and self.drops_inputs else None
        return self.dispatch(rows_RD, plan, partial(self._ffn_or_recomputed, dropout), number_R1)

    def _ffn_or_recomputed(
        self, dropout: Dropout | None, rows_RD: Tensor, splits: RowSplits, number_R1: Tensor | None
    ) -> Tensor:
        of_rows = None if dropout is None or number_R1 is None else dropout.of_rows(number_R1)
        if self.recompute:
            return _kept_input_only(self._ffn, rows_RD, splits, of_rows)
        return self._ffn(rows_RD, splits, of_rows)

    def _ffn(self, rows_RD: Tensor, splits: RowSplits, dropout: Dropout | None) -> Tensor:
        multiple = self.row_multiple()
        if all(rows % multiple == 0 for rows in splits.rows_e):
            if self.drops_inputs:
                drop_inputs(self, dropout)
            return self._whole_ffn(rows_RD, splits)
        assert not self.drops_inputs, "config.tuning: adapters are beside local layers, which need no padding"
        padding = row_padding(splits, multiple, rows_RD.device)
        padded_PD = moved(rows_RD, padding.row_P, padding.position_R, True)
        output_PD = self._whole_ffn(padded_PD, padding.splits)
        return moved(output_PD, padding.position_R, padding.row_P, True)

    def _whole_ffn(self, rows_RD: Tensor, splits: RowSplits) -> Tensor:
        """With row counts that the linear layers accept."""
        x_RF = self.linear_fc1(rows_RD, splits)
        y_RF = self.swiglu(x_RF)
        output_RD = self.linear_fc2(y_RF, splits)
        if self.recompute_swiglu:
            free_until_backward(self.swiglu, x_RF, y_RF, output_RD)
        return output_RD


class SharedExpert(torch.nn.Module):
    """The expert that every token visits: a SwiGLU FFN with gate and up projection in one matrix."""

    def __init__(self, config: HunyuanConfig, spec: Spec, groups: ProcessGroupCollection, drops_inputs: bool) -> None:
        super().__init__()
        self.drops_inputs = drops_inputs
        parts = config.parallel.recomputed_parts
        self.recompute, self.recompute_swiglu = "selective" in parts, "swiglu" in parts
        self.swiglu = spec.functions.swiglu
        self.linear_fc1 = spec.column_parallel_linear(config, config.hidden_size, 2 * config.ffn_hidden_size, groups)
        self.linear_fc1.weight.is_gated = True  # type: ignore[union-attr]
        self.linear_fc2 = spec.row_parallel_linear(config, config.ffn_hidden_size, config.hidden_size, groups)
        if "norms" in parts:
            keep_input_as_given(self.linear_fc1)
        if self.recompute_swiglu:
            keep_input_as_given(self.linear_fc2)

    def forward(self, hidden_TD: Tensor, dropout: Dropout | None = None) -> Tensor:
        """(T, D) -> (T, D)."""
        return _kept_input_only(self._ffn, hidden_TD, dropout) if self.recompute else self._ffn(hidden_TD, dropout)

    def _ffn(self, hidden_TD: Tensor, dropout: Dropout | None) -> Tensor:
        if self.drops_inputs:
            drop_inputs(self, dropout)
        x_TF = self.linear_fc1(hidden_TD)[0]
        y_TF = self.swiglu(x_TF)
        output_TD = self.linear_fc2(y_TF)[0]
        if self.recompute_swiglu:
            free_until_backward(self.swiglu, x_TF, y_TF, output_TD)
        return output_TD


def _kept_input_only(ffn: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """ffn(*inputs). With gradients enabled, only the inputs are kept for the backward pass, which recomputes the
    rest."""
    if not torch.is_grad_enabled():
        return ffn(*inputs)
    return checkpoint(ffn, *inputs, use_reentrant=True, preserve_rng_state=False)
