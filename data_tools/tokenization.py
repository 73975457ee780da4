"""Tokenizes a corpus into a folder, shard by shard, in parallel. After a kill, the next run resumes with the shards
that have no report."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.chat import ChatForm, PairForm
from data_tools.corpus import DEFAULT_EXTENSIONS, split_evenly, survey
from data_tools.encoding import DocumentEncoder, EncoderSource
from data_tools.progress import ProgressReport, describe_skipped
from data_tools.records import RecordForm
from data_tools.tokenized_shard import (
    Allowance,
    ShardReport,
    TokenizeJob,
    is_finished,
    read_report,
    shard_name,
    write_shard,
)
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import (
    MANIFEST,
    finish_folder,
    read_manifest,
    unfinished_folder,
    write_file,
    write_manifest,
)
from hunyuan_pretrain.data.indexed import TOKENIZED_FORMAT, TOKENIZED_VERSION, shard_files, targets_file, token_dtype
from hunyuan_pretrain.data.tokenizer import Tokenizer

REJECTS = "rejects.jsonl"
TOKENIZED_FILES = (MANIFEST, REJECTS, *shard_files("shard_*"), targets_file("shard_*"))
"""Patterns of the file names in a tokenized folder."""
_SECONDS_BETWEEN_LOOKS = 0.5
_RECORDS = ("jsonl", "json")
"""Kinds of files that hold conversations."""


def plan_job(
    inputs: Sequence[str],
    tokenizer_path: str,
    *,
    form: RecordForm | None = None,
    extensions: Sequence[str] = DEFAULT_EXTENSIONS,
    text_endings: Sequence[str] = (),
    max_rejects: Allowance | None = None,
    holdout_every: int | None = None,
    shard_bytes: int | None = None,
) -> TokenizeJob:
    """Survey the inputs and divide them into shards of about `shard_bytes` of text; one document in `holdout_every` of
    each shard is held out.

    Prints to stderr what is not read. Raises DataFormatError for an invalid input or tokenizer.
    """
    tokenizer, form = Tokenizer.load(tokenizer_path), form or RecordForm()
    found = survey(inputs, extensions, text_endings)
    files = found.files
    if isinstance(form, ChatForm) and (text := next((file for file in files if file.kind not in _RECORDS), None)):
        option = "--pairs" if isinstance(form, PairForm) else "--chat"
        raise DataFormatError(f"{text.path}: a file of text; {option} reads records: JSON lines or JSON arrays")
    if found.skipped:
        print(describe_skipped(found.skipped, found.examples), file=sys.stderr)
    return TokenizeJob(
        inputs=[str(path) for path in inputs],
        files=files,
        shards=split_evenly(files, shard_bytes),
        encoder=EncoderSource.of(tokenizer_path, tokenizer),
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        form=form,
        holdout_every=holdout_every,
        max_rejects=max_rejects or Allowance(),
        skipped=found.skipped,
    )


def finish(job: TokenizeJob, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Join the finished shards into complete folders; returns their manifests.

    Raises DataFormatError if there are more rejects than allowed, or if an output would hold no document. In the first
    case the shards stay; in the second they are removed.
    """
    reports = [
        read_report(folders[0] / f"{shard_name(number)}.json", (len(folders), len(job.inputs)))
        for number in range(len(job.shards))
    ]
    rejects = [sample for report in reports for sample in report.samples]
    num_rejects = sum(report.rejects for report in reports)
    totals = np.array([[output.totals for output in report.outputs] for report in reports]).sum(axis=0)
    num_documents = int(totals[:, :, 0].sum())
    passed_over = sum(report.passed_over for report in reports)
    job.max_rejects.check(num_rejects, num_documents + num_rejects, rejects)
    problem = None
    if num_documents == 0:
        reason = f"; {num_rejects} records were rejected, the first is {rejects[0]}" if rejects else ""
        reason += f"; --where leaves out {passed_over:,} records" if passed_over else ""
        problem = f"{', '.join(job.inputs)}: no document with text in {len(job.files)} files{reason}"
    elif job.holdout_every is not None and not 0 < (held_out := totals[1, :, 0].sum()) < num_documents:
        problem = (
            f"--holdout-every {job.holdout_every}: must hold out some of the {num_documents} documents, but not "
            f"all; it holds out {held_out}; "
            f"use 2 to {num_documents}"
        )
    if problem:
        remove_shards(folders, range(len(job.shards)))  # the same call would fail again
        raise DataFormatError(problem)
    manifests = _manifests(job, reports, totals)
    # the first folder's manifest comes last: once it exists, only the final names are missing
    for folder, manifest in reversed(list(zip(folders, manifests, strict=True))):
        if rejects:
            lines = [json.dumps(asdict(reject), ensure_ascii=False) for reject in rejects]
            write_file(folder / REJECTS, "".join(f"{line}\n" for line in lines).encode())
        write_manifest(folder, manifest)
    return manifests


