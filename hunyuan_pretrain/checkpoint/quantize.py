"""Writes an 8-bit copy of an export in compressed-tensors format, checked against the export from disk.

One fused group of weights is in memory at a time while writing, one decoder layer while calibrating and comparing. The
folder gets its name only after all checks (see quantized_certificate.py).
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.calibration import (
    FEWEST_CALIBRATION_TOKENS,
    FEWEST_HELD_OUT_TOKENS,
    input_scales,
    key_scale,
    sequences_of,
    split,
)
from hunyuan_pretrain.checkpoint.certificate import SAMPLE_TEXTS
from hunyuan_pretrain.checkpoint.exported_layers import Export
from hunyuan_pretrain.checkpoint.generate import load_tokenizer, sha256_of
from hunyuan_pretrain.checkpoint.outputs import new_folder, refuse_existing
from hunyuan_pretrain.checkpoint.quantized_certificate import (
    caches_weighted_keys,
    compare,
    expected_specs,
    quantized_modules,
    unquantized_model,
)
from hunyuan_pretrain.checkpoint.quantized_format import (
    SCHEMES,
    Scheme,
    fused_with,
    quantization_config,
    quantize_weights,
    stored_tensors,
)
from hunyuan_pretrain.checkpoint.tensor_files import INDEX, ShardWriter

CERTIFICATE = "certificate.json"


def quantize(
    export: Path,
    output: Path,
    scheme_name: str,
    *,
    fp8_kv_cache: bool = False,
    calibration: Path | None = None,
    held_out: Path | None = None,
    samples: int = 128,
    sequence_length: int = 2048,
    one_scale_per_tensor: bool = False,
    device: str = "cpu",
    max_shard_bytes: int = 5_000_000_000,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes `output` and returns its certificate.

    calibration, held_out: texts (see calibration.py), of which at most `samples` sequences are used. Without held_out,
    part of calibration is held out; without either, the built-in sample texts are compared. one_scale_per_tensor: for
    scheme fp8, the scales of the tensorwise recipe. device: what computes, one layer at a time.
    Raises CheckpointError and leaves nothing.
    """
    scheme = _scheme(scheme_name, fp8_kv_cache, calibration, one_scale_per_tensor)
    _refuse_missing_device(device)
    refuse_existing(output, export)
    source = Export.read(export)
    _refuse_what_is_not_bf16(source)
    length = min(sequence_length, source.config.max_position_embeddings)
    calibrating, comparing, compared_text = _sequences(
        source, scheme.is_static or fp8_kv_cache, calibration, held_out, samples, length
    )
    with new_folder(output) as folder:
        scales = _activation_scales(source, calibrating, fp8_kv_cache, device, log) if calibrating else {}
        _copy_other_files(source, folder, quantization_config(scheme, fp8_kv_cache))
        _write_tensors(source, folder, scheme, scales, one_scale_per_tensor, fp8_kv_cache, max_shard_bytes)
        figures = compare(source, folder, comparing, device, log)
        settings = {
            "fp8_kv_cache": fp8_kv_cache,
            "one_scale_per_tensor": one_scale_per_tensor or scheme.weight_strategy == "tensor",
            "calibration_tokens": sum(map(len, calibrating)),
            "held_out_text": compared_text,
        }
        table = _table(source, folder, scheme, figures)
        _extend_model_card(folder / "README.md", scheme, table)
        certificate = _certificate(source, folder, scheme, settings | {"table": table} | figures)
        _write_json(folder / CERTIFICATE, certificate)
    return certificate


def _scheme(name: str, fp8_kv_cache: bool, calibration: Path | None, one_scale_per_tensor: bool) -> Scheme:
    scheme = next((scheme for scheme in SCHEMES.values() if scheme.name == name), None)
    if scheme is None:
        raise CheckpointError(f"scheme {name!r}: must be one of {', '.join(SCHEMES)}")
    if calibration is None and (scheme.is_static or fp8_kv_cache):
        what = f"scheme {name}" if scheme.is_static else "an FP8 key/value cache"
        raise CheckpointError(f"{what} stores scales of activations, which come from texts: give --calibration")
    if one_scale_per_tensor and name != "fp8":
        reason = "it has one already" if scheme.is_static else "int8 is no recipe of training"
        raise CheckpointError(f"one scale per tensor is a choice of scheme fp8, not of {name}: {reason}")
    return scheme


def _refuse_missing_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both
        raise CheckpointError(f"device {device!r}: {str(error).splitlines()[0]}") from None


def _refuse_what_is_not_bf16(source: Export) -> None:
    if "quantization_config" in source.config_json:
        raise CheckpointError(f"{source.folder}: is quantised already; give the bf16 export that it was made from")
    for module in quantized_modules(source):
        dtype = source.tensors.spec(f"{module}.weight").dtype
        if dtype != torch.bfloat16:
            raise CheckpointError(
                f"{source.folder}: {module}.weight is {str(dtype).removeprefix('torch.')}; the kernels that read 8-bit "
                "weights compute in bf16: export the run again with --dtype bf16"
            )


