"""Loads an exported folder with transformers and streams text from it.

Code that comes with the weights runs only if the caller allows it. If the folder's model code is byte-identical to
ours, our own classes load the weights and the folder's code does not run at all.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from hunyuan_pretrain.checkpoint import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["generate", "load_model", "load_tokenizer"]

MODEL_CODE = ("configuration_hunyuan.py", "modeling_hunyuan.py")
"""Files of this package that an export contains."""
TOKENIZER_CODE = "tokenization_hy.py"
"""Likewise, for the release's scripts; it never runs here."""


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def carries_our_code(folder: Path) -> bool:
    """Whether the folder's model code is byte-identical to this version's."""
    here = Path(__file__).parent
    return all((folder / name).is_file() and sha256_of(folder / name) == sha256_of(here / name) for name in MODEL_CODE)


def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> Any:
    """The model of an exported folder (a transformers PreTrainedModel), in evaluation mode.

    dtype: None for the dtype of the export. Our own classes load an export of this version; transformers loads the
    model types that it knows; anything else brings its own code and needs trust_remote_code.
    Raises CheckpointError if the folder is not a model, needs code that is not trusted or a package that is not there,
    or its tensors do not fit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = _read_config(folder)
    if "quantization_config" in config and find_spec("compressed_tensors") is None:
        raise CheckpointError(
            f"{folder}: quantised; transformers loads it with compressed-tensors, which is not installed: "
            'pip install "compressed-tensors>=0.15"'
        )
    model_type = config.get("model_type")
    loader: Any
    if model_type == "hunyuan" and carries_our_code(folder):
        from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanForCausalLM

        loader, options = HunYuanForCausalLM, {}
    elif model_type in CONFIG_MAPPING or trust_remote_code:
        loader, options = AutoModelForCausalLM, {"trust_remote_code": trust_remote_code}
    else:
        raise CheckpointError(
            f"{folder}: model_type {model_type!r} is unknown to transformers, and the folder's model code is not "
            "the one of this version "
            "of hunyuan-pretrain. Read that code, then allow it with --trust-remote-code."
        )
    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=dtype or "auto",
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,  # never pytorch_model.bin, which is a pickle
            **options,
        )
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    # transformers only warns and leaves random numbers in their place.
    wrong = {
        what: sorted(names)
        for what, names in report.items()
        if what in ("missing_keys", "unexpected_keys", "mismatched_keys") and names
    }
    if wrong:
        raise CheckpointError(
            f"{folder}: tensors do not fit the model: "
            + "; ".join(f"{what}: {names[:5]}" for what, names in wrong.items())
        )
    return model.to(device).eval()


def load_generation_config(folder: Path) -> Any:
    """The defaults of generate() that an exported folder holds (a transformers GenerationConfig)."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of an exported folder; trust_remote_code allows it to run code from the folder. Never prompts."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    if path.is_file() and json.loads(path.read_text()).get("tokenizer_class") == "PreTrainedTokenizerFast":
        # AutoTokenizer would look at config.json first and warn that it does not know the model.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def generate(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.6,
    top_k: int = 20,
    repetition_penalty: float = 1.0,
    seed: int = 1234,
    chat: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    out: TextIO | None = None,
) -> str:
    """Streams the continuation of `prompt` to `out` (standard output by default) and returns it.

    temperature 0 always takes the likeliest token; otherwise top_p and top_k (0: off) truncate the distribution. The
    defaults are those of Tencent's serving scripts. chat: the prompt is one user turn in the tokenizer's chat template;
    otherwise it is the beginning of a document. Names of special tokens in it are plain text. seed: of the sampling.
    Raises CheckpointError as `load_model` does, and if prompt and new tokens exceed the model's positions.
    """
    out = out or sys.stdout
    model = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if chat:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
    # A document ends with <|endoftext|>, an answer with <|eos|>; exports of earlier versions list only the former.
    stop_ids = [tokenizer.eos_token_id, tokenizer.get_vocab().get("<|eos|>")]
    _refuse_more_than_the_positions(len(ids), max_new_tokens, model.config.max_position_embeddings)
    input_ids = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    # Embedding rows that only pad the vocabulary are not tokens; a barely trained model still gives them probability.
    padding_ids = list(range(len(tokenizer), model.config.vocab_size))
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            eos_token_id=[token for token in stop_ids if token is not None] or None,
            suppress_tokens=padding_ids or None,
            streamer=_streamer(tokenizer, out),
            **sampling,
        )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _refuse_more_than_the_positions(prompt_tokens: int, max_new_tokens: int, positions: int) -> None:
    if prompt_tokens >= positions:
        raise CheckpointError(
            f"the prompt has {prompt_tokens} tokens, and this model has {positions} positions, which leaves "
            "none for a new token; "
            f"shorten the prompt by at least {prompt_tokens + 1 - positions} tokens"
        )
    if prompt_tokens + max_new_tokens > positions:
        raise CheckpointError(
            f"{prompt_tokens} tokens of prompt and max_new_tokens={max_new_tokens} are more than the {positions} "
            "positions of this model; "
            f"use at most {positions - prompt_tokens} new tokens, or a shorter prompt"
        )


def _streamer(tokenizer: PreTrainedTokenizerBase, out: TextIO) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            out.write(text + ("\n" if stream_end else ""))
            out.flush()

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json, so this is not an exported model")
    config: dict[str, Any] = json.loads(path.read_text())
    return config
