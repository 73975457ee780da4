"""Writes a model as a folder that Hugging Face transformers (and what builds on it) loads, and proves that it loads right.

Two formats:
    hunyuan          everything this project trains, with our own model code beside the weights (auto_map)
    hunyuan_v1_moe   what transformers and vLLM load with their own code; refused where they would compute something else

The folder appears under its name only after it has been loaded back from disk and compared with the model it came from;
certificate.json in it says how well they agree.
"""

from __future__ import annotations

import json
import platform
import secrets
import shutil
from collections import abc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config.schema import ModelConfig
from ..data.tokenizer import Tokenizer, write_hf_tokenizer
from . import CheckpointError
from .generate import MODEL_CODE, load_model, load_tokenizer, sha256_of
from .weight_map import Mapping, to_hf, weight_map

Format = Literal["hunyuan", "hunyuan_v1_moe"]

# One position's difference is rms(difference) / rms(reference), both over the vocabulary and without their means.
# `median` bounds the typical position; `position` bounds each, and `outliers` is the share of positions that may exceed it.
# Measured on random models of up to 24 layers: 1e-6 (fp32), 0.01 (fp16) and 0.07 (bf16) for right exports; 0.4 and more where
# every layer is wrong in the same way.
FLIPS = "a router choice may flip where two experts are close"
HALF = f"{FLIPS}; an error in one layer of many may hide in this, and is visible in an fp32 export"
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"median": 1e-4, "position": 1e-3, "outliers": 0.02, "reason": f"only the order of summation differs; {FLIPS}"},
    torch.float16: {"median": 0.03, "position": 0.2, "outliers": 0.25, "reason": f"11 significant bits; {HALF}"},
    torch.bfloat16: {"median": 0.15, "position": 0.4, "outliers": 0.25, "reason": f"8 significant bits; {HALF}"},
}

SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and in 1969 two people walked on the Moon.",
    "床前明月光,疑是地上霜。举头望明月,低头思故乡。",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "E = mc^2; \u03b1 + \u03b2 \u2260 \u03b3; caf\u00e9, na\u00efve, \U0001f642",
)


