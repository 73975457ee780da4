"""Corpus to tokenized folder, shard by shard: each shard is a function of the inputs alone, is written by one process, and survives a kill.

A shard is finished when its report, shard_00000.json, is there: it is written last. Running again goes on with the shards that have none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from data_tools.corpus import DEFAULT_EXTENSIONS, CorpusFile, Split, deal_out, find_files
from data_tools.documents import DamagedError, Document, RejectedError, cut_between_words, read_split
from data_tools.encoding import DocumentEncoder, EncoderSource
from data_tools.progress import ProgressReport
from data_tools.records import RecordForm, Reject
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST, finish_folder, read_manifest, unfinished_folder, write_file, write_manifest
from hunyuan_pretrain.data.indexed import TOKENIZED_FORMAT, TOKENIZED_VERSION, ShardWriter, digest_of, shard_files, token_dtype
from hunyuan_pretrain.data.tokenizer import Tokenizer

REJECTS = "rejects.jsonl"
_BATCH_CHARACTERS = 1 << 20
_PART_CHARACTERS = 1 << 22
_REJECT_SAMPLES = 20
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Allowance:
    """How many records may be rejected: a number, or a share of all."""

    number: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Allowance:
        """From "100" or "0.1%"."""
        try:
            found = cls(share=float(text[:-1]) / 100) if text.endswith("%") else cls(number=int(text))
        except ValueError:
            found = cls(number=-1)
        if found.number < 0 or not 0 <= found.share <= 1:
            raise DataFormatError(f"--max-rejects {text}: must be a number such as 100, or a share such as 0.1%")
        return found

    def check(self, found: int, records: int, rejects: Sequence[Reject]) -> None:
        """Raise DataFormatError, which names the first of `rejects`, if so many are more than is allowed among so many records."""
        allowed = self.number + int(self.share * records)
        if found > allowed:
            others = f" (and {found - 1:,} more)" if found > 1 else ""
            raise DataFormatError(
                f"{rejects[0]}{others}; put it right, or let it pass with --max-rejects {found} or more; {allowed} are allowed"
            )

    def check_part(self, found: int, rejects: Sequence[Reject]) -> None:
        """The same in the middle of the work, where nobody knows yet of how many records a share would be."""
        if not self.share:
            self.check(found, 0, rejects)


@dataclass(frozen=True)
class TokenizeJob:
    """All that decides the output of `tokenize`."""

    inputs: list[str]
    files: list[CorpusFile]
    shards: list[list[Split]]
    encoder: EncoderSource
    tokenizer_digest: str
    vocab_size: int
    pad_id: int
    form: RecordForm
    holdout_every: int | None
    max_rejects: Allowance

    @property
    def identity(self) -> str:
        """Changes whenever the bytes of the output would."""
        files = [[file.path, file.input_number, file.size, file.version] for file in self.files]
        cuts = [[[split.file_number, split.start, split.end] for split in shard] for shard in self.shards]
        return digest_of([TOKENIZED_VERSION, files, cuts, self.tokenizer_digest, self.form.as_json(), self.holdout_every])


@dataclass(frozen=True)
class ShardOutput:
    """What a shard wrote into one of the folders."""

    entry: dict[str, Any]
    """For the manifest."""
    totals: list[tuple[int, int, int]]
    """For each input: documents, bytes, tokens."""


@dataclass(frozen=True)
class ShardReport:
    """A finished shard, for those who join it with the others."""

    outputs: list[ShardOutput]
    empty_documents: int
    rejects: int
    samples: list[Reject]
    """The first of the rejects."""


def shard_name(number: int) -> str:
    """Name of a shard's files, without their endings."""
    return f"shard_{number:05d}"


def is_finished(folders: Sequence[Path], number: int) -> bool:
    """Whether a shard's report is there, and all that it reports of."""
    names = shard_files(shard_name(number))
    return (folders[0] / f"{shard_name(number)}.json").is_file() and all((folder / name).is_file() for folder in folders for name in names)


