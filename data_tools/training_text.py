"""Selects the documents of a corpus on which a tokenizer is trained, and those held out to measure it."""

from __future__ import annotations

import hashlib
import heapq
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from data_tools.corpus import CorpusFile
from data_tools.documents import Document, read_documents
from data_tools.records import RecordForm, shown_value
from hunyuan_pretrain.data.errors import DataFormatError

MEASURED_BYTES = 16 << 20
_MAX_GROUPS = 40
_OTHER_GROUPS = "(others)"
_NO_FIELD = "(none)"
_SHOWN = 8
# tiktoken's regular expressions fail on runs of white space of about 900,000 characters. For counting pairs, a shorter
# run is just as good.
_LONG_RUN = re.compile(r"(?<!\s)(\s{500000})\s+")


class TextSample:
    """Keeps up to a number of bytes of text per group: the texts with the smallest hashes, so that the sample does not
    depend on order or duplicates."""

    def __init__(self, max_bytes: int = MEASURED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._heaps: dict[str, list[tuple[int, str, int]]] = {}
        self._hashes: dict[str, set[int]] = {}
        self._bytes: dict[str, int] = {}

    def add(self, group: str, digest: int, text: str, utf8_bytes: int) -> None:
        """Offer a text with its hash; a text with the same hash is ignored."""
        if group not in self._heaps and len(self._heaps) >= _MAX_GROUPS:
            group = _OTHER_GROUPS
        heap, hashes = self._heaps.setdefault(group, []), self._hashes.setdefault(group, set())
        if digest in hashes:
            return
        heapq.heappush(heap, (-digest, text, utf8_bytes))
        hashes.add(digest)
        self._bytes[group] = self._bytes.get(group, 0) + utf8_bytes
        while self._bytes[group] > self._max_bytes and len(heap) > 1:
            largest, _, size = heapq.heappop(heap)
            hashes.remove(-largest)
            self._bytes[group] -= size

    def __bool__(self) -> bool:
        return bool(self._heaps)

    def groups(self) -> dict[str, list[str]]:
        """Group -> its texts, sorted by hash; groups sorted by name."""
        return {
            group: [text for _, text, _ in sorted(self._heaps[group], reverse=True)] for group in sorted(self._heaps)
        }


@dataclass
class TrainingText:
    """Reads a corpus once: `read` yields the texts to train on, and collects the texts to measure on in `held_out` and
    `trained_on`."""

    inputs: Sequence[str]
    """As the user gave them."""
    files: Sequence[CorpusFile]
    text_field: str
    sample_fraction: float = 1.0
    max_rejects: int = 0
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Field -> allowed values, for documents to train on. Held-out documents are chosen from all documents."""
    holdout_every: int = 0
    """One document in `holdout_every` is held out, chosen by a hash of its text; 0: none."""
    group_by: str = "lang"
    documents: int = 0
    utf8_bytes: int = 0
    """Of the documents trained on."""
    held_out: TextSample = field(default_factory=TextSample)
    trained_on: TextSample = field(default_factory=TextSample)
    """Filled only while nothing is held out."""
    rejects: int = 0
    passed_over: int = 0
    """Documents that `where` leaves out."""
    _seen: dict[str, set[str]] = field(default_factory=dict)

    def read(self) -> Iterator[tuple[str, int]]:
        """Yield (text in NFC, bytes of the document) for each document to train on. Raises DataFormatError if there is
        none, or too many rejects."""
        due, found = 1.0, 0
        for document in read_documents(self.files, RecordForm(self.text_field), self.max_rejects, self._count_reject):
            if not document.text:
                continue
            found += 1
            digest = int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "big")
            text = _LONG_RUN.sub(r"\1", document.text) if len(document.text) > 500_000 else document.text
            group = shown_value(document.record[self.group_by]) if self.group_by in document.record else _NO_FIELD
            if self.holdout_every and digest % self.holdout_every == 0:
                self.held_out.add(group, digest, text, document.utf8_bytes)
                self.trained_on = TextSample()
                continue
            if not self._is_wanted(document):
                self.passed_over += 1
                continue
            # The first document that may be trained on always is.
            if due >= 1.0:
                due -= 1.0
                self.documents += 1
                self.utf8_bytes += document.utf8_bytes
                if not self.held_out:
                    self.trained_on.add(group, digest, text, document.utf8_bytes)
                yield unicodedata.normalize("NFC", text), document.utf8_bytes
            due += self.sample_fraction
        if not self.documents:
            raise DataFormatError(self._nothing(found))

    def _count_reject(self) -> None:
        self.rejects += 1

    def _is_wanted(self, document: Document) -> bool:
        for name, allowed in self.where.items():
            value = shown_value(document.record[name]) if name in document.record else _NO_FIELD
            seen = self._seen.setdefault(name, set())
            if len(seen) < _SHOWN:
                seen.add(value)
            if value not in allowed:
                return False
        return True

    def _nothing(self, found: int) -> str:
        if not found:
            return f"{', '.join(map(str, self.inputs))}: no document with text in {len(self.files)} files"
        if self._seen:
            where = " ".join(
                f"--where {name}={value}" for name, values in self.where.items() for value in sorted(values)
            )
            seen = "; ".join(f"{name} has {', '.join(sorted(values))}" for name, values in self._seen.items())
            return f"{where}: matches none of {found} documents ({seen})"
        return (
            f"--holdout-every {self.holdout_every}: holds out all of {found} documents; use 0 to hold out none, or "
            "another number"
        )
