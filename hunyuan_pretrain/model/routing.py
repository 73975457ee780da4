"""What routing takes and what it gives: training or evaluation, the plan of where tokens go, the statistics.

Shapes: T tokens of this rank, n routing groups, E experts, K top-k, R rows (places in experts), L layers, X numbers of
packed statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DROPPED = -1


class TrainingRouting(NamedTuple):
    """Routing of one micro-batch in training, with the capacity, recycling and losses of the config: what the random
    draw is keyed by, and the losses scaled."""

    seed: int
    step: int
    group_n: Tensor  # (n,) number of each routing group within the step's global batch
    num_global_groups: int  # routing groups of the step's global batch

    def share(self, rank: int, size: int) -> TrainingRouting:
        """That of one of `size` ranks that divide the tokens evenly, in order."""
        return self._replace(group_n=self.group_n.view(size, -1)[rank])


class EvaluationRouting(NamedTuple):
    """Routing of a validation: every token goes where it chose, and there are no router losses."""

    is_counted_T: Tensor | None = None  # bool, the tokens that the statistics count; None: all

    def share(self, rank: int, size: int) -> EvaluationRouting:
        """That of one of `size` ranks that divide the tokens evenly, in order."""
        if self.is_counted_T is None:
            return self
        return EvaluationRouting(self.is_counted_T.view(size, -1)[rank])


Routing = TrainingRouting | EvaluationRouting

EVALUATION = EvaluationRouting()
"""That counts all tokens."""


class RoutingPlan(NamedTuple):
    """Where each token goes. Rows are the experts' input, expert after expert, on this rank before any exchange."""

    weight_TK: Tensor  # fp32 combine weights, 0 where dropped
    row_TK: Tensor  # row of each choice, or num_rows where dropped
    token_R: Tensor  # token of each row, or T where the slot stayed empty
    rows_E: Tensor | None  # int64 rows of each expert; None under a capacity, which gives every expert the same number
    is_permutation: bool  # no choice dropped and no slot empty, by construction

    @property
    def num_rows(self) -> int:
        """Of all experts together."""
        return self.token_R.shape[0]

    def experts_TK(self, num_experts: int) -> Tensor:
        """The expert that computes each choice, DROPPED where none does; int64, on the CPU."""
        rows_E = torch.full((num_experts,), self.num_rows // num_experts) if self.rows_E is None else self.rows_E.cpu()
        # rows beyond the last expert's are those of dropped choices
        expert_TK = torch.bucketize(self.row_TK.cpu(), rows_E.cumsum(0), right=True)
        return expert_TK.masked_fill(expert_TK == num_experts, DROPPED)


class RouterStatistics(NamedTuple):
    """What a router counts in its tokens, fp32 without gradients: sums, to be added up over micro-batches and ranks. Of
    one layer; of several, every field has a dim L before."""

    chosen_E: Tensor  # choices of each expert, before recycling
    overflow: Tensor  # choices that found their expert full
    recycled: Tensor  # of those, the ones that another expert computes
    dropped: Tensor  # of those, the ones that no expert computes
    balance_loss: Tensor  # of all routing groups, without its coefficient
    z_loss: Tensor  # the same
    tokens: Tensor

    @classmethod
    def packed_size(cls, num_experts: int) -> int:
        """X: numbers of one layer."""
        return num_experts + len(cls._fields) - 1

    def packed(self) -> Tensor:
        """One layer's as the vector (X,) that passes through recomputation and reductions; `unpacked` reads it."""
        return torch.cat([part.reshape(-1) for part in self])

    @classmethod
    def unpacked(cls, packed_LX: Tensor) -> RouterStatistics:
        """What `packed` made, and sums of it; any dims before X."""
        num_experts = packed_LX.shape[-1] - cls.packed_size(0)
        return cls(packed_LX[..., :num_experts], *packed_LX[..., num_experts:].unbind(-1))


def marked(choice: Tensor, num_experts: int) -> Tensor:
    """(..., K) expert numbers -> (..., E) bool, whether an expert is among the K.

    torch's one_hot and bincount look at the numbers first, for which the host waits on a GPU or for the whole tensor on
    a CPU.
    """
    return torch.zeros(*choice.shape[:-1], num_experts, dtype=torch.bool, device=choice.device).scatter_(
        -1, choice, True
    )
