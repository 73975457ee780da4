"""Checks an export before it gets its name: that it matches the model it came from in every way that it will be used.

The folder is loaded back from disk as a user would load it. Its tokens are compared with the training tokenizer, and
its logits without a cache with the training model. Greedy text through the cache, also in a left-padded batch, is
compared with the same tokens one row at a time and without a cache.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.generate import load_model, load_tokenizer, sha256_of
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer

Format = Literal["hunyuan", "hunyuan_v1_moe"]

# A position's difference is rms(difference) / rms(reference), both over the vocabulary after subtracting their means.
# `median` bounds the median over positions; `position` bounds each one, and `outliers` is the share of positions that
# may exceed it. Measured on random models of up to 24 layers: 1e-6 (fp32), 0.01 (fp16) and 0.07 (bf16) for correct
# exports; 0.4 and more if every layer is wrong in the same way.
FLIPS = "a router choice may flip where two experts are close"
HALF = f"{FLIPS}; an error in one layer of many may hide within this, and shows in an fp32 export"
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {
        "median": 1e-4,
        "position": 1e-3,
        "outliers": 0.02,
        "reason": f"only the order of summation differs; {FLIPS}",
    },
    torch.float16: {"median": 0.03, "position": 0.2, "outliers": 0.25, "reason": f"11 significant bits; {HALF}"},
    torch.bfloat16: {"median": 0.15, "position": 0.4, "outliers": 0.25, "reason": f"8 significant bits; {HALF}"},
}

SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and in 1969 two people walked on the Moon.",
    "床前明月光,疑是地上霜。举头望明月,低头思故乡。",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "E = mc^2; \u03b1 + \u03b2 \u2260 \u03b3; caf\u00e9, na\u00efve, \U0001f642",
)

HOSTILE = f"{SPECIAL_TOKENS[3]}<|extra_0|> <|{{{{ messages }}}}"
"""User text that looks like the end of a turn."""

NEW_TOKENS = 8
"""Length of each greedy continuation. The second step is the first to read the cache."""

NATIVE_SINCE = (5, 20)
"""The first transformers version whose hunyuan_v1_moe computes this model. Up to 5.19 it changes the RoPE base past
max_position_embeddings (logits off by 1.5 to 7), and 5.0 ignores alpha (wrong from the first tokens)."""


def refuse_what_loads_wrongly(model: ModelConfig, format: Format) -> None:
    """Raise CheckpointError if the format is unknown or would compute another model. hunyuan_v1_moe is read by
    third-party code, which would not notice."""
    if format == "hunyuan":
        return
    if format != "hunyuan_v1_moe":
        raise CheckpointError(f"format {format!r}: must be hunyuan or hunyuan_v1_moe")
    reasons = _native_reasons(model)
    if reasons:
        raise CheckpointError(
            "format hunyuan_v1_moe would load without an error and compute another model; use format hunyuan:\n  "
            + "\n  ".join(reasons)
        )
    installed = version("transformers")
    if tuple(int(part) for part in installed.split(".")[:2]) < NATIVE_SINCE:
        raise CheckpointError(
            f"transformers {installed} computes format hunyuan_v1_moe with another RoPE past "
            "max_position_embeddings (5.0: from the first "
            "tokens), so it cannot certify it; install transformers>=5.20, or use format hunyuan"
        )


def loads_in(model: ModelConfig, format: Format) -> dict[str, Any]:
    """For each kind of loader: whether it loads the export and computes this model, in which versions, and why if
    not."""
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
        "transformers without code of this folder": {"loads": not ours, "reasons": [*native, *_native_reasons(model)]},
        "the code of Tencent's release (transformers 4.41 to 4.48)": {"loads": not release, "reasons": release},
    }


def _native_reasons(model: ModelConfig) -> list[str]:
    """Why HunYuanMoEV1ForCausalLM of transformers would compute another model."""
    reasons = []
    if model.cla_share_factor > 1:
        reasons.append(
            f"cla_share_factor={model.cla_share_factor}: it would fill the keys and values of borrowing layers "
            "with random numbers"
        )
    if model.moe_router_topk == 1:
        reasons.append(
            "moe_router_topk=1: transformers renormalises the weight of the only expert to 1, where this model "
            "uses its probability"
        )
    if not model.qk_layernorm:
        reasons.append("qk_layernorm=false: it always normalises queries and keys")
    if model.expert_ffn_size != model.ffn_hidden_size:
        reasons.append(
            f"moe_ffn_hidden_size={model.expert_ffn_size}: transformers gives routed experts the width of the "
            f"shared one, {model.ffn_hidden_size}"
        )
    return reasons


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


def certify(
    model: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype,
    reference_logits: Callable[[Tensor], Tensor],
    format: Format,
) -> dict[str, Any]:
    """Load the folder as a user would and compare tokens, logits and generated text. Returns the certificate. Raises
    CheckpointError if they disagree."""
    _compare_tokens(tokenizer, folder)
    texts = [torch.tensor([[tokenizer.start_id, *tokenizer.encode(text)]]) for text in SAMPLE_TEXTS]
    batches = {
        "random tokens": torch.randint(tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)),
        **{f"text {i}": tokens_1S for i, tokens_1S in enumerate(texts)},
    }
    loaded_model = load_model(folder)
    checks = {}
    for name, tokens_BS in batches.items():
        with torch.inference_mode():
            logits_BSV = loaded_model(tokens_BS, use_cache=False).logits
        checks[name] = _compare(reference_logits(tokens_BS), logits_BSV, model.padded_vocab_size)
    figures = _judge(checks, TOLERANCES[dtype], "the export does not compute the same as the model it came from")
    packages = ("torch", "transformers", "safetensors", "hunyuan-pretrain")
    return {
        "max_abs_difference": max(check["max_abs_difference"] for check in checks.values()),
        "mean_kl_nats": sum(check["mean_kl_nats"] for check in checks.values()) / len(checks),
        **figures,
        "tolerance": TOLERANCES[dtype],
        "checks": checks,
        "generation": check_generation(
            loaded_model, [tokens[0] for tokens in texts], tokenizer.vocab_size, TOLERANCES[dtype]
        ),
        "loaded_with": type(loaded_model).__name__,
        "loads_in": loads_in(model, format),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "sha256": {
            str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }


def check_generation(model: Any, prompts: list[Tensor], vocab_size: int, tolerance: dict[str, Any]) -> dict[str, Any]:
    """Compare greedy generate(), which reads its cache, with the model without a cache: two prompts alone, then all
    prompts in a left-padded batch.

    prompts: token ids (S,) each. The logits that generate() chose by are compared with those of one pass over the
    finished text, one row at a time and without a cache. Every chosen token must be the likeliest of that pass, except
    for ties within the tolerance. Raises CheckpointError.
    """
    runs = {f"prompt {i}": [prompt] for i, prompt in enumerate(prompts[:2])} | {"left-padded batch": prompts}
    checks, other_tokens = {}, 0
    for name, rows in runs.items():
        continued, logits_RNV = _greedy(model, rows)
        for number, (row, tokens, cached_NV) in enumerate(zip(rows, continued, logits_RNV, strict=True)):
            with torch.inference_mode():
                whole = torch.cat((row, tokens))[None].to(model.device)
                plain_NV = model(whole, use_cache=False).logits[0, len(row) - 1 : -1].cpu().double()
            check = checks[f"{name}, row {number}"] = _compare(plain_NV, cached_NV, plain_NV.shape[-1])
            chosen = (
                plain_NV[:, :vocab_size].gather(-1, tokens[:, None])[:, 0] if int(tokens.max()) < vocab_size else None
            )
            stops = _stop_ids(model)
            best_NV = plain_NV[:, :vocab_size].index_fill(-1, torch.tensor(stops, dtype=torch.long), -torch.inf)
            # Two tied logits may each be off by a few times the error that `position` allows.
            allowed = 10 * tolerance["position"] * plain_NV.std(-1)
            if chosen is None or not bool((best_NV.max(-1).values - chosen <= allowed).all()):
                raise CheckpointError(
                    f"generate() of the export does not choose the likeliest token ({name}, row {number}): "
                    f"{tokens.tolist()}, where the "
                    f"model without a cache finds {best_NV.argmax(-1).tolist()}"
                )
            other_tokens += int((best_NV.argmax(-1) != tokens).sum())
            check.pop("mean_kl_nats")
    figures = _judge(
        checks,
        tolerance,
        "generate() of the export, which reads its cache, does not compute the same as the model without one",
    )
    return {"new_tokens": NEW_TOKENS, "tokens_other_than_without_a_cache": other_tokens, **figures, "checks": checks}


def _greedy(model: Any, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Greedy generate() of a left-padded batch, without stopping early: new tokens (R, N) and the logits (R, N, V) that
    they were chosen by."""
    longest = max(len(row) for row in rows)
    padding = model.generation_config.pad_token_id
    tokens_RS = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=padding) for row in rows])
    mask_RS = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    with torch.inference_mode():
        out = model.generate(
            tokens_RS.to(model.device),
            attention_mask=mask_RS.to(model.device),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, longest:].cpu(), torch.stack(out.logits, 1).cpu()


