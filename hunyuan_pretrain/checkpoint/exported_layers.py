"""An exported folder as a source of layers: our model code for transformers, its weights read from the safetensors
files while it computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.generate import load_generation_config
from hunyuan_pretrain.checkpoint.layerwise import Visit
from hunyuan_pretrain.checkpoint.streamed import stream
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors

__all__ = ["ExportedLayers"]

TIED = {"lm_head.weight": "model.embed_tokens.weight"}


class ExportedLayers:
    """The model of an exported folder, of either format, of which one layer is in memory at a time.

    `model` is a HunYuanForCausalLM that works as if its weights were there: forward, caches, generate().
    """

    def __init__(self, folder: Path) -> None:
        """Reads the configuration and the headers. Raises CheckpointError if names or shapes of the tensors are not
        those of the configuration."""
        from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanForCausalLM

        config = _configuration(folder)
        tensors = StoredTensors(folder)
        with torch.device("meta"):
            model = HunYuanForCausalLM(config)
        tied = TIED if config.tie_word_embeddings else {}
        stored_name = {name: tied.get(name, name) for name, _ in model.named_parameters(remove_duplicate=False)}
        _refuse_other_tensors(folder, model, stored_name, tensors)
        layers = list(model.model.layers)
        experts = [expert for layer in layers for expert in layer.mlp.experts]
        stream(
            model,
            lambda name: tensors.spec(stored_name[name]).dtype,
            lambda name: tensors[stored_name[name]],
            [model.model.embed_tokens, *layers, *experts, model.model.norm, model.lm_head],
        )
        self.model = model.eval()
        if (folder / "generation_config.json").is_file():
            self.model.generation_config = load_generation_config(folder)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.model.model.layers)

    @torch.inference_mode()
    def walk(self, texts: Sequence[Tensor], visit: Visit) -> Tensor:
        """As LayerSource.walk. All texts are one packed row, in which positions restart."""
        tokens_1T = torch.cat(list(texts))[None]
        positions_1T = torch.cat([torch.arange(len(text)) for text in texts])[None]
        kv: list[Any] = [None]  # what the group's owner computed when it was run again

        def show(number: int, layer: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            def again(x_TD: Tensor) -> Tensor:
                result_1TD, kv[0], _ = layer.forward(x_TD[None], kv[0], *inputs[2:])
                return result_1TD[0]

            visit(number, inputs[0][0], output[0][0], again)

        hooks = [
            layer.register_forward_hook(partial(show, number), prepend=True)
            for number, layer in enumerate(self.model.model.layers)
        ]
        try:
            return self.model(tokens_1T, position_ids=positions_1T, use_cache=False).logits[0].float()
        finally:
            for hook in hooks:
                hook.remove()


def _configuration(folder: Path) -> Any:
    from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig

    try:
        fields = json.loads((folder / "config.json").read_text())
        return HunYuanConfig(**{key: value for key, value in fields.items() if key not in ("model_type", "auto_map")})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def _refuse_other_tensors(
    folder: Path, model: torch.nn.Module, stored_name: dict[str, str], tensors: StoredTensors
) -> None:
    wanted = {stored_name[name]: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    wrong = [f"{name}: missing" for name in sorted(wanted.keys() - tensors.keys())]
    wrong += [f"{name}: not a tensor of this model" for name in sorted(tensors.keys() - wanted.keys())]
    wrong += [
        f"{name}: shape {tensors.spec(name).shape}, the model has {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors.spec(name).shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{folder}: tensors do not fit the model:\n  " + "\n  ".join(wrong[:10]))
