"""Corpus to tokenized folder: documents encoded by a pool of processes, written in the order of the corpus."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.corpus import Chunk, CorpusFile, Document, Reject, check_rejects, documents_of, find_files, read_chunks
from data_tools.progress import ProgressReport
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST, new_folder, write_manifest
from hunyuan_pretrain.data.indexed import MAX_DOCUMENT_TOKENS, TOKENIZED_FORMAT, TOKENIZED_VERSION, IndexedWriter, token_dtype
from hunyuan_pretrain.data.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 20
# Below this a pool of processes takes longer to start than it saves.
_SMALL_CORPUS_BYTES = 4 << 20


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of some chunks, in order, and what was not one."""

    tokens: np.ndarray
    """(sum of lengths,) in the id type of the vocabulary."""
    lengths: np.ndarray
    """(documents,) int64, tokens."""
    utf8_bytes: np.ndarray
    """(documents,) int64, bytes of text."""
    inputs: np.ndarray
    """(documents,) int64, the number of the input each document comes from."""
    rejects: list[Reject]
    num_empty: int
    """Documents without text, which are left out."""
    bytes_on_disk: int


class BatchEncoder:
    """Encodes chunks into documents of <|startoftext|> ... <|endoftext|>."""

    def __init__(self, tokenizer_path: str, text_field: str) -> None:
        self._tokenizer = Tokenizer.load(tokenizer_path)
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._text_field = text_field

    def __call__(self, chunks: Sequence[Chunk]) -> EncodedBatch:
        """Encode the documents of the chunks, in order."""
        ids: list[np.ndarray] = []
        utf8_bytes, inputs, rejects, num_empty = [], [], [], 0
        for chunk in chunks:
            for document in documents_of(chunk, self._text_field):
                encoded = self._encode(chunk, document)
                if isinstance(encoded, Reject):
                    rejects.append(encoded)
                elif encoded is None:
                    num_empty += 1
                else:
                    assert isinstance(document, Document)
                    ids.append(encoded)
                    utf8_bytes.append(document.utf8_bytes)
                    inputs.append(chunk.file.input_number)
        tokens = np.concatenate(ids).astype(self._dtype) if ids else np.empty(0, dtype=self._dtype)
        lengths = np.array([len(document_ids) for document_ids in ids], dtype=np.int64)
        on_disk = sum(chunk.bytes_on_disk for chunk in chunks)
        return EncodedBatch(
            tokens, lengths, np.array(utf8_bytes, dtype=np.int64), np.array(inputs, dtype=np.int64), rejects, num_empty, on_disk
        )

    def _encode(self, chunk: Chunk, document: Document | Reject) -> np.ndarray | Reject | None:
        if isinstance(document, Reject):
            return document
        if not document.text:
            return None
        try:
            ids = self._tokenizer.encode_document(document.text)
        except DataFormatError as error:
            return Reject(str(chunk.file.path), f"{error} (a document that begins {document.text[:40]!r})")
        if len(ids) > MAX_DOCUMENT_TOKENS:
            return Reject(str(chunk.file.path), f"a document of {len(ids):,} tokens; the format ends at {MAX_DOCUMENT_TOKENS:,}")
        return ids


@dataclass
class _Output:
    """One tokenized folder in the making."""

    folder: Path
    writer: IndexedWriter
    num_inputs: int
    totals: np.ndarray = field(init=False)
    """(inputs, 3) int64: documents, bytes, tokens."""

    def __post_init__(self) -> None:
        self.totals = np.zeros((self.num_inputs, 3), dtype=np.int64)

    def add(self, batch: EncodedBatch, chosen: np.ndarray) -> None:
        """Append the documents of a batch where `chosen` (documents,) is true."""
        if not chosen.any():
            return
        is_all = bool(chosen.all())
        lengths = batch.lengths[chosen]
        self.writer.add(batch.tokens if is_all else batch.tokens[np.repeat(chosen, batch.lengths)], lengths)
        np.add.at(self.totals, batch.inputs[chosen], np.stack([np.ones_like(lengths), batch.utf8_bytes[chosen], lengths], axis=1))

    def finish(self, common: dict[str, Any], inputs: Sequence[str], num_files: Sequence[int]) -> dict[str, Any]:
        """Write the index and the manifest; returns the manifest."""
        digests = self.writer.finish()
        documents, utf8_bytes, tokens = (int(total) for total in self.totals.sum(axis=0))
        manifest = {
            "format": TOKENIZED_FORMAT,
            "version": TOKENIZED_VERSION,
            "documents": documents,
            "bytes": utf8_bytes,
            "tokens": tokens,
            "dtype": str(self.writer.dtype),
            **common,
            "sources": [
                {"path": path, "files": count, "documents": int(row[0]), "bytes": int(row[1]), "tokens": int(row[2])}
                for path, count, row in zip(inputs, num_files, self.totals, strict=True)
            ],
            "sha256": digests,
        }
        write_manifest(self.folder, manifest)
        return manifest


