"""Optional services: whatever a service does, the run continues, with one warning."""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from hunyuan_pretrain.config.schema import LoggingConfig
from hunyuan_pretrain.runtime import sinks
from hunyuan_pretrain.runtime.logging import RunLog
from hunyuan_pretrain.runtime.sinks import GuardedSink

ROOT = Path(__file__).parents[3]
GOES_ON = "the run continues without it, and all its numbers are in metrics.jsonl"


class Service:
    """A service that fails or blocks in one of its three operations."""

    def __init__(self, bad: str, how: str) -> None:
        self.bad, self.how = bad, how
        self.written: list[int] = []
        self.do("open")

    def do(self, operation: str) -> None:
        if operation == self.bad and self.how == "block":
            threading.Event().wait(30)
        elif operation == self.bad:
            raise SystemExit("key?") if self.how == "exit" else RuntimeError("no\nnetwork")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self.do("write")
        self.written.append(step)

    def close(self) -> None:
        self.do("close")


@pytest.mark.parametrize("how", ["raise", "exit", "block"])
@pytest.mark.parametrize("bad", ["open", "write", "close"])
def test_no_service_ends_or_delays_a_run(monkeypatch: pytest.MonkeyPatch, bad: str, how: str) -> None:
    monkeypatch.setattr(sinks, "_MAX_WAITING", 3)
    warnings: list[str] = []
    started = time.monotonic()
    sink = GuardedSink("Service", lambda: Service(bad, how), warnings.append, 0.3)
    for step in range(8):
        sink.write(step, {"loss": 1.0})
        time.sleep(0.01)
    sink.close()
    assert time.monotonic() - started < 5
    (warning,) = warnings
    assert warning.startswith("WARNING: Service ")
    assert warning.endswith("; " + GOES_ON)
    assert ("failed: no network" in warning) == (how == "raise")


def test_a_working_service_gets_every_record() -> None:
    service, warnings = Service("", ""), list[str]()
    sink = GuardedSink("Service", lambda: service, warnings.append, 10)
    for step in range(100):
        sink.write(step, {})
    sink.close()
    assert (service.written, warnings) == (list(range(100)), [])


PROGRAM = """
import sys, time
from pathlib import Path
from hunyuan_pretrain.config.schema import LoggingConfig
from hunyuan_pretrain.runtime.logging import RunLog
log = RunLog(Path(sys.argv[1]), LoggingConfig(tensorboard=False, wandb="online", sink_timeout_s=3), "name", True)
log.open_sinks({})
for step in range(1, 9):
    log.metrics({"step": step, "loss": 1.0})
    time.sleep(float(sys.argv[2]))
log.close()
log.line("trained")
"""


def online(run_dir: Path, seconds: float, home: Path, **variables: str) -> tuple[int, str]:
    """(exit status, stdout) of a run with wandb=online at a terminal with no user."""
    environment = (
        {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        | {"HOME": str(home)}
        | variables
    )
    terminal, child = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run_dir), str(seconds)],
        stdin=child,
        stderr=child,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=100,
        check=False,
    )
    os.close(terminal)
    os.close(child)
    return done.returncode, done.stdout


