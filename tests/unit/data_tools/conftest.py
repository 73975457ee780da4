"""A tiny tokenizer and a tiny corpus of several files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hunyuan_pretrain.data.tokenizer import RANKS_FILE, format_ranks


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (" t", "th", "the", "\n\n", "  ", "中"):
        ranks.setdefault(token.encode(), len(ranks))
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / RANKS_FILE).write_bytes(format_ranks(ranks))
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Two inputs with five files, one of which is split into several shards."""
    folder = tmp_path / "corpus"
    (folder / "texts").mkdir(parents=True)
    for number in range(4):
        (folder / "texts" / f"{number}.txt").write_text(f"the text {number} 中\n\n" * (number + 1))
    lines = [json.dumps({"text": f"the line {number} " + "the end\n" * (number % 5)}) for number in range(40)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return [str(folder / "lines.jsonl"), str(folder / "texts")]
