"""Signals that request a stop, in separate processes that do not import torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hunyuan_pretrain.config.exit_status import STOP_SIGNALS

ROOT = Path(__file__).parents[3]

STEPS = """
import time
from hunyuan_pretrain.runtime.stop import listen
stop = listen()
assert listen() is stop
print("listening", flush=True)
while not stop.is_asked:
    time.sleep(0.01)
time.sleep(0.5)  # a step's end and its save
print("saved", flush=True)
"""
WITH_FORKS = """
import multiprocessing, time
from hunyuan_pretrain.runtime.stop import listen
stop = listen()
writers = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(1,)) for _ in range(2)]
for writer in writers:
    writer.start()
time.sleep(0.2)  # they are past the fork
print("listening", flush=True)
for writer in writers:
    writer.join()
    assert writer.exitcode == 0
assert stop.is_asked
print("saved", flush=True)
"""
STUCK = """
import ctypes
from hunyuan_pretrain.runtime.stop import listen
listen()
print("listening", flush=True)
libc, signals = ctypes.CDLL(None), ctypes.create_string_buffer(128)
libc.sigaddset(signals, 12)
while True:
    libc.sigwait(signals, ctypes.byref(ctypes.c_int()))  # no signal that is handled ends it, as none ends a collective
"""


def listening(program: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def test_a_stop_is_remembered_until_the_run_can_stop() -> None:
    for number in STOP_SIGNALS:
        process = listening(STEPS)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "saved\n"), err
        assert err.strip() == (
            "Ctrl-C: stopping after a step that is saved; Ctrl-C again ends at once, without saving"
        ) * (number == signal.SIGINT)


def test_one_ctrl_c_during_a_save_counts_once_for_any_number_of_writers() -> None:
    process = listening(WITH_FORKS)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal and torchrun do
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "saved\n"), err
    assert err.count("Ctrl-C: stopping") == 1


def test_a_second_ctrl_c_ends_at_once_even_in_a_collective() -> None:
    process = listening(STUCK)
    for _ in range(2):
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


def test_other_ranks_leave_the_message_to_rank_0() -> None:
    process = listening(STEPS, RANK="1")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("saved\n", "")


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    process = listening("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + STEPS)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("saved\n", "")


ERROR_AFTER_SIGTERM = """
import os, signal
from hunyuan_pretrain.cli.ranks import report_error
from hunyuan_pretrain.runtime.stop import listen
listen()
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGTERM)
report_error("a mistake")
"""


def test_a_rank_whose_launcher_has_told_it_to_end_leaves_the_error_to_rank_0() -> None:
    """It meets the error of rank 0 later than the launcher's signal, which it has only noted."""
    for rank, status, said in ((0, 0, "a mistake\n"), (1, -signal.SIGTERM, "")):
        environment = os.environ | {"RANK": str(rank)}
        command = [sys.executable, "-c", ERROR_AFTER_SIGTERM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=15)
        assert (done.returncode, done.stderr) == (status, said)