def test_wandb_online_without_a_key_is_one_warning(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code, out = online(tmp_path / "run", 0.3, tmp_path)
    assert code == 0, out
    assert out.splitlines() == [
        "WARNING: Weights & Biases failed: No API key configured. Use `wandb login` to log in.; " + GOES_ON,
        "trained",
    ]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """Port of a server that accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


def test_an_unresponsive_wandb_server_delays_neither_the_run_nor_its_end(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with black_hole() as port:
        started = time.monotonic()
        code, out = online(
            tmp_path / "run", 0.01, tmp_path, WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL=f"http://127.0.0.1:{port}"
        )
    assert code == 0, out
    first, last = out.splitlines()
    assert first.startswith("WARNING: Weights & Biases ")
    assert first.endswith(GOES_ON)
    assert last == "trained"
    assert time.monotonic() - started < 80, "3 s are allowed for opening and for finishing"


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for step in (1, 2):
        log = RunLog(tmp_path, LoggingConfig(tensorboard=False, wandb="offline"), "name", is_writer=True)
        log.truncate_after(step - 1)
        log.open_sinks({})
        log.metrics({"step": step, "loss": 2.5})
        log.close()
    (name,) = {file.stem for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert name == "run-" + (tmp_path / sinks.WANDB_ID).read_text().strip()
    asked: list[dict[str, object]] = []
    wandb = SimpleNamespace(Settings=dict, init=lambda **options: asked.append(options))
    sinks.Wandb(wandb, LoggingConfig(wandb="online"), "name", tmp_path, {})
    assert (asked[0]["id"], asked[0]["resume"], asked[0]["mode"]) == (name.removeprefix("run-"), "allow", "online")


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = LoggingConfig(tensorboard=True, wandb="disabled")
    for first, steps in (
        (0, (1, 2, 3, 4)),
        (2, (3, 4, 5)),
    ):  # killed after step 4, resumed from the checkpoint of step 2
        log = RunLog(tmp_path, settings, "name", is_writer=True)
        log.truncate_after(first)
        log.open_sinks({})
        for step in steps:
            log.metrics({"step": step, "loss": step + 0.5 * first})
        log.close()
        time.sleep(1.1)  # file names contain the second, which decides their order
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 4.0),
        (4, 5.0),
        (5, 6.0),
    ]


class Client:
    """The methods of MLflow's client that are called, with its parameters; state is in `RUNS`."""

    RUNS: ClassVar[dict[str, dict[str, Any]]] = {}

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> str:
        return name

    def create_run(
        self, experiment_id: str, start_time: int | None = None, tags: Any = None, run_name: str | None = None
    ) -> Any:
        self.RUNS["1"] = {"place": experiment_id, "name": run_name, "metrics": [], "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id="1"))

    def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
        self.RUNS[run_id]["experiment"] = dictionary

    def log_batch(
        self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), synchronous: Any = None
    ) -> None:
        assert self.RUNS[run_id]["status"] == "RUNNING"
        self.RUNS[run_id]["metrics"] += metrics

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        self.RUNS[run_id]["status"] = status

    def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
        self.RUNS[run_id]["status"] = status or "FINISHED"


def write_to_mlflow(run_dir: Path) -> list[str]:
    """Two attempts of a run; returns the lines of the log."""
    for step in (1, 2):
        log = RunLog(run_dir, LoggingConfig(tensorboard=False, wandb="disabled", mlflow=True), "name", is_writer=True)
        log.truncate_after(step - 1)
        log.open_sinks({"seed": 7})
        log.metrics({"step": step, "stage": "decay", "loss": 2.5 + step, "expert_load": [[1.0]]})
        log.metrics({"step": step, "validation/code/loss": 3.0})
        log.close()
    return (run_dir / "log.txt").read_text().splitlines()


def test_mlflow_gets_the_same_names_and_a_resumed_run_is_the_same_run(tmp_path: Path, monkeypatch) -> None:
    metric = namedtuple("Metric", "key value timestamp step")
    fake = SimpleNamespace(MlflowClient=Client, entities=SimpleNamespace(Metric=metric))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    assert write_to_mlflow(tmp_path) == []
    (run,) = Client.RUNS.values()
    assert (run["place"], run["name"], run["status"]) == ("hunyuan-pretrain", "name", "FINISHED")
    assert run["experiment"] == {"seed": 7}
    assert [(one.key, one.value, one.step) for one in run["metrics"]] == [
        *(("loss", 3.5, 1), ("validation/code/loss", 3.0, 1)),
        *(("loss", 4.5, 2), ("validation/code/loss", 3.0, 2)),
    ]


def test_the_real_mlflow_takes_the_same_calls(tmp_path: Path, monkeypatch) -> None:
    """Where mlflow or mlflow-skinny is installed; its store of files needs no server."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    assert write_to_mlflow(tmp_path / "run") == []
    client = mlflow.MlflowClient()
    run_id = (tmp_path / "run" / sinks.MLFLOW_ID).read_text().strip()
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "name")
    assert [(one.step, one.value) for one in client.get_metric_history(run_id, "loss")] == [(1, 3.5), (2, 4.5)]
    assert found.data.metrics.keys() == {"loss", "validation/code/loss"}


def test_mlflow_without_an_address_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines = write_to_mlflow(tmp_path)
    assert {line[20:] for line in lines} == {f"WARNING: MLflow failed: MLFLOW_TRACKING_URI is not set; {GOES_ON}"}
