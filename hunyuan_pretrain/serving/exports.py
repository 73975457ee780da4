"""An export's folder: what is refused, and its model in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hunyuan_pretrain.serving.errors import ServingError
from hunyuan_pretrain.serving.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from hunyuan_pretrain.serving.local_engine import LocalModel

__all__ = ["load_local", "read_positions", "refuse_folder", "system_prompt_of"]


def refuse_folder(export: Path) -> None:
    """Raise ServingError unless there is a folder."""
    if not export.is_dir():
        raise ServingError(f"{export}: no such folder; give one that `hunyuan-pretrain export` wrote")


def load_local(export: Path, lora: Path | None, device: str, vocabulary: Vocabulary) -> LocalModel:
    """The model of an export with the installed model classes; no code of the folder runs. Raises CheckpointError,
    ServingError."""
    from hunyuan_pretrain.checkpoint.generate import load_model
    from hunyuan_pretrain.checkpoint.lora_merge import merged_tensors
    from hunyuan_pretrain.serving.local_engine import LocalModel

    adapted = () if lora is None else merged_tensors(export, lora)  # refused before weights are read
    model: Any = load_model(export, device=device)
    _replace(model, adapted, f"--lora {lora}: {{}}; merge first: hunyuan-pretrain merge-lora {export} {lora} OUT")
    if model.config.vocab_size < vocabulary.size:
        raise ServingError(
            f"{export}: the tokenizer has {vocabulary.size} ids, the embedding only {model.config.vocab_size} rows"
        )
    return LocalModel(model, vocabulary.size, vocabulary.stop_ids)


def system_prompt_of(given: str | None, vocabulary: Vocabulary, lora: Path | None) -> str:
    """The system prompt of chats without a system message: the one that is given, else that of the adapter, else that
    of the export. Raises CheckpointError."""
    from hunyuan_pretrain.checkpoint.adapter import system_prompt_of_adapter

    if given is not None:
        return given
    of_adapter = None if lora is None else system_prompt_of_adapter(lora)
    return vocabulary.system_prompt if of_adapter is None else of_adapter


def _replace(model: Any, tensors: Iterable[tuple[str, Tensor]], refusal: str) -> None:
    """Write tensors over the parameters of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors:
        if name not in parameters:
            raise ServingError(refusal.format(f"{type(model).__name__} has no {name} in memory"))
        parameters[name].data.copy_(tensor)


def read_positions(folder: Path) -> int:
    """The positions of an export's model. Raises ServingError."""
    try:
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServingError(f"{folder}: not an exported model: config.json: {error!r}") from None
