"""A stop by any signal at any moment of a run: saved, status 75, and the same command resumes. The run is a tiny one,
and each moment is one call that is watched: the process sends itself the signal there."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import fork_ranks, forking
from tests.helpers.runs import experiment_fields, metrics

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A hangup is handled the same way: tests/unit/runtime/test_stop.py."""
STEPS = 4
NOTHING, BEFORE = None, "stopped before the first step; nothing to save: the same command starts again\n"
MOMENTS: dict[str, tuple[str, str, int, int | None]] = {
    # moment: (module, function of it that is watched, at its n-th call, step of the checkpoint)
    "data is verified": ("hunyuan_pretrain.train.verification", "check_digest_in_steps", 2, NOTHING),
    "a checkpoint is looked for": ("hunyuan_pretrain.checkpoint.save_load", "load_newest", 1, NOTHING),
    "before the first step": ("hunyuan_pretrain.train.loop", "_announce", 1, NOTHING),
    "the first step": ("hunyuan_pretrain.train.step", "compute_gradients", 1, 1),
    "a later step": ("hunyuan_pretrain.train.step", "compute_gradients", 3, 3),
    "a save": ("hunyuan_pretrain.checkpoint.saving", "write_part", 1, 2),
    "an asynchronous save": ("hunyuan_pretrain.checkpoint.saving", "write_part", 1, 2),
    "a validation": ("hunyuan_pretrain.train.evaluate", "run_schedule", 2, 2),
    "the last validation": ("hunyuan_pretrain.train.evaluate", "run_schedule", 3, 4),
}


def fields_of(corpus: Path, run_dir: Path, is_async: bool) -> dict[str, Any]:
    return experiment_fields(
        corpus,
        run_dir,
        STEPS,
        model__num_layers=2,
        evaluation={"data": str(corpus / "heldout"), "max_sequences": 4, "every_steps": 2},
        checkpoint={"save_every_steps": 2, "async_save": is_async},
        stages__micro_batch_sequences=8,
        runtime__probes=False,
    )


@contextlib.contextmanager
def watched(module: str, name: str, at: int, action: Callable[[], object]) -> Iterator[None]:
    """Within it, the function's call number `at` does `action` first."""
    place = importlib.import_module(module)
    function, calls = getattr(place, name), []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == at:
            action()
        return function(*arguments, **options)

    setattr(place, name, call)
    try:
        yield
    finally:
        setattr(place, name, function)


def train_once(fields: dict[str, Any]) -> tuple[int, str]:
    """Status of a run, and what it printed to stdout."""
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.runtime import stop
    from hunyuan_pretrain.train.loop import train

    request, out = stop.listen(), io.StringIO()
    request.is_asked, request._interrupts = False, 0  # of the run before
    with contextlib.redirect_stdout(out):
        return train(Experiment.model_validate(fields)), out.getvalue()


def all_moments(corpus: Path, folder: Path, results: Path) -> None:
    from hunyuan_pretrain.train import evaluate

    evaluate.ROUNDS_AT_A_TIME = 2
    found: dict[str, Any] = {}
    run_dir = folder / "run"
    for moment, (module, name, at, _) in MOMENTS.items():
        for number in SIGNALS:
            shutil.rmtree(run_dir, ignore_errors=True)
            fields = fields_of(corpus, run_dir, moment != "a save")
            with watched(module, name, at, partial(os.kill, os.getpid(), number)):
                status, said = train_once(fields)
            kept = sorted(path.name for path in (run_dir / "checkpoints").glob("*"))
            log = (run_dir / "log.txt").read_text() if run_dir.exists() else ""
            again = train_once(fields)[0] if number == signal.SIGUSR1 else None  # of one signal: the test stays short
            found[f"{moment} {number}"] = [status, said, kept, log, again, losses(run_dir)]
    shutil.rmtree(run_dir)
    train_once(fields_of(corpus, run_dir, True))
    found["undisturbed"] = losses(run_dir)
    results.write_text(json.dumps(found))


def losses(run_dir: Path) -> list[dict[str, Any]]:
    """What the run has logged of steps and validations."""
    names = ("step", "loss", "validation_loss")
    return [{name: record[name] for name in names if name in record} for record in metrics(run_dir)]


@pytest.fixture(scope="module")
def found(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all runs, in one process."""
    folder = tmp_path_factory.mktemp("stops")
    process = forking().Process(target=all_moments, args=(corpus, folder, folder / "found.json"))
    process.start()
    process.join(300)
    process.kill()
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_saves_and_ends_with_75(found, moment, number):
    status, said, kept, log, again, records = found[f"{moment} {int(number)}"]
    step = MOMENTS[moment][3]
    assert status == 75, log
    assert (f"step_{step:07d}" in kept) if step is not None else (kept == [])
    if step is None:
        assert said.endswith(BEFORE), said
        assert "step 1/" not in log
    else:
        assert f"told to stop: saved after step {step}; the same command resumes from there: " in log
        assert not any(int(name[-7:]) > step for name in kept), "the save that was under way is the one to resume from"
    if again is not None:
        assert again == 0
        assert records == found["undisturbed"], "all losses and validations of a run that was not stopped, once each"


def interrupted_twice(corpus: Path, folder: Path, moment: str) -> None:
    module, name, at, _ = MOMENTS[moment]

    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        time.sleep(60)

    with watched(module, name, at, twice):
        train_once(fields_of(corpus, folder / "run", True))


@pytest.mark.parametrize("moment", ["data is verified", "a later step", "a save"])
def test_a_second_ctrl_c_ends_at_once(corpus, tmp_path, moment):
    process = forking().Process(target=interrupted_twice, args=(corpus, tmp_path, moment))
    began = time.monotonic()
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 130
    assert time.monotonic() - began < 55


def told_while_waiting(corpus: Path, folder: Path) -> tuple[int, list[str]]:
    """Rank 0 is told to stop while it waits for rank 1 in a collective of step 2."""
    import torch.distributed as dist

    fields, told = fields_of(corpus, folder / "run", True), []
    fields["stages"] = [stage | {"micro_batch_sequences": 4} for stage in fields["stages"]]

    def wait() -> None:
        if dist.get_rank() == 1:
            time.sleep(1.0)
        else:
            threading.Timer(0.4, lambda: told.append(os.kill(os.getpid(), signal.SIGTERM))).start()

    with watched("hunyuan_pretrain.train.step", "compute_gradients", 2, wait):
        status, _ = train_once(fields)
    return status, sorted(path.name for path in (folder / "run" / "checkpoints").glob("*"))


def test_a_rank_that_waits_in_a_collective_hears_a_stop_and_all_save_the_same_step(corpus, tmp_path):
    assert fork_ranks(2, told_while_waiting, corpus, tmp_path) == [(75, ["step_0000002"])] * 2