def export(
    model: ModelConfig,
    megatron_tensors: abc.Mapping[str, Tensor],
    tokenizer_folder: Path,
    output: Path,
    *,
    rope_alpha: float,
    max_position_embeddings: int,
    dtype: torch.dtype,
    reference_logits: Callable[[Tensor], Tensor],
    format: Format = "hunyuan",
    certificate_info: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Writes `output`, loads it back, compares it with the model it came from, and returns the certificate.

    megatron_tensors: full parameters by Megatron name (see `weight_map`), read one at a time. dtype: of the stored weights; the
    router stays fp32. rope_alpha: NTK-alpha of the last stage. reference_logits: the training model, dropless: token ids (B, S)
    -> logits (B, S, V). certificate_info: copied into the certificate (run, step). Needs memory for one shard while writing and
    for the whole model while comparing.
    Raises CheckpointError, and leaves no output, if the output folder is not empty, the format cannot express the model, a
    tensor is missing or of the wrong shape, the tokenizer does not fit, or what was loaded back computes something else.
    """
    _refuse_what_loads_wrongly(model, format)
    if dtype not in TOLERANCES:
        raise CheckpointError(f"dtype {dtype}: exports are {', '.join(str(known).removeprefix('torch.') for known in TOLERANCES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; remove it or choose another name")
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model's embedding only {model.padded_vocab_size} rows"
        )

    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.unfinished-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        # A pretraining document ends with <|endoftext|>; the ids in the release's own config.json are wrong for its tokenizer.
        ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
        config = hf_config(model, rope_alpha=rope_alpha, max_position_embeddings=max_position_embeddings, dtype=dtype, format=format) | ids
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", ids)
        write_hf_tokenizer(tokenizer, folder)
        if format == "hunyuan":
            for name in MODEL_CODE:
                shutil.copyfile(Path(__file__).parent / name, folder / name)
        _write_weights(model, megatron_tensors, folder, dtype, max_shard_bytes)
        certificate = _certify(model, tokenizer, folder, dtype, reference_logits)
        certificate = {"format": format, "dtype": str(dtype).removeprefix("torch."), "rope_alpha": rope_alpha} | certificate
        certificate["source"] = certificate_info or {}
        _write_json(folder / "certificate.json", certificate)
        folder.rename(output)  # over an empty folder too
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return certificate


def hf_config(
    model: ModelConfig, *, rope_alpha: float, max_position_embeddings: int, dtype: torch.dtype, format: Format = "hunyuan"
) -> dict[str, Any]:
    """The architecture as config.json spells it, without token ids."""
    config = {
        "architectures": ["HunYuanForCausalLM"],
        "model_type": "hunyuan",
        "auto_map": {
            "AutoConfig": "configuration_hunyuan.HunYuanConfig",
            "AutoModel": "modeling_hunyuan.HunYuanModel",
            "AutoModelForCausalLM": "modeling_hunyuan.HunYuanForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "moe_intermediate_size": model.expert_ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "attention_head_dim": model.head_dim,
        "num_experts": model.num_moe_experts,
        "num_shared_expert": 1,
        "moe_topk": model.moe_router_topk,
        "use_mixed_mlp_moe": True,
        "use_cla": model.cla_share_factor > 1,
        "cla_share_factor": model.cla_share_factor,
        "use_qk_norm": model.qk_layernorm,
        "capacity_factor": model.moe_expert_capacity_factor,
        "moe_drop_tokens": model.moe_expert_capacity_factor is not None and not model.recycle_routing,
        "moe_random_routing_dropped_token": model.moe_expert_capacity_factor is not None and model.recycle_routing,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        # All three keys, also for alpha 1: loaders of the release index them, and without them it rounds frequencies to bf16.
        "rope_scaling": {"type": "dynamic", "alpha": float(rope_alpha), "factor": 1.0},
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "max_position_embeddings": max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": model.init_method_std,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    if format == "hunyuan_v1_moe":
        config["architectures"], config["model_type"] = ["HunYuanMoEV1ForCausalLM"], "hunyuan_v1_moe"
        del config["auto_map"]
    return config


def _refuse_what_loads_wrongly(model: ModelConfig, format: Format) -> None:
    """hunyuan_v1_moe is read by other people's code, which would not notice that it computes another model."""
    if format == "hunyuan":
        return
    if format != "hunyuan_v1_moe":
        raise CheckpointError(f"format {format!r}: must be hunyuan or hunyuan_v1_moe")
    reasons = []
    if model.cla_share_factor > 1:
        reasons.append(
            f"cla_share_factor={model.cla_share_factor}: it would fill the keys and values of borrowing layers with random numbers"
        )
    if model.moe_router_topk == 1:
        reasons.append(
            "moe_router_topk=1: transformers renormalises the weight of the only expert to 1, where this model uses its probability"
        )
    if not model.qk_layernorm:
        reasons.append("qk_layernorm=false: it always normalises queries and keys")
    if model.expert_ffn_size != model.ffn_hidden_size:
        reasons.append(
            f"moe_ffn_hidden_size={model.expert_ffn_size}: transformers gives routed experts the width of the "
            f"shared one, {model.ffn_hidden_size}"
        )
    if reasons:
        raise CheckpointError(
            "format hunyuan_v1_moe would load without an error and be wrong; use format hunyuan:\n  " + "\n  ".join(reasons)
        )


def _write_weights(
    model: ModelConfig, megatron_tensors: abc.Mapping[str, Tensor], folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """safetensors shards in the order of the forward pass, planned from the shapes so that one shard is in memory at a time."""
    stored = {name: torch.float32 if row.is_fp32 else dtype for row in weight_map(model) for name in row.hf_names}
    shards = _plan_shards(weight_map(model), stored, max_shard_bytes)
    files = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    tensors = to_hf(model, megatron_tensors)
    total_bytes = 0
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for _ in names:
            name, tensor = next(tensors)
            # A copy even where nothing is cast: safetensors refuses tensors that share memory.
            shard[name] = tensor.detach().to("cpu", stored[name], copy=True, memory_format=torch.contiguous_format)
            total_bytes += shard[name].nbytes
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_of = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_of})


