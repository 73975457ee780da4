"""TensorBoard, Weights & Biases and MLflow: optional services, which must neither end nor delay a run.

Each runs on its own thread behind a queue. A sink that raises or falls far behind is dropped with one warning, and the
run continues; all its numbers are in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from hunyuan_pretrain.config.schema import LoggingConfig

WANDB_ID = "wandb_id"
"""File in the run directory with the id of its Weights & Biases run, so that a resumed run continues the same one."""
MLFLOW_ID = "mlflow_id"
"""The same of its MLflow run."""
_MAX_WAITING = 10_000
"""Records that a sink may lag behind; a few MB."""


class Sink(Protocol):
    """The interface of a service. It is constructed on the thread that then calls its methods."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the numbers of one record."""

    def close(self) -> None:
        """Flush everything."""


class GuardedSink:
    """Runs a sink on its own thread, which starts at once. Opening and writing never raise or wait; closing never
    raises.

    `warn` is called once, on the caller's thread, if the sink is dropped.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], warn: Callable[[str], None], timeout_s: float) -> None:
        self._name, self._warn, self._timeout_s = name, warn, timeout_s
        self._open = open_sink
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_MAX_WAITING)
        self._failure = ""
        self._is_given_up = False
        self._began = time.monotonic()
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Queue the numbers of one record."""
        if self._gave_up():
            return
        try:
            self._waiting.put_nowait((step, dict(scalars)))
        except queue.Full:
            self._give_up(f"is {_MAX_WAITING:,} records behind")

    def close(self) -> None:
        """Let the sink finish its queue. Waits up to `timeout_s`, and as long again first if the queue is full."""
        if self._gave_up():
            return
        try:
            self._waiting.put(None, timeout=self._timeout_s)
            self._thread.join(self._timeout_s)
        except queue.Full:
            pass
        if not self._gave_up() and self._thread.is_alive():
            self._give_up(f"was not done {self._timeout_s:g} s after the run")

    def _gave_up(self) -> bool:
        if not self._is_given_up:
            if self._failure:
                self._give_up(self._failure)
            elif not self._is_open.is_set() and time.monotonic() - self._began > self._timeout_s:
                self._give_up(f"did not answer within {self._timeout_s:g} s")
        return self._is_given_up

    def _give_up(self, reason: str) -> None:
        self._is_given_up = True
        self._warn(
            f"WARNING: {self._name} {reason}; the run continues without it, and all its numbers are in metrics.jsonl"
        )

    def _work(self) -> None:
        try:
            sink = self._open()
            self._is_open.set()
            while (item := self._waiting.get()) is not None:
                if self._is_given_up:
                    return
                sink.write(*item)
            sink.close()
        except BaseException as error:  # a library may raise SystemExit too
            self._failure = f"failed: {' '.join(str(error).split()) or type(error).__name__}"


class TensorBoard:
    """Event files in <run_dir>/tensorboard. Events that earlier attempts of the run wrote for `first_step` and later
    are purged."""

    def __init__(self, writer: Any, run_dir: Path, first_step: int) -> None:
        self._writer = writer(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run; a resumed run continues the same one."""

    def __init__(
        self, wandb: Any, settings: LoggingConfig, name: str, run_dir: Path, experiment: Mapping[str, Any]
    ) -> None:
        offered = {
            "silent": True,
            "console": "off",
            "init_timeout": settings.sink_timeout_s,
            "login_timeout": settings.sink_timeout_s,
            "finish_timeout": settings.sink_timeout_s,
        }
        known = getattr(wandb.Settings, "model_fields", offered)
        with _no_questions():
            self._run = wandb.init(
                project=settings.wandb_project,
                name=name,
                id=run_id(run_dir),
                resume="allow"
                if settings.wandb == "online"
                else None,  # offline there is no server to ask; `sync` joins the parts by id
                dir=str(run_dir),
                mode=settings.wandb,
                config=dict(experiment),
                settings=wandb.Settings(**{key: value for key, value in offered.items() if key in known}),
            )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the MLflow server in MLFLOW_TRACKING_URI; a resumed run continues the same one. Steps that are trained
    again, after a kill, occur twice in it."""

    def __init__(
        self, mlflow: Any, settings: LoggingConfig, name: str, run_dir: Path, experiment: Mapping[str, Any]
    ) -> None:
        """Raises RuntimeError if MLFLOW_TRACKING_URI is not set."""
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise RuntimeError("MLFLOW_TRACKING_URI is not set")
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        path = run_dir / MLFLOW_ID
        if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(settings.mlflow_experiment)
        place = self._client.create_experiment(settings.mlflow_experiment) if found is None else found.experiment_id
        self._id = self._client.create_run(place, tags={"run_dir": str(run_dir)}, run_name=name).info.run_id
        path.write_text(self._id + "\n", encoding="utf-8")
        self._client.log_dict(self._id, dict(experiment), "experiment.json")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, float(value), now, step) for key, value in scalars.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def run_id(run_dir: Path) -> str:
    """The id of this run in Weights & Biases, generated and saved on first use."""
    path = run_dir / WANDB_ID
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    made = secrets.token_hex(4)
    path.write_text(made + "\n", encoding="utf-8")
    return made


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Hide stdin, so that wandb cannot ask for an API key: a run waiting for an answer would hang."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before
