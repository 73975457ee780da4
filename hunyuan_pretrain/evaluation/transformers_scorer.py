"""An export in transformers as a scorer, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.evaluation.scoring import Item, Read, read_rows


class TransformersScorer:
    """A loaded export. The logits of a text are never in memory as a whole."""

    def __init__(self, model: Any) -> None:
        """model: a PreTrainedModel in evaluation mode."""
        self._model = model
        self.max_length = int(model.config.max_position_embeddings)
        self.device: torch.device = model.device

    @torch.inference_mode()
    def score(self, items: Sequence[Item], num_ids: int | None = None) -> list[Read]:
        """As Scorer.score."""
        return [self._score(item, num_ids) for item in items]

    def _score(self, item: Item, num_ids: int | None) -> Read:
        tokens_1T = torch.tensor([item.tokens], device=self.device)
        hidden_TD: Tensor = self._model.get_decoder()(tokens_1T, use_cache=False).last_hidden_state[0]
        weight_VD = self._model.get_output_embeddings().weight
        target_n = torch.tensor(item.targets, device=self.device)
        read_n2 = read_rows(hidden_TD[item.positions], weight_VD, target_n, 0, num_ids, lambda value, _how: value)
        return Read(read_n2[:, 0].cpu(), read_n2[:, 1].long().cpu())