def tokenize(
    inputs: Sequence[str],
    tokenizer_path: str,
    output: str,
    *,
    text_field: str,
    extensions: Sequence[str],
    workers: int,
    max_rejects: int = 0,
    holdout_every: int | None = None,
    holdout_output: str | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Tokenize `inputs` into the folder `output`, and every `holdout_every`-th document (counted from 1 over all inputs) into
    `holdout_output` instead; returns the manifests. The result does not depend on `workers`.

    Raises DataFormatError for anything in the corpus, the tokenizer or the outputs that is not as it should be; then nothing is written.
    """
    if (holdout_every is None) != (holdout_output is None):
        raise DataFormatError("--holdout-every and --holdout-output: give both or neither")
    if holdout_output is not None and Path(holdout_output).resolve() == Path(output).resolve():
        raise DataFormatError(f"--holdout-output {holdout_output}: the same folder as --output; give another one")
    tokenizer = Tokenizer.load(tokenizer_path)
    files = find_files(inputs, extensions)
    total_bytes = sum(file.path.stat().st_size for file in files)
    rejects: list[Reject] = []
    num_empty = num_documents = 0
    with ExitStack() as stack:
        outputs = []
        for path in (output, holdout_output):
            if path is not None:
                folder = stack.enter_context(new_folder(path, marker=MANIFEST, overwrite=overwrite))
                outputs.append(_Output(folder, IndexedWriter(folder, tokenizer.vocab_size), len(inputs)))
                stack.callback(outputs[-1].writer.close)
        progress = stack.enter_context(ProgressReport("tokenizing", total_bytes))
        workers = workers if total_bytes > _SMALL_CORPUS_BYTES else 1
        # Closed here, so that the processes have ended before an output is removed or named.
        for batch in stack.enter_context(closing(_encoded(_batches(files), (tokenizer_path, text_field), workers))):
            rejects += batch.rejects
            check_rejects(rejects, max_rejects)
            held_out = np.zeros(len(batch.lengths), dtype=bool)
            if holdout_every is not None:
                held_out = np.arange(num_documents + 1, num_documents + 1 + len(held_out)) % holdout_every == 0
                outputs[1].add(batch, held_out)
            outputs[0].add(batch, ~held_out)
            num_documents += len(batch.lengths)
            num_empty += batch.num_empty
            progress.advance(batch.bytes_on_disk, f"{num_documents:,} documents")
        if num_documents == 0:
            raise DataFormatError(f"{', '.join(map(str, inputs))}: no document with text in {len(files)} files")
        if holdout_every is not None and not 0 < outputs[1].writer.num_documents < num_documents:
            raise DataFormatError(
                f"--holdout-every {holdout_every}: must leave some of the {num_documents} documents on each side; use 2 to {num_documents}"
            )
        common = {
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "tokenizer_digest": tokenizer.digest,
            "empty_documents": num_empty,
            "rejects": [str(reject) for reject in rejects],
        }
        num_files = np.bincount([file.input_number for file in files], minlength=len(inputs)).tolist()
        return [result.finish(common, [str(path) for path in inputs], num_files) for result in outputs]


def _batches(files: Iterable[CorpusFile]) -> Iterator[list[Chunk]]:
    """Chunks together to about a megabyte, so that small files do not each make a task of their own."""
    batch: list[Chunk] = []
    size = 0
    for chunk in read_chunks(files):
        batch.append(chunk)
        size += len(chunk.content)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batches: Iterator[list[Chunk]], encoder_arguments: tuple[str, str], workers: int) -> Generator[EncodedBatch, None, None]:
    """Encode the batches on `workers` processes, in order, with at most two batches a worker in memory."""
    if workers == 1:
        yield from map(BatchEncoder(*encoder_arguments), batches)
        return
    waiting: deque[Future[EncodedBatch]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, encoder_arguments) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode_in_worker, batch))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise OSError("a worker process died, probably for lack of memory; try fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_encoder: BatchEncoder | None = None


def _start_worker(tokenizer_path: str, text_field: str) -> None:
    global _worker_encoder
    _worker_encoder = BatchEncoder(tokenizer_path, text_field)


def _encode_in_worker(batch: list[Chunk]) -> EncodedBatch:
    assert _worker_encoder is not None
    return _worker_encoder(batch)


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
