"""The loop's messages when a run cannot continue."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from hunyuan_pretrain.runtime.stop import StopRequest
from hunyuan_pretrain.train import TrainingError, loop
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields


def refusal(corpus, tmp_path, monkeypatch, **checkpoint) -> str:
    fields = experiment_fields(corpus, tmp_path / "run", model__num_layers=2, checkpoint=checkpoint)
    fields["runtime"] |= {"probes": False}
    run = on_this_rank(fields)
    monkeypatch.setattr(loop, "train_step", lambda *_: SimpleNamespace(loss=math.nan, grad_norm=1.0))
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