def _manifests(job: TokenizeJob, reports: Sequence[ShardReport], totals: np.ndarray) -> list[dict[str, Any]]:
    """Of each folder. totals: (folders, inputs, 3) documents, bytes, tokens."""
    num_files = np.bincount([file.input_number for file in job.files], minlength=len(job.inputs)).tolist()
    manifests = []
    for number, of_inputs in enumerate(totals.tolist()):
        documents, utf8_bytes, tokens = (sum(row[column] for row in of_inputs) for column in range(3))
        manifests.append(
            {
                "format": TOKENIZED_FORMAT,
                "version": TOKENIZED_VERSION,
                "documents": documents,
                "bytes": utf8_bytes,
                "tokens": tokens,
                "dtype": str(token_dtype(job.vocab_size)),
                "vocab_size": job.vocab_size,
                "pad_id": job.pad_id,
                "tokenizer_digest": job.tokenizer_digest,
                "text": job.form.as_json(),
                "holdout_every": job.holdout_every,
                "empty_documents": sum(report.empty_documents for report in reports),
                "passed_over": sum(report.passed_over for report in reports),
                "skipped": job.skipped,
                "rejects": sum(report.rejects for report in reports),
                "sources": [
                    {"path": path, "files": count, "documents": row[0], "bytes": row[1], "tokens": row[2]}
                    for path, count, row in zip(job.inputs, num_files, of_inputs, strict=True)
                ],
                "files": [file.path for file in job.files],
                "shards": [report.outputs[number].entry for report in reports],
            }
            | _chat_entry(job, [report.outputs[number].entry for report in reports])
        )
    return manifests