def write_shard(
    job: TokenizeJob, number: int, folders: Sequence[Path], encoder: DocumentEncoder, advance: Callable[[int], None] = lambda size: None
) -> ShardReport:
    """Tokenize one shard into the unfinished folders (the second is for what is held out), and return its report.

    Raises DataFormatError if a file is damaged, or if the shard alone has more rejects than the job allows.
    """
    with ExitStack() as stack:
        writers = [ShardWriter(folder, shard_name(number), job.vocab_size) for folder in folders]
        for writer in writers:
            stack.callback(writer.close)
        shard = _Shard(job, number, writers, encoder)
        for split in job.shards[number]:
            for document in read_split(split, job.form, advance):
                shard.add(split, document)
            shard.flush()
        outputs = [ShardOutput(writer.finish(), rows.tolist()) for writer, rows in zip(writers, shard.totals, strict=True)]
        report = ShardReport(outputs, shard.num_empty, shard.num_rejects, shard.rejects)
    write_file(folders[0] / f"{shard_name(number)}.json", json.dumps(asdict(report)).encode())
    return report


class _Shard:
    """The documents of one shard on their way to the writers, encoded many at a time."""

    def __init__(self, job: TokenizeJob, number: int, writers: Sequence[ShardWriter], encoder: DocumentEncoder) -> None:
        self._job, self._number, self._writers, self._encoder = job, number, writers, encoder
        self._split = job.shards[number][0]
        self._waiting: list[Document] = []
        self._waiting_characters = 0
        self.totals = np.zeros((len(writers), len(job.inputs), 3), dtype=np.int64)
        """For each writer and input: documents, bytes, tokens."""
        self.num_empty = self.num_rejects = 0
        self.rejects: list[Reject] = []
        """The first of them."""

    def add(self, split: Split, document: Document | Reject) -> None:
        """Take the next record of `split`."""
        self._split = split
        if isinstance(document, Reject):
            self._reject(document)
        elif document.parts is not None:
            self.flush()
            self._write_in_parts(document, document.parts)
        elif not document.text:
            self.num_empty += 1
        else:
            self._waiting.append(document)
            self._waiting_characters += len(document.text)
            if self._waiting_characters > _BATCH_CHARACTERS:
                self.flush()

    def flush(self) -> None:
        """Encode and write what waits; all of it is of one split."""
        documents, self._waiting, self._waiting_characters = self._waiting, [], 0
        if not documents:
            return
        texts = [document.text for document in documents]
        ids, lengths = self._encoder.encode(texts)
        utf8_bytes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
        origins = np.array([[self._split.file_number, document.place] for document in documents], dtype=np.int64)
        held_out = self._held_out(len(documents))
        for number, (writer, chosen) in enumerate(zip(self._writers, (~held_out, held_out), strict=False)):
            if chosen.any():
                tokens = ids if chosen.all() else ids[np.repeat(chosen, lengths)]
                writer.add(tokens, lengths[chosen], origins[chosen])
                self._count(number, int(chosen.sum()), int(utf8_bytes[chosen].sum()), len(tokens))

    def _write_in_parts(self, document: Document, parts: Iterator[str]) -> None:
        number = int(self._held_out(1)[0])
        utf8_bytes = 0

        def counted() -> Iterator[str]:
            nonlocal utf8_bytes
            for part in cut_between_words(parts, _PART_CHARACTERS):
                utf8_bytes += len(part.encode())
                yield part

        try:
            ids = self._encoder.encode_parts(counted())
            tokens = self._writers[number].add_in_parts(ids, (self._split.file_number, document.place))
            self._count(number, 1, utf8_bytes, tokens)
        except DamagedError:
            raise
        except (RejectedError, DataFormatError, UnicodeEncodeError) as error:
            with suppress(RejectedError):
                for _ in parts:  # the reader stands at the next document only when this one has been read
                    pass
            self._reject(Reject(f"{self._split.file.path}: byte {document.place:,}", str(error)))

    def _held_out(self, count: int) -> np.ndarray:
        """(count,) bool, which of the next documents are held out: every N-th, from another one on in each shard.

        So of many short shards as many documents are held out as of a few long ones, and no shard has to know another.
        """
        if self._job.holdout_every is None:
            return np.zeros(count, dtype=bool)
        first = self._number + 1 + sum(writer.num_documents for writer in self._writers)
        return np.arange(first, first + count) % self._job.holdout_every == 0

    def _count(self, writer: int, documents: int, utf8_bytes: int, tokens: int) -> None:
        self.totals[writer, self._split.file.input_number] += (documents, utf8_bytes, tokens)

    def _reject(self, reject: Reject) -> None:
        self.num_rejects += 1
        if len(self.rejects) < _REJECT_SAMPLES:
            self.rejects.append(reject)
        self._job.max_rejects.check_part(self.num_rejects, self.rejects)


