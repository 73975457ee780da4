"""Atomic writes of folders and files, and the manifest.json of every data folder."""

from __future__ import annotations

import fcntl
import json
import os
import reprlib
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hunyuan_pretrain.data.errors import DataFormatError

MANIFEST = "manifest.json"
_IDENTITY = ".job"
"""File in an unfinished folder with the identity of the job that it belongs to."""
_LOCK = ".lock"


@contextmanager
def new_folder(path: str | Path, *, files: Sequence[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path`. It is renamed to `path` when the block ends, and removed if the block raises.

    `files` are patterns for the names in a folder of this kind; the first name always exists. With `overwrite`, an
    existing folder is replaced only if it contains the first name and no name outside the patterns, so that a mistyped
    output never removes a user's files or another command's output. Raises DataFormatError if `path` exists and may not
    be replaced.
    """
    path = Path(path)
    _check_replaceable(path, files, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    # Left by a killed process with the same process id.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            flush_to_disk(file)
        _take_name(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def unfinished_folder(
    path: str | Path, *, files: Sequence[str], identity: str, overwrite: bool = False
) -> Iterator[Path]:
    """The unfinished folder of `path`. It survives interruption, so several runs of a command can fill it;
    `finish_folder` renames it to `path`.

    It is a sibling of `path` and keeps what an earlier run with the same `identity` left. The block has exclusive
    access, across all machines that see the folder. Files whose names begin with a dot are temporary: `finish_folder`
    removes them. If the block raises, the folder stays if it holds any other file; otherwise it is removed. Raises
    DataFormatError if `path` exists and may not be replaced (see `new_folder`), if another process is using the folder,
    or if it has another identity; with `overwrite`, its contents are then removed instead.
    """
    path = Path(path)
    _check_replaceable(path, files, overwrite)
    partial = _partial(path)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(path, fcntl.LOCK_EX):
        try:
            _take_over(partial, identity, overwrite)
            yield partial
        except BaseException:
            if not any(partial.glob("[!.]*")):
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def begun_folder(path: str | Path, *, alone: bool = False) -> Iterator[tuple[Path, str]]:
    """(unfinished folder of `path`, its identity) as left by `unfinished_folder`, for one of many processes that fill
    it together.

    Such processes may run at the same time, on any machine, but not beside one that holds the folder `alone` or through
    `unfinished_folder`. Raises DataFormatError if another process excludes this one, or if there is no such folder.
    """
    path = Path(path)
    file = _partial(path) / _IDENTITY
    if not file.is_file():
        raise DataFormatError(f"{path}: not begun, or finished already")
    with _locked(path, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
        yield file.parent, file.read_text(errors="replace")


@contextmanager
def waiting_for(lock: Path) -> Iterator[None]:
    """Hold the lock file `lock`, which is created if missing. Waits until no other process on any machine holds it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    # a separate file, not the folder: NFS grants an exclusive lock only on a file that is open for writing
    lock = os.open(_partial(path) / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataFormatError(f"{path}: another process is writing it; wait for it to end") from None
        yield
    finally:
        os.close(lock)


def finish_folder(path: str | Path) -> None:
    """Rename an unfinished folder to `path`. Its files must have been flushed. Does nothing if that is already done."""
    path = Path(path)
    partial = _partial(path)
    if partial.is_dir():
        for leftover in partial.glob(".*"):  # of killed processes, or needed only until now
            if leftover.name not in (_IDENTITY, _LOCK):
                leftover.unlink()
        _take_name(partial, path)
    for name in (_IDENTITY, _LOCK):
        (path / name).unlink(missing_ok=True)


def _take_over(partial: Path, identity: str, overwrite: bool) -> None:
    """Make sure that an unfinished folder has this identity. Raises DataFormatError if it holds files of another."""
    file = partial / _IDENTITY
    if (file.read_text(errors="replace") if file.is_file() else "") == identity:
        return
    if any(partial.glob("[!.]*")) and not overwrite:
        raise DataFormatError(
            f"{partial}: left unfinished by a run with other inputs or options; run that again to continue, or pass "
            "--overwrite to start over"
        )
    for other in partial.iterdir():
        if other.name != _LOCK:
            other.unlink()
    write_file(file, identity.encode())


def _partial(path: Path) -> Path:
    return path.parent / f".{path.name}.partial"


def _check_replaceable(path: Path, files: Sequence[str], overwrite: bool) -> None:
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty_folder:
        if not overwrite:
            raise DataFormatError(f"{path}: already there; choose another output, or pass --overwrite to replace it")
        if not (path / files[0]).is_file():
            raise DataFormatError(
                f"{path}: not replaced, because it holds no {files[0]} and so was not written by this command"
            )
        names = sorted(entry.name for entry in path.iterdir())
        if others := [name for name in names if not any(fnmatchcase(name, pattern) for pattern in files)]:
            raise DataFormatError(
                f"{path}: not replaced, because it holds {others[0]}, which this command does not write; choose "
                "another output, or remove the folder"
            )


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, with all links resolved, is a folder or lies inside it."""
    there = Path(folder).resolve()
    return there in (Path(path).resolve(), *Path(path).resolve().parents)


def _take_name(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    previous = path.parent / f".{path.name}.{os.getpid()}.previous"
    # A signal between the two renames would leave no folder under the name, neither the old one nor the new one.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        path.rename(previous)
        temporary.rename(path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    shutil.rmtree(previous)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write one file atomically: `path` holds either its previous content or all of `content`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(content)
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `folder`/manifest.json."""
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def manifest_format(folder: str | Path) -> str:
    """The `format` of a data folder, "" if its manifest has none. Raises DataFormatError if the folder or a readable
    manifest is missing."""
    return str(_load_manifest(Path(folder)).get("format", ""))


def read_manifest(folder: str | Path, expected_format: str, version: int, written_by: str) -> dict[str, Any]:
    """The manifest of a folder of the given format and version.

    Raises DataFormatError if the folder or its manifest is missing or unreadable, or if it is of another kind or
    version; `written_by` is the command the message points to.
    """
    folder = Path(folder)
    manifest = _load_manifest(folder, written_by)
    if manifest.get("format") != expected_format:
        found = str(manifest.get("format", "no format"))[:60]
        raise DataFormatError(
            f"{folder / MANIFEST}: {found}, expected {expected_format}; give a folder written by `{written_by}`"
        )
    if manifest.get("version") != version:
        found = reprlib.repr(manifest.get("version"))
        raise DataFormatError(
            f"{folder / MANIFEST}: version {found}, this program reads version {version}; run `{written_by}` again"
        )
    return manifest


def manifest_field(folder: str | Path, manifest: Any, name: str, kind: type) -> Any:
    """`manifest[name]` of a manifest or a part of one. Raises DataFormatError if it is missing, not of type `kind`, or
    an integer outside 0 to 2^63 - 1."""
    path = Path(folder) / MANIFEST
    if not isinstance(manifest, dict):
        raise DataFormatError(f"{path}: a JSON object with {name} is expected, found {type(manifest).__name__}")
    value = manifest.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "missing" if name not in manifest else reprlib.repr(value)
        raise DataFormatError(f"{path}: {name} is {found}, expected a value of type {kind.__name__}")
    if isinstance(value, int) and not 0 <= value < 2**63:
        raise DataFormatError(f"{path}: {name} is {reprlib.repr(value)}, expected a number from 0 to 2^63 - 1")
    return value


def _load_manifest(folder: Path, written_by: str = "hunyuan-data") -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise DataFormatError(f"{folder}: no such folder; write it with `{written_by}`")
        if not path.is_file():
            raise DataFormatError(f"{path}: missing; give a folder written by `{written_by}`")
        manifest = json.loads(path.read_bytes())
        json.dumps(manifest, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which cannot be printed
    except DataFormatError:
        raise
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise DataFormatError(f"{path}: a JSON object is expected, found {type(manifest).__name__}")
    return manifest
