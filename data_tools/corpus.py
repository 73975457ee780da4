"""The files of a corpus and how they are divided into shards: inputs -> files -> splits -> shards.

The beginning of each file is read to detect its format. Files in a folder that are not read are counted by reason.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.formats import HEAD_BYTES, PARQUET_ENDING, RECORD_ENDINGS, TEXT_ENDINGS, extension_of, format_of
from data_tools.progress import describe_skipped
from hunyuan_pretrain.config.extras import install_hint
from hunyuan_pretrain.data.errors import DataFormatError

DEFAULT_EXTENSIONS = (*TEXT_ENDINGS, *RECORD_ENDINGS, PARQUET_ENDING)
# Approximate compression ratio of text, so that shards of compressed files hold as much text as other shards.
_EXPANSION = 4
_MOST_REASONS = 64
# Files that mark folders written by hunyuan-data; such a folder inside an input is not text.
_OUR_FILES = ("hy.tiktoken", "sequence_offsets.npy", "shard_00000.origin.npy")
_URLS_AT_A_TIME = 256
_NO_RECORDS = {"object": "json", "no records": "jsonl"}
"""Kinds that are skipped in a folder -> how such a file is read if the user names it."""
_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus."""

    path: str
    """A local path, or a URL that fsspec opens, such as s3://bucket/part.jsonl.zst."""
    input_number: int
    """Index of the user's input that it belongs to."""
    size: int
    """Bytes on disk."""
    version: str
    """Changes when the file does: its modification time, or fsspec's `ukey` for an object in a store."""
    kind: str
    """text (one document), jsonl (one per line), json (consecutive JSON objects, or an array of them) or parquet (one
    per row)."""
    compression: str = ""
    """gzip, zstd, bz2 or xz, which can only be read sequentially from the start; "" for none."""

    @property
    def is_compressed(self) -> bool:
        """Whether the file is compressed as a whole."""
        return bool(self.compression)


@dataclass(frozen=True)
class Split:
    """A part of a file that is read independently: the lines that begin in a byte range, some row groups, or the whole
    file."""

    file: CorpusFile
    file_number: int
    start: int
    """First byte, or first row group."""
    end: int
    """One past the last byte or row group."""
    weight: int
    """Approximate bytes of text, for balancing the shards."""


@dataclass
class Survey:
    """The files of all inputs in a fixed order, and counts of what is not read."""

    files: list[CorpusFile] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of files (or folders) that are not read for it."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> path of the first such file or folder."""

    def skip(self, reason: str, path: str) -> None:
        """Count a file or folder that is not read."""
        if reason.startswith("."):
            # kept in the manifest, so it must be UTF-8, and bounded in number if every file has a different ending
            reason = reason.encode(errors="replace").decode()
            is_odd = len(reason) > 20 or (reason not in self.skipped and len(self.skipped) >= _MOST_REASONS)
            reason = "other endings" if is_odd else reason
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.examples.setdefault(reason, path)


def find_files(
    inputs: Sequence[str | Path], extensions: Sequence[str] = DEFAULT_EXTENSIONS, text_endings: Sequence[str] = ()
) -> list[CorpusFile]:
    """The files that `survey` finds."""
    return survey(inputs, extensions, text_endings).files


def survey(
    inputs: Sequence[str | Path], extensions: Sequence[str] = DEFAULT_EXTENSIONS, text_endings: Sequence[str] = ()
) -> Survey:
    """The files of all inputs in a fixed order, the format of each, and counts of what is not read.

    An input is a file, a folder, or a pattern with * ? [ ] or **; each may be a URL that fsspec opens. A folder stands
    for all files below it that end in one of `extensions` or `text_endings` ("" for no ending), compressed or not, at
    any depth, sorted by path. Links are followed. Names that begin with a dot and folders written by `hunyuan-data` are
    skipped. A file that is named explicitly or matches a pattern is read whatever its ending. A file that several links
    lead to is read once. Raises DataFormatError for an input that does not exist, is given twice or cannot be read, and
    for a folder or pattern without a file to read.
    """
    found = Survey()
    seen: dict[Any, str] = {}
    for number, given in enumerate(inputs):
        chosen = _Chosen(found, frozenset(extensions), frozenset(text_endings))
        before = len(found.files)
        for listed in _files_of_url(str(given), chosen) if "://" in str(given) else _local_files(str(given), chosen):
            if (other := seen.get(listed.key)) is not None:
                if (
                    listed.is_explicit
                    and not os.path.islink(listed.path)
                    and os.path.abspath(other) == os.path.abspath(listed.path)
                ):
                    raise DataFormatError(
                        f"{listed.path}: given twice (also as {other}); its documents would count double"
                    )
                found.skip("other names of a file that is read", listed.path)
                continue
            seen[listed.key] = listed.path
            kind, compression = format_of(listed.path, listed.head(), text_endings, listed.is_parquet_end)
            if kind in _NO_RECORDS and not listed.is_named:
                found.skip("without records (.json of neither lines nor an array)", listed.path)
                continue
            kind = _NO_RECORDS.get(kind, kind)
            found.files.append(CorpusFile(listed.path, number, listed.size, listed.version, kind, compression))
        if len(found.files) == before:
            raise DataFormatError(f"{given}: {_nothing(found, extensions)}")
    return found


