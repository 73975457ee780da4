"""Quantised exports: what is written, what is compared, which faults are found, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint import quantize as command
from hunyuan_pretrain.checkpoint.calibration import input_scales, sequences_of, split
from hunyuan_pretrain.checkpoint.exported_layers import Export
from hunyuan_pretrain.checkpoint.generate import load_model, load_tokenizer, sha256_of
from hunyuan_pretrain.checkpoint.quantize import quantize
from hunyuan_pretrain.checkpoint.quantized_certificate import (
    QuantizedLinear,
    _RoundedCache,
    _Saturation,
    check_tensors,
    compare,
    quantized_modules,
    unquantized_model,
)
from hunyuan_pretrain.checkpoint.quantized_format import (
    SCHEMES,
    quantize_weights,
    read_weight,
    round_inputs,
    stored_tensors,
)
from hunyuan_pretrain.checkpoint.tensor_files import INDEX, StoredTensors
from hunyuan_pretrain.cli import program
from tests.helpers.tiny_export import export_tiny, tiny_model, write_tiny_tokenizer

VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"scheme_name": "int8"},
    "fp8": {"scheme_name": "fp8"},
    "fp8-static": {"scheme_name": "fp8-static"},
    "int8, FP8 cache": {"scheme_name": "int8", "fp8_kv_cache": True},
    "fp8 in shards": {"scheme_name": "fp8", "one_scale_per_tensor": True, "max_shard_bytes": 40_000},
}
LENGTH = 64
SCALE = "model.layers.0.mlp.experts.1.up_proj.weight_scale"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, an export in bf16 and one in fp32, and texts."""
    folder = tmp_path_factory.mktemp("quantize")
    (folder / "tokenizer").mkdir()
    write_tiny_tokenizer(folder / "tokenizer")
    export_tiny(tiny_model(), folder / "tokenizer", folder / "bf16", dtype=torch.bfloat16)
    export_tiny(tiny_model(), folder / "tokenizer", folder / "fp32")
    (folder / "text.txt").write_text(Path(json.__file__).read_text()[:1600])
    return folder


@pytest.fixture(scope="module")
def written(work: Path) -> Callable[[str], Path]:
    """The folder of a variant, written when it is first asked for."""

    def folder(variant: str) -> Path:
        output = work / f"quantised {variant}"
        if not output.exists():
            quantize(work / "bf16", output, **VARIANTS[variant], calibration=work / "text.txt", sequence_length=LENGTH)
        return output

    return folder


@pytest.fixture(scope="module")
def source(work: Path) -> Export:
    return Export.read(work / "bf16")


@pytest.fixture(scope="module")
def held_out(work: Path) -> list[Tensor]:
    return split(sequences_of(work / "text.txt", load_tokenizer(work / "bf16"), LENGTH))[1]


