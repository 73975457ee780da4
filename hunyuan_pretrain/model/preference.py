"""Direct preference optimisation (DPO, arXiv 2305.18290): the loss of pairs of answers from their log-probabilities.

The log-probability of an answer is a sum over its tokens, which context-parallel ranks share, and the gradient of the
loss with respect to a token's cross-entropy is the same for all tokens of an answer. So the cross-entropies are first
computed without gradients, the loss gives each answer its factor, and the gradient is that of a weighted sum of
cross-entropies with these factors. That costs a second product with the output weight, and no memory that grows with
the vocabulary.

Shapes: T tokens of this context-parallel rank, A = 2 P answers of the P pairs of a micro-batch; answer 2 n is the
chosen one of pair n, 2 n + 1 the rejected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hunyuan_pretrain.model.cross_entropy import reduced


class PairSums(NamedTuple):
    """Sums over pairs."""

    pairs: float
    """Their number."""
    preference_loss: float
    """-log sigmoid of the margin."""
    margin: float
    """beta * (log-ratio of the chosen answer - log-ratio of the rejected one), to the reference model."""
    margin_size: float
    """Its absolute value."""
    preferred: float
    """1 where the margin is positive."""
    chosen_log_probability: float
    rejected_log_probability: float


@dataclass(frozen=True)
class PairLoss:
    """The loss of a step over all of its pairs."""

    beta: float
    sft_weight: float
    counts_2: Tensor
    """fp64: pairs of the global batch, target tokens of their chosen answers."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of a micro-batch."""

    answer_T: Tensor
    """int64, the answer whose conversation a token belongs to; -1 for padding."""
    reference_A: Tensor
    """fp64, the log-probability of each answer under the reference model."""
    loss: PairLoss | None
    """None: only the log-probabilities are wanted."""

    def log_probabilities(self, loss_T: Tensor, mask_T: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
        """(A,) fp64 from the cross-entropies (T,). Communicates: cp_group."""
        value_T = -(loss_T.double() * mask_T)
        # a masked sum for each answer: its order does not depend on threads, as that of index_add_ does on a GPU
        sums = [torch.where(self.answer_T == answer, value_T, 0.0).sum() for answer in range(len(self.reference_A))]
        return reduced(torch.stack(sums), cp_group, dist.ReduceOp.SUM)

    def weights(self, log_probability_A: Tensor, mask_T: Tensor, cp_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """((T,) fp32: the gradient of the loss with respect to each cross-entropy; (1 + fields of PairSums,) fp64: the
        loss of these pairs and their sums, on the first context-parallel rank, zeros on the others)."""
        assert self.loss is not None
        beta, sft_weight, (num_pairs, chosen_tokens) = self.loss.beta, self.loss.sft_weight, self.loss.counts_2
        ratio_P2, log_probability_P2 = ((log_probability_A - ref).view(-1, 2) for ref in (self.reference_A, 0.0))
        margin_P = beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
        pull_P = beta * torch.sigmoid(-margin_P) / num_pairs
        # answer -1 takes the last number
        of_answer = torch.stack((pull_P + sft_weight / chosen_tokens, -pull_P), dim=1).flatten()
        weight_T = torch.cat([of_answer, of_answer.new_zeros(1)])[self.answer_T] * mask_T
        loss_P, (chosen, rejected) = F.softplus(-margin_P), log_probability_P2.sum(0)
        numbers = torch.stack(
            [
                loss_P.sum() / num_pairs - sft_weight * chosen / chosen_tokens,
                loss_P.new_tensor(float(len(loss_P))),
                loss_P.sum(),
                margin_P.sum(),
                margin_P.abs().sum(),
                (margin_P > 0).double().sum(),
                chosen,
                rejected,
            ]
        )
        return weight_T.float(), numbers * float(cp_group.rank() == 0)
