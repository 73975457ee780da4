"""Which checkpoints of a run are kept: the newest ones, every n-th, and those that a person has named.

<run_dir>/checkpoints/step_0004000/name.json    the name of a kept checkpoint; it moves and goes with the folder
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from hunyuan_pretrain.checkpoint import CheckpointError, folders
from hunyuan_pretrain.data.folders import flush_to_disk, write_file

NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', not digits alone, which would be a step"


def name_of(folder: Path) -> str | None:
    """The name under which a checkpoint is kept; None if it has none. A damaged name file still keeps it."""
    path = folder / folders.NAME
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["name"]
        return name if isinstance(name, str) else "?"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "?"  # a file that cannot be read must not let a checkpoint go


def keep(run_dir: Path, folder: Path, name: str) -> None:
    """Keep a complete checkpoint under a name, which replaces an earlier one. Once this returns, the name is on disk.

    Raises CheckpointError for a name that is not one, or that another checkpoint of the run has.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name.isdigit():
        raise CheckpointError(f"{name!r} is not a name for a checkpoint: {NAME_RULE}")
    for other in folders.named_checkpoints(run_dir):
        if other != folder and name_of(other) == name:
            raise CheckpointError(f"{name!r} is the name of {other}; choose another, or release that one first")
    content = {"name": name, "named_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        write_file(folder / folders.NAME, (json.dumps(content, indent=1) + "\n").encode())
        flush_to_disk(folder)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: it has just been removed, so it cannot be kept") from None
    except OSError as error:
        raise CheckpointError(f"{folder / folders.NAME}: cannot be written: {error.strerror}") from None


def release(folder: Path) -> None:
    """Take the name of a checkpoint away. Raises CheckpointError."""
    try:
        (folder / folders.NAME).unlink(missing_ok=True)
        flush_to_disk(folder)
    except OSError as error:
        raise CheckpointError(f"{folder / folders.NAME}: cannot be removed: {error.strerror}") from None


def to_remove(complete: Sequence[Path], step: int, keep_last: int | None, keep_every_steps: int | None) -> list[Path]:
    """Of the complete checkpoints of a run, oldest first, those that are no longer wanted after saving `step`.

    Kept are the newest `keep_last` up to `step` (None: all), every one whose step is a multiple of `keep_every_steps`
    (None: no others), and the named ones. Later ones than `step`, left by an earlier attempt, neither count nor go:
    this attempt's would be removed in their favour.
    """
    if keep_last is None:
        return []
    old = [folder for folder in complete if (folders.step_of(folder) or 0) <= step][:-keep_last]
    return [
        folder
        for folder in old
        if name_of(folder) is None and (keep_every_steps is None or (folders.step_of(folder) or 0) % keep_every_steps)
    ]


def remove_old(run_dir: Path, step: int, keep_last: int | None, keep_every_steps: int | None = None) -> None:
    """Remove what `to_remove` names, oldest first. Stopped at any point, it leaves whole checkpoints, and at most one
    folder that has no checkpoint's name (`folders.remove_partials`). Raises OSError."""
    for folder in to_remove(folders.find_checkpoints(run_dir), step, keep_last, keep_every_steps):
        folders.remove(folder)
