"""A tiny model with random weights, a tiny tokenizer, and their export, for tests of what happens to weights after
training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint.hf_export import export
from hunyuan_pretrain.checkpoint.layerwise import Visit
from hunyuan_pretrain.checkpoint.weight_map import to_hf, weight_map
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, format_ranks
from tests.reference.plain_hunyuan import plain_logits

ALPHA = 1000.0


def tiny_model(**changes: object) -> ModelConfig:
    """Two layers, one CLA group, 4 experts, top-1, and room for the tiny tokenizer."""
    base = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 24,
        "num_moe_experts": 4,
        "padded_vocab_size": 480,
    }
    return ModelConfig(**(base | changes))


def random_tensors(model: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Full Megatron parameters, large enough that every part affects the result; norm weights are not 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for row in weight_map(model):
        tensor = torch.randn(row.megatron_shape, generator=generator)
        is_norm = "layernorm" in row.megatron_name
        tensors[row.megatron_name] = 1 + 0.2 * tensor if is_norm else tensor * row.megatron_shape[-1] ** -0.5
    return tensors


def reference_logits(
    model: ModelConfig, megatron: dict[str, torch.Tensor], alpha: float = ALPHA
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A stand-in for the training model: token ids (B, S) -> logits (B, S, V)."""
    hf = dict(to_hf(model, megatron))

    def logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        return torch.stack([plain_logits(model, hf, row, torch.tensor([0, len(row)]), alpha) for row in tokens_BS])

    return logits


class PlainLayers:
    """The plain formulation in the place of the training model, as a source of layers."""

    def __init__(self, model: ModelConfig, megatron: dict[str, torch.Tensor], alpha: float = ALPHA) -> None:
        self.num_layers = model.num_layers
        self._model, self._tensors, self._alpha = model, dict(to_hf(model, megatron)), alpha

    def walk(self, texts: Sequence[torch.Tensor], visit: Visit) -> torch.Tensor:
        def show(layer: int, before_TD: torch.Tensor, after_TD: torch.Tensor) -> None:
            visit(layer, before_TD, after_TD, again)

        def again(_: torch.Tensor) -> torch.Tensor:
            raise AssertionError("a reference is not run again")

        starts = torch.tensor([0, *accumulate(len(text) for text in texts)])
        return plain_logits(self._model, self._tensors, torch.cat(list(texts)), starts, self._alpha, show)


def write_tiny_tokenizer(folder: Path) -> Path:
    """A tokenizer of 256 bytes, one merge and the 209 special tokens: 466 ids."""
    (folder / RANKS_FILE).write_bytes(format_ranks({bytes([byte]): byte for byte in range(256)} | {b"he": 256}))
    return folder


def export_tiny(model: ModelConfig, tokenizer_folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """`export` of random weights, fp32 unless told otherwise."""
    megatron = random_tensors(model)
    options: dict[str, Any] = {
        "rope_alpha": ALPHA,
        "max_position_embeddings": 4096,
        "dtype": torch.float32,
        "reference": PlainLayers(model, megatron),
        "certificate_info": {"run": "tiny", "step": 3},
    }
    return export(model, megatron, tokenizer_folder, output, **(options | changes))


def own_module_cache(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let transformers keep the code of model folders in `folder`, and find none that other tests have kept."""
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    patch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "transformers_modules").is_dir()])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        patch.delitem(sys.modules, name)
