"""A folder that a command writes whole or not at all, also when the command is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hunyuan_pretrain.checkpoint import hf_export, hf_import, lora_merge, outputs, quantize
from hunyuan_pretrain.checkpoint.outputs import new_folder
from tests.helpers.runs import ROOT

PROGRAM = """
import os, sys, time
from pathlib import Path
from hunyuan_pretrain.checkpoint.outputs import new_folder

with new_folder(Path(sys.argv[1])) as folder:
    for number in range(100):
        (folder / str(number)).write_text("begun")
    print("begun", flush=True)
    time.sleep(60)
"""


def begun(output: Path) -> subprocess.Popen[str]:
    """A process that writes `output` and does not end."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_stopped_leaves_nothing(tmp_path: Path, number: int) -> None:
    process = begun(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(number)
    process.send_signal(number)  # a second one does not end the cleanup
    _, error = process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == []
    assert process.returncode == -number, "as if it had not been caught"
    assert ("KeyboardInterrupt" if number == signal.SIGINT else "out: stopped; nothing was left behind") in error


def test_what_a_killed_command_left_is_removed_by_the_next_one_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    killed = begun(tmp_path / "out[1]")
    killed.kill()
    killed.communicate(timeout=60)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    living = begun(tmp_path / "out[1]")
    there = {path.name for path in tmp_path.iterdir()}
    assert not left & there
    (tmp_path / ".out[1].unfinished-mine").mkdir()
    with new_folder(tmp_path / "out[1]") as folder:
        (folder / "file").write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {*there, "out[1]", ".out[1].unfinished-mine"}
    living.kill()
    living.communicate(timeout=60)


def test_handlers_are_put_back_and_those_of_others_are_not_replaced(tmp_path: Path) -> None:
    calls: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, frame: calls.append(number))
    try:
        before = [signal.getsignal(number) for number in outputs.STOPS]
        with new_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert [signal.getsignal(number) for number in outputs.STOPS] == before
        assert calls == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_every_command_that_writes_a_model_writes_it_so() -> None:
    for module in (hf_export, hf_import, lora_merge, quantize):
        assert module.new_folder is new_folder
