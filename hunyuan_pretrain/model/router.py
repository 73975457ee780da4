"""The router of a layer: each token's chosen experts, combine weights, balance loss and z-loss.

model/recycle_routing.py assigns the choices to experts and rows, within the capacity; model/gating.py computes weights,
losses and statistics. On a GPU kernels do the same. Softmax and top-k are torch's in any case: another exponential
rounds otherwise, and another order of equal probabilities chooses other experts.

Shapes: T tokens of this rank, D hidden, E experts, K top-k, X numbers of packed statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.model.functions import Functions, plain_functions
from hunyuan_pretrain.model.gating import combine_weights, statistics
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.recycle_routing import Assignment, assign_without_capacity
from hunyuan_pretrain.model.routing import EvaluationRouting, Routing, RoutingPlan


class Routed(NamedTuple):
    """What a router returns for this rank's tokens."""

    plan: RoutingPlan
    loss: Tensor | None
    """(): the router losses times their coefficients, this rank's part of the mean over the routing groups of the
    global batch; None in evaluation."""
    statistics_X: Tensor
    """model.routing.RouterStatistics, packed."""
    hidden_TD: Tensor
    """The router's input, for what reads it next (model.permutation says why)."""


class Router(torch.nn.Module):
    """Router of one layer. Weight (E, D) and logits are fp32 in every precision."""

    def __init__(self, config: HunyuanConfig, layer: int, functions: Functions | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.functions = functions or plain_functions()
        shape = (config.num_moe_experts, config.hidden_size)
        weight: Any = torch.nn.Parameter(torch.empty(shape, dtype=torch.float32, device=weight_device(config)))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Routed:
        """Route this rank's tokens, whole routing groups in order. The caller has to apply the returned loss.

        In training the config's capacity, recycling and losses apply; in evaluation, and in dropless training, every
        token goes to the experts it chose. Communicates nothing.
        """
        logits_TE, hidden_TD = self.functions.router_logits(hidden_TD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        chosen_TK = self.choose(probs_TE, routing)
        assigned = self._assign(chosen_TK, routing)
        if isinstance(routing, EvaluationRouting) or routing.is_counted_T is not None:
            weight_TK, loss = combine_weights(probs_TE, assigned), None
            counted = statistics(assigned, routing.is_counted_T)
            if not isinstance(routing, EvaluationRouting):
                entropy_T = torch.special.entr(probs_TE.detach()).sum(-1)
                counted = counted._replace(entropy=(entropy_T * routing.is_counted_T).sum())
            statistics_X = counted.packed()
        else:
            weight_TK, loss, statistics_X = self.functions.gating(
                logits_TE, probs_TE, assigned, self.config, routing.num_global_groups
            )
        plan = RoutingPlan(weight_TK, assigned.row_TK, assigned.token_R, assigned.rows_E, assigned.is_permutation)
        return Routed(plan, loss, statistics_X, hidden_TD)

    def _assign(self, chosen_TK: Tensor, routing: Routing) -> Assignment:
        if isinstance(routing, EvaluationRouting) or routing.is_counted_T is not None:
            return assign_without_capacity(chosen_TK, self.config.num_moe_experts)
        if self.config.moe_expert_capacity_factor is None:
            return assign_without_capacity(chosen_TK, self.config.num_moe_experts, routing.group_n.shape[0])
        return self.functions.assign(chosen_TK, self.config, self.layer, routing)

    def choose(self, probs_TE: Tensor, routing: Routing) -> Tensor:
        """(T, K) the most probable experts of each token. A comparison of two runs (diagnostics/parity.py) replaces
        this method by the other run's choices."""
        return probs_TE.topk(self.config.moe_router_topk, dim=-1).indices
