"""What a model is given of one micro-batch.

Shapes: T tokens of this context-parallel rank, all sequences of the micro-batch one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hunyuan_pretrain.model.routing import EVALUATION, Routing
from hunyuan_pretrain.parallel.context_parallel import ContextSlice


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch on one rank; tensors on the model's device."""

    tokens_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64, from 0 in each piece of a document."""
    cu_seqlens: list[int]
    """cu_seqlens of the pieces, over the tokens of all context-parallel ranks; as Python ints, so that no layer waits
    for the device to learn them."""
    rope_alpha: float = 1.0
    """Of the stage: stretches the RoPE base for long contexts."""
    labels_T: Tensor | None = None
    """int64, the token to predict at each position; None: the model returns logits."""
    loss_weight_T: Tensor | None = None
    """fp32 factor of each cross-entropy in the sum that is the loss; wanted where there are labels."""
    routing: Routing = EVALUATION
    """In training experts have their capacity and the router its losses; in evaluation and export routing is
    dropless."""
    context: ContextSlice | None = None
    """Which of all context-parallel ranks' tokens these are; None where there is one rank."""
