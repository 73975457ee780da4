"""One transformer layer, and the CLA group: the unit of recompute.

Shapes: T tokens of this rank, D hidden, L layers of the group, X numbers of packed router statistics
(model.routing.RouterStatistics).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hunyuan_pretrain.model.attention import AttentionPlan, SelfAttention, SharedKV
from hunyuan_pretrain.model.dropout import ATTENTION, EXPERTS, Dropout
from hunyuan_pretrain.model.experts import MixtureOfExperts
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.lora import drop_inputs, drops_inputs
from hunyuan_pretrain.model.recompute import free_until_backward
from hunyuan_pretrain.model.routing import Routing
from hunyuan_pretrain.model.spec import Spec
from hunyuan_pretrain.parallel import whereabouts


class TransformerLayer(torch.nn.Module):
    """x += attention(norm(x)); x += moe(norm(x)); with dropout, of each branch before it is added. `layer` counts from
    0 over the whole model."""

    def __init__(self, config: HunyuanConfig, layer: int, spec: Spec, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.layer = layer
        self.recompute_norms = "norms" in config.parallel.recomputed_parts
        self.drops_inputs = drops_inputs(config, layer, "self_attention.")
        self.input_layernorm = spec.input_norm(config, config.hidden_size)
        self.self_attention = SelfAttention(config, layer, spec, groups, self.input_layernorm)
        self.pre_mlp_layernorm = spec.norm(config, config.hidden_size)
        self.mlp = MixtureOfExperts(config, layer, spec, groups)

    def forward(
        self,
        hidden_TD: Tensor,
        kv: SharedKV | None,
        plan: AttentionPlan,
        routing: Routing,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, SharedKV, Tensor]:
        """Returns ((T, D), keys and values of the group, packed router statistics (X,))."""
        whereabouts.forward(self.layer)
        if self.drops_inputs:
            drop_inputs(self.self_attention, dropout)
        normalised_TD, hidden_TD = self.input_layernorm(hidden_TD)
        attention_TD, kv = self.self_attention(normalised_TD, kv, plan, dropout)
        if self.recompute_norms:
            self._free(self.input_layernorm, hidden_TD, normalised_TD, attention_TD)
        drop = None if dropout is None or not dropout.rates.hidden else dropout.hidden
        if drop is not None:
            attention_TD = drop(attention_TD, self.layer, ATTENTION)
        normalised_TD, hidden_TD = self.pre_mlp_layernorm(hidden_TD, attention_TD)
        residual_TD = hidden_TD if drop is None else torch.zeros_like(hidden_TD)
        output_TD, statistics_X = self.mlp(normalised_TD, residual_TD, routing, dropout)
        if self.recompute_norms:
            self._free(self.pre_mlp_layernorm, hidden_TD, normalised_TD, output_TD)
        if drop is not None:
            output_TD = hidden_TD + drop(output_TD, self.layer, EXPERTS)
        if output_TD.requires_grad:
            output_TD.register_hook(partial(whereabouts.backward, self.layer))
        return output_TD, kv, statistics_X

    @staticmethod
    def _free(norm: torch.nn.Module, x_TD: Tensor, y_TD: Tensor, result_TD: Tensor) -> None:
        # not norm itself, which would call hooks again: core's, those of diagnostics
        free_until_backward(lambda x_TD: norm.forward(x_TD)[0], x_TD, y_TD, result_TD)


def run_cla_group(
    layers: Sequence[TransformerLayer],
    hidden_TD: Tensor,
    plan: AttentionPlan,
    routing: Routing,
    recompute: bool,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Run hidden_TD through the layers of one CLA group; returns ((T, D), packed router statistics (L, X)).

    With `recompute`, only hidden_TD is kept for the backward pass. No layer draws from a random generator (recycle
    routing and dropout are keyed), so no RNG state has to be kept either.
    """

    def run(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        kv, statistics = None, []
        for layer in layers:
            hidden_TD, kv, statistics_X = layer(hidden_TD, kv, plan, routing, dropout)
            statistics.append(statistics_X)
        return hidden_TD, torch.stack(statistics)

    if recompute and torch.is_grad_enabled():
        # without use_reentrant, core's linears would see copies of their weights in the backward pass, without core's
        # mark that a gradient is already in main_grad, and overlap_grad_reduce would reject the missing gradient
        return checkpoint(run, hidden_TD, use_reentrant=True, preserve_rng_state=False)
    return run(hidden_TD)
