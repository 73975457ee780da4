"""Checkpoint folders: their names, the marker of a complete one, and checks that their files are as written.

<run_dir>/checkpoints/step_0000100/           one checkpoint
    complete.json                             written last: step, model, size and sha256 of every other file
    name.json                                 only in one that is kept under a name: that name
    common.pt, __0_0.distcp, ...              megatron's distributed checkpoint
<run_dir>/checkpoints/step_0000200.9f2c41d0.partial/
                                              one attempt at a save (*.partial: also a checkpoint that is being removed)
<run_dir>/checkpoints/step_0000200.damaged/   a damaged checkpoint, set aside by a run that continued without it
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.faults import (
    MISSING,
    Fault,
    NewerFormatError,
    UnreadableError,
    damage_to,
    may_be_good,
    opened,
    reading,
    unreadable,
)
from hunyuan_pretrain.checkpoint.stored import COMMON, INDEX, Index, Section, check_object, read_index
from hunyuan_pretrain.config.changes import Kind, model_differences
from hunyuan_pretrain.config.errors import show_value
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.data.folders import flush_to_disk

FORMAT_VERSION = 1
MARKER = "complete.json"
NAME = "name.json"
"""In the folder of a checkpoint that is kept under a name (retention.py)."""
SELF = "marker_sha256"
"""Key of the digest over everything else in complete.json."""

PARTIAL, DAMAGED = ".partial", ".damaged"
THREADS = 8
"""That digest or stat files: a network file system serves several at once, and hashing leaves the interpreter free."""
WITHOUT_ANY = "repair or remove them; with none left the run starts from the beginning"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:07d}"


def partial_folder(folder: Path) -> Path:
    """Where a new attempt at the checkpoint `folder` is written. No other attempt has this name, so a rank that is left
    over from another one, on a node that was lost, cannot write into it."""
    return folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}")


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint folder; None for any other folder."""
    found = re.fullmatch(r"step_(\d{7,})", folder.name)
    return int(found[1]) if found else None


def named_checkpoints(run_dir: Path) -> list[Path]:
    """Every folder that has the name of a checkpoint, oldest first, whatever it contains. Raises UnreadableError."""
    place = run_dir / "checkpoints"
    try:
        folders = [place / name for name in os.listdir(place)]  # Path.glob finds nothing where it may not look
    except MISSING:
        return []
    except OSError as error:
        raise unreadable(place, error) from error
    return sorted((folder for folder in folders if step_of(folder) is not None), key=lambda one: step_of(one) or 0)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. This checks file sizes only; digests are checked on loading.

    Raises CheckpointError if one that is newer than all of these may be complete too, but cannot be read now or is of a
    newer program: nobody is given an older one in its place.
    """
    found: list[Path] = []
    for folder in reversed(named_checkpoints(run_dir)):
        fault = fault_of(folder)
        if fault is None:
            found.append(folder)
        elif fault.state != "damaged" and not found:
            raise may_be_good(folder, fault)
    return found[::-1]


def none_is_good(run_dir: Path, faults: Mapping[Path, Fault | str], hint: str) -> CheckpointError:
    """The error for a run with no usable checkpoint. It names each checkpoint with its fault."""
    named = "\n".join(f"  {folder.name}: {fault}" for folder, fault in faults.items())
    return CheckpointError(f"{run_dir / 'checkpoints'}: no usable checkpoint ({hint})\n{named}")


def faults_of(run_dir: Path) -> dict[Path, Fault | str]:
    """What is wrong with the faulty checkpoints of a run, newest first, as far as `fault_of` can tell."""
    return {folder: fault for folder in reversed(named_checkpoints(run_dir)) if (fault := fault_of(folder)) is not None}


def fault_of(folder: Path, marker: Mapping[str, Any] | None = None) -> Fault | None:
    """What is wrong with a checkpoint, as far as its marker (by default read) and file sizes show; None if nothing
    is."""
    try:
        files = (marker or read_marker(folder))["files"]
        wrong = next((name for name, file in files.items() if not _has_size(folder / name, file)), None)
        return None if wrong is None else Fault("damaged", damage_to(wrong))
    except (TypeError, KeyError, AttributeError) as error:
        return Fault("damaged", f"{MARKER}: {error}")
    except CheckpointError as error:
        state = {UnreadableError: "unreadable", NewerFormatError: "newer"}.get(type(error), "damaged")
        return Fault(state, str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/"))


def read_marker(folder: Path) -> dict[str, Any]:
    """complete.json of a checkpoint. Raises CheckpointError if it is missing or damaged, UnreadableError, and
    NewerFormatError if a newer program has written it."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        missing = {"step", "world_size", "model", "files"} - marker.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        # a newer program may compute the digest in another way; its marker is refused below
        if (
            SELF in marker
            and marker[SELF] != _self_digest(marker)
            and marker.get("format_version", 1) <= FORMAT_VERSION
        ):
            raise ValueError(f"its content is not what was written: {SELF} does not match it")
        if step_of(folder) not in (None, marker["step"]):
            raise ValueError(f"it belongs to step {marker['step']}")
        if elsewhere := [name for name in marker["files"] if name != os.path.basename(name)]:
            raise ValueError(f"it names a file outside its folder: {elsewhere[0]}")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: {_not_a_checkpoint(folder)}") from None
    except OSError as error:
        raise UnreadableError(f"{folder}/{unreadable(folder / MARKER, error)}") from None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / MARKER}: damaged: {error}") from None
    if marker.get("format_version", 1) > FORMAT_VERSION:
        newer = f"format_version is {marker['format_version']}, this program reads up to {FORMAT_VERSION}"
        raise NewerFormatError(f"{folder / MARKER}: written by a newer program: {newer}")
    return marker


