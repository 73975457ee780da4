"""8-bit weights in the compressed-tensors format, as vLLM and transformers read it: schemes, names, and arithmetic.

What is quantised: every linear layer but the router and the output layer. A weight's numbers are `codes * scale`:

  int8        codes -127 to 127, four of them in an int32; one scale per output, in bf16 as the kernels hold it
  fp8         E4M3 codes; one scale per output, fp32 (or one per tensor, equal for every output)
  fp8-static  E4M3 codes; one fp32 scale per tensor

The FP8 arithmetic is that of training (model/fp8/quantise.py, which needs megatron-core; a test compares the bits):
448 / amax, nearest even. Engines fuse q, k, v and gate, up into one matrix with one scale, and quantise again with the
largest of several, so parts that are fused share their scale. These are also the tensors of which the tensorwise recipe
takes the scale.

compressed-tensors itself is not needed to write: packing is one line, and the tests compare with the library.
Shapes: O outputs, I inputs of a linear layer. Format: https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.tensor_files import TensorSpec

SchemeName = Literal["int8", "fp8", "fp8-static"]
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
INT8_MAX = 127
SMALLEST_TOKEN_SCALE = 1 / (FP8_MAX * 512)
"""Of vLLM's kernels (input_quant_fp8.py)."""

IGNORE = ("lm_head", r"re:.*\.mlp\.gate(\.wg)?$")
"""Linear layers that are not quantised. Engines match the beginning of a name; the router is mlp.gate in vLLM and
mlp.gate.wg in transformers. A pattern without the end, mlp.gate.*, would also exempt shared_mlp.gate_proj."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one parent that engines fuse into one matrix."""


@dataclass(frozen=True)
class Scheme:
    """How weights and inputs of linear layers are stored and computed."""

    name: SchemeName
    meaning: str
    format: str
    """compressed-tensors' name of the layout on disk."""
    weight_type: Literal["int", "float"]
    weight_strategy: Literal["channel", "tensor"]
    inputs: Literal["token", "tensor"] | None
    """One scale per token, computed when it runs; one per layer, stored; None: inputs stay in bf16."""

    @property
    def is_static(self) -> bool:
        """Whether scales of the inputs are stored, and so need calibration."""
        return self.inputs == "tensor"

    def group(self) -> dict[str, Any]:
        """The scheme as compressed-tensors describes it, without targets."""
        common = {"num_bits": 8, "symmetric": True}
        weights = common | {"type": self.weight_type, "strategy": self.weight_strategy, "dynamic": False}
        if self.weight_type == "int":
            weights["group_size"] = -1  # vLLM 0.28 asserts this number for experts in int8
        inputs = common | {"type": "float", "strategy": self.inputs, "dynamic": not self.is_static}
        return {"weights": weights, "input_activations": inputs if self.inputs else None, "output_activations": None}


SCHEMES: dict[SchemeName, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "int8 weights, bf16 inputs (W8A16)", "pack-quantized", "int", "channel", None),
        Scheme("fp8", "FP8 weights; FP8 inputs, a scale per token", "float-quantized", "float", "channel", "token"),
        Scheme(
            "fp8-static",
            "FP8 weights; FP8 inputs, stored scales",
            "float-quantized",
            "float",
            "tensor",
            "tensor",
        ),
    )
}

KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def quantization_config(scheme: Scheme, has_kv_scales: bool) -> dict[str, Any]:
    """The value of quantization_config in config.json."""
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": scheme.format,
        "config_groups": {"group_0": {"targets": ["Linear"], **scheme.group()}},
        "ignore": list(IGNORE),
        "kv_cache_scheme": dict(KV_CACHE) if has_kv_scales else None,
    }


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a quantization_config describes. Raises CheckpointError if it is none of ours."""
    groups = config.get("config_groups") or {}
    if config.get("quant_method") == "compressed-tensors" and list(groups) == ["group_0"]:
        described = {key: groups["group_0"].get(key) for key in ("weights", "input_activations", "output_activations")}
        for scheme in SCHEMES.values():
            if config.get("format") == scheme.format and described == scheme.group():
                return scheme
    raise CheckpointError(f"quantization_config describes none of the schemes {', '.join(SCHEMES)}")


def is_ignored(module: str, ignore: Collection[str]) -> bool:
    """Whether the patterns exempt a linear layer, as vLLM and compressed-tensors decide it."""
    return any(
        re.match(pattern[3:], module) is not None if pattern.startswith("re:") else pattern == module
        for pattern in ignore
    )


# --- arithmetic -------------------------------------------------------------------------------------------------------


class QuantizedWeight(NamedTuple):
    """The numbers of a weight are codes * scale."""

    codes: Tensor
    """(O, I), int8 or E4M3."""
    scale: Tensor
    """(O, 1), or (1,) for the whole tensor."""

    def dequantized(self) -> Tensor:
        """(O, I), fp32."""
        return self.codes.float() * self.scale.float()


def quantize_weights(
    weights: Mapping[str, Tensor], scheme: Scheme, one_scale_per_tensor: bool = False
) -> dict[str, QuantizedWeight]:
    """Linear layers that engines fuse, name -> (O, I), in codes with shared scales.

    one_scale_per_tensor: every output of a scheme with scales per output gets that of the fused tensor. Raises
    CheckpointError if a weight or a scale is not finite, or a scale is 0.
    """
    per_tensor = one_scale_per_tensor or scheme.weight_strategy == "tensor"
    amax_of = {name: weight.float().abs().amax(1, keepdim=True) for name, weight in weights.items()}
    if per_tensor:
        amax = torch.cat(list(amax_of.values())).amax()
        amax_of = {name: amax.expand_as(rows) for name, rows in amax_of.items()}
    found = {}
    for name, weight in weights.items():
        quantize = _int8 if scheme.weight_type == "int" else _fp8
        codes, scale = quantize(weight.float(), amax_of[name])
        if not bool((amax_of[name].isfinite() & scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(f"{name}.weight: holds values that are not finite, or has a scale of 0")
        found[name] = QuantizedWeight(codes, scale[0].clone() if scheme.weight_strategy == "tensor" else scale)
    return found


def _fp8(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.where(amax == 0, 1.0, torch.full_like(amax, FP8_MAX) / amax)
    return (weight * scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale.reciprocal()


def _int8(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    # rounded to bf16 before the codes are chosen: the kernels hold it so
    scale = torch.where(amax == 0, 1.0, amax / INT8_MAX).bfloat16()
    return (weight / scale.float()).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def error_bound(weight: QuantizedWeight, values: Tensor) -> Tensor:
    """How far a number may be from its unquantised value (O, I) if it was rounded to nearest: half a step, plus what
    rounding a scale and a product to fp32 or bf16 adds."""
    scale, size = weight.scale.float(), values.float().abs()
    if weight.codes.dtype == torch.int8:
        # also of the largest value: a scale rounded down to bf16 puts it at most 127 * 2^-8 = 0.496 above its code
        return scale * (0.5 + 2.0**-10)
    return torch.maximum(size * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-10)


def round_inputs(x: Tensor, scheme: Scheme, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Inputs (..., I) of a linear layer as the kernels see them: fp32 numbers, and the factor to multiply the products
    by, (..., 1) or (1,)."""
    x = x.float()
    if scheme.inputs is None:
        return x, None
    if scheme.inputs == "token":
        scale = (x.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(SMALLEST_TOKEN_SCALE)
    assert scale is not None
    return to_fp8_and_back(x * scale.reciprocal()), scale


def to_fp8_and_back(x: Tensor) -> Tensor:
    """fp32 numbers rounded to E4M3, saturating."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()


# --- on disk ----------------------------------------------------------------------------------------------------------


def fused_with(module: str, modules: Collection[str]) -> tuple[str, ...]:
    """The linear layers that share the scale of `module`, itself included, in the order of FUSED."""
    parent, _, own = module.rpartition(".")
    for parts in FUSED:
        if own in parts:
            return tuple(name for part in parts if (name := f"{parent}.{part}") in modules)
    return (module,)


def stored_specs(module: str, shape: Sequence[int], scheme: Scheme) -> dict[str, TensorSpec]:
    """The tensors of a quantised linear layer of weight shape (O, I)."""
    rows, columns = shape
    scale_shape = (1,) if scheme.weight_strategy == "tensor" else (rows, 1)
    if scheme.weight_type == "int":
        return {
            f"{module}.weight_packed": TensorSpec(torch.int32, (rows, -(-columns // 4))),
            f"{module}.weight_scale": TensorSpec(torch.bfloat16, scale_shape),
            f"{module}.weight_shape": TensorSpec(torch.int64, (2,)),
        }
    specs = {
        f"{module}.weight": TensorSpec(FP8, (rows, columns)),
        f"{module}.weight_scale": TensorSpec(torch.float32, scale_shape),
    }
    if scheme.is_static:
        specs[f"{module}.input_scale"] = TensorSpec(torch.float32, (1,))
    return specs


def stored_tensors(module: str, weight: QuantizedWeight, input_scale: Tensor | None) -> dict[str, Tensor]:
    """What `stored_specs` names."""
    codes, scale = weight
    if codes.dtype == torch.int8:
        packed = torch.nn.functional.pad(codes.view(torch.uint8) ^ 128, (0, -codes.shape[1] % 4)).view(torch.int32)
        shape = torch.tensor(codes.shape)
        return {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale, f"{module}.weight_shape": shape}
    tensors = {f"{module}.weight": codes, f"{module}.weight_scale": scale}
    return tensors if input_scale is None else tensors | {f"{module}.input_scale": input_scale}


def read_weight(tensors: Mapping[str, Tensor], module: str, scheme: Scheme) -> QuantizedWeight:
    """A quantised linear layer of a folder. Raises CheckpointError if weight_shape does not fit the packed tensor."""
    scale = tensors[f"{module}.weight_scale"]
    if scheme.weight_type == "float":
        return QuantizedWeight(tensors[f"{module}.weight"], scale)
    packed, (rows, columns) = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_shape"].tolist()
    if packed.shape != (rows, -(-columns // 4)):
        raise CheckpointError(f"{module}.weight_shape is {rows} x {columns}, which weight_packed does not hold")
    return QuantizedWeight((packed.view(torch.uint8)[:, :columns] ^ 128).contiguous().view(torch.int8), scale)
