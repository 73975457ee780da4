"""8-bit weights: packing, rounding, and that FP8 codes are the bits that training's matmuls used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.quantized_format import (
    FP8_MAX,
    IGNORE,
    SCHEMES,
    QuantizedWeight,
    error_bound,
    fused_with,
    is_ignored,
    quantization_config,
    quantize_weights,
    read_weight,
    round_inputs,
    scheme_of,
    stored_specs,
    stored_tensors,
)
from hunyuan_pretrain.checkpoint.weight_map import weight_map
from hunyuan_pretrain.config.recipe import RECIPES
from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.fp8.quantise import quantize as quantize_in_training
from hunyuan_pretrain.model.fp8.session import matmuls, training_step
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import build_model
from tests.helpers import tiny
from tests.helpers.tiny_export import random_tensors

schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)


def weights_of(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """bf16 weights whose rows have very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) ** 4).bfloat16()
        for shape in shapes
    ]


def test_int8_codes_are_packed_as_the_value_plus_128_lowest_byte_first() -> None:
    codes = torch.tensor([[-127, 0, 1, 127, 5]], dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.ones(1, 1, dtype=torch.bfloat16))
    stored = stored_tensors("a", weight, None)
    expected = [[1 | 128 << 8 | 129 << 16 | 255 << 24, 133]]
    assert (stored["a.weight_packed"].long() & 0xFFFFFFFF).tolist() == expected
    assert stored["a.weight_shape"].tolist() == [1, 5]
    assert torch.equal(read_weight(stored, "a", SCHEMES["int8"]).codes, codes)


@schemes
@pytest.mark.parametrize("columns", [5, 8])
def test_stored_tensors_have_the_announced_specs_and_are_read_back(scheme, columns: int) -> None:
    (matrix,) = weights_of((6, columns))
    weight = quantize_weights({"a": matrix}, scheme)["a"]
    stored = stored_tensors("a", weight, torch.ones(1) if scheme.is_static else None)
    specs = stored_specs("a", matrix.shape, scheme)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == specs
    found = read_weight(stored, "a", scheme)
    assert torch.equal(found.dequantized(), weight.dequantized())
    assert found.codes.is_contiguous()


@schemes
def test_every_number_is_within_half_a_step_and_the_bound_is_tight(scheme) -> None:
    (matrix,) = weights_of((64, 256))
    weight = quantize_weights({"a": matrix}, scheme)["a"]
    error, bound = (weight.dequantized() - matrix.float()).abs(), error_bound(weight, matrix)
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.9
    nearly = weight._replace(scale=weight.scale * 1.1)
    assert not bool(((nearly.dequantized() - matrix.float()).abs() <= error_bound(nearly, matrix)).all())


@schemes
def test_quantising_dequantised_weights_again_changes_no_bit(scheme) -> None:
    """FP8 also through bf16, so a bf16 export of weights that are on the grid is not rounded a second time. int8
    through fp32 only: one scale in 128 is a tie that 127 * scale in bf16 moves to its neighbour."""
    once = quantize_weights(dict(zip("abc", weights_of((48, 64), (16, 64), (16, 64)), strict=True)), scheme)
    dtype = torch.float32 if scheme.weight_type == "int" else torch.bfloat16
    again = quantize_weights({name: weight.dequantized().to(dtype) for name, weight in once.items()}, scheme)
    for name, weight in once.items():
        assert torch.equal(weight.codes.view(torch.uint8), again[name].codes.view(torch.uint8))
        assert torch.equal(weight.scale, again[name].scale)


def test_fused_layers_share_the_scale_of_a_tensor() -> None:
    weights = dict(zip(("gate", "up"), weights_of((32, 48), (16, 48)), strict=True))
    parts = quantize_weights(weights, SCHEMES["fp8-static"])
    assert torch.equal(parts["gate"].scale, parts["up"].scale)
    largest = max(float(weight.float().abs().max()) for weight in weights.values())
    assert float(parts["gate"].scale) == pytest.approx(largest / 448)


