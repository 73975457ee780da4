"""Measures how much text a token holds, by language, for the new tokenizer and for the base vocabulary alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

ALL = "all"


@dataclass(frozen=True)
class Compression:
    """Counts over some texts; `base_tokens` is the number of tokens under the base vocabulary, None without a base."""

    documents: int
    characters: int
    utf8_bytes: int
    tokens: int
    base_tokens: int | None

    @property
    def gain(self) -> float | None:
        """Characters per token relative to the base; None without a base."""
        return None if self.base_tokens is None else self.base_tokens / self.tokens

    def __add__(self, other: Compression) -> Compression:
        base_tokens = (
            None if self.base_tokens is None or other.base_tokens is None else self.base_tokens + other.base_tokens
        )
        return Compression(
            self.documents + other.documents,
            self.characters + other.characters,
            self.utf8_bytes + other.utf8_bytes,
            self.tokens + other.tokens,
            base_tokens,
        )

    def as_json(self) -> dict[str, Any]:
        """Counts and ratios for the report."""
        fields: dict[str, Any] = {
            "documents": self.documents,
            "characters": self.characters,
            "bytes": self.utf8_bytes,
            "tokens": self.tokens,
            "characters_per_token": round(self.characters / self.tokens, 4),
            "bytes_per_token": round(self.utf8_bytes / self.tokens, 4),
        }
        if self.base_tokens is not None and self.gain is not None:
            fields["base"] = {
                "tokens": self.base_tokens,
                "characters_per_token": round(self.characters / self.base_tokens, 4),
                "bytes_per_token": round(self.utf8_bytes / self.base_tokens, 4),
            }
            fields["gain"] = round(self.gain, 4)
        return fields


def measure(
    groups: Mapping[str, Sequence[str]],
    encode: Callable[[str], Sequence[int]],
    base_encode: Callable[[str], Sequence[int]] | None,
) -> dict[str, Compression]:
    """Compression per group of texts, and of all texts under the key `ALL`."""
    measured: dict[str, Compression] = {}
    for group, texts in groups.items():
        counts = [
            Compression(
                1,
                len(text),
                len(text.encode()),
                len(encode(text)),
                None if base_encode is None else len(base_encode(text)),
            )
            for text in texts
        ]
        measured[group] = sum(counts[1:], counts[0])
    whole = list(measured.values())
    measured[ALL] = sum(whole[1:], whole[0])
    return measured


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print one row per group, and one for all texts if there is more than one group."""
    base = report["base"]
    beside = f", beside {base['name']}" if base else ""
    table = Table(title=f"on {report['measured_on']}{beside}", title_justify="left")
    table.add_column(report["by"])
    for column in ("docs", "MB", "chars\n/token", "bytes\n/token"):
        table.add_column(column, justify="right")
    if base:
        for column in ("base: chars\n/token", "bytes\n/token", "gain"):
            table.add_column(column, justify="right")
    for group, row in report["groups"].items():
        if group == ALL and len(report["groups"]) == 2:
            continue
        cells = [
            f"{row['documents']:,}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['characters_per_token']:.2f}",
            f"{row['bytes_per_token']:.2f}",
        ]
        if base:
            of_base = row["base"]
            cells += [
                f"{of_base['characters_per_token']:.2f}",
                f"{of_base['bytes_per_token']:.2f}",
                f"{row['gain']:.3f}",
            ]
        table.add_row(group, *cells)
    console.print(table)
