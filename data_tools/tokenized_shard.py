"""Writes one shard of a tokenized corpus. A shard depends only on the inputs and is written by one process.

Its report, such as shard_00000.json, is written last; the shard is finished once the report exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from data_tools.chat import ChatForm, PairForm
from data_tools.corpus import CorpusFile, Split
from data_tools.documents import DamagedError, Document, RejectedError, cut_between_words, read_split
from data_tools.encoding import DocumentEncoder, EncoderSource
from data_tools.records import RecordForm, Reject
from hunyuan_pretrain.data.arrays import IS_TARGET
from hunyuan_pretrain.data.digests import digest_of
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import write_file
from hunyuan_pretrain.data.indexed import TOKENIZED_VERSION, ShardWriter, shard_files, targets_file

_BATCH_CHARACTERS = 1 << 20
_PART_CHARACTERS = 1 << 22
_REJECT_SAMPLES = 20
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Allowance:
    """How many records may be rejected: a number, or a share of all records."""

    number: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Allowance:
        """Parse "100" or "0.1%". Raises DataFormatError."""
        try:
            found = cls(share=float(text[:-1]) / 100) if text.endswith("%") else cls(number=int(text))
        except ValueError:
            found = cls(number=-1)
        if found.number < 0 or not 0 <= found.share <= 1:
            raise DataFormatError(f"--max-rejects {text}: must be a number such as 100, or a share such as 0.1%")
        return found

    def check(self, found: int, records: int, rejects: Sequence[Reject]) -> None:
        """Raise DataFormatError, naming the first of `rejects`, if `found` rejects among `records` are more than
        allowed."""
        allowed = self.number + int(self.share * records)
        if found > allowed:
            others = f" (and {found - 1:,} more)" if found > 1 else ""
            raise DataFormatError(
                f"{rejects[0]}{others}; fix it, or allow it with --max-rejects {found} or more; {allowed} are allowed"
            )

    def check_part(self, found: int, rejects: Sequence[Reject]) -> None:
        """Like `check`, while records are still being read. A share is not checked, as their total is not yet known."""
        if not self.share:
            self.check(found, 0, rejects)


@dataclass(frozen=True)
class TokenizeJob:
    """Everything that determines the output of `tokenize`."""

    inputs: list[str]
    files: list[CorpusFile]
    shards: list[list[Split]]
    encoder: EncoderSource
    tokenizer_digest: str
    vocab_size: int
    pad_id: int
    form: RecordForm | ChatForm
    holdout_every: int | None
    max_rejects: Allowance
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of files in the inputs that are not read for it."""

    @property
    def identity(self) -> str:
        """A digest that changes whenever the output bytes would."""
        files = [
            [file.path, file.input_number, file.size, file.version, file.kind, file.compression] for file in self.files
        ]
        cuts = [[[split.file_number, split.start, split.end] for split in shard] for shard in self.shards]
        return digest_of(
            [TOKENIZED_VERSION, files, cuts, self.tokenizer_digest, self.form.as_json(), self.holdout_every]
        )


@dataclass(frozen=True)
class ShardOutput:
    """What a shard wrote to one of the folders."""

    entry: dict[str, Any]
    """The shard's entry in the manifest."""
    totals: list[tuple[int, int, int]]
    """(documents, bytes, tokens) per input."""


@dataclass(frozen=True)
class ShardReport:
    """Summary of a finished shard, for joining it with the others."""

    outputs: list[ShardOutput]
    empty_documents: int
    passed_over: int
    """Records that --where leaves out."""
    rejects: int
    samples: list[Reject]
    """The first rejects, at most 20."""


def shard_name(number: int) -> str:
    """Name of a shard's files without their extensions."""
    return f"shard_{number:05d}"


def is_finished(job: TokenizeJob, folders: Sequence[Path], number: int) -> bool:
    """Whether a shard's report and all of its files exist."""
    name = shard_name(number)
    names = (*shard_files(name), *((targets_file(name),) if isinstance(job.form, ChatForm) else ()))
    return (folders[0] / f"{shard_name(number)}.json").is_file() and all(
        (folder / name).is_file() for folder in folders for name in names
    )


def write_shard(
    job: TokenizeJob,
    number: int,
    folders: Sequence[Path],
    encoder: DocumentEncoder,
    advance: Callable[[int], None] = lambda size: None,
) -> ShardReport:
    """Tokenize one shard into the unfinished folders (the second one takes held-out documents); returns its report.

    Raises DataFormatError if a file is damaged, or if this shard alone exceeds an allowed number of rejects.
    """
    with ExitStack() as stack:
        is_chat = isinstance(job.form, ChatForm)
        writers = [ShardWriter(folder, shard_name(number), job.vocab_size, is_chat) for folder in folders]
        for writer in writers:
            stack.callback(writer.close)
        shard = _Shard(job, number, writers, encoder)
        for split in job.shards[number]:
            for document in read_split(split, job.form, advance, shard.pass_over):
                shard.add(split, document)
            shard.flush()
        outputs = [
            ShardOutput(writer.finish() | ({"target_tokens": targets} if is_chat else {}), rows.tolist())
            for writer, rows, targets in zip(writers, shard.totals, shard.target_tokens, strict=True)
        ]
        report = ShardReport(outputs, shard.num_empty, shard.num_passed_over, shard.num_rejects, shard.rejects)
    write_file(folders[0] / f"{shard_name(number)}.json", json.dumps(asdict(report)).encode())
    return report