@pytest.mark.parametrize("scale", [1.0, 0.003, 2.0**-14])
def test_codes_survive_the_way_that_vllm_fuses_them(scale: float) -> None:
    """Through fp16 numbers and the largest scale, also if the scales are equal (per_tensor_dequantize and
    scaled_fp8_quant). A scale below 2^-15 would lose codes among fp16's subnormals."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]
    in_fp16 = codes.to(torch.float16) * torch.tensor(scale)
    again = (in_fp16.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(codes.dtype)
    assert torch.equal(again.float(), codes.float())
    assert in_fp16.dtype == torch.float16


def test_one_scale_per_tensor_stores_a_scale_for_each_output() -> None:
    pair = dict(zip("ab", weights_of((8, 16), (4, 16)), strict=True))
    rows = quantize_weights(pair, SCHEMES["fp8"], one_scale_per_tensor=True)
    tensor = quantize_weights(pair, SCHEMES["fp8-static"])
    for name in pair:
        assert rows[name].scale.shape == (len(pair[name]), 1)
        assert torch.equal(rows[name].dequantized(), tensor[name].dequantized())


@schemes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-39])
def test_scales_that_are_0_or_not_finite_are_refused(scheme, value: float) -> None:
    matrix = torch.full((2, 4), value, dtype=torch.bfloat16)
    if value == 1e-39:
        matrix = torch.full((2, 4), 2.0**-133, dtype=torch.bfloat16)  # subnormal: 448 / amax overflows
    with pytest.raises(
        CheckpointError, match=r"^layer\.weight: holds values that are not finite, or has a scale of 0$"
    ):
        quantize_weights({"layer": matrix}, scheme)


@schemes
def test_an_output_whose_weights_are_all_0_stays_0(scheme) -> None:
    (matrix,) = weights_of((4, 8))
    matrix[1] = 0
    weight = quantize_weights({"a": matrix}, scheme)["a"]
    assert bool((weight.dequantized()[1] == 0).all())
    assert bool((weight.scale > 0).all())


def test_inputs_are_rounded_with_a_scale_per_token_or_the_stored_one() -> None:
    x = torch.tensor([[1.0, -3.0, 0.02], [500.0, 7.0, 0.0], [0.0, 0.0, 0.0]])
    codes, scale = round_inputs(x, SCHEMES["fp8"], None)
    assert scale is not None
    assert scale.flatten().tolist() == pytest.approx([3 / 448, 500 / 448, 1 / (448 * 512)])
    assert codes[:, 1].tolist() == [-448, 6.5, 0]  # 7 * 448 / 500 = 6.27
    codes, scale = round_inputs(x, SCHEMES["fp8-static"], torch.tensor([0.5]))
    assert codes.tolist()[:2] == [[2, -6, 0.0390625], [448, 14, 0]]
    assert scale is not None
    assert scale.tolist() == [0.5]
    assert round_inputs(x, SCHEMES["int8"], None)[1] is None


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("lm_head", True),
        ("model.layers.0.mlp.gate", True),
        ("model.layers.12.mlp.gate.wg", True),
        ("model.layers.0.mlp.shared_mlp.gate_proj", False),
        ("model.layers.0.mlp.shared_mlp.gate_up_proj", False),
        ("model.layers.0.mlp.experts.3.gate_proj", False),
        ("model.layers.0.mlp.experts", False),
        ("model.layers.0.self_attn.q_proj", False),
    ],
)
def test_router_and_output_layer_are_exempt_under_the_names_of_both_loaders(layer: str, expected: bool) -> None:
    assert is_ignored(layer, IGNORE) == expected


def test_a_pattern_without_an_end_would_exempt_more() -> None:
    assert is_ignored("model.layers.0.mlp.shared_mlp.gate_proj", ("re:.*mlp.gate.*",))


def test_layers_that_engines_fuse() -> None:
    modules = ["l.0.q_proj", "l.0.k_proj", "l.0.v_proj", "l.0.o_proj", "l.1.q_proj", "e.3.up_proj", "e.3.gate_proj"]
    assert fused_with("l.0.v_proj", modules) == ("l.0.q_proj", "l.0.k_proj", "l.0.v_proj")
    assert fused_with("l.1.q_proj", modules) == ("l.1.q_proj",), "a borrowing layer"
    assert fused_with("e.3.up_proj", modules) == ("e.3.gate_proj", "e.3.up_proj")
    assert fused_with("l.0.o_proj", modules) == ("l.0.o_proj",)


@schemes
def test_the_scheme_is_read_from_its_config(scheme) -> None:
    config = quantization_config(scheme, True)
    assert scheme_of(config) is scheme
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    with pytest.raises(CheckpointError, match="none of the schemes int8, fp8, fp8-static"):
        scheme_of(config)


def test_fp8_static_weights_are_the_bits_of_training_with_the_tensorwise_recipe() -> None:
    """A step of the training model in emulated FP8, then our codes of the same weights, by their names in an export."""
    model = tiny.tiny_model()
    precision = PrecisionConfig(dtype="bf16", fp8_recipe="tensorwise")
    config = transformer_config(model, ParallelConfig(), precision, device="cpu")
    (training,) = build_model(config, tiny.world_of_one(), seed=None)
    values = {name: tensor.bfloat16() for name, tensor in random_tensors(model).items()}
    for name, parameter in training.named_parameters():
        parameter.data.copy_(values[name])
    used = {}
    with training_step([training], tiny.world_of_one()):
        training(tiny.packed_inputs(model))
        for layer, matmul in matmuls([training]):
            found = [matmul._weights[key] for key in sorted(matmul._weights)]  # type: ignore[index,arg-type]
            used[f"{layer}.weight"] = torch.cat(found).reshape(values[f"{layer}.weight"].shape)
    compared = 0
    for row in weight_map(model):
        if row.megatron_name not in used:
            assert "norm" in row.megatron_name or row.is_fp32 or "embedding" in row.megatron_name
            continue
        stored = dict(zip(row.hf_names, row.to_hf(values[row.megatron_name]), strict=True))
        trained = dict(zip(row.hf_names, row.to_hf(used[row.megatron_name]), strict=True))
        for name in stored:
            group = fused_with(name.removesuffix(".weight"), [other.removesuffix(".weight") for other in stored])
            parts = {part: stored[f"{part}.weight"] for part in group}
            ours = quantize_weights(parts, SCHEMES["fp8-static"])[name.removesuffix(".weight")]
            assert torch.equal(ours.dequantized(), trained[name]), name
            compared += 1
    assert compared == 4 * (2 + 3 + 4 * 3) + 2 * 2


def test_scales_per_output_are_the_arithmetic_of_training_too() -> None:
    """Each row as a tensor of its own."""
    (matrix,) = weights_of((16, 64))
    _, codes, inverse = quantize_in_training(matrix[:, None], RECIPES["tensorwise"], "w", False)
    ours = quantize_weights({"a": matrix}, SCHEMES["fp8"])["a"]
    assert torch.equal(ours.codes.view(torch.uint8), codes.view(16, 64).view(torch.uint8))
    assert torch.equal(ours.scale, inverse.view(16, 1))
