"""Scales of activations for static FP8 and for an FP8 key/value cache, from texts.

Layer by layer, with the unquantised weights. Every routed expert sees every token: the routed share of a small
calibration set would leave the scale of a rarely chosen expert to a few tokens, or to none. Engines hold one input
scale for all experts of a layer (vLLM takes the largest), so all of them get the same.

Texts: a .jsonl file (each line {"text": ...} or a JSON string), or any other file as one text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.exported_layers import ExportedLayers
from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanDecoderLayer
from hunyuan_pretrain.checkpoint.quantized_format import FP8_MAX

FEWEST_CALIBRATION_TOKENS = 512
"""Fewer tokens say little about the largest activation; 128 sequences of 2,048 tokens are usual."""
FEWEST_HELD_OUT_TOKENS = 128
"""Fewer tokens say little about perplexity; thousands are better."""
EVERY_NTH_IS_HELD_OUT = 8
"""Of the calibration sequences, if there is no other text."""


def sequences_of(path: Path, tokenizer: Any, length: int) -> list[Tensor]:
    """The texts of a file as sequences of at most `length` token ids (S,): each text begins with the start token, and
    what follows a full sequence begins another. Raises CheckpointError."""
    found = []
    for text in _texts(path):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for begin in range(0, len(ids), length - 1):
            found.append(torch.tensor([tokenizer.bos_token_id, *ids[begin : begin + length - 1]]))
    return [sequence for sequence in found if len(sequence) > 2]  # a loss needs a token after the first


def _texts(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number}: not JSON: {error}") from None
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise CheckpointError(f'{path}, line {number}: expected {{"text": "..."}} or a JSON string')
        yield text


def split(sequences: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(for calibration, held out) of one list of sequences."""
    held_out = list(sequences[EVERY_NTH_IS_HELD_OUT - 1 :: EVERY_NTH_IS_HELD_OUT])
    rest = [one for number, one in enumerate(sequences, 1) if number % EVERY_NTH_IS_HELD_OUT]
    return (rest, held_out) if held_out else (rest[:-1], rest[-1:])


def input_scales(model: ExportedLayers, sequences: Sequence[Tensor], log: Callable[[str], None]) -> dict[str, Tensor]:
    """Scales (1,) in fp32: of the inputs of each linear layer by its name, and of the cached keys and values of each
    owner of a CLA group as <layer>.self_attn.k and .v.

    Raises CheckpointError if one is 0 or not finite.
    """
    passages = model.passages(sequences)
    largest: dict[str, Tensor] = {}
    for number in range(model.num_layers):
        log(f"calibration: layer {number + 1} of {model.num_layers}")
        seen = _Largest(f"model.layers.{number}.")
        with model.layer(number) as layer, _watched(layer, seen):
            for passage in passages:
                model.advance(layer, passage, _SeenCache(seen))
        largest |= seen.values
    return {name: _scale(name, amax) for name, amax in largest.items()}


def key_scale(model: ExportedLayers, number: int, with_weight: bool, observed: Tensor) -> Tensor:
    """Scale (1,) of a layer's cached keys.

    After the key norm a head's keys have at most the length sqrt(head width), and so has each of their values: no text
    can exceed that. with_weight: an engine caches keys multiplied by the norm's weight (format hunyuan_v1_moe).
    """
    if not model.model.config.use_qk_norm:
        return observed
    bound = torch.full_like(observed, math.sqrt(model.model.config.head_dim))
    if with_weight:
        bound = bound * model.tensors[f"model.layers.{number}.self_attn.key_layernorm.weight"].float().abs().amax()
    return _scale(f"model.layers.{number}.self_attn.k", bound)


def _scale(name: str, amax: Tensor) -> Tensor:
    scale = amax.reshape(1) / FP8_MAX
    if not bool(scale.isfinite().all() and (scale > 0).all()):
        raise CheckpointError(
            f"{name}: the largest activation over the calibration texts is {float(amax)}, so it has no scale; "
            "the export or the texts are damaged"
        )
    return scale


class _Largest:
    """Largest absolute values, by name. nan stays nan."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.values: dict[str, Tensor] = {}

    def add(self, x: Tensor, *names: str) -> None:
        amax = x.detach().abs().amax().float()
        for name in (self.prefix + name for name in names):
            self.values[name] = torch.maximum(self.values[name], amax) if name in self.values else amax


class _SeenCache:
    """In the place of a cache: sees what would be stored."""

    def __init__(self, seen: _Largest) -> None:
        self.seen = seen

    def update(self, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.seen.add(k, "self_attn.k")
        self.seen.add(v, "self_attn.v")
        return k, v


@contextmanager
def _watched(layer: HunYuanDecoderLayer, seen: _Largest) -> Iterator[None]:
    """Inside, `seen` is told of the inputs of every linear layer."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.add(inputs[0], name)

    def watch_experts(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_BSD = inputs[0]
        parents = [f"mlp.experts.{number}" for number in range(len(layer.mlp.experts))]
        seen.add(x_BSD, *(f"{parent}.{part}_proj" for parent in parents for part in ("gate", "up")))
        experts: Any = layer.mlp.experts
        for expert in experts:
            inner = nn.functional.silu(expert.gate_proj(x_BSD)) * expert.up_proj(x_BSD)
            seen.add(inner, *(f"{parent}.down_proj" for parent in parents))

    modules = layer.named_modules()
    own = [(name, module) for name, module in modules if name.endswith("_proj") and ".experts." not in name]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in own]
    hooks.append(layer.mlp.register_forward_pre_hook(watch_experts))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
