"""Checks an export before it gets its name: that it matches the model it came from in every way that it will be used.

Both models are read from disk layer by layer, so a model of any size is checked in the memory of a few layers. Compared
are tokens, the hidden states of every layer, logits, and greedy text through the cache, also in a left-padded batch. A
model that fits into memory is also loaded as a user would load it.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.differences import TOLERANCES, compare_logits, judge_layers, judge_logits
from hunyuan_pretrain.checkpoint.exported_layers import Export, ExportedLayers
from hunyuan_pretrain.checkpoint.generate import load_model, load_tokenizer, sha256_of
from hunyuan_pretrain.checkpoint.layerwise import LayerSource, compare_layers
from hunyuan_pretrain.checkpoint.loaders import Format, loads_in
from hunyuan_pretrain.checkpoint.workers import Say, free_memory_bytes, run_over
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.data.chat_template import default_system_prompt
from hunyuan_pretrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer

__all__ = ["TOLERANCES", "certify"]

WHOLE_SHARE = 4
"""A model is loaded as a whole if it takes at most this part of the free memory: while it loads, parts exist twice."""

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


def certify(
    model: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype,
    reference: LayerSource,
    format: Format,
    processes: int = 1,
    say: Say | None = None,
) -> dict[str, Any]:
    """Compare the folder's tokens, hidden states, logits and generated text with those of the model it came from.
    Returns the certificate; its figures of the logits are those of the model loaded as a whole, if it was. Raises
    CheckpointError if they disagree.

    processes: over which the digests of the files are computed. A temporary file of hidden states lies in the folder's
    parent meanwhile.
    """
    _compare_tokens(tokenizer, folder)
    tolerance, vocab_size = TOLERANCES[dtype], model.padded_vocab_size
    prompts = [torch.tensor([tokenizer.start_id, *tokenizer.encode(text)]) for text in SAMPLE_TEXTS]
    random_BS = torch.randint(tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    streamed = ExportedLayers(Export.read(folder))
    whole, why_not = _as_a_user_loads_it(folder)
    loaded_model = streamed.model if whole is None else whole
    loaded_with = type(loaded_model).__name__
    continued = continue_greedily(loaded_model, prompts)
    texts = {**{f"random tokens {i}": row for i, row in enumerate(random_BS)}, **_distinct(continued)}
    logits_of_whole = {} if whole is None else {name: _logits(whole, text) for name, text in texts.items()}
    stops = _stop_ids(loaded_model)
    del whole, loaded_model

    wrong = "the export does not compute the same as the model it came from"
    compared = compare_layers(reference, streamed, list(texts.values()), folder.parent, tolerance["position"], say)
    lengths = [len(text) for text in texts.values()]
    expected = dict(zip(texts, compared.reference_TV.split(lengths), strict=True))
    actual = dict(zip(texts, compared.candidate_TV.split(lengths), strict=True))
    layers = judge_layers(compared.layers, tolerance, wrong)
    checks = {name: compare_logits(expected[name], actual[name], vocab_size) for name in texts}
    figures = judge_logits(checks, tolerance, wrong)
    if logits_of_whole:  # judged apart: transformers' class may be wrong where our code, layer by layer, is right
        whole_checks = {
            f"{name}, loaded as a whole": compare_logits(expected[name], logits, vocab_size)
            for name, logits in logits_of_whole.items()
        }
        figures = judge_logits(whole_checks, tolerance, f"{wrong}, loaded as a whole")
        checks |= whole_checks
    generation = check_generation(continued, expected, texts, tokenizer.vocab_size, stops, tolerance)
    packages = ("torch", "transformers", "safetensors", "hunyuan-pretrain")
    return {
        "max_abs_difference": max(check["max_abs_difference"] for check in checks.values()),
        "mean_kl_nats": sum(check["mean_kl_nats"] for check in checks.values()) / len(checks),
        **figures,
        "tolerance": tolerance,
        "checks": checks,
        "layers": {**layers, "checks": compared.layers},
        "generation": generation,
        "loaded_with": loaded_with,
        "loaded_as_a_whole": why_not or True,
        "loads_in": loads_in(model, format),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "sha256": _digests(folder, processes, say),
    }


def _as_a_user_loads_it(folder: Path) -> tuple[Any, str | None]:
    """The model loaded by transformers, or None and the reason."""
    needed, free = sum(path.stat().st_size for path in folder.glob("*.safetensors")), free_memory_bytes()
    if needed * WHOLE_SHARE <= free:
        return load_model(folder), None
    return None, (
        f"no: it has {needed / 1e9:.3g} GB, more than 1/{WHOLE_SHARE} of the {free / 1e9:.3g} GB of free memory; "
        "our model code read it layer by layer"
    )


def _logits(model: Any, tokens_S: Tensor) -> Tensor:
    """(S, V), one text alone and without a cache."""
    with torch.inference_mode():
        logits_SV: Tensor = model(tokens_S[None].to(model.device), use_cache=False).logits[0]
    return logits_SV.cpu()


def _digests(folder: Path, processes: int, say: Say | None) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    tasks = [(path, path.stat().st_size) for path in files]
    found = run_over(processes, "digests of the export", sha256_of, tasks, say)
    return {str(path.relative_to(folder)): digest for path, digest in zip(files, found, strict=True)}


class Continued(NamedTuple):
    """A text that the export has continued greedily through its cache."""

    prompt: Tensor
    tokens_N: Tensor
    """The new tokens."""
    logits_NV: Tensor
    """Those that they were chosen by."""

    @property
    def text(self) -> Tensor:
        """The prompt and the new tokens, (S + N,)."""
        return torch.cat((self.prompt, self.tokens_N))


def continue_greedily(model: Any, prompts: list[Tensor]) -> dict[str, Continued]:
    """Continue the first prompt alone, then all of them in a left-padded batch. prompts: token ids (S,) each."""
    found = {}
    for name, rows in {"prompt 0": prompts[:1], "left-padded batch": prompts}.items():
        tokens_RN, logits_RNV = _greedy(model, rows)
        for number, (prompt, tokens_N, logits_NV) in enumerate(zip(rows, tokens_RN, logits_RNV, strict=True)):
            found[f"{name}, row {number}"] = Continued(prompt, tokens_N, logits_NV)
    return found


def _distinct(continued: dict[str, Continued]) -> dict[str, Tensor]:
    """Each of the finished texts once."""
    distinct = {tuple(one.text.tolist()): one.text for one in continued.values()}
    return {f"text {number}": text for number, text in enumerate(distinct.values())}


def check_generation(
    continued: dict[str, Continued],
    expected: dict[str, Tensor],
    texts: dict[str, Tensor],
    vocab_size: int,
    stops: list[int],
    tolerance: dict[str, Any],
) -> dict[str, Any]:
    """Compare greedy generate() of the export, which reads its cache, with the model it came from without a cache.

    The logits that generate() chose by are compared with those of one pass over the finished texts: `expected`, (S, V)
    by the names of `texts`. Every chosen token must be the likeliest of that pass, except for ties within the
    tolerance. stops: ids that greedy text did not stop at here. Raises CheckpointError.
    """
    name_of = {tuple(text.tolist()): name for name, text in texts.items()}
    checks, other_tokens = {}, 0
    for name, one in continued.items():
        plain_NV = expected[name_of[tuple(one.text.tolist())]][len(one.prompt) - 1 : -1].double()
        check = checks[name] = compare_logits(plain_NV, one.logits_NV, plain_NV.shape[-1])
        chosen = (
            plain_NV[:, :vocab_size].gather(-1, one.tokens_N[:, None])[:, 0]
            if int(one.tokens_N.max()) < vocab_size
            else None
        )
        best_NV = plain_NV[:, :vocab_size].index_fill(-1, torch.tensor(stops, dtype=torch.long), -torch.inf)
        # Two tied logits may each be off by a few times the error that `position` allows.
        allowed = 10 * tolerance["position"] * plain_NV.std(-1)
        if chosen is None or not bool((best_NV.max(-1).values - chosen <= allowed).all()):
            raise CheckpointError(
                f"generate() of the export does not choose the likeliest token ({name}): {one.tokens_N.tolist()}, "
                f"where the model it came from, without a cache, finds {best_NV.argmax(-1).tolist()}"
            )
        other_tokens += int((best_NV.argmax(-1) != one.tokens_N).sum())
        check.pop("mean_kl_nats")
    figures = judge_logits(
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
    default = {"role": "system", "content": default_system_prompt(folder) or ""}
    for text in (SAMPLE_TEXTS[0], HOSTILE):
        messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        for given, meant in ((messages, messages), (messages[1:], [default, *messages[1:]])):
            ours, theirs = tokenizer.apply_chat(meant), loaded.apply_chat_template(given, return_dict=False)
            if ours != theirs:
                raise CheckpointError(
                    f"the exported chat template encodes {text!r} as {theirs}, the training tokenizer as {ours}"
                )
