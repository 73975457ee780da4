"""The run directory and what is written there: the log, metrics.jsonl, TensorBoard, Weights & Biases.

Only rank 0 writes; on other ranks every function here does nothing.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hunyuan_pretrain.config.schema import LoggingConfig


class RunLog:
    """Human-readable lines on the console and in <run_dir>/log.txt, numbers in metrics.jsonl and the optional sinks.

    metrics.jsonl holds one object a line. A run that resumes appends; lines of steps after the checkpoint that it resumed from
    are removed first (`truncate_after`), so each step is there once.
    """

    def __init__(self, run_dir: Path, logging: LoggingConfig, name: str, is_writer: bool) -> None:
        self.run_dir, self.is_writer = run_dir, is_writer
        self._settings, self._name = logging, name
        self._sinks: list[Any] = []
        self._progress: Progress | None = None
        self.console = Console(highlight=False, soft_wrap=True)
        if is_writer:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._text = (run_dir / "log.txt").open("a", encoding="utf-8")

    def line(self, message: str) -> None:
        """One line (or several) for a person."""
        if self.is_writer:
            self.console.print(message, markup=False)
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            self._text.flush()

    def truncate_after(self, step: int) -> None:
        """Forget metrics of steps later than `step`, which a resumed run is about to compute again."""
        path = self.run_dir / "metrics.jsonl"
        if self.is_writer and path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def open_sinks(self, resolved_experiment: Mapping[str, Any]) -> None:
        """Open metrics.jsonl and the sinks that are switched on and installed; one line says which are missing."""
        if not self.is_writer:
            return
        self._metrics = (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        if self._settings.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._sinks.append(_TensorBoard(SummaryWriter(str(self.run_dir / "tensorboard"))))
            except ImportError:
                self.line("tensorboard is not installed: no TensorBoard events")
        if self._settings.wandb != "disabled":
            try:
                import wandb

                self._sinks.append(_Wandb(wandb, self._settings, self._name, self.run_dir, resolved_experiment))
            except ImportError:
                self.line("wandb is not installed: no Weights & Biases run")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append one record; it must hold `step`. Scalars go to every sink, lists to metrics.jsonl only."""
        if self.is_writer:
            self._metrics.write(json.dumps({key: _json_number(value) for key, value in record.items()}) + "\n")
            self._metrics.flush()
            scalars = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
            for sink in self._sinks:
                sink.write(record["step"], scalars)

    def start_progress(self, num_steps: int, first_step: int) -> None:
        """A live progress line, on a terminal only."""
        if self.is_writer and self.console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("", total=num_steps, completed=first_step)
            self._progress.start()

    def progress(self, step: int, description: str) -> bool:
        """Move the progress line to `step`; returns False where there is none, so that the caller prints a plain line."""
        if self._progress is None:
            return False
        self._progress.update(self._task, completed=step, description=description)
        return True

    def close(self) -> None:
        """Flush and close everything."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for sink in self._sinks:
            sink.close()
        self._sinks = []


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, wandb: Any, settings: LoggingConfig, name: str, run_dir: Path, experiment: Mapping[str, Any]) -> None:
        self._run = wandb.init(
            project=settings.wandb_project,
            name=name,
            dir=str(run_dir),
            mode=settings.wandb,
            config=dict(experiment),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def record_environment(run_dir: Path, resolved_yaml: str, versions: Mapping[str, str]) -> None:
    """Write what would be needed to repeat the run: resolved.yaml, and environment.json with command, commit and versions. Rank 0 only."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "resolved.yaml").write_text(resolved_yaml, encoding="utf-8")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    environment = {"command": sys.argv, "commit": commit or None, "python": sys.version.split()[0], **versions}
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def _step_of(line: str) -> int:
    """Step of a metrics line; a line cut short by a kill belongs to no step that was saved."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return sys.maxsize


def _json_number(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, in lists too."""
    if isinstance(value, list):
        return [_json_number(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