def _plan_shards(table: list[Mapping], stored: dict[str, torch.dtype], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    free = max_shard_bytes
    for row in table:
        for name, shape in zip(row.hf_names, row.hf_shapes, strict=True):
            size = torch.Size(shape).numel() * stored[name].itemsize
            if shards[-1] and size > free:
                shards.append([])
                free = max_shard_bytes
            shards[-1].append(name)
            free -= size
    return shards


def _certify(
    model: ModelConfig, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, reference_logits: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Loads the folder as a user would and compares tokens and logits. Raises CheckpointError if they disagree."""
    loaded_tokenizer = load_tokenizer(folder)
    for text in SAMPLE_TEXTS:
        ours, loaded = tokenizer.encode(text), loaded_tokenizer(text, add_special_tokens=False)["input_ids"]
        if ours != loaded:
            raise CheckpointError(f"the exported tokenizer encodes {text!r} as {loaded}, the training tokenizer as {ours}")
    batches = {
        "random tokens": torch.randint(tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)),
        **{f"text {i}": torch.tensor([[tokenizer.start_id, *tokenizer.encode(text)]]) for i, text in enumerate(SAMPLE_TEXTS)},
    }
    loaded_model = load_model(folder)
    checks = {}
    for name, tokens_BS in batches.items():
        with torch.inference_mode():
            logits_BSV = loaded_model(tokens_BS, use_cache=False).logits
        checks[name] = _compare(reference_logits(tokens_BS), logits_BSV, model.padded_vocab_size)
    tolerance = TOLERANCES[dtype]
    difference = torch.cat([check.pop("per_position") for check in checks.values()])
    median, outliers = difference.median().item(), (difference > tolerance["position"]).double().mean().item()
    # `not <=` and not `>`: a NaN must fail.
    if not (median <= tolerance["median"] and outliers <= tolerance["outliers"] and bool(difference.isfinite().all())):
        raise CheckpointError(
            f"the export computes something else than the model it came from: relative difference of the logits {median:.2e} at the median "
            f"position (at most {tolerance['median']:.0e}), {outliers:.0%} of positions above {tolerance['position']:.0e} (at most "
            f"{tolerance['outliers']:.0%}), {int((~difference.isfinite()).sum())} positions not finite"
        )
    packages = ("torch", "transformers", "safetensors", "hunyuan-pretrain")
    return {
        "max_abs_difference": max(check["max_abs_difference"] for check in checks.values()),
        "mean_kl_nats": sum(check["mean_kl_nats"] for check in checks.values()) / len(checks),
        "median_relative_difference": median,
        "positions_above_tolerance": outliers,
        "tolerance": tolerance,
        "checks": checks,
        "loaded_with": type(loaded_model).__name__,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "sha256": {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }


def _compare(expected_BSV: Tensor, actual_BSV: Tensor, vocab_size: int) -> dict[str, Any]:
    expected, actual = (t.detach().cpu().double().reshape(-1, t.shape[-1]) for t in (expected_BSV, actual_BSV))
    if expected.shape != actual.shape or expected.shape[-1] != vocab_size:
        raise CheckpointError(f"logits of the model have shape {tuple(expected_BSV.shape)}, those of the export {tuple(actual_BSV.shape)}")
    expected_log, actual_log = expected.log_softmax(-1), actual.log_softmax(-1)
    centred = expected - expected.mean(-1, keepdim=True)
    difference = (actual - actual.mean(-1, keepdim=True)) - centred
    return {
        "positions": len(expected),
        "max_abs_difference": (actual - expected).abs().max().item(),
        "mean_kl_nats": (expected_log.exp() * (expected_log - actual_log)).sum(-1).mean().item(),
        "same_likeliest_token": (expected.argmax(-1) == actual.argmax(-1)).double().mean().item(),
        "per_position": difference.norm(dim=-1) / centred.norm(dim=-1).clamp_min(1e-30),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
