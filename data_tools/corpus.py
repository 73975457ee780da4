"""The files of a corpus and how they are dealt out: inputs -> files -> splits -> shards. Nothing is read here but names and sizes."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hunyuan_pretrain.data.errors import DataFormatError

DEFAULT_EXTENSIONS = (".txt", ".md", ".py", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".zst")
# What compression saves on text, about: a shard of compressed files shall hold as much text as another.
_EXPANSION = 4


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus."""

    path: str
    """A local path, or a URL that fsspec opens, such as s3://bucket/part.jsonl.zst."""
    input_number: int
    """Number of the input, as the user gave it, that it belongs to."""
    size: int
    """Bytes on disk."""
    version: str
    """Changes when the file does: its time of change, or what the store says of the object."""

    @property
    def kind(self) -> str:
        """text (one document), jsonl (one a line) or parquet (one a row)."""
        return {".jsonl": "jsonl", ".parquet": "parquet"}.get(extension_of(self.path), "text")

    @property
    def is_compressed(self) -> bool:
        """.gz or .zst, which can only be read from its beginning."""
        return self.path.lower().endswith(_COMPRESSED)


@dataclass(frozen=True)
class Split:
    """A part of a file that is read on its own: lines that begin in a range of bytes, some row groups, or a whole file."""

    file: CorpusFile
    file_number: int
    start: int
    """First byte, or first row group."""
    end: int
    """After the last byte or row group."""
    weight: int
    """About how many bytes of text, to deal out evenly."""


def find_files(inputs: Sequence[str | Path], extensions: Sequence[str] = DEFAULT_EXTENSIONS) -> list[CorpusFile]:
    """The files of all inputs in a fixed order.

    An input is a file, a folder, a pattern with * ? [ ] or **, each also as a URL that fsspec knows. A folder stands for the files in it,
    at any depth and sorted by path, that end in one of `extensions`, compressed (.gz, .zst) or not; a file that is named itself or found
    by a pattern is read whatever its extension. Raises DataFormatError for an input that does not exist or is given twice, and for a
    folder without such a file.
    """
    files: list[CorpusFile] = []
    seen: dict[str, str] = {}
    for number, given in enumerate(inputs):
        for path, size, version in _files_of_url(str(given), extensions) if "://" in str(given) else _local_files(Path(given), extensions):
            resolved = path if "://" in path else os.path.realpath(path)
            if resolved in seen:
                raise DataFormatError(f"{path}: given twice (also as {seen[resolved]}); its documents would count double")
            seen[resolved] = path
            files.append(CorpusFile(path, number, size, version))
    return files


def deal_out(files: Sequence[CorpusFile], shard_bytes: int | None = None) -> list[list[Split]]:
    """The splits of each shard, in the order of the corpus: a function of the files alone.

    A shard holds about `shard_bytes` of text; by default a 64th of the corpus, but at least 8 MB and at most 512 MB. Plain JSON lines are
    cut anywhere, parquet between row groups; a text or compressed file is never cut.
    """
    total = sum(file.size * (_EXPANSION if file.is_compressed else 1) for file in files)
    wanted = shard_bytes or min(max(total // 64, 8_000_000), 512_000_000)
    shards: list[list[Split]] = []
    filled = 0
    for file_number, file in enumerate(files):
        for split in _splits(file, file_number, wanted):
            if not shards or filled + split.weight // 2 > wanted:  # nearer to the wanted size without it
                shards.append([])
                filled = 0
            shards[-1].append(split)
            filled += split.weight
    return shards


def _splits(file: CorpusFile, number: int, wanted: int) -> Iterator[Split]:
    if file.kind == "parquet":
        from data_tools.documents import open_parquet

        with open_parquet(file) as parquet:
            sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
        for group, size in enumerate(sizes):
            yield Split(file, number, group, group + 1, size)
    elif file.kind == "jsonl" and not file.is_compressed:
        num_parts = max(1, round(file.size / wanted))
        borders = [file.size * part // num_parts for part in range(num_parts + 1)]
        for start, end in pairwise(borders):
            yield Split(file, number, start, end, end - start)
    else:
        yield Split(file, number, 0, file.size, file.size * (_EXPANSION if file.is_compressed else 1))


def extension_of(path: str) -> str:
    """The last extension in lower case, that of the text where a file is compressed."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _local_files(given: Path, extensions: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """(path, bytes, version) of the files of one input."""
    if given.is_dir():
        inside = sorted(os.path.join(parent, name) for parent, _, names in os.walk(given) for name in names)
        found = _readable(_chosen(str(given), inside, extensions))
    elif given.is_file():
        found = _readable([str(given)])
    else:
        matches = sorted(glob.glob(str(given), recursive=True)) if glob.has_magic(str(given)) else []
        found = _readable([path for path in matches if os.path.isfile(path)])
        if not found:
            raise DataFormatError(f"{given}: no such file or folder")
    for path in found:
        status = os.stat(path)
        yield path, status.st_size, str(status.st_mtime_ns)


def _files_of_url(url: str, extensions: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
        if glob.has_magic(path):
            found = sorted(system.glob(path))
        elif system.isdir(path):
            found = _chosen(url, sorted(system.find(path)), extensions)
        else:
            found = [path] if system.exists(path) else []
    except (ImportError, ValueError) as error:
        raise DataFormatError(f"{url}: {error}") from None
    if not found:
        raise DataFormatError(f"{url}: no such file or folder")
    for name in _readable(found):
        yield system.unstrip_protocol(name), int(system.info(name)["size"] or 0), str(system.ukey(name))


def _chosen(folder: str, paths: Iterable[str], extensions: Sequence[str]) -> list[str]:
    found = [path for path in paths if extension_of(path) in extensions]
    if not found:
        raise DataFormatError(f"{folder}: no file ends in {' '.join(extensions)} (or these with .gz or .zst); choose with --extension")
    return found


def _readable(paths: list[str]) -> list[str]:
    """The same paths. Raises DataFormatError for one that is not read, or that no manifest could name."""
    for path in paths:
        if path != path.encode(errors="replace").decode():
            raise DataFormatError(f"{path!r}: its name is not UTF-8; give the file another one")
        if extension_of(path) == ".json":
            raise DataFormatError(f"{path}: a .json file is not read; write one JSON object a line, in a file named .jsonl")
    return paths


def open_file(file: CorpusFile) -> Any:
    """The bytes of a file as they are on disk: a binary file object."""
    if "://" not in file.path:
        return open(file.path, "rb")
    import fsspec

    return fsspec.open(file.path, "rb").open()