def _stop_ids(model: Any) -> list[int]:
    stops = model.generation_config.eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or [])


def _compare_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Compare the ids of texts, documents and conversations, including messages with names of special tokens."""
    loaded = load_tokenizer(folder)
    for text in SAMPLE_TEXTS:
        ours, theirs = tokenizer.encode(text), loaded(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            raise CheckpointError(
                f"the exported tokenizer encodes {text!r} as {theirs}, the training tokenizer as {ours}"
            )
        if loaded(text)["input_ids"] != [tokenizer.start_id, *ours]:
            raise CheckpointError(
                f"the exported tokenizer begins {text!r} with {loaded(text)['input_ids'][:1]}, not <|startoftext|>"
            )
    for text in (SAMPLE_TEXTS[0], HOSTILE):
        messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        ours, theirs = tokenizer.apply_chat(messages), loaded.apply_chat_template(messages, return_dict=False)
        if ours != theirs:
            raise CheckpointError(
                f"the exported chat template encodes {text!r} as {theirs}, the training tokenizer as {ours}"
            )


def _judge(checks: dict[str, dict[str, Any]], tolerance: dict[str, Any], what: str) -> dict[str, float]:
    """Median relative difference and share of outliers over all positions of all checks. Raises CheckpointError if they
    exceed the tolerance."""
    difference = torch.cat([check.pop("per_position") for check in checks.values()])
    median, outliers = difference.median().item(), (difference > tolerance["position"]).double().mean().item()
    # `not <=` instead of `>`, because NaN must fail.
    if not (median <= tolerance["median"] and outliers <= tolerance["outliers"] and bool(difference.isfinite().all())):
        raise CheckpointError(
            f"{what}: relative difference of the logits {median:.2e} at the median "
            f"position (at most {tolerance['median']:.0e}), {outliers:.0%} of positions above "
            f"{tolerance['position']:.0e} (at most "
            f"{tolerance['outliers']:.0%}), {int((~difference.isfinite()).sum())} positions not finite"
        )
    return {"median_relative_difference": median, "positions_above_tolerance": outliers}


def _compare(expected_BSV: Tensor, actual_BSV: Tensor, vocab_size: int) -> dict[str, Any]:
    expected, actual = (t.detach().cpu().double().reshape(-1, t.shape[-1]) for t in (expected_BSV, actual_BSV))
    if expected.shape != actual.shape or expected.shape[-1] != vocab_size:
        raise CheckpointError(
            f"logits of the model have shape {tuple(expected_BSV.shape)}, those of the export {tuple(actual_BSV.shape)}"
        )
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
