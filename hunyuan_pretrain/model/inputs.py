"""The model's input for one micro-batch.

Shapes: T tokens of this context-parallel rank, all sequences of the micro-batch concatenated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hunyuan_pretrain.model.dropout import NO_DROPOUT, Rates
from hunyuan_pretrain.model.preference import Pairs
from hunyuan_pretrain.model.routing import EVALUATION, Routing
from hunyuan_pretrain.model.varlen_attention import Documents
from hunyuan_pretrain.parallel.context_parallel import ContextSlice


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch on one rank; tensors on the model's device."""

    tokens_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64, from 0 in each piece of a document."""
    cu_seqlens: list[int] | Documents
    """Of the pieces, over the tokens of all context-parallel ranks; Python ints, so that no layer waits for the device
    to read them. In a step that is recorded they are in memory, because they change from replay to replay."""
    rope_alpha: float = 1.0
    """Of the training stage; stretches the RoPE base for long contexts."""
    labels_T: Tensor | None = None
    """int64, the token to predict at each position; None: the model returns logits."""
    loss_weight_T: Tensor | None = None
    """fp32 weight of each cross-entropy in the loss, a sum; required with labels."""
    pairs: Pairs | None = None
    """The tokens are pairs of answers, of which the last stage computes the loss and its numbers (`Pairs.weights`), or
    the log-probabilities; `loss_weight_T` is then the mask of targets."""
    routing: Routing = EVALUATION
    """In training, the capacity of experts and the router losses apply; in evaluation and export, routing is
    dropless."""
    read_out: Callable[[Tensor, Tensor], Tensor] | None = None
    """What the last stage computes instead of a loss or logits, from the hidden states (T, D) after the final norm and
    the output weight (V / tensor-parallel ranks, D)."""
    context: ContextSlice | None = None
    """Which of the tokens of all context-parallel ranks these are; None with one rank."""
    dropout: Rates = NO_DROPOUT
    """Of the step; only with a routing of training, whose keys draw the masks."""
