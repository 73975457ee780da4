"""`hunyuan-data` when it is told to stop: an exit status that says so, and nothing half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, sys
from data_tools import cli
from hunyuan_pretrain.data import folders

def killed(path, to_disk=folders.flush_to_disk):
    os.kill(os.getpid(), NUMBER)
    to_disk(path)

def named(self, target, rename=folders.Path.rename):
    if str(self).endswith("out"):
        os.kill(os.getpid(), NUMBER)
    return rename(self, target)

if sys.argv.pop(1) == "writing":
    folders.flush_to_disk = killed
else:
    folders.Path.rename = named
cli.main()
"""


def stopped(moment: str, number: int, *arguments: object) -> tuple[int, str]:
    """(exit status, stderr) of `hunyuan-data` that gets a signal when it flushes its first file, or renames the old
    folder."""
    program = PROGRAM.replace("NUMBER", str(int(number)))
    command = [sys.executable, "-c", program, moment, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_has_a_status_and_leaves_nothing_half_written(
    corpus: Path, tmp_path: Path, number: int, status: int
) -> None:
    code, err = stopped(
        "writing", number, "pack", corpus / "tokenized", "--sequence-length", 32, "--output", tmp_path / "out"
    )
    assert (code, err) == (
        status,
        "hunyuan-data: stopped; no partial output is left, and the same command resumes `tokenize` and `pack`\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_stop_while_a_folder_is_replaced_leaves_the_new_one_whole(corpus: Path, tmp_path: Path) -> None:
    arguments = ["pack", corpus / "tokenized", "--sequence-length", 32, "--output", tmp_path / "out"]
    assert (
        subprocess.run([sys.executable, "-m", "data_tools.cli", *map(str, arguments)], cwd=ROOT, check=True).returncode
        == 0
    )
    code, _ = stopped("replacing", signal.SIGTERM, *arguments, "--seed", 5, "--overwrite")
    assert code == 75
    assert '"seed": 5' in (tmp_path / "out" / "manifest.json").read_text()
