"""Plants pickles that would run a command in the files of a checkpoint, with digests that match."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hunyuan_pretrain.checkpoint import folders


class Command:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Expression:
    """Evaluates Python when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').system({self.command!r})",)


def sign(folder: Path) -> None:
    """Give complete.json the sizes and digests of the files as they are now."""
    content = json.loads((folder / folders.MARKER).read_text())
    content["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folders.data_files(folder)
    }
    folders.write_marker(folder, {key: value for key, value in content.items() if key != folders.SELF})


def change_index(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the index that this process has written itself, and sign it."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)


def replace_record(folder: Path, name: str, content: bytes) -> None:
    """Store other bytes in place of a tensor or an object: behind the others, where the index then points."""

    def change(metadata: Any) -> None:
        (place,) = [place for key, place in metadata.storage_data.items() if key.fqn.startswith(name)]
        file = folder / place.relative_path
        place.offset, place.length = file.stat().st_size, len(content)
        with file.open("ab") as opened:
            opened.write(content)

    change_index(folder, change)


def saved(value: Any) -> bytes:
    """What torch.save writes."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _whole_index(folder: Path, harm: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(harm))
    sign(folder)


def _in_the_index(folder: Path, harm: Any) -> None:
    change_index(folder, lambda metadata: setattr(metadata, "planner_data", {"x": harm}))


def _common(folder: Path, harm: Any) -> None:
    (folder / "common.pt").write_bytes(saved({"args": harm}))
    sign(folder)


PLACES: dict[str, Callable[[Path, Any], None]] = {
    "the whole index": _whole_index,
    "a part of the index": _in_the_index,
    "common to all ranks": _common,
    "an object": lambda folder, harm: replace_record(folder, "generators", saved([{"torch": harm}])),
    "a weight": lambda folder, harm: replace_record(folder, "embedding.word_embeddings", saved(harm)),
    "a moment": lambda folder, harm: replace_record(folder, "optimizer.exp_avg.embedding", saved([harm])),
}
"""Every place of a checkpoint that is a pickle."""