def _nothing(found: Survey, extensions: Sequence[str]) -> str:
    line = describe_skipped(found.skipped, found.examples)
    return (
        f"no file ends in {' '.join(extensions)} (or these with .gz, .zst, .bz2 or .xz) and is not read already; "
        "choose endings with --extension, "
        f"or read other files as text with --text-ending{line and f' ({line})'}"
    )


def split_evenly(files: Sequence[CorpusFile], shard_bytes: int | None = None) -> list[list[Split]]:
    """The splits of each shard, in corpus order. The result depends only on the files and `shard_bytes`.

    A shard holds about `shard_bytes` of text (default: 1/64 of the corpus, between 8 MB and 512 MB). Uncompressed JSON
    lines are split at any line, parquet between row groups; a text file, a compressed file or an array is never split.
    """
    total = sum(file.size * (_EXPANSION if file.is_compressed else 1) for file in files)
    wanted = shard_bytes or min(max(total // 64, 8_000_000), 512_000_000)
    shards: list[list[Split]] = []
    filled = 0
    for file_number, file in enumerate(files):
        for split in _splits(file, file_number, wanted):
            if not shards or filled + split.weight // 2 > wanted:  # closer to the wanted size without this split
                shards.append([])
                filled = 0
            shards[-1].append(split)
            filled += split.weight
    return shards


def _splits(file: CorpusFile, number: int, wanted: int) -> Iterator[Split]:
    if file.kind == "parquet":
        with open_parquet(file) as parquet:
            sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
        for group, size in enumerate(sizes):
            yield Split(file, number, group, group + 1, size)
    elif file.kind == "jsonl" and not file.is_compressed:
        num_parts = max(1, round(file.size / wanted))
        bounds = [file.size * part // num_parts for part in range(num_parts + 1)]
        for start, end in pairwise(bounds):
            yield Split(file, number, start, end, end - start)
    else:
        yield Split(file, number, 0, file.size, file.size * (_EXPANSION if file.is_compressed else 1))


@dataclass(frozen=True)
class _Listed:
    """A file found under an input."""

    path: str
    size: int
    version: str
    key: Any
    """Identical for all names of a file."""
    is_named: bool
    """Given by the user or matched by a pattern, not found in a folder."""
    head: Callable[[], bytes]
    is_parquet_end: Callable[[], bool]
    is_explicit: bool = True
    """Not reached through a link inside a folder."""


@dataclass(frozen=True)
class _Chosen:
    """Selects the names in a folder that are read."""

    found: Survey
    extensions: Collection[str]
    text_endings: Collection[str]

    def takes(self, path: str) -> bool:
        """Whether a file in a folder is read; counts it if not."""
        ending = extension_of(path)
        if ending in self.extensions or ending in self.text_endings:
            return True
        self.found.skip(ending or "without an ending", path)
        return False


def _local_files(given: str, chosen: _Chosen) -> Iterator[_Listed]:
    if os.path.isdir(given):
        yield from _files_of_folder(given, chosen)
        return
    if os.path.exists(given):
        yield _local(given, is_named=True)
        return
    if not glob.has_magic(given):
        link = "a broken link" if os.path.islink(given) else "no such file or folder"
        raise DataFormatError(f"{given}: {link}")
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
        raise DataFormatError(f"{given}: no such file or folder, and the pattern matches nothing")
    ours: dict[str, bool] = {}
    for path in matches:
        if not os.path.isdir(path):
            folder = os.path.dirname(path)
            if folder not in ours:
                ours[folder] = any(os.path.exists(os.path.join(folder, name)) for name in _OUR_FILES)
                if ours[folder]:
                    chosen.found.skip("folders written by hunyuan-data", folder)
            if ours[folder]:
                continue
            if os.path.exists(path):
                yield _local(path, is_named=True)
            else:
                chosen.found.skip("links to what is not there", path)
        elif "**" not in given:  # ** already matches the files inside the folder
            yield from _files_of_folder(path, chosen)


def _local(path: str, *, is_named: bool, is_explicit: bool = True) -> _Listed:
    if path != path.encode(errors="replace").decode():
        raise DataFormatError(f"{path!r}: its name is not UTF-8; rename the file")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataFormatError(f"{path}: neither a file nor a folder; write its content to a file")
    key = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)

    def head() -> bytes:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)

    def is_parquet_end() -> bool:
        with open(path, "rb") as file:
            file.seek(max(status.st_size - 4, 0))
            return file.read() == _PARQUET_MAGIC

    return _Listed(path, status.st_size, str(status.st_mtime_ns), key, is_named, head, is_parquet_end, is_explicit)


def _files_of_folder(folder: str, chosen: _Chosen) -> Iterator[_Listed]:
    """The files of a folder, including linked folders, each once. A file that is also reached without a link keeps that
    name."""
    walked: set[tuple[int, int]] = set()
    files: list[tuple[bool, str]] = []
    waiting = [(folder, False)]
    while waiting:
        path, is_linked = waiting.pop(0)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in walked:
            chosen.found.skip("other names of a folder that is read", path)
            continue
        walked.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        if any(entry.name in _OUR_FILES for entry in inside):
            chosen.found.skip("folders written by hunyuan-data", path)
            continue
        below = []
        for entry in inside:
            if entry.name.startswith("."):
                chosen.found.skip("hidden (the name begins with a dot)", entry.path)
            elif entry.is_dir(follow_symlinks=True):
                below.append((entry.path, is_linked or entry.is_symlink()))
            elif not entry.is_file(follow_symlinks=True):
                chosen.found.skip(
                    "links to what is not there" if entry.is_symlink() else "neither file nor folder", entry.path
                )
            elif chosen.takes(entry.path):
                files.append((is_linked or entry.is_symlink(), entry.path))
        # links last, so that a folder keeps the name without a link
        waiting = sorted([*waiting, *below], key=lambda item: (item[1], item[0]))
    listed: dict[Any, _Listed] = {}
    for is_linked, path in sorted(files):
        file = _local(path, is_named=False, is_explicit=not is_linked)
        if file.key in listed:
            chosen.found.skip("other names of a file that is read", path)
        else:
            listed[file.key] = file
    yield from sorted(listed.values(), key=lambda file: file.path)


def _files_of_url(url: str, chosen: _Chosen) -> Iterator[_Listed]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise DataFormatError(f"{url}: reading URLs needs the package fsspec: pip install fsspec") from None
    try:
        system, path = url_to_fs(url)
        is_folder = False
        if glob.has_magic(path) and not system.exists(path):
            found = sorted(name for name in system.glob(path) if not system.isdir(name))
        elif system.isdir(path):
            is_folder = True
            found = _below(system.find(path), path, chosen)
        else:
            found = [path] if system.exists(path) else []
    except (ImportError, ValueError) as error:
        raise DataFormatError(f"{url}: {error}") from None
    if not found and not is_folder:
        raise DataFormatError(f"{url}: no such file or folder")
    for begin in range(0, len(found), _URLS_AT_A_TIME):
        yield from _of_store(system, found[begin : begin + _URLS_AT_A_TIME], is_named=not is_folder)


def _below(paths: Sequence[str], folder: str, chosen: _Chosen) -> list[str]:
    """The files below a folder of a store that are read, by the same rules as for local folders."""
    ours = {str(PurePosixPath(path).parent) for path in paths if PurePosixPath(path).name in _OUR_FILES}
    for path in sorted(ours):
        chosen.found.skip("folders written by hunyuan-data", path)
    found = []
    for path in sorted(paths):
        relative = PurePosixPath(path[len(folder) :].lstrip("/"))
        if any(part.startswith(".") for part in relative.parts):
            chosen.found.skip("hidden (the name begins with a dot)", path)
        elif not any(str(parent) in ours for parent in PurePosixPath(path).parents) and chosen.takes(path):
            found.append(path)
    return found


def _of_store(system: Any, names: Sequence[str], *, is_named: bool) -> Iterator[_Listed]:
    """Files of a store; their beginnings are fetched in one batch, because each request is slow."""
    infos = [system.info(name) for name in names]
    sizes = [int(info["size"] or 0) for info in infos]
    heads = system.cat_ranges(
        list(names), [0] * len(names), [min(size, HEAD_BYTES) for size in sizes], on_error="return"
    )
    for name, size, head in zip(names, sizes, heads, strict=True):
        path = system.unstrip_protocol(name)
        if path != path.encode(errors="replace").decode():
            raise DataFormatError(f"{path!r}: its name is not UTF-8; rename the file")
        if size and not isinstance(head, bytes):
            raise DataFormatError(f"{path}: cannot be read ({head})")
        end = partial(_ends_as_parquet, system, name, size)
        yield _Listed(path, size, str(system.ukey(name)), path, is_named, partial(bytes, head if size else b""), end)


def _ends_as_parquet(system: Any, name: str, size: int) -> bool:
    return bool(system.cat_file(name, max(size - 4, 0), size) == _PARQUET_MAGIC)


def open_file(file: CorpusFile) -> Any:
    """A binary file object with the raw bytes of a file, not decompressed."""
    if "://" not in file.path:
        return open(file.path, "rb")
    import fsspec

    return fsspec.open(file.path, "rb").open()


@contextmanager
def open_parquet(file: CorpusFile) -> Iterator[Any]:
    """Open a file as a pyarrow ParquetFile. Raises DataFormatError if it is damaged or pyarrow is missing."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataFormatError(f"{file.path}: reading parquet needs pyarrow: {install_hint('pyarrow')}") from None
    with open_file(file) as raw:
        try:
            yield pq.ParquetFile(raw)
        except DataFormatError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataFormatError(f"{file.path}: damaged, or not a parquet file ({error}); write it again") from None
