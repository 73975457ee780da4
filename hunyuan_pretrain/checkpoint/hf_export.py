"""Writes a model as a folder that Hugging Face transformers (and what builds on it) can load, and checks that it loads
correctly.

Two formats:
    hunyuan          every model this project trains; our own model code lies beside the weights (auto_map)
    hunyuan_v1_moe   loaded by transformers and vLLM with their own code; refused if that would compute another model

Weights are converted one parameter at a time, one expert at a time where they are routed experts', by several
processes if wanted. The folder gets its name only after it has been read back from disk and compared with the model it
came from. Its certificate.json says how closely they agree and what else loads it (see `certificate`).
"""

from __future__ import annotations

import json
import shutil
from collections import abc
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.certificate import certify
from hunyuan_pretrain.checkpoint.differences import TOLERANCES
from hunyuan_pretrain.checkpoint.generate import MODEL_CODE, TOKENIZER_CODE
from hunyuan_pretrain.checkpoint.layerwise import LayerSource
from hunyuan_pretrain.checkpoint.loaders import Format, refuse_what_loads_wrongly
from hunyuan_pretrain.checkpoint.model_card import CardFacts, model_card
from hunyuan_pretrain.checkpoint.outputs import new_folder, refuse_existing
from hunyuan_pretrain.checkpoint.stored_weights import rows_of, shape_of
from hunyuan_pretrain.checkpoint.tensor_files import ShardWriter, TensorSpec
from hunyuan_pretrain.checkpoint.weight_map import by_expert, refuse_other_parameters, weight_map
from hunyuan_pretrain.checkpoint.workers import Say, run_over
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.data.chat_template import chat_fields, default_system_prompt
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer, format_ranks, write_hf_tokenizer

__all__ = ["export", "generation_config", "hf_config", "make_chat", "refuse_at_once"]

RELEASE_TOKENIZER = "release_tokenizer"


def export(
    model: ModelConfig,
    megatron_tensors: abc.Mapping[str, Tensor],
    tokenizer_folder: Path,
    output: Path,
    *,
    rope_alpha: float,
    max_position_embeddings: int,
    dtype: torch.dtype,
    reference: LayerSource,
    format: Format = "hunyuan",
    certificate_info: dict[str, Any] | None = None,
    card: CardFacts | None = None,
    system_prompt: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    processes: int = 1,
    say: Say | None = None,
) -> dict[str, Any]:
    """Writes `output`, reads it back, compares it with the model it came from, and returns the certificate.

    megatron_tensors: full parameters by Megatron name (see `weight_map`), read one at a time; with several processes
    it is pickled, so it should read from disk. dtype: of the stored weights; the router stays fp32. rope_alpha:
    NTK-alpha of the stage that the weights come from. reference: the model that the weights come from, in `dtype`.
    certificate_info: copied into the certificate (run, step, weights). card: what README.md says of the training.
    system_prompt: of a model that was fine-tuned on conversations, the default of its chats, "" for none; None: a
    model of documents. say: gets lines of progress. Needs memory for one expert in each process while writing, and
    for one layer while comparing.
    Raises CheckpointError and leaves no output if the output folder is not empty, the format cannot express the model,
    a tensor is missing or has the wrong shape, the tokenizer does not fit, the disk is full or not writable, or the
    model read back computes something else.
    """
    tokenizer = refuse_at_once(model, tokenizer_folder, output, dtype=dtype, format=format)
    refuse_other_parameters(model, {name: shape_of(megatron_tensors, name) for name in megatron_tensors})

    with new_folder(output) as folder:
        # A pretraining document ends with <|endoftext|>, an answer with <|eos|>; the ids in the release's own
        # config.json are wrong for its tokenizer.
        end = tokenizer.end_id if system_prompt is None else tokenizer.eos_id
        ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": end, "pad_token_id": tokenizer.pad_id}
        written_with = {"transformers_version": version("transformers")}
        config = hf_config(
            model, rope_alpha=rope_alpha, max_position_embeddings=max_position_embeddings, dtype=dtype, format=format
        )
        _write_json(folder / "config.json", config | ids | written_with)
        _write_json(folder / "generation_config.json", generation_config(model, tokenizer) | written_with)
        write_hf_tokenizer(tokenizer, folder, model_max_length=max_position_embeddings, system_prompt=system_prompt)
        _write_for_the_release(tokenizer, folder)
        if format == "hunyuan":
            for name in MODEL_CODE:
                shutil.copyfile(Path(__file__).parent / name, folder / name)
        writer = ShardWriter(folder, _stored(model, dtype), max_shard_bytes)
        _write_weights(model, megatron_tensors, writer, processes, say)
        certificate = certify(model, tokenizer, folder, dtype, reference, format, processes, say)
        certificate = {
            "format": format,
            "dtype": str(dtype).removeprefix("torch."),
            "rope_alpha": rope_alpha,
        } | certificate
        certificate["source"] = certificate_info or {}
        if system_prompt is not None:
            certificate["chat"] = {"system_prompt": system_prompt}
        _write_json(folder / "certificate.json", certificate)
        (folder / "README.md").write_text(model_card(model, config, certificate, card or CardFacts()))
    return certificate