class _EmptyError(Exception):
    """A very long record without any text."""


class _Shard:
    """Encodes the documents of one shard in batches and passes them to the writers."""

    def __init__(self, job: TokenizeJob, number: int, writers: Sequence[ShardWriter], encoder: DocumentEncoder) -> None:
        self._job, self._number, self._writers, self._encoder = job, number, writers, encoder
        self._split = job.shards[number][0]
        self._waiting: list[Document] = []
        self._waiting_characters = 0
        self.totals = np.zeros((len(writers), len(job.inputs), 3), dtype=np.int64)
        """(writers, inputs, 3): documents, bytes, tokens."""
        self.target_tokens = [0] * len(writers)
        """Of conversations, in each folder."""
        self.num_empty = self.num_passed_over = self.num_rejects = 0
        self.rejects: list[Reject] = []
        """The first rejects, at most 20."""

    def add(self, split: Split, document: Document | Reject) -> None:
        """Add the next record of `split`."""
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

    def pass_over(self) -> None:
        """Count a record that --where leaves out."""
        self.num_passed_over += 1

    def flush(self) -> None:
        """Encode and write the buffered documents, which all belong to one split."""
        documents, self._waiting, self._waiting_characters = self._waiting, [], 0
        if documents:
            try:
                self._write(documents)
            except DataFormatError:  # one document failed; keep the others
                for document in documents:
                    self._write_or_reject(document)

    def _write_or_reject(self, document: Document) -> None:
        try:
            self._write([document])
        except DataFormatError as error:
            self._reject(
                Reject(
                    f"{self._split.file.path}: byte {document.position:,}",
                    str(error),
                    document.text[:_SHOWN_CHARACTERS],
                )
            )

    def _write(self, documents: Sequence[Document]) -> None:
        texts = [document.text for document in documents]
        ids, lengths, targets = self._encode(documents, texts)
        utf8_bytes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
        origins = np.array([[self._split.file_number, document.position] for document in documents], dtype=np.int64)
        held_out = self._held_out(len(documents))
        for number, (writer, chosen) in enumerate(zip(self._writers, (~held_out, held_out), strict=False)):
            if chosen.any():
                is_written = slice(None) if chosen.all() else np.repeat(chosen, lengths)
                tokens, of_these = ids[is_written], None if targets is None else targets[is_written]
                writer.add(tokens, lengths[chosen], origins[chosen], of_these)
                self.target_tokens[number] += 0 if of_these is None else int(np.count_nonzero(of_these & IS_TARGET))
                self._count(number, int(chosen.sum()), int(utf8_bytes[chosen].sum()), len(tokens))

    def _encode(
        self, documents: Sequence[Document], texts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(ids, lengths, targets of conversations)."""
        form = self._job.form
        if not isinstance(form, ChatForm):
            return *self._encoder.encode(texts), None
        chats = [form.conversations_of(document.record) for document in documents]
        if isinstance(form, PairForm):
            return self._encoder.encode_pairs(chats)
        return self._encoder.encode_chats([chat for (chat,) in chats], form.train_end_of_user)

    def _write_in_parts(self, document: Document, parts: Iterator[str]) -> None:
        number = int(self._held_out(1)[0])
        utf8_bytes = 0

        def counted() -> Iterator[str]:
            nonlocal utf8_bytes
            for part in cut_between_words(parts, _PART_CHARACTERS):
                utf8_bytes += len(part.encode())
                yield part
            if not utf8_bytes:
                raise _EmptyError

        try:
            ids = self._encoder.encode_parts(counted())
            tokens = self._writers[number].add_in_parts(ids, (self._split.file_number, document.position))
            self._count(number, 1, utf8_bytes, tokens)
        except DamagedError:
            raise
        except _EmptyError:
            self.num_empty += 1
        except (RejectedError, DataFormatError, UnicodeEncodeError) as error:
            with suppress(RejectedError):
                for _ in parts:  # the reader reaches the next document only after this one is read completely
                    pass
            self._reject(Reject(f"{self._split.file.path}: byte {document.position:,}", str(error)))

    def _held_out(self, count: int) -> np.ndarray:
        """(count,) bool: which of the next documents are held out. This is every N-th one, with a different offset in
        each shard: many short shards hold out as many documents as a few long ones, and shards stay independent.
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


def read_report(file: Path, shape: tuple[int, int]) -> ShardReport:
    """Read a shard's report. Raises DataFormatError if it is invalid or its totals are not of `shape` (folders,
    inputs)."""
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
