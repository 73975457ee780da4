"""Inputs and outputs of routing: the mode (training or evaluation), the plan of where tokens go, the statistics.

Shapes: T tokens of this rank, n routing groups, E experts, K top-k, R rows (slots of experts), L layers, X numbers of
packed statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DROPPED = -1


class TrainingRouting(NamedTuple):
    """Routing of one micro-batch in training, with the capacity, recycling and losses of the config. The fields key the
    random draw and scale the losses."""

    seed: int
    step: int
    group_n: Tensor  # (n,) number of each routing group within the step's global batch
    num_global_groups: int  # routing groups of the step's global batch
    key_L: Tensor | None = None
    """int64 keys of the draw of every layer of the model, model.recycle_routing.draw_keys of seed and step, on the
    device; None: from the two numbers. In memory, a later step can replace them in work that is recorded once."""

    is_counted_T: Tensor | None = None
    """Dropless: as in validation, without capacity and router losses; bool, tokens that the statistics count."""

    def share(self, rank: int, size: int) -> TrainingRouting:
        """The part of one of `size` ranks that split the tokens evenly, in order."""
        mine = self._replace(group_n=self.group_n.view(size, -1)[rank])
        if self.is_counted_T is None:
            return mine
        return mine._replace(is_counted_T=self.is_counted_T.view(size, -1)[rank])


class EvaluationRouting(NamedTuple):
    """Routing in validation: every token goes to the experts it chose, and there are no router losses."""

    is_counted_T: Tensor | None = None  # bool, tokens that the statistics count; None: all

    def share(self, rank: int, size: int) -> EvaluationRouting:
        """The part of one of `size` ranks that split the tokens evenly, in order."""
        if self.is_counted_T is None:
            return self
        return EvaluationRouting(self.is_counted_T.view(size, -1)[rank])


Routing = TrainingRouting | EvaluationRouting

EVALUATION = EvaluationRouting()
"""Counts all tokens."""


class RoutingPlan(NamedTuple):
    """Where each token goes. Rows are the experts' input on this rank, sorted by expert, before any exchange."""

    weight_TK: Tensor  # fp32 combine weights, 0 where dropped
    row_TK: Tensor  # row of each choice, or num_rows if dropped
    token_R: Tensor  # token of each row, or T if the slot is empty
    rows_E: Tensor | None  # int64 rows of each expert; None under a capacity: all experts have the same number
    is_permutation: bool  # no choice dropped and no slot empty, by construction

    @property
    def num_rows(self) -> int:
        """R, over all experts."""
        return self.token_R.shape[0]

    def experts_TK(self, num_experts: int) -> Tensor:
        """The expert that computes each choice, DROPPED if none does; int64, on the CPU."""
        rows_E = torch.full((num_experts,), self.num_rows // num_experts) if self.rows_E is None else self.rows_E.cpu()
        # dropped choices have a row past the last expert's
        expert_TK = torch.bucketize(self.row_TK.cpu(), rows_E.cumsum(0), right=True)
        return expert_TK.masked_fill(expert_TK == num_experts, DROPPED)


class RouterStatistics(NamedTuple):
    """What a router counts, fp32 without gradients: sums, to be added up over micro-batches and ranks. For one layer;
    for several, every field has a leading dim L."""

    chosen_E: Tensor  # choices of each expert, before recycling
    overflow: Tensor  # choices that found their expert full
    recycled: Tensor  # those of them that another expert computes
    dropped: Tensor  # those of them that no expert computes
    balance_loss: Tensor  # summed over routing groups, without its coefficient
    z_loss: Tensor  # the same
    entropy: Tensor  # of the probabilities of each token, nats; 0 in evaluation
    tokens: Tensor

    @classmethod
    def packed_size(cls, num_experts: int) -> int:
        """X, the numbers of one layer."""
        return num_experts + len(cls._fields) - 1

    def packed(self) -> Tensor:
        """One layer's statistics as a vector (X,), for recomputation and reductions; `unpacked` reads it."""
        return torch.cat([part.reshape(-1) for part in self])

    @classmethod
    def unpacked(cls, packed_LX: Tensor) -> RouterStatistics:
        """Inverse of `packed`, also for sums of packed vectors; any dims before X."""
        num_experts = packed_LX.shape[-1] - cls.packed_size(0)
        return cls(packed_LX[..., :num_experts], *packed_LX[..., num_experts:].unbind(-1))


def marked(choice: Tensor, num_experts: int) -> Tensor:
    """(..., K) expert numbers -> (..., E) bool, whether an expert is among the K.

    torch's one_hot and bincount inspect the numbers first, which makes the host wait for a GPU, and reads the whole
    tensor on a CPU.
    """
    return torch.zeros(*choice.shape[:-1], num_experts, dtype=torch.bool, device=choice.device).scatter_(
        -1, choice, True
    )
