"""Which programs compute the right thing from an export, and why the others do not.

Each reason was measured with the program itself or read in its source; docs/guide/loaders.md says which, with the
versions. A format that a program would load without an error and compute wrongly is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.config.schema import ModelConfig

__all__ = ["MEASURED", "NATIVE_SINCE", "Format", "loads_in", "refuse_what_loads_wrongly"]

Format = Literal["hunyuan", "hunyuan_v1_moe", "gguf"]

NATIVE_SINCE = (5, 20)
"""The first transformers version whose hunyuan_v1_moe computes this model. Up to 5.19 it changes the RoPE base past
max_position_embeddings (logits off by 1.5 to 7), and 5.0 ignores alpha (wrong from the first tokens)."""

MEASURED = {"cla": 0.59, "top-1": 0.56, "no qk norm": 0.49, "cla and top-1": 0.75, "top-1 in llama.cpp": 0.43}
"""How far logits are off if a refused model is loaded nevertheless: rms(difference) / rms(logits) over the vocabulary,
both without their means, the median of positions. For transformers' hunyuan_v1_moe unless it says otherwise; random
models of 4 layers, for which any two unrelated outputs are 1.4 apart. tests/unit/checkpoint/test_loaders.py measures
those of transformers again."""


def refuse_what_loads_wrongly(model: ModelConfig, format: Format) -> None:
    """Raise CheckpointError if the format is unknown, cannot be written, or would be loaded as another model:
    hunyuan_v1_moe is read by third-party code, which would not notice."""
    if format == "hunyuan":
        return
    if format == "gguf":
        raise CheckpointError(_why_no_gguf(model))
    if format != "hunyuan_v1_moe":
        raise CheckpointError(f"format {format!r}: must be hunyuan or hunyuan_v1_moe")
    reasons = _native_reasons(model)
    if reasons:
        raise CheckpointError(
            "format hunyuan_v1_moe would load without an error and compute another model, or not load; use format "
            "hunyuan:\n  " + "\n  ".join([*reasons, _what_would_load(model)])
        )
    installed = version("transformers")
    if tuple(int(part) for part in installed.split(".")[:2]) < NATIVE_SINCE:
        raise CheckpointError(
            f"transformers {installed} computes format hunyuan_v1_moe with another RoPE past "
            "max_position_embeddings (5.0: from the first "
            "tokens), so it cannot certify it; install transformers>=5.20, or use format hunyuan"
        )


def loads_in(model: ModelConfig, format: Format) -> dict[str, Any]:
    """For each program: whether it loads the export and computes this model, in which versions, and why if not."""
    ours = format == "hunyuan"
    transformers = (
        {
            "loads": True,
            "versions": ">=5.0",
            "tested": "5.0 to 5.24",
            "needs": "trust_remote_code=True, for the model code in this folder",
        }
        if ours
        else {"loads": True, "versions": ">=5.20", "tested": "5.20 to 5.24", "needs": "nothing"}
    )
    native = ["format hunyuan: export with --format hunyuan_v1_moe"] if ours else []
    release = _release_reasons(model) + ([] if ours else ["format hunyuan_v1_moe: export with --format hunyuan"])
    return {
        "transformers": transformers,
        "transformers without code of this folder": _verdict([*native, *_native_reasons(model)]),
        "the code of Tencent's release (transformers 4.41 to 4.48)": _verdict(release),
        "vLLM with the plugin of hunyuan-pretrain (0.28 and newer)": _verdict(
            [] if ours else ["format hunyuan_v1_moe: export with --format hunyuan"]
        ),
        "vLLM alone (0.28 to 0.32)": _verdict(native),
        "SGLang (source of 0.5.23)": _verdict([*native, *_sglang_reasons(model)]),
        "TensorRT-LLM (source of its main branch)": _verdict([*native, *_tensorrt_reasons(model)]),
        "llama.cpp": _verdict([_why_no_gguf(model)]),
    }


def _verdict(reasons: Sequence[str]) -> dict[str, Any]:
    return {"loads": not reasons, "reasons": list(reasons)}


def _native_reasons(model: ModelConfig) -> list[str]:
    """Why HunYuanMoEV1ForCausalLM of transformers would compute another model."""
    reasons = []
    if model.cla_share_factor > 1:
        reasons.append(
            f"cla_share_factor={model.cla_share_factor}: it would fill the keys and values of borrowing layers "
            f"with random numbers ({_off('cla')})"
        )
    if model.moe_router_topk == 1:
        reasons.append(
            "moe_router_topk=1: transformers renormalises the weight of the only expert to 1, where this model "
            f"uses its probability ({_off('top-1')})"
        )
    if not model.qk_layernorm:
        reasons.append(f"qk_layernorm=false: it always normalises queries and keys ({_off('no qk norm')})")
    if model.expert_ffn_size != model.ffn_hidden_size:
        reasons.append(
            f"moe_ffn_hidden_size={model.expert_ffn_size}: transformers gives routed experts the width of the "
            f"shared one, {model.ffn_hidden_size}, and refuses to load others"
        )
    return reasons


def _off(which: str) -> str:
    return f"logits off by {MEASURED[which]:.0%} of their spread in a small random model"


def _what_would_load(model: ModelConfig) -> str:
    """The nearest architecture that the format expresses."""
    changes = {
        "cla_share_factor: 1": model.cla_share_factor > 1,
        "moe_router_topk: 2": model.moe_router_topk == 1,
        "qk_layernorm: true": not model.qk_layernorm,
        "moe_ffn_hidden_size: null": model.expert_ffn_size != model.ffn_hidden_size,
    }
    return f"a model trained with {', '.join(name for name, is_needed in changes.items() if is_needed)} would load"


def _release_reasons(model: ModelConfig) -> list[str]:
    """Why the model code of Tencent's release would not load the weights."""
    reasons = []
    if model.expert_ffn_size != model.ffn_hidden_size:
        reasons.append(
            f"moe_ffn_hidden_size={model.expert_ffn_size}: it gives every expert the width {model.ffn_hidden_size}"
        )
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        reasons.append(f"kv_channels={model.head_dim}: its heads have the width hidden_size / num_attention_heads")
    if model.num_moe_experts == 1:
        reasons.append("num_moe_experts=1: it builds a layer without a router")
    return reasons


