"""The loop's messages when a run cannot continue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hunyuan_pretrain.model.routing import RouterStatistics
from hunyuan_pretrain.runtime.stop import StopRequest
from hunyuan_pretrain.runtime.transfers import Outgoing
from hunyuan_pretrain.train import TrainingError, loop
from hunyuan_pretrain.train.step import LaunchedStep
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields


def launched(step: int, loss: float = 1.0, stop: float = 0.0) -> LaunchedStep:
    """A step of one layer and one expert."""
    numbers = torch.tensor([loss, stop, *[1.0] * RouterStatistics.packed_size(1), 1.0, 8.0], dtype=torch.float64)
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
    """Steps of a loop that trains nothing: what is read, saved and logged, in order."""

    def __init__(self, corpus, tmp_path, monkeypatch, steps: int = 8, log_every: int = 100, **checkpoint: Any) -> None:
        fields = experiment_fields(corpus, tmp_path / "run", steps, model__num_layers=2, checkpoint=checkpoint)
        fields["runtime"] |= {"probes": False}
        fields["evaluation"] = {}
        fields["logging"] = {"log_every_steps": log_every}
        self.events: list[str] = []
        self.nan_at: int | None = None
        self.told_at: int | None = None
        self.stop = StopRequest()
        self.run = on_this_rank(fields)
        events = self.events

        class Read(Outgoing):
            def read(self) -> torch.Tensor:
                if f"read {self.number}" not in events:
                    events.append(f"read {self.number}")
                return super().read()

        def launch(run: Any, stage: Any, step: int, is_stop_asked: bool = False, **_: Any) -> LaunchedStep:
            events.append(f"launch {step + 1}")
            one = launched(step, math.nan if step + 1 == self.nan_at else 1.0, float(is_stop_asked))
            numbers = Read(one.numbers.read())
            numbers.number = step + 1
            if step + 1 == self.told_at:
                self.stop.is_asked = True
            return LaunchedStep(step, numbers, one.statistics_shape, 0.0)

        monkeypatch.setattr(loop, "launch_step", launch)
        monkeypatch.setattr(loop, "_save", lambda run, done, must_succeed: events.append(f"save {done}"))

    def train(self) -> int:
        try:
            return loop._train(self.run, self.stop)
        finally:
            self.run.loader.close()


def test_a_step_that_is_not_logged_is_read_after_the_next_one_is_launched(corpus, tmp_path, monkeypatch):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=4)
    assert steps.train() == 0
    assert steps.events == [
        "launch 1", "launch 2", "read 1", "launch 3", "read 2", "launch 4", "read 3", "read 4", "save 4",
    ]  # fmt: skip


def test_without_a_capacity_a_step_is_read_before_the_next_one_is_launched(corpus, tmp_path, monkeypatch):
    """The next one could run out of memory on weights that are NaN, and hide the reason."""
    steps = Steps(corpus, tmp_path, monkeypatch, steps=4)
    model = steps.run.experiment.model.model_copy(update={"moe_expert_capacity_factor": None})
    steps.run.experiment = steps.run.experiment.model_copy(update={"model": model})
    steps.nan_at = 2
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        steps.train()
    assert steps.events == ["launch 1", "read 1", "launch 2", "read 2"]


def test_a_logged_step_is_read_at_once(corpus, tmp_path, monkeypatch):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=4, log_every=2)
    steps.train()
    assert steps.events[:6] == ["launch 1", "launch 2", "read 1", "read 2", "launch 3", "launch 4"]


@pytest.mark.parametrize("bad", [2, 3, 4])
def test_a_bad_step_is_never_saved_and_is_named_though_it_is_read_late(corpus, tmp_path, monkeypatch, bad):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=6, save_every_steps=2)
    steps.nan_at = bad
    with pytest.raises(TrainingError, match=f"step {bad}: loss nan"):
        steps.train()
    assert [event for event in steps.events if event.startswith("save")] == (["save 2"] if bad > 2 else [])
    assert f"launch {bad + 2}" not in steps.events


def test_a_stop_in_a_step_that_is_not_logged_is_obeyed_at_most_two_steps_later(corpus, tmp_path, monkeypatch):
    """Step 2 was launched before; step 3 tells the other ranks, step 4 hears of it."""
    steps = Steps(corpus, tmp_path, monkeypatch, steps=8)
    steps.told_at = 2
    assert steps.train() == 75
    assert steps.events[-3:] == ["read 3", "read 4", "save 4"]


def test_a_bad_step_is_not_saved_by_a_stop(corpus, tmp_path, monkeypatch):
    steps = Steps(corpus, tmp_path, monkeypatch, steps=8)
    steps.told_at, steps.nan_at = 2, 4
    with pytest.raises(TrainingError, match="step 4"):
        steps.train()
    assert not [event for event in steps.events if event.startswith("save")]