def refuse_at_once(
    model: ModelConfig, tokenizer_folder: Path, output: Path, *, dtype: torch.dtype, format: Format
) -> Tokenizer:
    """Raise CheckpointError for what is known to be wrong before any weight is read; returns the tokenizer."""
    refuse_what_loads_wrongly(model, format)
    if dtype not in TOLERANCES:
        raise CheckpointError(
            f"dtype {dtype}: exports are {', '.join(str(known).removeprefix('torch.') for known in TOLERANCES)}"
        )
    refuse_existing(output)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model's embedding only {model.padded_vocab_size} rows"
        )
    try:
        ShardWriter(output, _stored(model, dtype)).refuse_full_disk()
    except CheckpointError as error:
        raise CheckpointError(f"{output}: cannot be written: {error}") from None
    return tokenizer


def generation_config(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Defaults of generate() in transformers and of requests to vLLM: stop at the end of a document or an answer,
    sample as Tencent's serving scripts and `hunyuan-pretrain generate` do, and never return the id of an embedding row
    that only pads the vocabulary. A barely trained model still gives such rows probability."""
    config: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.6,
        "top_k": 20,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": [tokenizer.end_id, tokenizer.eos_id],
        "pad_token_id": tokenizer.pad_id,
    }
    if tokenizer.vocab_size < model.padded_vocab_size:
        config["suppress_tokens"] = list(range(tokenizer.vocab_size, model.padded_vocab_size))
    return config


def make_chat(folder: Path, system_prompt: str) -> dict[str, Any]:
    """Make the tokenizer files of an export those of a model that was fine-tuned on conversations, as `export` writes
    them; returns what changes in config.json. Raises DataFormatError."""
    tokenizer = Tokenizer.load(folder)
    length = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("model_max_length")
    write_hf_tokenizer(tokenizer, folder, model_max_length=length, system_prompt=system_prompt)
    _write_for_the_release(tokenizer, folder)
    return {"eos_token_id": tokenizer.eos_id}


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
        config["moe_layer_num_skipped"] = 0  # TensorRT-LLM reads it
        del config["auto_map"]
    return config


def _stored(model: ModelConfig, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """What is stored of each tensor, in the order of the forward pass."""
    return {
        name: TensorSpec(torch.float32 if row.is_fp32 else dtype, shape)
        for row in weight_map(model)
        for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)
    }


Piece = tuple[int, int]
"""A row of the table, and which expert of its parameter; 0 where there are no experts."""


def _write_weights(
    model: ModelConfig, megatron_tensors: abc.Mapping[str, Tensor], writer: ShardWriter, processes: int, say: Say | None
) -> None:
    """Write every tensor to its place, which depends on shapes alone: the files are the same for any number of
    processes."""
    writer.create()
    # some for each process, because what they know of the checkpoint is sent to them with each share
    share_bytes = writer.total_bytes // (8 * processes) if processes > 1 else 0
    shares: list[tuple[list[Piece], int]] = [([], 0)]
    for number, row in enumerate(weight_map(model)):
        for expert, part in enumerate(by_expert(row)):
            if shares[-1][1] > share_bytes:
                shares.append(([], 0))
            size = sum(writer.spec(name).nbytes for name in part.hf_names)
            shares[-1] = ([*shares[-1][0], (number, expert)], shares[-1][1] + size)
    convert = partial(_convert, model, megatron_tensors, writer)
    written = run_over(processes, "writing weights", convert, shares, say)
    writer.finish(frozenset(name for names in written for name in names))


def _convert(
    model: ModelConfig, megatron_tensors: abc.Mapping[str, Tensor], writer: ShardWriter, pieces: list[Piece]
) -> list[str]:
    """Read, convert and write these pieces; returns the names of what was written."""
    table, names = list(weight_map(model)), []
    for number, expert in pieces:
        row = by_expert(table[number])[expert]
        part = rows_of(megatron_tensors, row.megatron_name, expert, expert + row.megatron_shape[0])
        for name, tensor in zip(row.hf_names, row.to_hf(part), strict=True):
            writer.write(name, tensor)
            names.append(name)
    return names


def _write_for_the_release(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what the scripts of Tencent's release read and copy: hy.tiktoken and the code of a tokenizer class, and
    `release_tokenizer`, a folder for their --tokenizer_name_or_path whose tokenizer is that class. The tokenizer of the
    export itself is another."""
    (folder / RANKS_FILE).write_bytes(format_ranks(tokenizer.ranks))
    shutil.copyfile(Path(__file__).parent / TOKENIZER_CODE, folder / TOKENIZER_CODE)
    release = folder / RELEASE_TOKENIZER
    release.mkdir(exist_ok=True)
    for name in (RANKS_FILE, TOKENIZER_CODE, "generation_config.json", "special_tokens_map.json"):
        shutil.copyfile(folder / name, release / name)
    _write_release_config(folder)


def _write_release_config(folder: Path) -> None:
    """tokenizer_config.json of `release_tokenizer`, from that of the export."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {
        **chat_fields(default_system_prompt(folder), is_marked=False),
        "tokenizer_class": "HYTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]},
        "padding_side": "right",
    }
    _write_json(folder / RELEASE_TOKENIZER / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
