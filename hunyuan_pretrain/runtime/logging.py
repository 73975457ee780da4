"""Writes the run directory: the log, metrics.jsonl, events.jsonl, TensorBoard, Weights & Biases, MLflow.

Only rank 0 writes; on other ranks RunLog does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hunyuan_pretrain.config.history import write_whole
from hunyuan_pretrain.config.schema import LoggingConfig
from hunyuan_pretrain.runtime.sinks import GuardedSink, MLflow, Sink, TensorBoard, Wandb
from hunyuan_pretrain.runtime.webhook import Webhook, from_variable

EVENTS = "events.jsonl"
POSTED = ("alarm", "alarm over", "save failed", "failed")
"""Events that go to the webhook too."""

CLOCK_FIELDS = frozenset(
    "seconds data_wait_seconds tokens_per_s model_flops_per_s mfu time run_seconds process_seconds eta_seconds".split()  # noqa: SIM905
) | {
    *("host_rss_bytes", "device_peak_bytes", "median_launch_seconds"),
    *(f"max_{what}_{of}" for what in ("data_wait", "launch") for of in ("seconds", "rank")),
}
"""Fields of metrics.jsonl that depend on time or machine. All others are the same whenever and wherever a step is
trained."""


class Lines:
    """An append-only text file. While it cannot be written (full disk), lines wait in memory and each new one retries.

    `warn` is called once when writing starts to fail and once when it works again.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self._warn = path, warn
        self._file = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting: list[bytes] = []
        self._is_failing = False

    def add(self, line: str) -> None:
        """Append a line and write it to disk at once if possible."""
        self._waiting.append(f"{line}\n".encode(errors="replace"))
        self.flush()

    def flush(self) -> None:
        """Try to write the waiting lines."""
        try:
            while self._waiting:
                rest = self._waiting[0]
                while rest:  # a full disk takes a part of a line before it refuses
                    rest = rest[self._file.write(rest) :]
                self._size += len(self._waiting.pop(0))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)  # no partial line
            if not self._is_failing:
                self._is_failing = True
                self._warn(f"WARNING: {self.path}: {error.strerror}; its lines wait in memory until it can be written")
            return
        if self._is_failing:
            self._is_failing = False
            self._warn(f"{self.path}: can be written again; nothing was lost")

    def finish(self) -> None:
        """Write the waiting lines, or warn how many are lost."""
        self.flush()
        if self._waiting:
            self._warn(f"WARNING: {self.path}: {len(self._waiting):,} lines could not be written and are lost")
            self._waiting = []


class _Console(Console):
    """rich's console, which here does not end the process when the reader of its output is gone."""

    def on_broken_pipe(self) -> None:
        raise


