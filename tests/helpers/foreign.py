"""Tiny model folders in the forms that other programs write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint.certificate import Format
from hunyuan_pretrain.checkpoint.hf_export import hf_config
from hunyuan_pretrain.checkpoint.tensor_files import ShardWriter, TensorSpec
from hunyuan_pretrain.checkpoint.weight_map import to_hf
from hunyuan_pretrain.config.schema import ModelConfig
from tests.helpers.tiny_export import ALPHA, random_tensors, write_tiny_tokenizer

ROUTER = ".mlp.gate.wg.weight"


def hf_tensors(model: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of the release; the router is fp32."""
    found = to_hf(model, random_tensors(model, seed))
    return {name: tensor.clone() if name.endswith(ROUTER) else tensor.to(dtype) for name, tensor in found}


def write_tensors(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 1 << 40) -> None:
    """Write safetensors, and an index if there are several shards."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = ShardWriter(folder, specs, max_shard_bytes)
    writer.create()
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()


def write_folder(
    folder: Path,
    model: ModelConfig,
    tensors: dict[str, Tensor],
    *,
    format: Format = "hunyuan",
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 1 << 40,
    **fields: Any,
) -> Path:
    """A model folder: config.json with `fields` changed (None: left out), weights, hy.tiktoken."""
    folder.mkdir()
    config = hf_config(model, rope_alpha=ALPHA, max_position_embeddings=4096, dtype=dtype, format=format)
    config = {name: value for name, value in (config | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors, max_shard_bytes)
    write_tiny_tokenizer(folder)
    return folder


def as_release_fuses(model: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v of owner layers in one qkv_proj; up and gate of every SwiGLU in one gate_and_up_proj, up first."""
    G, H, D = model.num_query_groups, model.head_dim, model.hidden_size
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".self_attn.q_proj.weight") and name.replace("q_proj", "k_proj") in tensors:
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            groups = [
                torch.cat([part.view(G, -1, H, D)[group] for part in parts]).reshape(-1, D) for group in range(G)
            ]  # for each key/value head: its query heads, its key, its value
            fused[name.replace("q_proj", "qkv_proj")] = torch.cat(groups)
        elif name.endswith("gate_proj.weight"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            fused[name.replace("gate_proj", "gate_and_up_proj")] = torch.cat([up, tensor])
        elif not re.search(r"(k_proj|v_proj|up_proj)\.weight$", name):
            fused[name] = tensor
    return fused


def as_transformers_fuses(model: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of a layer in gate_up_proj (E, 2 F, D), gate first, and down_proj (E, D, F)."""
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = [
            [tensors[f"{prefix}{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            for expert in range(model.num_moe_experts)
        ]
        fused[f"{prefix}gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
        fused[f"{prefix}down_proj"] = torch.stack([down for _, _, down in experts])
    return fused


def to_fp8(tensors: dict[str, Tensor], per_row: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(stored tensors, the values that they stand for, fp32): linear layers in float8_e4m3fn with weight_scale, for
    each row in the shape (rows, 1), or one number; and an input_scale."""
    stored, values = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name], values[name] = tensor, tensor.float()
            continue
        largest = tensor.float().abs().amax(1, keepdim=True) if per_row else tensor.float().abs().amax()
        scale = largest / 448
        quantised = (tensor.float() / scale).to(torch.float8_e4m3fn)
        prefix = name.removesuffix("weight")
        stored[name], stored[f"{prefix}weight_scale"] = quantised, scale
        stored[f"{prefix}input_scale"] = torch.tensor(0.5)
        values[name] = quantised.float() * scale
    return stored, values
