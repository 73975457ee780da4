"""The loop's messages when a run cannot continue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hunyuan_pretrain.model.routing import RouterStatistics
from hunyuan_pretrain.runtime.logging import CLOCK_FIELDS
from hunyuan_pretrain.runtime.stop import StopRequest
from hunyuan_pretrain.runtime.transfers import Outgoing
from hunyuan_pretrain.train import TrainingError, loop, metrics
from hunyuan_pretrain.train.step_result import LaunchedStep
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields


def launched(step: int, loss: float = 1.0, stop: float = 0.0) -> LaunchedStep:
    """A step of one layer and one expert."""
    numbers = torch.tensor([loss, stop, 0.0, *[1.0] * RouterStatistics.packed_size(1), 1.0, 8.0], dtype=torch.float64)
    return LaunchedStep(step, Outgoing(numbers), torch.Size((1, RouterStatistics.packed_size(1))), 0.0)


def refusal(corpus, tmp_path, monkeypatch, **checkpoint) -> str:
    fields = experiment_fields(corpus, tmp_path / "run", model__num_layers=2, checkpoint=checkpoint)
    fields["runtime"] |= {"probes": False}
    run = on_this_rank(fields)
    monkeypatch.setattr(loop, "launch_step", lambda run, stage, step, **_: launched(step, loss=math.nan))
    with pytest.raises(TrainingError) as caught:
        loop._train(run, StopRequest())
    run.loader.close()
    return str(caught.value)


def test_a_non_finite_loss_names_the_newest_checkpoint_or_says_that_there_is_none(corpus, tmp_path, monkeypatch):
    cure = "lower optimizer.lr or optimizer.clip_grad, or leave the data of this step out (stages.N.skip_data_steps)"
    none = "step 1: loss nan, gradient norm 1.0; there is no checkpoint of this run to go back to"
    assert refusal(corpus, tmp_path, monkeypatch) == (
        f"{none} (only the end of the run is saved, checkpoint.save_every_steps): {cure}, and start again"
    )
    first = "the first would have been saved after step 2"
    assert f"{none} ({first}, checkpoint.save_every_steps)" in refusal(
        corpus, tmp_path, monkeypatch, save_every_steps=2
    )
    folder = tmp_path / "run" / "checkpoints" / "step_0000002"
    monkeypatch.setattr(loop.save_load, "find_checkpoints", lambda run_dir: [folder])
    monkeypatch.setattr(loop.save_load, "read_marker", lambda folder: {"step": 2})
    words = (
        f"the newest checkpoint is {folder}, after step 2; the same command resumes from it and gets the same numbers: "
        f"first {cure}"
    )
    assert refusal(corpus, tmp_path, monkeypatch).endswith(words)


class Steps:
    """Steps of a loop that trains nothing: what is launched, read, recorded, validated and saved, in order.

    Times are simulated: the host launches a step in 1 s, the device computes it in 10 s, a validation or a save takes
    100 s.
    """

    def __init__(
        self,
        corpus,
        tmp_path,
        monkeypatch,
        steps: int = 8,
        log_every: int = 100,
        validate_every: int | None = None,
        on_the_host: bool = False,
        **checkpoint: Any,
    ) -> None:
        fields = experiment_fields(corpus, tmp_path / "run", steps, model__num_layers=2, checkpoint=checkpoint)
        fields["runtime"] |= {"probes": False}
        held_out = {"data": str(corpus / "heldout"), "every_steps": validate_every}
        fields["evaluation"] = {} if validate_every is None else held_out
        fields["logging"] = {"log_every_steps": log_every}
        self.events: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.nan_at: int | None = None
        self.told_at: int | None = None
        self.fails_at: tuple[int, Exception] | None = None
        self.now = self.device_is_free_at = 0.0
        self.stop = StopRequest()
        self.run = on_this_rank(fields)
        events = self.events

        class Read(Outgoing):
            is_here = on_the_host

            def read(numbers) -> torch.Tensor:
                self.now = max(self.now, numbers.ready_at)
                if f"read {numbers.number}" not in events:
                    events.append(f"read {numbers.number}")
                return super().read()

        def launch(run: Any, stage: Any, step: int, is_stop_asked: bool = False, **_: Any) -> LaunchedStep:
            events.append(f"launch {step + 1}")
            if self.fails_at is not None and self.fails_at[0] == step + 1:
                raise self.fails_at[1]
            one = launched(step, math.nan if step + 1 == self.nan_at else 1.0, float(is_stop_asked))
            numbers = Read(one.numbers.read())
            self.now += 1.0
            self.device_is_free_at = max(self.device_is_free_at, self.now) + 10.0
            numbers.number, numbers.ready_at = step + 1, self.device_is_free_at
            if step + 1 == self.told_at:
                self.stop.is_asked = True
            return LaunchedStep(step, numbers, one.statistics_shape, float(step))

        def record(fields: dict[str, Any]) -> None:
            events.append(f"record {fields['step']}")
            self.records.append(dict(fields))

        def taking_long(event: str) -> None:
            events.append(event)
            self.now += 100.0

        monkeypatch.setattr(loop, "launch_step", launch)
        monkeypatch.setattr(loop.Saves, "save", lambda saves, done, *_: taking_long(f"save {done}"))
        monkeypatch.setattr(loop, "_evaluate", lambda run, stage, done, stop: taking_long(f"validate {done}") or True)
        monkeypatch.setattr(self.run.log, "metrics", record)
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)

    def train(self) -> int:
        try:
            return loop._train(self.run, self.stop)
        finally:
            self.run.loader.close()

    def seconds(self) -> list[float]:
        return [record["seconds"] for record in self.records]


def test_a_step_that_is_not_logged_is_read_after_the_next_one_is_launched(corpus, tmp_path, monkeypatch):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=4)
    assert steps.train() == 0
    assert steps.events == [
        "launch 1", "launch 2", "read 1", "launch 3", "read 2", "launch 4", "read 3", "read 4", "record 4", "save 4",
    ]  # fmt: skip


def test_a_logged_step_too_is_read_after_the_next_one_is_launched(corpus, tmp_path, monkeypatch):
    """Unless it is validated, saved or the last: then its record is there before."""
    steps = Steps(corpus, tmp_path, monkeypatch, steps=6, log_every=1, validate_every=2, save_every_steps=3)
    assert steps.train() == 0
    assert steps.events == [
        "launch 1", "launch 2", "read 1", "record 1", "read 2", "record 2", "validate 2",
        "launch 3", "read 3", "record 3", "save 3",
        "launch 4", "read 4", "record 4", "validate 4",
        "launch 5", "launch 6", "read 5", "record 5", "read 6", "record 6", "validate 6", "save 6",
    ]  # fmt: skip


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_record_has_the_time_and_the_rates_of_its_steps(corpus, tmp_path, monkeypatch, log_every):
    """The first step after a break waits for its launch; the device does the others one after another."""
    steps = Steps(corpus, tmp_path, monkeypatch, 8, log_every, validate_every=4)
    rates = [(step / 10, step / 100) for step in range(8)]
    monkeypatch.setattr(loop, "apply_learning_rate", lambda run, step: rates[step])
    assert steps.train() == 0
    first, later = (11.0, 10.0) if log_every == 1 else (10.5, 10.0)
    assert steps.seconds() == ([first, *[later] * (4 // log_every - 1)] * 2)
    of = [record["step"] for record in steps.records]
    assert of == list(range(log_every, 9, log_every))
    assert [(record["learning_rate"], record["expert_learning_rate"]) for record in steps.records] == [
        rates[step - 1] for step in of
    ]
    waits = [sum(range(step - log_every, step)) / log_every for step in of]
    assert [record["data_wait_seconds"] for record in steps.records] == waits


def test_a_step_that_the_host_has_computed_is_read_at_once(corpus, tmp_path, monkeypatch):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=3, log_every=2, on_the_host=True)
    steps.told_at = 2
    assert steps.train() == 75
    assert steps.events == ["launch 1", "read 1", "launch 2", "read 2", "record 2", "save 2"]
    assert [Outgoing(torch.ones(1)).is_here, launched(0).numbers.is_here] == [True, True]


def test_records_are_the_same_whenever_they_are_read(corpus, tmp_path, monkeypatch):
    """Of real steps: values and order, validations between them."""
    found = []
    for is_here in (True, False):
        fields = experiment_fields(corpus, tmp_path / str(is_here), 6, model__num_layers=2)
        fields["runtime"] |= {"probes": False}
        fields["evaluation"] = {"data": str(corpus / "heldout"), "max_sequences": 3, "every_steps": 4}
        run, records = on_this_rank(fields), []
        monkeypatch.setattr(Outgoing, "is_here", is_here)
        monkeypatch.setattr(run.log, "metrics", records.append)
        monkeypatch.setattr(loop.Saves, "save", lambda saves, done, *_: None)
        assert loop._train(run, StopRequest()) == 0
        run.loader.close()
        found.append([{key: value for key, value in one.items() if key not in CLOCK_FIELDS} for one in records])
    assert [(one["step"], "validation_loss" in one) for one in found[0]] == [
        *((step, False) for step in range(1, 5)), (4, True), (5, False), (6, False), (6, True),
    ]  # fmt: skip
    assert found[0] == found[1]


@pytest.mark.parametrize("is_bad", [False, True])
def test_an_error_leaves_no_record_behind(corpus, tmp_path, monkeypatch, is_bad):
    """The step before may also be the reason: weights that are NaN."""
    steps = Steps(corpus, tmp_path, monkeypatch, steps=4, log_every=1)
    steps.fails_at, steps.nan_at = (3, ValueError("a damaged shard")), 2 if is_bad else None
    with pytest.raises(TrainingError if is_bad else ValueError, match="step 2: loss nan" if is_bad else "damaged"):
        steps.train()
    last = [] if is_bad else ["record 2"]
    assert steps.events == ["launch 1", "launch 2", "read 1", "record 1", "launch 3", "read 2", *last]


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("CUDA error: an illegal memory access"), RuntimeError("gloo: Connection closed by peer")],
    ids=["a GPU", "another rank"],
)
def test_after_an_error_that_makes_reading_wait_forever_nothing_is_read(corpus, tmp_path, monkeypatch, error):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=4, log_every=1)
    steps.fails_at = (3, error)
    with pytest.raises(type(error), match=str(error)):
        steps.train()
    assert steps.events[-1] == "launch 3"


def test_without_a_capacity_a_step_is_read_before_the_next_one_is_launched(corpus, tmp_path, monkeypatch):
    """The next one could run out of memory on weights that are NaN, and hide the reason."""
    steps = Steps(corpus, tmp_path, monkeypatch, steps=4)
    model = steps.run.experiment.model.model_copy(update={"moe_expert_capacity_factor": None})
    steps.run.experiment = steps.run.experiment.model_copy(update={"model": model})
    steps.nan_at = 2
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        steps.train()
    assert steps.events == ["launch 1", "read 1", "launch 2", "read 2"]


@pytest.mark.parametrize("bad", [2, 3, 4])
def test_a_bad_step_is_never_saved_and_is_named_though_it_is_read_late(corpus, tmp_path, monkeypatch, bad):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=6, save_every_steps=2)
    steps.nan_at = bad
    with pytest.raises(TrainingError, match=f"step {bad}: loss nan"):
        steps.train()
    assert [event for event in steps.events if event.startswith("save")] == (["save 2"] if bad > 2 else [])
    assert f"launch {bad + 2}" not in steps.events


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_stop_in_a_step_is_obeyed_at_most_two_steps_later(corpus, tmp_path, monkeypatch, log_every):
    """Step 2 was launched before; step 3 tells the other ranks, step 4 hears of it."""
    steps = Steps(corpus, tmp_path, monkeypatch, steps=8, log_every=log_every)
    steps.told_at = 2
    assert steps.train() == 75
    assert [event for event in steps.events if not event.startswith("record")][-3:] == ["read 3", "read 4", "save 4"]
    assert [record["step"] for record in steps.records] == ([1, 2, 3, 4] if log_every == 1 else [])


def test_a_bad_step_is_not_saved_by_a_stop(corpus, tmp_path, monkeypatch):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=8)
    steps.told_at, steps.nan_at = 2, 4
    with pytest.raises(TrainingError, match="step 4"):
        steps.train()
    assert not [event for event in steps.events if event.startswith("save")]


@pytest.mark.parametrize("what", ["fails", "is stopped"])
def test_a_checkpoint_is_saved_before_benchmarks(corpus, tmp_path, monkeypatch, what):
    """An error in them loses nothing, and the next start goes on after them; a stop saves again, with what is owed."""
    steps = Steps(corpus, tmp_path, monkeypatch, steps=6, save_every_steps=2)
    settings = steps.run.experiment.evaluation.model_copy(update={"tasks": ("piqa",), "tasks_every_steps": 2})
    steps.run.experiment = steps.run.experiment.model_copy(update={"evaluation": settings})
    steps.run.benchmarks = object()

    def measure(run: Any, stage: Any, done: int, is_stop_asked: Any) -> bool:
        steps.events.append(f"tasks {done}")
        if done < 4:
            return True
        if what == "fails":
            raise RuntimeError("no memory is left")
        steps.stop.is_asked = True
        return False

    monkeypatch.setattr(loop, "measure", measure)
    if what == "fails":
        with pytest.raises(RuntimeError, match="no memory is left"):
            steps.train()
    else:
        assert steps.train() == 75
    found = [event for event in steps.events if event.startswith(("save", "tasks"))]
    assert found == ["save 2", "tasks 2", "save 4", "tasks 4", *(["save 4"] if what == "is stopped" else [])]