def quiet(_: str) -> None:
    pass


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantised_folder_holds_the_export_with_8_bit_linear_layers(
    variant: str, written: Callable[[str], Path], source: Export
) -> None:
    folder = written(variant)
    scheme, tensors = check_tensors(source, folder)
    assert scheme.name == VARIANTS[variant]["scheme_name"]
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config == source.config_json
    quantized = quantized_modules(source)
    assert len(quantized) == 2 * (2 + 3 + 4 * 3) + 2, "two layers, one of them with keys and values"
    for name in source.tensors:
        if name.removesuffix(".weight") not in quantized:
            assert torch.equal(tensors[name], source.tensors[name]), name
    assert not any("gate.wg" in module or "embed" in module for module in quantized)
    has_cache = VARIANTS[variant].get("fp8_kv_cache", False)
    scales = {name for name in tensors if name.endswith((".k_scale", ".v_scale"))}
    assert scales == ({f"model.layers.0.self_attn.{letter}_scale" for letter in "kv"} if has_cache else set())
    others = {path.name for path in source.folder.iterdir()} - {"model.safetensors"}
    assert {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} - {INDEX} == others
    assert (folder / INDEX).exists() == ("max_shard_bytes" in VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_certificate_has_figures_a_table_and_digests(
    variant: str, written: Callable[[str], Path], work: Path
) -> None:
    folder = written(variant)
    certificate = json.loads((folder / "certificate.json").read_text())
    column = certificate["scheme"].upper()
    assert certificate["table"]["perplexity"] == {
        "BF16": certificate["perplexity"]["bf16"],
        column: certificate["perplexity"]["quantized"],
    }
    sizes = certificate["table"]["weights, GB"]
    assert sizes["BF16"] == (work / "bf16/model.safetensors").stat().st_size / 1e9
    assert sizes[column] == sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9 < sizes["BF16"]
    assert 0 < certificate["mean_kl_nats"] <= certificate["limits"]["mean_kl_nats"]
    assert certificate["positions"] == 3 * (LENGTH - 1)
    assert certificate["source"] == json.loads((work / "bf16/certificate.json").read_text())
    on_disk = {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
    del on_disk["certificate.json"]
    assert certificate["sha256"] == on_disk
    assert ("saturated_inputs" in certificate) == (column == "FP8-STATIC")


def test_without_texts_the_built_in_ones_are_compared(work: Path, tmp_path: Path) -> None:
    certificate = quantize(work / "bf16", tmp_path / "out", "int8")
    assert certificate["held_out_text"] == "built-in sample texts"
    assert certificate["calibration_tokens"] == 0


def test_a_model_card_says_that_the_folder_is_quantised(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "bf16", tmp_path / "export")
    (tmp_path / "export/README.md").write_text("# Model\n")
    certificate = quantize(tmp_path / "export", tmp_path / "out", "fp8")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("# Model\n\n## Quantised\n\nFP8 weights; FP8 inputs, a scale per token; compressed-tensors")
    assert "| | BF16 | FP8 |\n|---|---|---|\n| perplexity | " in card
    assert certificate["sha256"]["README.md"] == sha256_of(tmp_path / "out/README.md")
    assert (tmp_path / "export/README.md").read_text() == "# Model\n"


# --- what is computed -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_layer_by_layer_computes_the_model(work: Path, held_out: list[Tensor]) -> None:
    export = Export.read(work / "fp32")
    layered, model = unquantized_model(export, "cpu"), load_model(work / "fp32")
    passages = layered.passages(held_out)
    for number in range(2):
        with layered.layer(number) as layer:
            for passage in passages:
                layered.advance(layer, passage)
    for tokens_S, passage in zip(held_out, passages, strict=True):
        expected = model(tokens_S[None], use_cache=False).logits[0]
        assert torch.equal(torch.cat(list(layered.logits(passage))), expected)


@torch.inference_mode()
def test_scales_are_the_largest_inputs_with_every_token_at_every_expert(work: Path, held_out: list[Tensor]) -> None:
    export = Export.read(work / "fp32")
    scales = input_scales(unquantized_model(export, "cpu"), held_out, quiet)
    model, largest = load_model(work / "fp32"), {}

    def see(name: str, x: Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(x.abs().max()))

    for name, module in model.named_modules():
        if name.endswith("_proj") and ".experts." not in name:
            module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
        if name.endswith("v_proj"):
            module.register_forward_hook(lambda _, inputs, output, name=name: see(name[:-5], output))
        if name.endswith(".mlp"):

            def all_experts(mlp: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                (x,) = inputs
                see(f"{name}.experts.gate_proj", x)
                for expert in mlp.experts:  # type: ignore[union-attr]
                    see(f"{name}.experts.down_proj", nn.functional.silu(expert.gate_proj(x)) * expert.up_proj(x))

            module.register_forward_pre_hook(all_experts)
    for tokens_S in held_out:
        model(tokens_S[None], use_cache=False)
    for module in quantized_modules(export):
        layer, routed, rest = module.partition(".experts.")
        name = f"{layer}.experts.{rest.partition('.')[2].replace('up_', 'gate_')}" if routed else module
        assert float(scales[module]) == pytest.approx(largest[name] / 448, rel=1e-6), module
    assert float(scales["model.layers.0.self_attn.v"]) == pytest.approx(largest["model.layers.0.self_attn.v"] / 448)
    assert len({float(scales[f"model.layers.0.mlp.experts.{e}.down_proj"]) for e in range(4)}) == 1


def test_the_key_scale_is_the_bound_that_the_key_norm_gives(written: Callable[[str], Path]) -> None:
    tensors = StoredTensors(written("int8, FP8 cache"))
    assert float(tensors["model.layers.0.self_attn.k_scale"]) == pytest.approx(8**0.5 / 448)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_a_quantised_layer_multiplies_rounded_inputs_and_dequantised_weights(scheme) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix, x = torch.randn(24, 40, generator=generator), torch.randn(2, 7, 40, generator=generator)
    weight = quantize_weights({"a": matrix.bfloat16()}, scheme)["a"]
    stored = torch.tensor([0.004])
    rounded, factor = round_inputs(x, scheme, stored)
    expected = (rounded.double() * (1.0 if factor is None else factor.double())) @ weight.dequantized().double().T
    saturation = _Saturation()
    linear = QuantizedLinear(matrix.shape, scheme, saturation)
    tensors = stored_tensors("a", weight, stored if scheme.is_static else None)
    linear.load_state_dict({name.removeprefix("a."): tensor for name, tensor in tensors.items()})
    actual = linear(x)
    assert torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-5)
    if scheme.is_static:
        beyond = float((x.abs() > 0.004 * 448).double().mean())
        assert saturation.figures() == {"saturated_inputs": pytest.approx(beyond)}
        assert beyond > 0


def test_a_cache_in_fp8_returns_rounded_keys_and_values() -> None:
    k, v = torch.tensor([0.3, -2.0, 500.0]), torch.tensor([1.0, 0.07, -3.0])
    k_read, v_read = _RoundedCache(torch.tensor([1.0]), torch.tensor([0.5]), None).update(k, v, 0, {})
    assert k_read.tolist() == [0.3125, -2.0, 448.0]
    assert v_read.tolist() == pytest.approx([1.0, 0.0703125, -3.0])
    weight_H = torch.tensor([2.0, 0.0, 0.5])
    k_read, _ = _RoundedCache(torch.tensor([1.0]), torch.tensor([0.5]), weight_H).update(k, v, 0, {})
    assert k_read.tolist() == [0.3125, -2.0, 512.0], "500 * 0.5 lies between 240 and 256"


def test_no_more_than_three_layers_are_in_memory(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of all tensors that were read and are still alive, whenever one is read; 12 layers. Those of layers, and
    all: two embeddings are not in memory beside layers."""
    export_tiny(tiny_model(num_layers=12), work / "tokenizer", tmp_path / "deep", dtype=torch.bfloat16)
    export = Export.read(tmp_path / "deep")
    names = [name for name in export.tensors if name.startswith("model.layers.0.")]
    layer = sum(export.tensors.spec(name).nbytes for name in names)
    alive, alive_of_layers, most, most_of_layers = weakref.WeakSet(), weakref.WeakSet(), 0, 0
    read = StoredTensors.__getitem__

    def watched(self: StoredTensors, name: str) -> Tensor:
        nonlocal most, most_of_layers
        tensor = read(self, name)
        alive.add(tensor.untyped_storage())
        if ".layers." in name:
            alive_of_layers.add(tensor.untyped_storage())
        most = max(most, sum(storage.nbytes() for storage in alive))
        most_of_layers = max(most_of_layers, sum(storage.nbytes() for storage in alive_of_layers))
        return tensor

    monkeypatch.setattr(StoredTensors, "__getitem__", watched)
    text = work / "text.txt"
    quantize(tmp_path / "deep", tmp_path / "out", "fp8-static", calibration=text, sequence_length=LENGTH)
    embeddings = 2 * export.tensors.spec("model.embed_tokens.weight").nbytes
    assert layer <= most_of_layers < 3 * layer
    assert embeddings <= most < embeddings + layer


# --- planted faults ---------------------------------------------------------------------------------------------------


def exchange(tensors: dict[str, Tensor], one: str, other: str) -> None:
    for kind in ("weight_packed", "weight_scale", "weight", "input_scale"):
        if f"{one}.{kind}" in tensors:
            a, b = f"{one}.{kind}", f"{other}.{kind}"
            tensors[a], tensors[b] = tensors[b], tensors[a]


def scaled(factor: float, *ends: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(ends):
                tensors[name] = tensors[name] * factor

    return change


EXPERT = "model.layers.1.mlp.experts.2"
FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "a transposed scale": (
        "fp8",
        lambda t: t.update({SCALE: t[SCALE].T.contiguous()}),
        r"up_proj\.weight_scale: float32 \(1, 24\), expected float32 \(24, 1\)",
    ),
    "gate and up exchanged": (
        "int8",
        lambda t: exchange(t, f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj"),
        r"experts\.2\.gate_proj: numbers differ from the export's by more than half a step",
    ),
    "gate and up exchanged in FP8 with one scale": (
        "fp8-static",
        lambda t: exchange(t, f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj"),
        r"experts\.2\.gate_proj: numbers differ",
    ),
    "two experts exchanged": (
        "fp8",
        lambda t: exchange(t, f"{EXPERT}.down_proj", "model.layers.1.mlp.experts.3.down_proj"),
        r"experts\.2\.down_proj: numbers differ",
    ),
    "an unquantised tensor": (
        "int8",
        lambda t: t.update({"model.layers.0.self_attn.o_proj.weight": torch.zeros(32, 32, dtype=torch.bfloat16)}),
        r"o_proj\.weight: not in a folder of scheme int8",
    ),
    "a missing scale": ("fp8", lambda t: t.pop(SCALE), r"up_proj\.weight_scale: missing"),
    "a scale 5% too large": ("fp8", scaled(1.05, SCALE), "numbers differ"),
    "a changed router": ("fp8", scaled(1.01, "layers.1.mlp.gate.wg.weight"), r"gate\.wg\.weight: not the export's"),
    "a changed norm": ("int8", scaled(1.01, "model.norm.weight"), r"model\.norm\.weight: not the export's"),
    "an input scale of one expert": (
        "fp8-static",
        scaled(1.5, f"{EXPERT}.down_proj.input_scale"),
        r"down_proj\.input_scale: differs from that of model\.layers\.1\.mlp\.experts\.0\.down_proj",
    ),
    "a weight scale of up alone": (
        "fp8-static",
        scaled(1.5, f"{EXPERT}.up_proj.weight_scale"),
        r"up_proj\.weight_scale: differs from that of .*gate_proj, with which engines fuse it",
    ),
    "input scales 64 times too small": ("fp8-static", scaled(1 / 64, ".input_scale"), "on held-out text is"),
    "input scales 100,000 times too large": ("fp8-static", scaled(1e5, ".input_scale"), "on held-out text is"),
    "a scale of cached values that is too small": ("int8, FP8 cache", scaled(1e-3, "v_scale"), "on held-out text is"),
    "no scale of cached keys": (
        "int8, FP8 cache",
        lambda t: t.pop("model.layers.0.self_attn.k_scale"),
        r"self_attn\.k_scale: missing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, written: Callable[[str], Path], source: Export, held_out: list[Tensor], tmp_path: Path
) -> None:
    variant, change, message = FAULTS[fault]
    shutil.copytree(written(variant), tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "damaged/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"^wrongly quantised:\n(.|\n)*{message}"):
        compare(source, tmp_path / "damaged", held_out, "cpu", quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(ignore=["lm_head"]), r"mlp\.gate\.wg: not exempt"),
        (lambda q: q.update(ignore=["lm_head", "re:.*mlp.gate.*"]), r"shared_mlp\.gate_proj: exempt|gate_proj: exempt"),
        (lambda q: q.update(ignore=[*q["ignore"], "re:.*o_proj"]), r"o_proj: exempt under ignore="),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), r"self_attn\.k_scale: missing"),
        (lambda q: q.update(format="float-quantized"), "none of the schemes"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="tensor"), "none of the schemes"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_found(
    change: Callable[[dict[str, Any]], None],
    message: str,
    written: Callable[[str], Path],
    source: Export,
    tmp_path: Path,
) -> None:
    shutil.copytree(written("int8"), tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged/config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "damaged/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        check_tensors(source, tmp_path / "damaged")


def test_a_name_that_only_the_index_knows_is_found(
    written: Callable[[str], Path], source: Export, tmp_path: Path
) -> None:
    shutil.copytree(written("fp8 in shards"), tmp_path / "damaged")
    index = json.loads((tmp_path / "damaged" / INDEX).read_text())
    index["weight_map"]["model.layers.0.mlp.experts.0.gate_up_proj.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / "damaged" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the index and the shards disagree about .*gate_up_proj"):
        check_tensors(source, tmp_path / "damaged")


# --- what is refused --------------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
BAD_EXPORTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no export": (lambda folder: (folder / "config.json").unlink(), "not an export: config.json: No such file"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
    "another model": (
        lambda folder: change_config(folder, model_type="llama"),
        "model_type is 'llama', expected hunyuan",
    ),
    "an unknown architecture": (lambda folder: change_config(folder, hidden_act="gelu"), "only 'silu' is implemented"),
    "quantised already": (lambda folder: change_config(folder, quantization_config={}), "is quantised already"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "its tokenizer cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a truncated shard": (cut, "the file was cut or changed"),
    "a missing tensor": (lambda folder: change_tensors(folder, lambda t: t.pop(Q_PROJ)), f"{Q_PROJ}: missing"),
    "an unknown tensor": (
        lambda folder: change_tensors(folder, lambda t: t.update(more=torch.ones(1))),
        "more: not a tensor of this model",
    ),
    "another shape": (
        lambda folder: change_tensors(folder, lambda t: t.update({Q_PROJ: t[Q_PROJ][1:].clone()})),
        r"q_proj.weight: shape (31, 32), but this model has (32, 32)",
    ),
    "fp16": (
        lambda folder: change_tensors(folder, lambda t: t.update({n: x.half() for n, x in t.items() if "wg" not in n})),
        "is float16; the kernels that read 8-bit weights compute in bf16: export the run again with --dtype bf16",
    ),
    "numbers that are not finite": (
        lambda folder: change_tensors(folder, lambda t: t[Q_PROJ].fill_(torch.nan)),
        "q_proj.weight: holds values that are not finite",
    ),
}


@pytest.fixture
def refuse(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command, which must end with status 2, one message and nothing written; returns the message."""

    def run(export: Path, *options: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        arguments = ["quantize", export, tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", ["hunyuan-pretrain", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            program.main()
        assert stop.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("case", BAD_EXPORTS)
def test_what_is_no_export_in_bf16_is_refused(
    case: str, work: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    damage, message = BAD_EXPORTS[case]
    shutil.copytree(work / "bf16", tmp_path / "export")
    damage(tmp_path / "export")
    error = refuse(tmp_path / "export", "--scheme", "int8")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "int4"], "Invalid value for '--scheme'"),
        ([], "Missing option '--scheme'"),
        (
            ["--scheme", "fp8-static"],
            "scheme fp8-static stores scales of activations, which come from texts: give --cal",
        ),
        (["--scheme", "int8", "--kv-cache", "fp8"], "an FP8 key/value cache stores scales of activations"),
        (["--scheme", "int8", "--device", "nowhere"], "device 'nowhere': "),
        (["--scheme", "int8", "--one-scale-per-tensor"], "is a choice of scheme fp8, not of int8"),
        (
            ["--scheme", "fp8-static", "--calibration", "few"],
            "leaves 0 tokens to calibrate with, at least 512 are needed",
        ),
        (["--scheme", "int8", "--held-out", "few"], "leaves 6 tokens to compare on, at least 128 are needed"),
        (["--scheme", "int8", "--held-out", "missing"], "missing: cannot be read: No such file"),
        (["--scheme", "int8", "--held-out", "bytes"], "bytes: not UTF-8 text"),
        (["--scheme", "int8", "--held-out", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--scheme", "int8", "--held-out", "other.jsonl"], 'other.jsonl, line 1: expected {"text": "..."} or a JSON'),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, work: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "few").write_text("Hello")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.jsonl").write_text('"a"\n{\n')
    (tmp_path / "other.jsonl").write_text('{"content": "a"}\n')
    files = {path.name: path for path in tmp_path.iterdir()} | {"missing": tmp_path / "missing"}
    error = refuse(work / "bf16", *(files.get(option, option) for option in options))
    assert message in " ".join(error.split())


def test_an_fp32_export_is_refused(work: Path, refuse: Callable[..., str]) -> None:
    assert "is float32" in refuse(work / "fp32", "--scheme", "fp8")


def test_an_existing_folder_is_kept(work: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert "exists and is not an empty folder" in refuse(work / "bf16", "--scheme", "int8")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_an_output_inside_the_export_is_refused(work: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lies in .*, which is only read"):
        quantize(work / "bf16", work / "bf16/out", "int8")


def test_a_disk_that_is_too_small_or_becomes_full_leaves_nothing(
    work: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(work)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "1e-06 GB are free" in refuse(work / "bf16", "--scheme", "int8")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert "cannot be written: [Errno 28] No space left on device; nothing was left" in refuse(
        work / "bf16", "--scheme", "int8"
    )


def test_a_folder_that_was_written_wrongly_never_gets_its_name(
    work: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Any:
        return {name: one._replace(scale=one.scale * 2) for name, one in quantize_weights(*arguments).items()}

    monkeypatch.setattr(command, "quantize_weights", wrong)
    assert "wrongly quantised" in refuse(work / "bf16", "--scheme", "fp8")


def test_activations_without_a_scale_are_refused(work: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    shutil.copytree(work / "bf16", tmp_path / "export")
    change_tensors(tmp_path / "export", lambda t: t["model.layers.1.input_layernorm.weight"].zero_())
    texts = ("--calibration", work / "text.txt", "--sequence-length", LENGTH)
    error = refuse(tmp_path / "export", "--scheme", "fp8-static", *texts)
    assert "model.layers.1.self_attn.q_proj: the largest activation over the calibration texts is 0.0" in error


def test_the_native_format_caches_keys_with_the_weight_of_their_norm(work: Path, tmp_path: Path) -> None:
    model = tiny_model(cla_share_factor=1, moe_router_topk=2)
    export_tiny(model, work / "tokenizer", tmp_path / "native", dtype=torch.bfloat16, format="hunyuan_v1_moe")
    options: dict[str, Any] = {"fp8_kv_cache": True, "calibration": work / "text.txt", "sequence_length": LENGTH}
    certificate = quantize(tmp_path / "native", tmp_path / "out", "int8", **options)
    assert certificate["format"] == "hunyuan_v1_moe"
    tensors = StoredTensors(tmp_path / "out")
    for number in range(2):
        largest = tensors[f"model.layers.{number}.self_attn.key_layernorm.weight"].float().abs().max()
        assert float(tensors[f"model.layers.{number}.self_attn.k_scale"]) == pytest.approx(
            8**0.5 * float(largest) / 448
        )


def test_generate_says_what_it_needs(written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hunyuan_pretrain.checkpoint.generate.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'pip install "compressed-tensors>=0\.15"'):
        load_model(written("int8"))


def test_read_weight_refuses_a_shape_that_does_not_fit() -> None:
    scheme = SCHEMES["int8"]
    tensors = {
        "a.weight_packed": torch.zeros(2, 3, dtype=torch.int32),
        "a.weight_scale": torch.ones(2, 1),
        "a.weight_shape": torch.tensor([2, 20]),
    }
    with pytest.raises(CheckpointError, match=r"a\.weight_shape is 2 x 20, which weight_packed does not hold"):
        read_weight(tensors, "a", scheme)
