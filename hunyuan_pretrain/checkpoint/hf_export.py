"""Writes a model as a folder that Hugging Face transformers (and what builds on it) can load, and checks that it loads
correctly.

Two formats:
    hunyuan          every model this project trains; our own model code lies beside the weights (auto_map)
    hunyuan_v1_moe   loaded by transformers and vLLM with their own code; refused if that would compute another model

The folder gets its name only after it has been loaded back from disk and compared with the model it came from. Its
certificate.json says how closely they agree and what else loads it (see `certificate`).
"""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections import abc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.certificate import TOLERANCES, Format, certify, refuse_what_loads_wrongly
from hunyuan_pretrain.checkpoint.generate import MODEL_CODE, TOKENIZER_CODE
from hunyuan_pretrain.checkpoint.weight_map import Mapping, to_hf, weight_map
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer, format_ranks, write_hf_tokenizer

__all__ = ["export", "generation_config", "hf_config"]

CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
)
"""Errors caused by the disk or the folder, not by this program."""


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

    megatron_tensors: full parameters by Megatron name (see `weight_map`), read one at a time. dtype: of the stored
    weights; the router stays fp32. rope_alpha: NTK-alpha of the stage that the weights come from. reference_logits: the
    training model without a capacity limit, token ids (B, S) -> logits (B, S, V). certificate_info: copied into the
    certificate (run, step). Needs memory for one shard while writing and for the whole model while comparing.
    Raises CheckpointError and leaves no output if the output folder is not empty, the format cannot express the model,
    a tensor is missing or has the wrong shape, the tokenizer does not fit, the disk is full or not writable, or the
    model loaded back computes something else.
    """
    refuse_what_loads_wrongly(model, format)
    if dtype not in TOLERANCES:
        raise CheckpointError(
            f"dtype {dtype}: exports are {', '.join(str(known).removeprefix('torch.') for known in TOLERANCES)}"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; remove it or choose another name")
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model's embedding only {model.padded_vocab_size} rows"
        )

    folder = output.parent / f".{output.name}.unfinished-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        # A pretraining document ends with <|endoftext|>; the ids in the release's own config.json are wrong for its
        # tokenizer.
        ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
        written_with = {"transformers_version": version("transformers")}
        config = hf_config(
            model, rope_alpha=rope_alpha, max_position_embeddings=max_position_embeddings, dtype=dtype, format=format
        )
        _write_json(folder / "config.json", config | ids | written_with)
        _write_json(folder / "generation_config.json", generation_config(model, tokenizer) | written_with)
        write_hf_tokenizer(tokenizer, folder, model_max_length=max_position_embeddings)
        _write_for_the_release(tokenizer, folder)
        if format == "hunyuan":
            for name in MODEL_CODE:
                shutil.copyfile(Path(__file__).parent / name, folder / name)
        _write_weights(model, megatron_tensors, folder, dtype, max_shard_bytes)
        _give_every_file_the_mode_of(folder / "config.json")
        certificate = certify(model, tokenizer, folder, dtype, reference_logits, format)
        certificate = {
            "format": format,
            "dtype": str(dtype).removeprefix("torch."),
            "rope_alpha": rope_alpha,
        } | certificate
        certificate["source"] = certificate_info or {}
        _write_json(folder / "certificate.json", certificate)
        folder.rename(output)  # over an empty folder too
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in CANNOT_WRITE:
            raise
        raise CheckpointError(f"{output}: cannot be written: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return certificate


def generation_config(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Defaults of transformers' generate(): stop at the end of a document or an answer, and never return the id of an
    embedding row that only pads the vocabulary. A barely trained model still gives such rows probability."""
    config: dict[str, Any] = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": [tokenizer.end_id, tokenizer.eos_id],
        "pad_token_id": tokenizer.pad_id,
    }
    if tokenizer.vocab_size < model.padded_vocab_size:
        config["suppress_tokens"] = list(range(tokenizer.vocab_size, model.padded_vocab_size))
    return config


def hf_config(
    model: ModelConfig,
    *,
    rope_alpha: float,
    max_position_embeddings: int,
    dtype: torch.dtype,
    format: Format = "hunyuan",
) -> dict[str, Any]:
    """The architecture as written to config.json, without token ids."""
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
        # All three keys, even for alpha 1: the release's loaders index them, and without them the release rounds
        # frequencies to bf16.
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


def _write_weights(
    model: ModelConfig,
    megatron_tensors: abc.Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write safetensors shards in the order of the forward pass. They are planned from the shapes alone, so only one
    shard is in memory at a time."""
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
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_of}
        )


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


def _write_for_the_release(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what the scripts of Tencent's release read and copy: hy.tiktoken and the code of a tokenizer class, and
    `release_tokenizer`, a folder for their --tokenizer_name_or_path whose tokenizer is that class. The tokenizer of the
    export itself is another."""
    (folder / RANKS_FILE).write_bytes(format_ranks(tokenizer.ranks))
    shutil.copyfile(Path(__file__).parent / TOKENIZER_CODE, folder / TOKENIZER_CODE)
    release = folder / "release_tokenizer"
    release.mkdir()
    for name in (RANKS_FILE, TOKENIZER_CODE, "generation_config.json", "special_tokens_map.json"):
        shutil.copyfile(folder / name, release / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "HYTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]},
        "padding_side": "right",
    }
    _write_json(release / "tokenizer_config.json", config)


def _give_every_file_the_mode_of(file: Path) -> None:
    """safetensors makes its files readable by their owner only; all other files follow the umask."""
    for path in file.parent.rglob("*"):
        if path.is_file():
            path.chmod(file.stat().st_mode)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