class RunLog:
    """Writes readable lines to the console and <run_dir>/log.txt, and numbers to metrics.jsonl and the optional sinks.

    metrics.jsonl holds one object per line. A resumed run appends, after `truncate_after` has removed the lines of
    steps later than its checkpoint, so each step occurs once. Once open, a write failure does not end the run.
    """

    def __init__(self, run_dir: Path, logging: LoggingConfig, name: str, is_writer: bool) -> None:
        """Raises OSError if the folder or its log cannot be written."""
        self.run_dir, self.is_writer = run_dir, is_writer
        self._settings, self._name = logging, name
        self._sinks: list[GuardedSink] = []
        self._progress: Progress | None = None
        self._webhook: Webhook | None = None
        self._first_step = 1
        self.console = _Console(highlight=False, soft_wrap=True)
        if is_writer:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._text = Lines(run_dir / "log.txt", self._print)

    def line(self, message: str) -> None:
        """Log a message of one or more lines."""
        if self.is_writer:
            self._print(message)
            self._text.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def _print(self, message: str) -> None:
        try:
            self.console.print(message, markup=False)
        except OSError:  # the pipe or terminal is gone; log.txt has everything
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.close(silence)

    def truncate_after(self, step: int) -> None:
        """Remove metrics of steps later than `step`, which a resumed run computes again. Raises OSError."""
        self._first_step = step + 1
        path = self.run_dir / "metrics.jsonl"
        if not self.is_writer or not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [
            line.rstrip(b"\n") + b"\n" for line in lines if _step_of(line) <= step
        ]  # the last may lack only its newline
        if kept != lines:
            partial = path.with_suffix(".partial")
            partial.write_bytes(b"".join(kept))
            partial.replace(path)

    def open_sinks(self, resolved_experiment: Mapping[str, Any]) -> None:
        """Open metrics.jsonl and the enabled sinks; an enabled sink that is not installed is skipped with a log line.

        Raises OSError if metrics.jsonl cannot be written.
        """
        if not self.is_writer:
            return
        self._metrics = Lines(self.run_dir / "metrics.jsonl", self.line)
        self._events = Lines(self.run_dir / EVENTS, self.line)
        self._webhook = from_variable(self._settings.webhook_url_env, self.line)
        if self._settings.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.line("tensorboard is not installed: no TensorBoard events")
            else:
                self._open("TensorBoard", partial(TensorBoard, SummaryWriter, self.run_dir, self._first_step))
        if self._settings.wandb != "disabled":
            try:
                import wandb
            except ImportError:
                self.line("wandb is not installed: no Weights & Biases run")
            else:
                self._open(
                    "Weights & Biases",
                    partial(Wandb, wandb, self._settings, self._name, self.run_dir, resolved_experiment),
                )

        if self._settings.mlflow:
            try:
                import mlflow
            except ImportError:
                self.line("mlflow is not installed: no MLflow run")
            else:
                self._open(
                    "MLflow", partial(MLflow, mlflow, self._settings, self._name, self.run_dir, resolved_experiment)
                )

    def go_back(self, step: int) -> None:
        """`truncate_after`, while metrics.jsonl is open. Raises OSError."""
        if self.is_writer:
            self._metrics.finish()
            self.truncate_after(step)
            self._metrics = Lines(self.run_dir / "metrics.jsonl", self.line)

    def _open(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._sinks.append(GuardedSink(name, open_sink, self.line, self._settings.sink_timeout_s))

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append one record, which must contain `step`. Numbers also go to every sink under the same names; lists do
        not."""
        if self.is_writer:
            self._metrics.add(json.dumps({key: _json_number(value) for key, value in record.items()}))
            scalars = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
            for sink in self._sinks:
                sink.write(record["step"], scalars)
            if self._webhook is not None:
                self._webhook.report()

    def event(self, kind: str, text: str, step: int | None = None) -> None:
        """Record what happened, in events.jsonl; nothing is ever removed from it. An alarm is also a line of the log;
        POSTED kinds go to the webhook, which a failure waits for, because the process may end next."""
        if not self.is_writer or getattr(self, "_events", None) is None:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        event = {"time": now, "kind": kind, "step": step, "text": text}
        self._events.add(json.dumps(event))
        if kind.startswith("alarm"):
            self.line(f"{kind.upper()} at step {step}: {text}")
        if self._webhook is not None and kind in POSTED:
            where = {"run": self._name, "run_dir": str(self.run_dir), "host": socket.gethostname()}
            self._webhook.post(where | event)
            if kind == "failed":
                self._webhook.close()
                self._webhook = None

    def flush(self) -> None:
        """Try again to write the lines that wait in memory, if the disk may have space again."""
        if self.is_writer:
            for lines in (getattr(self, "_metrics", None), getattr(self, "_events", None), self._text):
                if lines is not None:
                    lines.flush()

    def start_progress(self, num_steps: int, first_step: int) -> None:
        """Start a live progress line if the console is a terminal."""
        if self.is_writer and self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("", total=num_steps, completed=first_step)
            self._progress.start()

    def progress(self, step: int, description: str) -> bool:
        """Move the progress line to `step`. Returns False if there is none; the caller then logs a plain line."""
        if self._progress is None:
            return False
        self._progress.update(self._task, completed=step, description=description)
        return True

    def close(self) -> None:
        """Flush and close everything; each sink gets `logging.sink_timeout_s` to finish."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        if self._webhook is not None:
            self._webhook.close()
            self._webhook = None
        if self.is_writer:
            for lines in (getattr(self, "_metrics", None), getattr(self, "_events", None), self._text):
                if lines is not None:
                    lines.finish()


def check_writable(run_dir: Path) -> None:
    """Raise OSError if a run directory, its log or its metrics cannot be written. Changes nothing."""
    if run_dir.exists() and not run_dir.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(run_dir))
    nearest = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\n" * 4096)  # a full disk still accepts an empty file
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(nearest)) from None
    for name in ("log.txt", "metrics.jsonl", EVENTS):
        if (run_dir / name).exists():
            with (run_dir / name).open("ab"):
                pass


def record_environment(run_dir: Path, resolved_yaml: str, versions: Mapping[str, str]) -> None:
    """Write what is needed to reproduce the run: resolved.yaml, and environment.json with command, commit and versions.
    Call on rank 0 only."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "resolved.yaml", resolved_yaml)
    environment = {"command": sys.argv, **code_version(), **versions}
    write_whole(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")


def code_version() -> dict[str, str | None]:
    """`commit` of this code, with a + if files differ from it, None if the code is not in git; and the `python`
    version."""
    folder = Path(__file__).parent
    # a virtual environment may be inside another project's repository
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "python": sys.version.split()[0]}
    commit, changed = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit and commit + ("+" if changed else ""), "python": sys.version.split()[0]}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails or is not installed."""
    try:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=folder)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _step_of(line: bytes) -> int:
    """Step of a metrics line. A line truncated by a kill counts as later than every saved step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


def _json_number(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON lacks, replaced by None, in lists too."""
    if isinstance(value, list):
        return [_json_number(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
