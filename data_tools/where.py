"""`hunyuan-data where` and `verify`: trace and check the data of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_tools.progress import ProgressReport
from hunyuan_pretrain.config.history import RESOLVED, read_history
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.digests import check_digest
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import manifest_format
from hunyuan_pretrain.data.indexed import TOKENIZED_FORMAT, TokenizedDataset
from hunyuan_pretrain.data.ledger import LedgerSequence, sequences_of_step
from hunyuan_pretrain.data.packed_format import PACKED_FORMAT, PackedIndex
from hunyuan_pretrain.data.sample_order import SampleOrder


def load_run(path: str) -> Experiment:
    """Load the experiment of a run directory or YAML file. Raises DataFormatError for any other folder, ConfigError for
    an invalid file."""
    file = Path(path) / RESOLVED if Path(path).is_dir() else Path(path)
    if Path(path).is_dir() and not file.is_file():
        raise DataFormatError(
            f"{path}: not a run directory (no {RESOLVED}); give the run_dir of a run that has started, or its YAML"
        )
    return load_experiment(file)


def where(run: str, step: int, console: Console, *, as_json: bool = False, place: int | None = None) -> None:
    """Print the documents in the batch of a step, numbered as in metrics.jsonl: of the global batch, or of one position
    in it.

    If the configuration of the run has changed, the one in force at that step is used.

    Prints text, or one JSON object per sequence and line. Raises DataFormatError if there is no such step or position,
    or if data is missing.
    """
    experiment = load_run(run)
    history = read_history(Path(run)) if Path(run).is_dir() else []
    past = (history[:-1], history[-1].first_step, history[-1].left_out) if history else ()
    order = SampleOrder(experiment, None, *past)
    if not 1 <= step <= order.num_steps:
        raise DataFormatError(f"--step {step}: the run has the steps 1 to {order.num_steps}")
    stage = order.stage(step - 1)
    if place is not None and not 0 <= place < stage.global_batch_sequences:
        raise DataFormatError(
            f"--place {place}: the global batch has the positions 0 to {stage.global_batch_sequences - 1}"
        )
    in_stage = order.positions_of_stage(step - 1, np.arange(stage.global_batch_sequences))
    first, last = (int(number) // stage.global_batch_sequences + 1 for number in (in_stage[0], in_stage[-1]))
    data_step = str(first) if first == last else f"{first} to {last}"  # differ after a change of the batch size
    if not as_json:
        console.print(
            f"step {step}: stage {stage.name}, step {data_step} of its data, {stage.global_batch_sequences} sequences"
        )
    for sequence in sequences_of_step(order, step - 1):
        if place is not None and sequence.place != place:
            continue
        if as_json:
            of_stage = int(in_stage[sequence.place])
            at = {
                "step": step,
                "stage": stage.name,
                "data_step": of_stage // stage.global_batch_sequences + 1,
                "sequence_of_stage": of_stage,
            }
            print(json.dumps({**at, **asdict(sequence)}, ensure_ascii=False))
        else:
            _print_sequence(sequence, console)


def _print_sequence(sequence: LedgerSequence, console: Console) -> None:
    table = Table("position", "tokens", "document", "from its token", "of", title_justify="left")
    table.title = f"place {sequence.place}: sequence {sequence.sequence} of {sequence.packed}"
    for piece in sequence.pieces:
        at = f" at {piece.place:,}" if piece.place else ""
        document = f"{piece.tokenized} #{piece.document:,}"
        table.add_row(
            f"{piece.position:,}", f"{piece.tokens:,}", document, f"{piece.first_token:,}", f"{piece.file}{at}"
        )
    console.print(table)


def verify(paths: Sequence[str]) -> int:
    """Read every file of data folders, or of all data of experiments and runs, and compare it with its SHA-256.

    Returns the number of files read. Raises DataFormatError naming each file that is missing or differs.
    """
    files: dict[Path, str | None] = {}
    for path in paths:
        folders = [path]
        if Path(path).suffix in (".yaml", ".yml") or (Path(path) / RESOLVED).is_file():
            experiment = load_run(path)
            folders = [source.path for stage in experiment.stages for source in stage.data]
            folders += experiment.evaluation.paths
        for folder in folders:
            files |= _digests(folder)
    problems = []
    total = sum(file.stat().st_size for file in files if file.is_file())
    with ProgressReport("verifying", total) as progress, ThreadPoolExecutor() as pool:
        for file, problem in zip(files, pool.map(_problem, files.items()), strict=True):
            problems += [problem] if problem else []
            progress.advance(file.stat().st_size if file.is_file() else 0, f"{len(files)} files")
    if problems:
        raise DataFormatError("\n".join(problems))
    return len(files)


def _digests(folder: str) -> dict[Path, str | None]:
    """SHA-256 of the files of a tokenized or packed folder, including its sources."""
    kind = manifest_format(folder)
    if kind == TOKENIZED_FORMAT:
        return TokenizedDataset(folder).digests()
    if kind == PACKED_FORMAT:
        return PackedIndex(folder).digests()
    raise DataFormatError(
        f"{folder}: not written by `hunyuan-data tokenize` or `pack`; give a folder that is, a run or an experiment"
    )


def _problem(file: tuple[Path, str | None]) -> str | None:
    try:
        check_digest(*file)
    except DataFormatError as error:
        return str(error)
    return None