def _not_a_checkpoint(folder: Path) -> str:
    """What a path without a marker is instead, and which checkpoints may have been meant."""
    what, run_dir = f"not a complete checkpoint (no {MARKER}); complete ones there", folder.parent.parent
    if (folder / "checkpoints").is_dir():
        what, run_dir = "a run directory; name one of its checkpoints: complete ones there", folder
    others = [path.name for path in named_checkpoints(run_dir) if path != folder and (path / MARKER).exists()]
    return f"{what}: {', '.join(others) or 'none'}"


def write_marker(folder: Path, content: Mapping[str, Any]) -> None:
    """Write complete.json and flush it to disk."""
    content = json.loads(json.dumps({"format_version": FORMAT_VERSION, **content}))  # as it will be read back
    with (folder / MARKER).open("w", encoding="utf-8") as file:
        json.dump({**content, SELF: _self_digest(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush_to_disk(folder)


def share_to_verify(names: Iterable[str], rank: int, world_size: int) -> list[str]:
    """The files that a rank verifies: those that the rank of its number wrote. Under the same layout it reads just
    these afterwards, from its machine's memory. Files of no rank go round."""
    share = []
    for number, name in enumerate(sorted(names)):
        writer = re.match(r"__(\d+)_", name)
        if (int(writer[1]) if writer else number) % world_size == rank:
            share.append(name)
    return share


def verify_files(folder: Path, marker: Mapping[str, Any], names: Sequence[str]) -> None:
    """`verify_file` of each name, THREADS at a time. Raises CheckpointError naming the first that differs."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="digests") as pool:
        for _ in pool.map(lambda name: verify_file(folder, marker, name), names):
            pass


def verify_file(folder: Path, marker: Mapping[str, Any], name: str) -> None:
    """Compare a file of a checkpoint with the marker's size and digest. Raises CheckpointError if it differs,
    UnreadableError."""
    file = marker["files"][name]
    with reading(folder / name):
        is_as_written = _has_size(folder / name, file) and digest(folder / name) == file["sha256"]
    if not is_as_written:
        raise CheckpointError(damage_to(name))


def index_of(folder: Path, marker: Mapping[str, Any]) -> Index:
    """Where the tensors of a checkpoint are. The bytes that are interpreted are the ones whose digest is compared.

    Raises CheckpointError if they are not as written or not an index, UnreadableError, UnsafePickleError if they, or
    what is common to all ranks, name what no checkpoint needs.
    """
    files = marker["files"]
    with reading(folder / INDEX):
        content = (folder / INDEX).read_bytes()
    if INDEX not in files or hashlib.sha256(content).hexdigest() != files[INDEX]["sha256"]:
        raise CheckpointError(damage_to(INDEX))
    if COMMON in files:  # nothing in it is used; whoever hid something there meant another reader
        with opened(folder / COMMON) as descriptor:
            check_object(descriptor, Section(COMMON, 0, files[COMMON]["bytes"]))
    return read_index(content, {name: file["bytes"] for name, file in files.items()})


ADAPTER_OF = "adapter_of"
"""Key of complete.json of a run with LoRA: the checkpoint holds an adapter; path and digest of its base."""


def refuse_other_model(folder: Path, marker: Mapping[str, Any], model: ModelConfig) -> None:
    """Raise CheckpointError naming every setting that makes the checkpoint's weights unusable for `model`."""
    differences = [one for one in model_differences(marker["model"], model) if one.kind == Kind.never]
    if differences:
        lines = [
            f"  {one.key}: {show_value(one.old)} in the checkpoint, {show_value(one.new)} in the config"
            for one in differences
        ]
        raise CheckpointError(f"{folder}: a checkpoint of another model\n" + "\n".join(lines))


def checkpoint_of(path: Path) -> Path:
    """A checkpoint's folder: `path` itself, or the newest complete checkpoint of the run directory `path`. Raises
    CheckpointError if there is none."""
    if (path / MARKER).exists():
        return path
    if found := find_checkpoints(path):
        return found[-1]
    if faults := faults_of(path):
        raise none_is_good(path, faults, "repair one, or choose another")
    is_run = (path / "checkpoints").is_dir()
    what = "a run directory without a complete checkpoint" if is_run else "neither a checkpoint nor a run directory"
    near = ", ".join(str(folder) for folder in find_checkpoints(path.parent.parent))
    raise CheckpointError(f"{path}: {what}" + (f"; complete checkpoints beside it: {near}" if near else ""))


def data_files(folder: Path) -> list[Path]:
    """Every file of a checkpoint except the marker and its name."""
    return sorted(path for path in folder.iterdir() if path.name not in (MARKER, NAME))


def digest(path: Path) -> str:
    """Flush a file to disk and return its sha256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_in_place(partial: Path, folder: Path) -> OSError | None:
    """Give a finished folder its name. Removes a folder of that name from an earlier attempt at this run, and keeps the
    step under the name that that one had. Raises OSError, and then the earlier folder is still there. Returns the error
    if the folder has its name but this could not be flushed to disk."""
    old = folder.with_name(f"{folder.name}.old{PARTIAL}")
    if (folder / NAME).exists():
        shutil.copyfile(folder / NAME, partial / NAME)
        flush_to_disk(partial / NAME)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    try:
        flush_to_disk(folder.parent)
    except OSError as error:
        return error
    shutil.rmtree(old, ignore_errors=True)
    return None


def remove(folder: Path) -> bool:
    """Remove a checkpoint without a name. It is renamed first, so that a half-removed one is never taken for a
    checkpoint. Returns False, and leaves it, if it has a name by then: a person may give it one at any moment."""
    doomed = folder.with_name(f"{folder.name}.removed{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    if (doomed / NAME).exists():
        doomed.rename(folder)
        return False
    shutil.rmtree(doomed)
    return True


def remove_partials(run_dir: Path) -> list[str]:
    """Remove what killed attempts left half-written or half-removed, and put back what was only renamed; returns one
    log line per folder.

    Call it on one process, and only while no other process writes to the run.
    """
    found = sorted(
        folder
        for folder in (run_dir / "checkpoints").glob(f"step_*{PARTIAL}")
        if folder.is_dir() and not folder.is_symlink()
    )
    return [_leave_no_partial(folder) for folder in found]


def _leave_no_partial(folder: Path) -> str:
    """A kill between two renames leaves a whole checkpoint: one that was to be replaced (`put_in_place`), or that has
    been given a name while it was removed (`remove`)."""
    place, is_named = folder.with_name(folder.name.partition(".")[0]), (folder / NAME).exists()
    is_whole = folder.name.endswith(f".old{PARTIAL}") or (folder.name.endswith(f".removed{PARTIAL}") and is_named)
    if is_whole and (folder / MARKER).exists() and not place.exists():
        folder.rename(place)
        return f"{place} is back: an earlier attempt was ended while it was to be replaced or removed"
    doomed = folder.with_name(f"{folder.name}.gone{PARTIAL}")
    folder.rename(doomed)  # first: a rank that is left over on a lost node would go on to fill it
    shutil.rmtree(doomed)
    return f"removed {folder}: what an ended attempt left of a save or of a removal"


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint that cannot be used, which frees its name for a later one of that step. Returns the new
    folder."""
    for number in range(1, 1000):
        aside = folder.with_name(folder.name + DAMAGED + (f".{number}" if number > 1 else ""))
        if not aside.exists():
            folder.rename(aside)
            return aside
    raise CheckpointError(f"{folder}: too many folders named {folder.name}{DAMAGED}")


def _self_digest(marker: Mapping[str, Any]) -> str:
    content = {key: value for key, value in marker.items() if key != SELF}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _has_size(path: Path, file: Mapping[str, Any]) -> bool:
    """Raises UnreadableError."""
    try:
        return path.stat().st_size == file["bytes"]
    except MISSING:
        return False
    except OSError as error:
        raise unreadable(path, error) from error
