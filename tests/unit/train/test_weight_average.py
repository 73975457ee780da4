"""optimizer.ema_decay: the exponential moving average of the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import read_marker
from hunyuan_pretrain.checkpoint.optimizer_state import bytes_on_host, full_moments
from hunyuan_pretrain.checkpoint.stored_weights import StoredWeights
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.counts import checkpoint_bytes, parameters
from hunyuan_pretrain.plan.saving import bytes_copied
from hunyuan_pretrain.train import weight_average
from hunyuan_pretrain.train.as_planned import held, planned
from hunyuan_pretrain.train.step import train_step
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields

DECAY, STEPS = 0.75, 4
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "without the distributed optimizer": {"parallel": {"use_distributed_optimizer": False}},
    "bf16": {"precision": {"dtype": "bf16"}},
    "split": {"precision": {"dtype": "bf16"}, "optimizer__use_precision_aware_optimizer": True},
    "half offloaded": {"precision": {"dtype": "bf16"}, "optimizer__cpu_offload_fraction": 0.5},
    "attention only": {"tuning": {"trainable": ["*.self_attention.*"]}},
}


def fields(corpus: Path, run_dir: Path, decay: float | None = DECAY, **changes: Any) -> dict[str, Any]:
    optimizer = {"lr": 1e-2, "ema_decay": decay}
    return experiment_fields(corpus, run_dir, STEPS, optimizer=optimizer, model__num_layers=2, **changes)


def states(run: Any) -> dict[str, dict[str, np.ndarray]]:
    """Main weights and averages in fp32, by kind and name; no average of frozen weights."""
    found: dict[str, dict[str, np.ndarray]] = {"weight": {}, "ema": {}}
    weights = dict(run.chunks[0].named_parameters())
    for name, tensors, _ in full_moments(run.chunks, run.optimizer):
        found["weight"][name] = tensors.get("main", weights[name].detach()).float().numpy().copy()
        if "ema" in tensors:
            found["ema"][name] = tensors["ema"].numpy().copy()
    return found


def train(run: Any, steps: range) -> None:
    for step in steps:
        train_step(run, run.schedule.stage(step), step)


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_that_of_the_recorded_weights(corpus: Path, tmp_path: Path, case: str, monkeypatch: Any) -> None:
    """In fp64 by numpy; kept, planned and saved in as many bytes as it has; and resumed bit by bit."""
    monkeypatch.setattr(weight_average, "JOINED", 100)  # several parts of a weight
    run, again = (on_this_rank(fields(corpus, tmp_path / "run", **CASES[case])) for _ in range(2))
    averages = {name: weight.astype(np.float64) for name, weight in states(run)["weight"].items()}
    for step in range(STEPS):
        train(run, range(step, step + 1))
        found = states(run)
        for name, weight in found["weight"].items():
            averages[name] = DECAY * averages[name] + (1 - DECAY) * weight
        if step == 1:
            folder = save_load.save(tmp_path / "run", 2, run.chunks, run.optimizer, None)
            save_load.load(folder, again.chunks, again.optimizer)
            stored = StoredWeights(folder, sizes(folder), "ema")
            assert {name: stored[name].numpy().tobytes() for name in found["ema"]} == as_bytes(found["ema"])
    trained = {name for name, parameter in run.chunks[0].named_parameters() if parameter.requires_grad}
    assert found["ema"].keys() == trained
    for name, average in found["ema"].items():
        # each of the 4 steps rounds to fp32 a few times
        np.testing.assert_allclose(average, averages[name], rtol=0, atol=4e-7 * np.abs(averages[name]).max())
        assert (average != found["weight"][name]).any(), "it lags behind"
    assert held(run) == planned(run.experiment, [run.schedule.stage(0)], 1, 0, False).kept
    train(again, range(2, STEPS))
    for kind, tensors in states(again).items():
        assert as_bytes(tensors) == as_bytes(found[kind]), kind
    for one in (run, again):
        one.loader.close()


def test_training_does_not_read_the_average(corpus: Path, tmp_path: Path) -> None:
    ends = []
    for decay in (None, DECAY):
        run = on_this_rank(fields(corpus, tmp_path / "run", decay))
        train(run, range(2))
        run.loader.close()
        ends.append(as_bytes(states(run)["weight"]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("case", ["fp32", "split"])
def test_it_begins_with_the_weights_of_the_checkpoint_and_is_dropped_without_a_decay(
    corpus: Path, tmp_path: Path, case: str
) -> None:
    without, late, twice = (
        on_this_rank(fields(corpus, tmp_path / "run", decay, **CASES[case])) for decay in (None, DECAY, None)
    )
    train(without, range(1))
    folder = save_load.save(tmp_path / "run", 1, without.chunks, without.optimizer, None)
    with pytest.raises(CheckpointError, match=r"no moving average .* optimizer\.ema_decay was null when it was saved"):
        StoredWeights(folder, sizes(folder), "ema")
    train(late, range(1))  # an average of its own, which the checkpoint replaces
    save_load.load(folder, late.chunks, late.optimizer)
    start = states(late)
    assert as_bytes(start["ema"]) == as_bytes(start["weight"])
    train(late, range(1, 2))
    found = states(late)
    for name, average in found["ema"].items():
        expected = DECAY * start["weight"][name].astype(np.float64) + (1 - DECAY) * found["weight"][name]
        np.testing.assert_allclose(average, expected, rtol=0, atol=1e-7 * np.abs(expected).max())  # one fp32 rounding
    folder = save_load.save(tmp_path / "run", 2, late.chunks, late.optimizer, None)
    save_load.load(folder, twice.chunks, twice.optimizer)
    dropped = states(twice)
    assert as_bytes(dropped["weight"]) == as_bytes(found["weight"])
    assert dropped["ema"] == {}
    train(twice, range(2, 3))
    assert held(twice) == planned(twice.experiment, [twice.schedule.stage(0)], 1, 0, False).kept
    for one in (without, late, twice):
        one.loader.close()


def test_the_plan_counts_it_in_checkpoints(corpus: Path, tmp_path: Path) -> None:
    without, whole = (Experiment.model_validate(fields(corpus, tmp_path, decay)) for decay in (None, DECAY))
    trained = parameters(whole.model).total
    assert checkpoint_bytes(whole) - checkpoint_bytes(without) == 4 * trained
    run = on_this_rank(fields(corpus, tmp_path))
    assert bytes_copied(whole, 1, 0) == bytes_on_host(run.chunks) > bytes_copied(without, 1, 0) + 4 * trained
    run.loader.close()


def sizes(folder: Path) -> dict[str, int]:
    return {name: file["bytes"] for name, file in read_marker(folder)["files"].items()}


def as_bytes(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in tensors.items()}