def plan_job(
    inputs: Sequence[str],
    tokenizer_path: str,
    *,
    form: RecordForm | None = None,
    extensions: Sequence[str] = DEFAULT_EXTENSIONS,
    max_rejects: Allowance | None = None,
    holdout_every: int | None = None,
    shard_bytes: int | None = None,
) -> TokenizeJob:
    """Look at the inputs and deal them out into shards of about `shard_bytes` of text, one document in `holdout_every` of each held out.

    Raises DataFormatError for an input or tokenizer that is not as it should be.
    """
    tokenizer = Tokenizer.load(tokenizer_path)
    files = find_files(inputs, extensions)
    return TokenizeJob(
        inputs=[str(path) for path in inputs],
        files=files,
        shards=deal_out(files, shard_bytes),
        encoder=EncoderSource.of(tokenizer_path, tokenizer),
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        form=form or RecordForm(),
        holdout_every=holdout_every,
        max_rejects=max_rejects or Allowance(),
    )


def finish(job: TokenizeJob, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Join the finished shards to whole folders, and return their manifests.

    Raises DataFormatError if there are more rejects than allowed, or if an output would hold no document; the shards then stay.
    """
    reports = [
        _read_report(folders[0] / f"{shard_name(number)}.json", (len(folders), len(job.inputs))) for number in range(len(job.shards))
    ]
    rejects = [sample for report in reports for sample in report.samples]
    num_rejects = sum(report.rejects for report in reports)
    totals = np.array([[output.totals for output in report.outputs] for report in reports]).sum(axis=0)
    num_documents = int(totals[:, :, 0].sum())
    job.max_rejects.check(num_rejects, num_documents + num_rejects, rejects)
    problem = None
    if num_documents == 0:
        reason = f"; {num_rejects} records were rejected, the first is {rejects[0]}" if rejects else ""
        problem = f"{', '.join(job.inputs)}: no document with text in {len(job.files)} files{reason}"
    elif job.holdout_every is not None and not 0 < (held_out := totals[1, :, 0].sum()) < num_documents:
        problem = (
            f"--holdout-every {job.holdout_every}: must leave some of the {num_documents} documents on each side, but holds {held_out} "
            f"out; use 2 to {num_documents}"
        )
    if problem:
        remove_shards(folders, range(len(job.shards)))  # the same call would end the same
        raise DataFormatError(problem)
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
                "rejects": num_rejects,
                "sources": [
                    {"path": path, "files": count, "documents": row[0], "bytes": row[1], "tokens": row[2]}
                    for path, count, row in zip(job.inputs, num_files, of_inputs, strict=True)
                ],
                "files": [file.path for file in job.files],
                "shards": [report.outputs[number].entry for report in reports],
            }
        )
    # the first folder's manifest last: where it is, only the names are left to be given
    for folder, manifest in reversed(list(zip(folders, manifests, strict=True))):
        if rejects:
            lines = [json.dumps(asdict(reject), ensure_ascii=False) for reject in rejects]
            write_file(folder / REJECTS, "".join(f"{line}\n" for line in lines).encode())
        write_manifest(folder, manifest)
    return manifests


def _read_report(file: Path, shape: tuple[int, int]) -> ShardReport:
    """Raises DataFormatError unless the report is one of a shard with totals for so many (folders, inputs)."""
    try:
        report = TypeAdapter(ShardReport).validate_json(file.read_bytes())
        if [len(output.totals) for output in report.outputs] != [shape[1]] * shape[0]:
            raise ValueError("totals of other inputs")
        if len(report.samples) != min(report.rejects, _REJECT_SAMPLES):
            raise ValueError("samples of other rejects")
    except ValueError:
        raise DataFormatError(
            f"{file}: not the report of a shard of this version; remove it, and the same command writes the shard again"
        ) from None
    return report


def name_outputs(outputs: Sequence[str], folder: Path, num_shards: int) -> None:
    """Give the joined folders their names, the first one, which is `folder` until then, last and without the reports of its shards."""
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
    """Tokenize `inputs` into the folder `output`, and what is held out into `holdout_output`; returns the manifests.

    `planning` is what `plan_job` takes. The result does not depend on `workers`, nor on how often the command was interrupted before.

    Raises DataFormatError for anything in the corpus, the tokenizer or the outputs that is not as it should be. Finished shards stay then,
    and are not tokenized again by the same call; if there is none, nothing stays.
    """
    job = plan_job(inputs, tokenizer_path, **planning)
    outputs = checked_outputs(output, job.holdout_every, holdout_output)
    with ExitStack() as stack:
        folders = [stack.enter_context(unfinished_folder(output, marker=MANIFEST, identity=job.identity, overwrite=overwrite))]
        if not (folders[0] / MANIFEST).is_file():
            for other in outputs[1:]:
                folders.append(stack.enter_context(unfinished_folder(other, marker=MANIFEST, identity=job.identity, overwrite=overwrite)))
            write_shards(job, folders, workers)
            manifests = finish(job, folders)
        name_outputs(outputs, folders[0], len(job.shards))
        return (
            manifests
            if len(folders) == len(outputs)
            else [read_manifest(each, TOKENIZED_FORMAT, TOKENIZED_VERSION, "") for each in outputs]
        )


def checked_outputs(output: str, holdout_every: int | None, holdout_output: str | None) -> list[str]:
    """The folders to write, the one for what is held out last. Raises DataFormatError where they do not fit together."""
    if (holdout_every is None) != (holdout_output is None):
        raise DataFormatError("--holdout-every and --holdout-output: give both or neither")
    if holdout_output is None:
        return [output]
    if Path(holdout_output).resolve() == Path(output).resolve():
        raise DataFormatError(f"--holdout-output {holdout_output}: the same folder as --output; give another one")
    return [output, holdout_output]


def write_shards(job: TokenizeJob, folders: Sequence[Path], workers: int) -> None:
    """Write the shards that are not finished, each on one of `workers` processes; if that fails, only finished ones stay."""
    waiting = [number for number in range(len(job.shards)) if not is_finished(folders, number)]
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
        remove_shards(folders, [number for number in range(len(job.shards)) if not is_finished(folders, number)])
        raise


def remove_shards(folders: Sequence[Path], numbers: Iterable[int]) -> None:
    """Remove what there is of these shards."""
    for number in numbers:
        for folder in folders:
            for name in (*shard_files(shard_name(number)), f"{shard_name(number)}.json"):
                (folder / name).unlink(missing_ok=True)


def _write_in_processes(job: TokenizeJob, folders: Sequence[Path], waiting: list[int], workers: int, progress: ProgressReport) -> None:
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
    _worker = (job, folders, read, DocumentEncoder(job.encoder))


def _write_in_worker(number: int) -> ShardReport:
    assert _worker is not None
    job, folders, read, encoder = _worker

    def advance(size: int) -> None:
        with read.get_lock():
            read.value += size

    return write_shard(job, number, folders, encoder, advance)


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
