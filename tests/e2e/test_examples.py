"""examples/ run as they are, on a tiny corpus."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, experiment_fields, write_experiment


def run(name: str, *arguments: object) -> str:
    """Run an example and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_by_a_test() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests/e2e").glob("*.py")]
    for example in (ROOT / "examples").glob("*.py"):
        assert any(f'"{example.name}"' in text or f'"examples/{example.name}"' in text for text in texts), example


def test_load_data(corpus: Path) -> None:
    said = run("load_data.py", corpus / "train", corpus / "tokenizer").splitlines()
    assert said[0].startswith("sequence 0 of ")
    assert "64 positions" in said[0]
    assert len(said) > 1
    with pytest.raises(AssertionError, match="no such folder"):
        run("load_data.py", corpus / "nowhere", corpus / "tokenizer")


def test_train_and_export(corpus: Path, tmp_path: Path) -> None:
    config = write_experiment(tmp_path / "tiny.yaml", experiment_fields(corpus, tmp_path / "run", steps=2))
    assert "tiny: " in run("train.py", config, "optimizer.lr=5e-3")
    assert list((tmp_path / "run/checkpoints").glob("step_*/complete.json"))
    said = run("export.py", tmp_path / "run", tmp_path / "model", "import ")
    assert "largest difference" in said
    assert (tmp_path / "model/model.safetensors").is_file() or list((tmp_path / "model").glob("*.safetensors"))
