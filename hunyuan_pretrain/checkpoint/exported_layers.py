"""An exported folder as layers that are computed from disk: our model code for transformers, of which one decoder
layer, the embedding or the output layer is in memory at a time.

The certificate runs the model as it is, also through its cache. For quantised exports, all sequences pass through a
layer before the next one is read, and linear layers are replaced: they multiply in fp32 and round the result to bf16,
as kernels accumulate.

Shapes: S tokens of one sequence, T of all texts, D hidden size, V vocabulary size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.generate import load_generation_config
from hunyuan_pretrain.checkpoint.layerwise import Visit
from hunyuan_pretrain.checkpoint.streamed import stream
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors

if TYPE_CHECKING:  # transformers takes seconds to import
    from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig
    from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanDecoderLayer

__all__ = ["Export", "ExportedLayers", "OnDevice", "Passage", "WideLinear"]

FORMATS = ("hunyuan", "hunyuan_v1_moe")
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
MakeLinear = Callable[[str, torch.Size], nn.Module]
"""Name and weight shape (O, I) of a linear layer, such as model.layers.0.self_attn.q_proj -> what takes its place. Its
parameters have the names of tensors in the folder."""

LOGITS_AT_ONCE = 256
"""Positions whose logits are in memory together."""


@dataclass(frozen=True)
class Export:
    """A folder that `export` wrote, with its tensors on disk."""

    folder: Path
    config_json: dict[str, Any]
    config: HunYuanConfig
    tensors: StoredTensors
    linears: frozenset[str]
    """Names of all linear layers, router and output layer included."""

    @property
    def owners(self) -> range:
        """The layers with keys and values of their own; the others of a CLA group borrow them."""
        return range(0, self.config.num_hidden_layers, self.config.kv_share_factor)

    @classmethod
    def read(cls, folder: Path) -> Export:
        """Read headers only. Raises CheckpointError if the folder is no export, or tensors are missing, unknown or
        misshapen."""
        from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig
        from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanForCausalLM

        path = folder / "config.json"
        try:
            config_json = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{folder}: not an export: config.json: {error.strerror}") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON: {error}") from None
        model_type = config_json.get("model_type") if isinstance(config_json, dict) else None
        if model_type not in FORMATS:
            raise CheckpointError(f"{folder}: model_type is {model_type!r}, expected {' or '.join(FORMATS)}")
        try:
            config = HunYuanConfig.from_dict(config_json | {"model_type": "hunyuan", "quantization_config": None})
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        with torch.device("meta"):
            model = HunYuanForCausalLM(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        linears = frozenset(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        return cls(folder, config_json, config, StoredTensors(folder), linears)._refuse_other_than(shapes)

    def _refuse_other_than(self, shapes: Mapping[str, tuple[int, ...]]) -> Export:
        if "quantization_config" in self.config_json:
            return self
        wrong = [f"{name}: missing" for name in shapes if name not in self.tensors]
        wrong += [f"{name}: not a tensor of this model" for name in self.tensors if name not in shapes]
        wrong += [
            f"{name}: shape {self.tensors.spec(name).shape}, but this model has {shape}"
            for name, shape in shapes.items()
            if name in self.tensors and self.tensors.spec(name).shape != shape
        ]
        if wrong:
            lines = [f"{self.folder}: {len(wrong)} tensors do not fit config.json:", *wrong[:5]]
            raise CheckpointError("\n  ".join(lines))
        return self


class OnDevice(Mapping[str, Tensor]):
    """Tensors that are read from disk to a device."""

    def __init__(self, stored: StoredTensors, device: str) -> None:
        self.stored, self.device = stored, device

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class WideLinear(nn.Module):
    """y = x W^T, multiplied in fp32 and rounded to the dtype of x."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        return nn.functional.linear(x.float(), self.weight.float()).to(x.dtype)


@dataclass
class Passage:
    """One sequence on its way through the layers."""

    x_1SD: Tensor
    owner_kv: tuple[Tensor, Tensor] | None = None
    """Keys and values of its CLA group."""


class ExportedLayers:
    """The model of an export, of which one layer is in memory at a time.

    `model` is a HunYuanForCausalLM that works as if its weights were there: forward, caches, generate().
    """

    def __init__(
        self,
        export: Export,
        stored: StoredTensors | None = None,
        device: str = "cpu",
        make_linear: MakeLinear | None = None,
    ) -> None:
        """stored: other tensors than the export's own. make_linear: replaces all linear layers but the router."""
        from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanForCausalLM

        stored = export.tensors if stored is None else stored
        self.tensors = OnDevice(stored, device)
        with torch.device("meta"):
            model = HunYuanForCausalLM(export.config).eval()
            if make_linear is not None:
                _replace_linears(model, make_linear)
        tied = TIED if export.config.tie_word_embeddings else {}
        decoder, layers = model.model, list(model.model.layers)
        experts = [expert for layer in layers for expert in layer.mlp.experts]
        self._streamed = stream(
            model,
            lambda name: stored.spec(tied.get(name, name)).dtype,
            lambda name: self.tensors[tied.get(name, name)],
            [decoder.embed_tokens, *layers, *experts, decoder.norm, model.lm_head],
            device,
        )
        self.model = model
        if (export.folder / "generation_config.json").is_file():
            self.model.generation_config = load_generation_config(export.folder)

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

    def passages(self, sequences: Sequence[Tensor]) -> list[Passage]:
        """Sequences of token ids (S,) before the first layer."""
        embedding = self.model.model.embed_tokens
        with self._streamed.held(embedding):
            return [Passage(embedding(tokens_S[None].to(self.tensors.device)).detach()) for tokens_S in sequences]

    @contextmanager
    def layer(self, number: int) -> Iterator[HunYuanDecoderLayer]:
        """A layer, in memory within the block."""
        layer = self.model.model.layers[number]
        with self._streamed.held(layer):
            yield layer

    @torch.inference_mode()
    def advance(self, layer: HunYuanDecoderLayer, passage: Passage, cache: Any = None) -> None:
        """Pass a sequence through a layer. `cache.update` sees the keys and values that a server would cache."""
        from hunyuan_pretrain.checkpoint.modeling_hunyuan import _Mask

        positions_S = torch.arange(passage.x_1SD.shape[1], device=passage.x_1SD.device)
        rope = self.model.model._rope(positions_S[None], passage.x_1SD)
        mask = _Mask(None, None, positions_S, 0)
        x_1SD, owner_kv = passage.x_1SD, passage.owner_kv
        passage.x_1SD, passage.owner_kv, _ = layer(x_1SD, owner_kv, rope, mask, cache, positions_S, False)

    @contextmanager
    def output(self) -> Iterator[None]:
        """Within it, the output layer stays in memory, for `logits` of several sequences."""
        with self._streamed.held(self.model.lm_head):
            yield

    @torch.inference_mode()
    def logits(self, passage: Passage) -> Iterator[Tensor]:
        """Logits (up to LOGITS_AT_ONCE, V) in fp32 of consecutive positions, after the last layer."""
        for x_SD in self.model.model.norm(passage.x_1SD)[0].split(LOGITS_AT_ONCE):
            yield self.model.lm_head(x_SD).float()


def _replace_linears(model: nn.Module, make_linear: MakeLinear) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith(".gate.wg"):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, make_linear(name, module.weight.shape))
