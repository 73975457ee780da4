"""TensorBoard and Weights & Biases: services that a run can do without, so that none of them may end it or hold it up.

Each works on a thread of its own, through a queue. One that raises, or falls far behind, is given up with one warning,
and the run goes on; all of its numbers are in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import io
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
"""File of a run directory with the id of its run in Weights & Biases, so that a resumed run goes on in the same one."""
_MAX_WAITING = 10_000
"""Records that a sink may be behind, some MB."""


class Sink(Protocol):
    """What a service is to a run: made when it is opened, on the thread that then calls the rest."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The numbers of one record."""

    def close(self) -> None:
        """Everything is on its way when this returns."""


class GuardedSink:
    """A sink on a thread of its own, which is begun at once: opening, writing and closing it neither raise nor wait for
    it.

    `warn` is told once, by the caller's thread, if the sink is given up.
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
        """Hand over the numbers of one record."""
        if self._gave_up():
            return
        try:
            self._waiting.put_nowait((step, dict(scalars)))
        except queue.Full:
            self._give_up(f"is {_MAX_WAITING:,} records behind")

    def close(self) -> None:
        """Let it finish what it was given, for `timeout_s` at most."""
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
            f"WARNING: {self._name} {reason}; the run goes on without it, and all of its numbers are in metrics.jsonl"
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
        except BaseException as error:  # a library may leave by SystemExit too
            self._failure = f"failed: {' '.join(str(error).split()) or type(error).__name__}"


class TensorBoard:
    """Event files in <run_dir>/tensorboard. `first_step`: what earlier attempts of the run wrote of this and later
    steps is void."""

    def __init__(self, writer: Any, run_dir: Path, first_step: int) -> None:
        self._writer = writer(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run in Weights & Biases, the same one each time that this run is resumed."""

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
                else None,  # offline, there is nobody to ask; the id joins the parts at `sync`
                dir=str(run_dir),
                mode=settings.wandb,
                config=dict(experiment),
                settings=wandb.Settings(**{key: value for key, value in offered.items() if key in known}),
            )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def run_id(run_dir: Path) -> str:
    """The id of a run in Weights & Biases, made when it is first asked for."""
    path = run_dir / WANDB_ID
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    made = secrets.token_hex(4)
    path.write_text(made + "\n", encoding="utf-8")
    return made


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """No terminal to ask for an API key at: a run that waits for an answer hangs."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before
