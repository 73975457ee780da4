"""examples/clean_and_tokenize.py on real text, with those of datatrove's steps that download nothing."""

from __future__ import annotations

import gzip
import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.tokenization import tokenize

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def documents() -> list[str]:
    """Prose of Python's reference, 8 paragraphs per document."""
    blocks = [block for text in pydoc_data.topics.topics.values() for block in text.split("\n\n")]
    paragraphs = [
        " ".join(block.split())
        for block in dict.fromkeys(blocks)
        if re.fullmatch(r"[A-Z][^=<>|_`\"*()\[\]]{80,}\.", block)
    ]
    return ["\n".join(paragraphs[start : start + 8]) for start in range(0, len(paragraphs), 8)]


def removed(work: Path, name: str) -> list[dict]:
    contents = [gzip.decompress(path.read_bytes()) for path in (work / "removed" / name).glob("*.jsonl.gz")]
    return [json.loads(line) for content in contents for line in content.splitlines()]


def test_the_pipeline_cleans_and_tokenizes_and_resumes_where_it_stopped(tmp_path: Path, corpus: Path) -> None:
    for package in ("datatrove", "orjson"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'hunyuan-pretrain[cluster]'")
    texts = documents()
    twins = {text: f"{text}\nAll of this was said before." for text in texts}
    planted = {
        "menu": "Home | News | Contact\n" * 300,
        "numbers": " ".join(str(number) for number in range(3000)),
    }
    (tmp_path / "raw").mkdir()
    for number, part in enumerate((texts, [*twins.values(), *planted.values()])):
        lines = [json.dumps({"text": text, "id": f"{number}/{place}"}) for place, text in enumerate(part)]
        (tmp_path / "raw" / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    work, out = tmp_path / "work", tmp_path / "out"
    command = [
        sys.executable,
        "examples/clean_and_tokenize.py",
        tmp_path / "raw",
        "--words",
        "plain",
        "--tasks",
        "2",
        "--work",
        work,
    ]
    command += ["--output", out, "--tokenizer"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    failed = subprocess.run([*command, tmp_path / "nowhere"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "nowhere: no such file; a tokenizer is a folder with" in failed.stderr
    clean = {path: path.stat().st_mtime_ns for path in (work / "clean").iterdir()}
    subprocess.run([*command, corpus / "tokenizer"], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert clean == {path: path.stat().st_mtime_ns for path in clean}, "cleaned twice"

    kept = [json.loads(line)["text"] for path in clean for line in path.open()]
    reasons = {
        name: {record["text"] for record in removed(work, name)}
        for name in ("repetition", "gopher", "fineweb", "duplicates")
    }
    assert planted["menu"] in reasons["repetition"]
    assert planted["numbers"] in reasons["gopher"] | reasons["repetition"]
    assert all((text in kept) != (twin in kept) for text, twin in twins.items() if {text, twin} & {*kept})
    assert len(kept) == len(reasons["duplicates"]) > 2
    assert sorted([*kept, *(text for name in reasons for text in reasons[name])]) == sorted(
        [*texts, *twins.values(), *planted.values()]
    )
    (manifest,) = tokenize([str(work / "clean")], str(corpus / "tokenizer"), str(tmp_path / "plain"))
    assert manifest["documents"] == len(kept)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()
    }
