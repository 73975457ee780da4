"""Checks a quantised folder as it lies on disk, against the bf16 export that it was made from.

Three checks, each of which refuses the folder:

  tensors    what a loader would expect after quantization_config is there, and nothing else; what is not quantised has
             the export's bits
  weights    every number is within half a step of the export's, which correct rounding guarantees and a transposed or
             exchanged tensor does not satisfy
  behaviour  logits on held-out text, computed layer by layer in the kernels' arithmetic: inputs rounded with their
             scales, products of codes summed in fp32. What differs from a GPU is the order of the sums.

Shapes: S tokens of one sequence, D hidden size, V vocabulary size, H head width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.exported_layers import Export, ExportedLayers, OnDevice, Passage, WideLinear
from hunyuan_pretrain.checkpoint.quantized_format import (
    IGNORE,
    Scheme,
    error_bound,
    fused_with,
    is_ignored,
    read_weight,
    round_inputs,
    scheme_of,
    stored_specs,
    to_fp8_and_back,
)
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors, TensorSpec

_FP8_LIMITS = {"median_relative_difference": 0.5, "mean_kl_nats": 0.1, "perplexity_ratio": 1.1}
LIMITS = {
    "int8": {"median_relative_difference": 0.25, "mean_kl_nats": 0.05, "perplexity_ratio": 1.05},
    "fp8": _FP8_LIMITS,
    "fp8-static": _FP8_LIMITS,
}
"""Of figures on held-out text, for faults of scales of activations; wrong weights are found exactly.