def _sglang_reasons(model: ModelConfig) -> list[str]:
    """Why SGLang's HunYuanMoEV1ForCausalLM would not run. It weights a single expert by its probability, takes the
    width of routed experts and the QK norm from config.json, and reads alpha."""
    if model.cla_share_factor == 1:
        return []
    return [
        f"cla_share_factor={model.cla_share_factor}: it builds borrowing layers but never hands them keys and values, "
        "so the first request ends in an AssertionError"
    ]


def _tensorrt_reasons(model: ModelConfig) -> list[str]:
    """Why TensorRT-LLM's HunYuanMoEV1ForCausalLM would compute another model or not load. It takes the width of routed
    experts from config.json, and reads alpha."""
    reasons = []
    if model.cla_share_factor > 1:
        reasons.append(f"cla_share_factor={model.cla_share_factor}: it has no CLA, and finds no keys to load")
    if model.moe_router_topk == 1:
        reasons.append("moe_router_topk=1: it renormalises the weight of the only expert to 1")
    if not model.qk_layernorm:
        reasons.append("qk_layernorm=false: it always normalises queries and keys")
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        reasons.append(f"kv_channels={model.head_dim}: its heads have the width hidden_size / num_attention_heads")
    return reasons


def _why_no_gguf(model: ModelConfig) -> str:
    reasons = []
    if model.cla_share_factor > 1:
        reasons.append(
            f"cla_share_factor={model.cla_share_factor}: its hunyuan-moe has no CLA and refuses to load (attn_k of a "
            "borrowing layer is missing)"
        )
    if model.moe_router_topk == 1:
        reasons.append(
            "moe_router_topk=1: it renormalises the weight of the only expert to 1 "
            f"({_off('top-1 in llama.cpp')}), without an error"
        )
    if not model.qk_layernorm:
        reasons.append("qk_layernorm=false: it needs the norms of queries and keys and refuses to load")
    if reasons:
        return "format gguf: llama.cpp does not compute this model; use format hunyuan:\n  " + "\n  ".join(reasons)
    return (
        "format gguf: llama.cpp would compute this model, but nothing here could certify the file, so none is written; "
        "its own converter takes only a head width of 128, alpha 1000 and the release's tokenizer class"
    )
