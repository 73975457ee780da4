"""Computes an export one decoder layer at a time, with that layer's weights read from disk.

All sequences pass through a layer before the next one is read, so memory holds one layer, the embedding, and the
hidden states. Linear layers multiply in fp32 and round the result to bf16, as kernels accumulate; everything else is
the export's own model code.

Shapes: S tokens of one sequence, D hidden size, V vocabulary size, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig
from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanDecoderLayer, HunYuanForCausalLM, HunYuanModel, _Mask
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors

FORMATS = ("hunyuan", "hunyuan_v1_moe")
MakeLinear = Callable[[str], nn.Module]
"""Name of a linear layer, such as model.layers.0.self_attn.q_proj -> a module with its weight."""

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

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        return nn.functional.linear(x.float(), self.weight.float()).to(x.dtype)


@dataclass
class Passage:
    """One sequence on its way through the layers."""

    x_1SD: Tensor
    owner_kv: tuple[Tensor, Tensor] | None = None
    """Keys and values of its CLA group."""


class LayeredModel:
    """A model whose decoder layers stay on disk."""

    def __init__(self, config: HunYuanConfig, tensors: Mapping[str, Tensor], make_linear: MakeLinear) -> None:
        """tensors: of the folder, read on access. make_linear: for all linear layers but the router."""
        self.config, self.tensors, self._make_linear = config, tensors, make_linear
        # the model without layers: embedding, final norm and RoPE
        alone = HunYuanConfig.from_dict(config.to_dict() | {"num_hidden_layers": 0, "dtype": None})
        with torch.device("meta"):
            self._shell = HunYuanModel(alone)
        self._fill(self._shell, "model.")
        self._head = WideLinear(
            self._shell.embed_tokens.weight if config.tie_word_embeddings else tensors["lm_head.weight"]
        )

    def embedded(self, tokens_S: Tensor) -> Passage:
        """A sequence before the first layer."""
        weight = self._shell.embed_tokens.weight
        return Passage(self._shell.embed_tokens(tokens_S[None].to(weight.device)).detach())

    def layer(self, number: int) -> HunYuanDecoderLayer:
        """Read a layer."""
        with torch.device("meta"):
            layer = HunYuanDecoderLayer(self.config, number).eval()
        prefix = f"model.layers.{number}."
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and not name.endswith(".gate.wg"):
                parent, _, own = name.rpartition(".")
                setattr(layer.get_submodule(parent), own, self._make_linear(prefix + name))
        self._fill(layer, prefix)
        return layer

    def _fill(self, module: nn.Module, prefix: str) -> None:
        missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        module.load_state_dict({name: self.tensors[prefix + name] for name in missing}, strict=False, assign=True)

    @torch.inference_mode()
    def advance(self, layer: HunYuanDecoderLayer, passage: Passage, cache: Any = None) -> None:
        """Pass a sequence through a layer. `cache.update` sees the keys and values that a server would cache."""
        positions_S = torch.arange(passage.x_1SD.shape[1], device=passage.x_1SD.device)
        rope = self._shell._rope(positions_S[None], passage.x_1SD)
        mask = _Mask(None, None, positions_S, 0)
        x_1SD, owner_kv = passage.x_1SD, passage.owner_kv
        passage.x_1SD, passage.owner_kv, _ = layer(x_1SD, owner_kv, rope, mask, cache, positions_S, False)

    @torch.inference_mode()
    def logits(self, passage: Passage) -> Iterator[Tensor]:
        """Logits (up to LOGITS_AT_ONCE, V) in fp32 of consecutive positions, after the last layer."""
        for x_SD in self._shell.norm(passage.x_1SD)[0].split(LOGITS_AT_ONCE):
            yield self._head(x_SD).float()