Measured, int8 and FP8: relative difference of the logits 0.003 and 0.008, KL 0.00003 and 0.0002 (the demo's model);
0.02 and 0.1, 0.001 and 0.01 (random weights, 2 layers); FP8 0.24 and 0.033 (random weights, 10 layers), where trained
weights lose less. Unrelated logits differ by 1.4."""
WHY = (
    "rounding to 8 bits moves the logits of trained models by about 0.01, of random ones by up to 0.25; "
    "unrelated logits differ by 1.4"
)


def check_tensors(source: Export, folder: Path) -> tuple[Scheme, StoredTensors]:
    """The first check, and that layers which engines fuse have equal scales. Raises CheckpointError."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    scheme, ignore, tensors = scheme_of(config), config.get("ignore") or (), StoredTensors(folder)
    wrong = [
        f"{module}: {'exempt' if is_ignored(module, ignore) else 'not exempt'} under ignore={list(ignore)}"
        for module in sorted(source.linears)
        if is_ignored(module, ignore) != is_ignored(module, IGNORE)
    ]
    quantized = quantized_modules(source)
    expected = expected_specs(source, scheme, config.get("kv_cache_scheme") is not None)
    wrong += [f"{name}: missing" for name in expected if name not in tensors]
    wrong += [f"{name}: not in a folder of scheme {scheme.name}" for name in tensors if name not in expected]
    wrong += [
        f"{name}: {_show(tensors.spec(name))}, expected {_show(spec)}"
        for name, spec in expected.items()
        if name in tensors and tensors.spec(name) != spec
    ]
    if wrong:
        raise _refused(wrong)
    untouched = [name for name in source.tensors if name.removesuffix(".weight") not in quantized]
    wrong += [f"{name}: not the export's" for name in untouched if not _same(tensors[name], source.tensors[name])]
    wrong += _unequal_scales(source, scheme, tensors, quantized)
    if wrong:
        raise _refused(wrong)
    return scheme, tensors


def quantized_modules(source: Export) -> list[str]:
    """The linear layers that are quantised, in the order of the export."""
    modules = (name.removesuffix(".weight") for name in source.tensors)
    return [module for module in modules if module in source.linears and not is_ignored(module, IGNORE)]


def expected_specs(source: Export, scheme: Scheme, has_kv_scales: bool) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of every tensor of the quantised folder, in the order of the export."""
    quantized = set(quantized_modules(source))
    specs: dict[str, TensorSpec] = {}
    for name in source.tensors:
        module, spec = name.removesuffix(".weight"), source.tensors.spec(name)
        specs |= stored_specs(module, spec.shape, scheme) if module in quantized else {name: spec}
    for number in source.owners if has_kv_scales else ():
        for letter in "kv":
            specs[f"model.layers.{number}.self_attn.{letter}_scale"] = TensorSpec(torch.float32, (1,))
    return specs


def _unequal_scales(
    source: Export, scheme: Scheme, tensors: Mapping[str, Tensor], quantized: Sequence[str]
) -> list[str]:
    """Layers with stored scales that engines would replace by the largest of several."""
    if not scheme.is_static:
        return []
    wrong = []
    first_of: dict[str, str] = {}
    for module in quantized:
        fused = fused_with(module, quantized)[0]
        if not torch.equal(tensors[f"{module}.weight_scale"], tensors[f"{fused}.weight_scale"]):
            wrong.append(f"{module}.weight_scale: differs from that of {fused}, with which engines fuse it")
        layer, routed, rest = fused.partition(".experts.")
        first = first_of.setdefault(layer + routed + rest.partition(".")[2] if routed else fused, module)
        if not torch.equal(tensors[f"{module}.input_scale"], tensors[f"{first}.input_scale"]):
            wrong.append(f"{module}.input_scale: differs from that of {first}, which reads the same input")
    return wrong


def compare(
    source: Export, folder: Path, sequences: Sequence[Tensor], device: str, log: Callable[[str], None]
) -> dict[str, Any]:
    """All checks; returns the figures. sequences: held-out token ids (S,) each. Raises CheckpointError."""
    scheme, stored = check_tensors(source, folder)
    tensors, saturation = OnDevice(stored, device), _Saturation()
    check_weights(source, scheme, tensors)
    plain = unquantized_model(source, device)
    other = quantized_model(source, scheme, stored, device, saturation)
    expected, actual = (model.passages(sequences) for model in (plain, other))
    hidden = []
    for number in range(source.config.num_hidden_layers):
        log(f"comparison: layer {number + 1} of {source.config.num_hidden_layers}")
        _through(plain, number, expected, None)
        _through(other, number, actual, rounded_cache(source, tensors, number))
        hidden.append(_relative_difference(expected, actual))
    with plain.output(), other.output():
        figures = _figures(plain, other, sequences, expected, actual)
    figures |= {"relative_difference_after_layer": hidden} | saturation.figures()
    _judge(figures, scheme)
    return figures | {"limits": LIMITS[scheme.name] | {"reason": WHY}}


def check_weights(source: Export, scheme: Scheme, tensors: OnDevice) -> None:
    """The second check, of one weight after the other, on the device of `tensors`. Raises CheckpointError."""
    originals, wrong = OnDevice(source.tensors, tensors.device), []
    for module in quantized_modules(source):
        weight, original = read_weight(tensors, module, scheme), originals[f"{module}.weight"]
        if not bool(((weight.dequantized() - original.float()).abs() <= error_bound(weight, original)).all()):
            wrong.append(f"{module}: numbers differ from the export's by more than half a step")
    if wrong:
        raise _refused(wrong)


def unquantized_model(source: Export, device: str) -> ExportedLayers:
    """The model of the export, computed on a device."""
    return ExportedLayers(source, device=device, make_linear=lambda _, shape: WideLinear(shape))


def quantized_model(
    source: Export, scheme: Scheme, stored: StoredTensors, device: str, saturation: _Saturation | None = None
) -> ExportedLayers:
    """The model of a quantised folder in the kernels' arithmetic. stored: its tensors, as `check_tensors` accepts
    them."""
    counts = saturation or _Saturation()

    def linear(module: str, shape: torch.Size) -> nn.Module:
        return WideLinear(shape) if is_ignored(module, IGNORE) else QuantizedLinear(shape, scheme, counts)

    return ExportedLayers(source, stored, device, linear)


class QuantizedLinear(nn.Module):
    """y = x W^T as the kernels of a scheme compute it: products of rounded inputs and codes, summed in fp32, then
    multiplied by both scales and rounded to the dtype of x. Its parameters are the tensors of the folder."""

    def __init__(self, shape: torch.Size, scheme: Scheme, saturation: _Saturation) -> None:
        """shape: (O, I)."""
        super().__init__()
        self.scheme, self.saturation = scheme, saturation
        for name, spec in stored_specs("", shape, scheme).items():
            empty = torch.empty(spec.shape, dtype=spec.dtype)
            self.register_parameter(name.removeprefix("."), nn.Parameter(empty, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        stored = {f".{name}": parameter for name, parameter in self.named_parameters()}
        weight, input_scale = read_weight(stored, "", self.scheme), stored.get(".input_scale")
        rounded, factor = round_inputs(x, self.scheme, input_scale)
        if self.scheme.is_static:
            self.saturation.add(x, input_scale)
        y = nn.functional.linear(rounded, weight.codes.float()) * weight.scale.float().flatten()
        return (y if factor is None else y * factor).to(x.dtype)


class _Saturation:
    """Counts inputs beyond the largest number that a stored scale allows."""

    def __init__(self) -> None:
        self.inputs = self.beyond = 0

    def add(self, x: Tensor, scale: Tensor | None) -> None:
        assert scale is not None
        self.inputs += x.numel()
        self.beyond += int((x.float().abs() > scale * torch.finfo(torch.float8_e4m3fn).max).sum())

    def figures(self) -> dict[str, float]:
        return {"saturated_inputs": self.beyond / self.inputs} if self.inputs else {}


class _RoundedCache:
    """In the place of a key/value cache: what comes back from one in FP8."""

    def __init__(self, k_scale: Tensor, v_scale: Tensor, weight_H: Tensor | None) -> None:
        """weight_H: of the key norm, if the engine caches keys with it."""
        self.k_scale, self.v_scale, self.weight_H = k_scale, v_scale, weight_H

    def update(self, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        weight_H = torch.ones_like(self.k_scale) if self.weight_H is None else self.weight_H.float()
        k_cached = to_fp8_and_back(k.float() * weight_H / self.k_scale) * self.k_scale
        k_read = torch.where(weight_H == 0, k.float(), k_cached / weight_H)
        v_read = to_fp8_and_back(v.float() / self.v_scale) * self.v_scale
        return k_read.to(k.dtype), v_read.to(v.dtype)


def caches_weighted_keys(source: Export) -> bool:
    """Whether engines cache the keys of this format after multiplying them by the key norm's weight."""
    return source.config_json["model_type"] == "hunyuan_v1_moe" and source.config.use_qk_norm


def rounded_cache(source: Export, tensors: Mapping[str, Tensor], number: int) -> _RoundedCache | None:
    """What stands in for the FP8 cache of a layer; None if the folder has no scales for it."""
    attention = f"model.layers.{number}.self_attn."
    if f"{attention}k_scale" not in tensors:
        return None
    weight_H = tensors[f"{attention}key_layernorm.weight"] if caches_weighted_keys(source) else None
    return _RoundedCache(tensors[f"{attention}k_scale"], tensors[f"{attention}v_scale"], weight_H)


def _through(model: ExportedLayers, number: int, passages: Sequence[Passage], cache: _RoundedCache | None) -> None:
    with model.layer(number) as layer:
        for passage in passages:
            model.advance(layer, passage, cache)


def _relative_difference(expected: Sequence[Passage], actual: Sequence[Passage]) -> float:
    pairs = [(one.x_1SD.double(), other.x_1SD.double()) for one, other in zip(expected, actual, strict=True)]
    difference = sum(float((other - one).square().sum()) for one, other in pairs)
    return math.sqrt(difference / max(sum(float(one.square().sum()) for one, _ in pairs), 1e-300))


def _figures(
    plain: ExportedLayers,
    other: ExportedLayers,
    sequences: Sequence[Tensor],
    expected: Sequence[Passage],
    actual: Sequence[Passage],
) -> dict[str, Any]:
    """Figures over all positions but the last of each sequence, which has no next token."""
    losses, kl, same, relative, largest = torch.zeros(2, dtype=torch.float64), 0.0, 0, [], 0.0
    for tokens_S, one, two in zip(sequences, expected, actual, strict=True):
        labels = tokens_S[1:]
        for expected_SV, actual_SV in zip(plain.logits(one), other.logits(two), strict=True):
            label_S, labels = labels[: len(expected_SV)], labels[len(expected_SV) :]
            a, b = (logits_SV[: len(label_S)].double().cpu() for logits_SV in (expected_SV, actual_SV))
            log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
            losses -= torch.stack([x.gather(-1, label_S[:, None]).sum() for x in (log_a, log_b)])
            kl += float((log_a.exp() * (log_a - log_b)).sum())
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            largest = max(largest, float((a - b).abs().max())) if len(label_S) else largest
            centred = a - a.mean(-1, keepdim=True)
            difference = b - b.mean(-1, keepdim=True) - centred
            relative.append(difference.norm(dim=-1) / centred.norm(dim=-1).clamp_min(1e-30))
    count = sum(len(tokens_S) - 1 for tokens_S in sequences)
    before, after = (losses / count).exp().tolist()
    return {
        "positions": count,
        "perplexity": {"bf16": before, "quantized": after},
        "mean_kl_nats": kl / count,
        "same_likeliest_token": same / count,
        "median_relative_difference": float(torch.cat(relative).median()),
        "max_abs_difference": largest,
    }


def _judge(figures: Mapping[str, Any], scheme: Scheme) -> None:
    """Raises CheckpointError if a figure is above its limit."""
    ratio = figures["perplexity"]["quantized"] / figures["perplexity"]["bf16"]
    found = {**figures, "perplexity_ratio": ratio}
    # `not <=` instead of `>`, because nan must fail
    wrong = [
        f"{name} on held-out text is {found[name]:.3g}, at most {limit:.3g} for {scheme.name}"
        for name, limit in LIMITS[scheme.name].items()
        if not found[name] <= limit
    ]
    if wrong:
        raise _refused(wrong)


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _show(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {tuple(spec.shape)}"


def _refused(wrong: Sequence[str]) -> CheckpointError:
    more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return CheckpointError("wrongly quantised:\n  " + "\n  ".join(wrong[:5]) + more)