def _sequences(
    source: Export, needs_calibration: bool, calibration: Path | None, held_out: Path | None, samples: int, length: int
) -> tuple[list[Tensor], list[Tensor], str]:
    """(sequences for calibration, held-out sequences, what the latter are)."""
    if samples < 1 or length < 3:
        raise CheckpointError(f"samples={samples}, sequences of {length} tokens: at least 1, of 3 tokens, are needed")
    try:
        tokenizer = load_tokenizer(source.folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source.folder}: its tokenizer cannot be loaded: {error}") from None
    if tokenizer.bos_token_id is None:
        raise CheckpointError(f"{source.folder}: its tokenizer has no start token")
    calibrating = sequences_of(calibration, tokenizer, length) if calibration else []
    what = str(held_out or calibration)
    if held_out:
        comparing = sequences_of(held_out, tokenizer, length)
    elif calibration:
        calibrating, comparing = split(calibrating)
    else:
        texts = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAMPLE_TEXTS)
        comparing, what = [torch.tensor([tokenizer.bos_token_id, *ids]) for ids in texts], "built-in sample texts"
    calibrating, comparing = calibrating[:samples] if needs_calibration else [], comparing[:samples]
    for sequences, fewest, path in (
        (calibrating, FEWEST_CALIBRATION_TOKENS if needs_calibration else 0, calibration),
        (comparing, FEWEST_HELD_OUT_TOKENS if held_out or calibration else 0, held_out or calibration),
    ):
        if (count := sum(map(len, sequences))) < fewest:
            use = "compare on" if sequences is comparing else "calibrate with"
            raise CheckpointError(f"{path}: leaves {count} tokens to {use}, at least {fewest} are needed")
    return calibrating, comparing, what


def _activation_scales(
    source: Export, sequences: list[Tensor], fp8_kv_cache: bool, device: str, log: Callable[[str], None]
) -> dict[str, Tensor]:
    """Scales (1,) by the name of a linear layer; and of cached keys and values, see calibration.py."""
    model = unquantized_model(source, device)
    scales = input_scales(model, sequences, log)
    for number in source.owners if fp8_kv_cache else ():
        keys = f"model.layers.{number}.self_attn.k"
        scales[keys] = key_scale(model, number, caches_weighted_keys(source), scales[keys])
    return scales


def _copy_other_files(source: Export, folder: Path, quantization: dict[str, Any]) -> None:
    """Everything but weights, their index, and the certificate of the export."""
    for path in source.folder.iterdir():
        if path.suffix == ".safetensors" or path.name in (INDEX, CERTIFICATE, "config.json"):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    _write_json(folder / "config.json", source.config_json | {"quantization_config": quantization})


def _write_tensors(
    source: Export,
    folder: Path,
    scheme: Scheme,
    scales: Mapping[str, Tensor],
    one_scale_per_tensor: bool,
    fp8_kv_cache: bool,
    max_shard_bytes: int,
) -> None:
    writer = ShardWriter(folder, expected_specs(source, scheme, fp8_kv_cache), max_shard_bytes)
    writer.create()
    quantized = quantized_modules(source)
    for name in source.tensors:
        if name.removesuffix(".weight") not in quantized:
            writer.write(name, source.tensors[name])
    for module in quantized:
        group = fused_with(module, quantized)
        if module != group[0]:
            continue
        weights = {part: source.tensors[f"{part}.weight"] for part in group}
        for part, weight in quantize_weights(weights, scheme, one_scale_per_tensor).items():
            for name, tensor in stored_tensors(part, weight, scales[part] if scheme.is_static else None).items():
                writer.write(name, tensor)
    for number in source.owners if fp8_kv_cache else ():
        for letter in "kv":
            attention = f"model.layers.{number}.self_attn."
            writer.write(f"{attention}{letter}_scale", scales[f"{attention}{letter}"])
    writer.finish()


def _table(source: Export, folder: Path, scheme: Scheme, figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Row -> column -> number, in the shape of the published table (BF16 | quantised)."""
    before, after = (sum(path.stat().st_size for path in at.glob("*.safetensors")) for at in (source.folder, folder))
    perplexity, column = figures["perplexity"], scheme.name.upper()
    return {
        "perplexity": {"BF16": perplexity["bf16"], column: perplexity["quantized"]},
        "likeliest token as in BF16": {"BF16": 1.0, column: figures["same_likeliest_token"]},
        "mean KL from BF16, nats": {"BF16": 0.0, column: figures["mean_kl_nats"]},
        "weights, GB": {"BF16": before / 1e9, column: after / 1e9},
    }


def _extend_model_card(path: Path, scheme: Scheme, table: dict[str, dict[str, float]]) -> None:
    """Say in the export's model card, if it has one, what this folder is."""
    if not path.is_file():
        return
    columns = list(table["perplexity"])
    lines = ["", "## Quantised", "", f"{scheme.meaning}; compressed-tensors, made from the export described above.", ""]
    lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[column]:.6g}" for column in columns) + " |" for name, row in table.items()
    ]
    # how the export loads is not how its 8-bit copy does
    kept = re.sub(r"## Loading\n.*?(?=^## |\Z)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    path.write_text(kept.rstrip("\n") + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _certificate(source: Export, folder: Path, scheme: Scheme, content: dict[str, Any]) -> dict[str, Any]:
    original = source.folder / CERTIFICATE
    return {
        "format": source.config_json["model_type"],
        "scheme": scheme.name,
        "meaning": scheme.meaning,
        **content,
        "computed_with": "torch, in the arithmetic of the kernels; no 8-bit kernel ran",
        "source": json.loads(original.read_text(encoding="utf-8")) if original.is_file() else {},
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "hunyuan-pretrain")},
        "sha256": {
            str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