def _chat_entry(job: TokenizeJob, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(job.form, ChatForm):
        return {}
    return {"chat": job.form.chat, "target_tokens": sum(entry["target_tokens"] for entry in entries)}


def name_outputs(outputs: Sequence[str], folder: Path, num_shards: int) -> None:
    """Give the joined folders their final names. The first one, still at `folder`, comes last and loses its shard
    reports."""
    for output in outputs[1:]:
        finish_folder(output)
    for number in range(num_shards):
        (folder / f"{shard_name(number)}.json").unlink(missing_ok=True)
    finish_folder(outputs[0])


def tokenize(
    inputs: Sequence[str],
    tokenizer_path: str,
    output: str,
    *,
    workers: int = 1,
    holdout_output: str | None = None,
    overwrite: bool = False,
    **planning: Any,
) -> list[dict[str, Any]]:
    """Tokenize `inputs` into the folder `output`, and held-out documents into `holdout_output`; returns the manifests.

    `planning` are arguments of `plan_job`. The result does not depend on `workers` or on earlier interruptions.

    Raises DataFormatError if the corpus, the tokenizer or an output is invalid. Finished shards then stay, and the same
    call does not tokenize them again; without a finished shard, no output is left.
    """
    job = plan_job(inputs, tokenizer_path, **planning)
    outputs = checked_outputs(output, job.holdout_every, holdout_output)
    with ExitStack() as stack:
        folders = [
            stack.enter_context(
                unfinished_folder(output, files=TOKENIZED_FILES, identity=job.identity, overwrite=overwrite)
            )
        ]
        if not (folders[0] / MANIFEST).is_file():
            for other in outputs[1:]:
                folders.append(
                    stack.enter_context(
                        unfinished_folder(other, files=TOKENIZED_FILES, identity=job.identity, overwrite=overwrite)
                    )
                )
            write_shards(job, folders, workers)
            manifests = finish(job, folders)
        name_outputs(outputs, folders[0], len(job.shards))
        return (
            manifests
            if len(folders) == len(outputs)
            else [read_manifest(each, TOKENIZED_FORMAT, TOKENIZED_VERSION, "") for each in outputs]
        )


def checked_outputs(output: str, holdout_every: int | None, holdout_output: str | None) -> list[str]:
    """The output folders, the one for held-out documents last. Raises DataFormatError if the arguments contradict each
    other."""
    if (holdout_every is None) != (holdout_output is None):
        raise DataFormatError("--holdout-every and --holdout-output: give both or neither")
    if holdout_output is None:
        return [output]
    if Path(holdout_output).resolve() == Path(output).resolve():
        raise DataFormatError(f"--holdout-output {holdout_output}: the same folder as --output; give another one")
    return [output, holdout_output]


def write_shards(job: TokenizeJob, folders: Sequence[Path], workers: int) -> None:
    """Write the unfinished shards, each in one of `workers` processes. After a failure only finished shards are
    left."""
    waiting = [number for number in range(len(job.shards)) if not is_finished(job, folders, number)]
    sizes = [sum(split.weight for split in shard) for shard in job.shards]
    try:
        with ProgressReport("tokenizing", sum(sizes[number] for number in waiting)) as progress:
            if min(workers, len(waiting)) > 1:
                _write_in_processes(job, folders, waiting, min(workers, len(waiting)), progress)
            elif waiting:
                encoder = DocumentEncoder(job.encoder)
                for count, number in enumerate(waiting):
                    write_shard(job, number, folders, encoder, partial(progress.advance, note=_done(count, waiting)))
    except BaseException:
        remove_shards(folders, [number for number in range(len(job.shards)) if not is_finished(job, folders, number)])
        raise


def remove_shards(folders: Sequence[Path], numbers: Iterable[int]) -> None:
    """Remove all files of these shards that exist."""
    for number in numbers:
        for folder in folders:
            base = shard_name(number)
            for name in (*shard_files(base), targets_file(base), f"{base}.json"):
                (folder / name).unlink(missing_ok=True)


def _write_in_processes(
    job: TokenizeJob, folders: Sequence[Path], waiting: list[int], workers: int, progress: ProgressReport
) -> None:
    context = get_context("spawn")
    read = context.Value("q", 0)
    reported = num_rejects = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (job, folders, read)) as pool:
        running = {pool.submit(_write_in_worker, number) for number in waiting}
        try:
            while running:
                finished, running = wait(running, timeout=_SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
                for future in finished:
                    report = future.result()
                    num_rejects += report.rejects
                    job.max_rejects.check_part(num_rejects, report.samples)
                now = read.value
                progress.advance(now - reported, _done(len(waiting) - len(running), waiting))
                reported = now
        except BrokenProcessPool:
            raise OSError("a worker process died, probably for lack of memory; try fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _done(count: int, waiting: list[int]) -> str:
    return f"{count:,} of {len(waiting):,} shards"


_worker: tuple[TokenizeJob, Sequence[Path], Any, DocumentEncoder] | None = None


def _start_worker(job: TokenizeJob, folders: Sequence[Path], read: Any) -> None:
    global _worker
    # The main process handles a stop: a worker finishes its shard, or the pool would report that it died.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _worker = (job, folders, read, DocumentEncoder(job.encoder))


def _write_in_worker(number: int) -> ShardReport:
    assert _worker is not None
    job, folders, read, encoder = _worker

    def advance(size: int) -> None:
        with read.get_lock():
            read.value += size

    return write_shard(job, number, folders, encoder, advance)


def default_workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
