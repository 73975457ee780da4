"""Quantised folders read by the compressed-tensors library, and by transformers with it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_pretrain.checkpoint.exported_layers import Export
from hunyuan_pretrain.checkpoint.generate import generate, load_model
from hunyuan_pretrain.checkpoint.quantize import quantize
from hunyuan_pretrain.checkpoint.quantized_certificate import quantized_modules
from hunyuan_pretrain.checkpoint.quantized_format import IGNORE, SCHEMES, is_ignored, read_weight
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors
from tests.helpers.tiny_export import export_tiny, tiny_model, write_tiny_tokenizer

library = pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors library")
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"scheme_name": "int8"},
    "fp8": {"scheme_name": "fp8"},
    "fp8-static": {"scheme_name": "fp8-static"},
    "int8 and cache": {"scheme_name": "int8", "fp8_kv_cache": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("export")
    export_tiny(tiny_model(), write_tiny_tokenizer(folder), folder / "bf16", dtype=torch.bfloat16)
    return Export.read(folder / "bf16")


@pytest.fixture(scope="module")
def written(source: Export) -> Callable[[str], Path]:
    text = source.folder.parent / "text.txt"
    text.write_text(Path(json.__file__).read_text()[:1600])

    def folder(variant: str) -> Path:
        output = source.folder.parent / variant
        if not output.exists():
            quantize(source.folder, output, **VARIANTS[variant], calibration=text, sequence_length=64)
        return output

    return folder


def quantization_of(folder: Path) -> Any:
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])


@variants
def test_the_library_decompresses_every_weight_to_our_numbers(
    variant: str, written: Callable[[str], Path], source: Export
) -> None:
    from compressed_tensors.compressors import BaseCompressor

    folder = written(variant)
    config, tensors = quantization_of(folder), StoredTensors(folder)
    scheme = SCHEMES[VARIANTS[variant]["scheme_name"]]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    modules = quantized_modules(source)
    for module in modules:
        stored = {
            name.removeprefix(f"{module}."): tensors[name] for name in tensors if name.startswith(f"{module}.weight")
        }
        found = compressor.decompress(stored, config.config_groups["group_0"])["weight"]
        ours = read_weight(tensors, module, scheme).dequantized()
        assert torch.equal(found, ours.to(found.dtype)), module
        assert found.dtype == tensors[f"{module}.weight_scale"].dtype
    assert len(modules) == 36


@variants
def test_the_library_compresses_with_our_scales_to_our_bits(
    variant: str, written: Callable[[str], Path], source: Export
) -> None:
    """But for ties: training multiplies by 448 / amax, the library divides by amax / 448, which differ in the last bit.
    Where the codes differ, both are equally far from the weight."""
    from compressed_tensors.compressors import BaseCompressor

    folder = written(variant)
    config, tensors = quantization_of(folder), StoredTensors(folder)
    scheme = SCHEMES[VARIANTS[variant]["scheme_name"]]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    for module in quantized_modules(source):
        plain = {
            "weight": source.tensors[f"{module}.weight"].float(),
            "weight_scale": tensors[f"{module}.weight_scale"].float(),
        }
        compressed = compressor.compress(plain, config.config_groups["group_0"])
        ours = read_weight(tensors, module, scheme)
        theirs = {f"{module}.{name}": tensor for name, tensor in compressed.items()}
        theirs[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"]
        codes = read_weight(theirs, module, scheme).codes.float()
        differ = codes != ours.codes.float()
        weight, scale = plain["weight"], ours.scale.float().expand_as(codes)
        error = [(weight - some * scale).abs()[differ] for some in (codes, ours.codes.float())]
        assert torch.allclose(*error, rtol=1e-5), module
        assert scheme.weight_type == "float" or not bool(differ.any()), module


def test_the_library_exempts_and_targets_what_we_do(written: Callable[[str], Path], source: Export) -> None:
    from compressed_tensors.utils.match import match_named_modules

    from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanForCausalLM

    with torch.device("meta"):
        model = HunYuanForCausalLM(source.config)
    config = quantization_of(written("int8"))
    matched = {name for name, _ in match_named_modules(model, config.config_groups["group_0"].targets, config.ignore)}
    assert matched == set(quantized_modules(source))
    assert matched == {name for name in source.linears if not is_ignored(name, IGNORE)}


@pytest.mark.parametrize("variant", ["int8", "fp8", "fp8-static"])
@torch.inference_mode()
def test_transformers_dequantises_it_to_our_numbers(
    variant: str, written: Callable[[str], Path], source: Export
) -> None:
    """With the folder's own model code, as a user loads it. With this option transformers casts the router to bf16."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder = written(variant)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    scheme, tensors = SCHEMES[VARIANTS[variant]["scheme_name"]], StoredTensors(folder)
    for module in quantized_modules(source):
        ours = read_weight(tensors, module, scheme).dequantized()
        assert torch.equal(model.get_submodule(module).weight, ours.bfloat16()), module
    for name in set(source.tensors) - {f"{module}.weight" for module in quantized_modules(source)}:
        found = model.get_parameter(name)
        assert torch.equal(found, source.tensors[name].to(found.dtype)), name
    tokens = torch.arange(3, 60)[None]
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, tokens.shape[1] + 4)


@pytest.mark.parametrize("scheme_name", ["int8", "fp8"])
@torch.inference_mode()
def test_transformers_own_model_loads_the_native_format(scheme_name: str, tmp_path: Path) -> None:
    """hunyuan_v1_moe, whose experts transformers fuses: as an export in bf16 with the same numbers."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = tiny_model(cla_share_factor=1, moe_router_topk=2)
    tokenizer = write_tiny_tokenizer(tmp_path)
    export_tiny(model, tokenizer, tmp_path / "bf16", dtype=torch.bfloat16, format="hunyuan_v1_moe")
    quantize(tmp_path / "bf16", tmp_path / "quantised", scheme_name)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantised",
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not any(report.values())
    source, stored = Export.read(tmp_path / "bf16"), StoredTensors(tmp_path / "quantised")
    tensors = {name: source.tensors[name] for name in source.tensors}
    for module in quantized_modules(source):
        tensors[f"{module}.weight"] = read_weight(stored, module, SCHEMES[scheme_name]).dequantized().bfloat16()
    save_file(tensors, tmp_path / "bf16/model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    tokens = torch.arange(3, 60)[None]
    assert torch.equal(loaded(tokens, use_cache=False).logits, expected(tokens, use_cache=False).logits)


def test_generate_continues_a_text_with_a_quantised_folder(written: Callable[[str], Path]) -> None:
    assert generate(written("int8"), "def f", max_new_tokens=4, temperature=0, out=io.StringIO())


@pytest.mark.parametrize("variant", ["int8", "fp8", "fp8-static"])
@torch.inference_mode()
def test_transformers_computes_with_the_codes(variant: str, written: Callable[[str], Path], source: Export) -> None:
    """Without the option the library rounds inputs too. transformers holds scales in the model's dtype, so those of
    FP8 are rounded to bf16: another 2^-9, inside the error of FP8."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(written(variant), trust_remote_code=True, dtype=torch.bfloat16)
    assert model.get_parameter("model.layers.1.mlp.gate.wg.weight").dtype == torch.float32
    tokens = torch.arange(3, 60)[None]
    logits = model(tokens, use_cache=False).logits.float()
    expected = load_model(source.folder)(tokens, use_cache=False).logits.float()
    difference = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < float(difference.median()) < 0.3
