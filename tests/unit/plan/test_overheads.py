"""Validation, saving and failures in the plan."""

from __future__ import annotations

from typing import Any

import pytest

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.costs import as_data, costs, rows
from hunyuan_pretrain.plan.counts import checkpoint_bytes, parameters
from hunyuan_pretrain.plan.hardware import load
from hunyuan_pretrain.plan.overheads import failures, pipelined_s
from hunyuan_pretrain.plan.timing import step_time
from tests.helpers.planned import hunyuan_large, measured_on_an_h200

H200 = load("H200-141GB")
SETS: dict[str, Any] = {"data": "web", "sets": [{"name": "code", "path": "code"}], "every_steps": 100}
LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 8,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 8,
    "expert_model_parallel_size": 8,
}


def one_gpu(**sections: Any) -> Experiment:
    return Experiment.model_validate(measured_on_an_h200().model_dump() | sections)


def beside(experiment: Experiment, ranks: int = 1) -> dict[str, Any]:
    data = as_data(costs(experiment, ranks, H200))
    return dict(data["stages"][0]["beside"])


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("uneven", [False, True])
def test_a_forward_pipeline_takes_as_long_as_a_simulated_one(ranks: int, chunks: int, uneven: bool) -> None:
    """A rank takes groups of as many micro-batches as there are ranks through its chunks in turn. With equal stages the
    formula is exact; else it is at most the simulated time, and within 10% of it."""
    forward = [1.0 + uneven * 0.3 * (stage % 3) for stage in range(ranks * chunks)]
    micro_batches = 12
    free, done = [0.0] * ranks, {}
    order = [
        (chunk, number)
        for first in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for number in range(first, first + ranks)
    ]
    waiting = [list(order) for _ in range(ranks)]
    while any(waiting):
        for rank in range(ranks):
            while waiting[rank]:
                chunk, number = waiting[rank][0]
                stage = chunk * ranks + rank
                if stage and (stage - 1, number) not in done:
                    break
                start = max(free[rank], done.get((stage - 1, number), 0.0))
                free[rank] = done[stage, number] = start + forward[stage]
                waiting[rank].pop(0)
    simulated = max(free)
    found = pipelined_s(forward, ranks, micro_batches)
    assert found <= simulated + 1e-9
    assert found == pytest.approx(simulated, rel=0.1 if uneven else 1e-9)


def test_a_validation_takes_a_third_of_training_on_as_many_tokens() -> None:
    """A step has a forward and a backward pass, twice as long; and the update."""
    experiment = one_gpu(evaluation=SETS | {"max_sequences": 4, "micro_batch_sequences": 2})
    (stage,) = experiment.stages
    step = step_time(experiment, stage, 1, H200)
    found = beside(experiment)
    assert 0.25 < found["validation_s"] / 2 / step.seconds < 0.34
    assert found["validation_share"] == pytest.approx(found["validation_s"] / 100 / step.seconds)
    twice = beside(one_gpu(evaluation=SETS | {"max_sequences": 8, "micro_batch_sequences": 2}))
    assert twice["validation_s"] == pytest.approx(2 * found["validation_s"])


def test_fp8_does_not_change_validation() -> None:
    plain, quantised = (
        beside(one_gpu(evaluation=SETS | {"max_sequences": 4}, precision={"fp8_recipe": recipe}))["validation_s"]
        for recipe in (None, "blockwise")
    )
    assert plain == quantised


def test_without_sets_validation_takes_no_time_and_without_a_limit_it_is_not_planned() -> None:
    none, unknown = one_gpu(), one_gpu(evaluation=SETS)
    assert beside(none)["validation_s"] == 0
    assert beside(unknown)["validation_s"] is None
    shown = {(row.group, row.name): (row.value, row.note) for row in rows(costs(unknown, 1, H200))}
    assert shown["time", "validation"] == ("not planned", "all sequences of the data; set evaluation.max_sequences")
    assert shown["run", "days with saving"][1] == "without validation"
    assert ("time", "validation") not in {(row.group, row.name) for row in rows(costs(none, 1, H200))}


def test_a_checkpoint_of_hunyuan_large() -> None:
    """5.4 TB, as in the guide: 14 bytes of each of 389e9 weights, 12 of a router's. 64 servers write it at 1 GB/s each
    in 85 seconds, and each GPU copies a 512th of it first."""
    experiment = hunyuan_large(parallel=LAYOUT, checkpoint={"save_every_steps": 250})
    size = checkpoint_bytes(experiment)
    count = parameters(experiment.model)
    assert size == 14 * count.total - 2 * count.router
    found = beside(experiment, 512)
    written = size / 64e9
    assert written < found["save_s"] < written + 2 * size / 512 / H200.host_copy_bytes_per_s
    step = step_time(experiment, experiment.stages[0], 512, H200)
    assert found["save_wait_s"] == pytest.approx(found["save_s"] - written), "for the copy"
    assert found["save_share"] == pytest.approx(found["save_wait_s"] / 250 / step.seconds)
    assert found["late_s"] == pytest.approx(written)
    waits = {"save_every_steps": 250, "async_save": False}
    found = beside(hunyuan_large(parallel=LAYOUT, checkpoint=waits), 512)
    assert (found["save_wait_s"], found["late_s"]) == (found["save_s"], 0.0)
    often = beside(hunyuan_large(parallel=LAYOUT, checkpoint={"save_every_steps": 1}), 512)
    assert often["save_wait_s"] == pytest.approx(2 * often["save_s"] - written - step.seconds), (
        "for the save before too"
    )


def test_a_stop_waits_for_the_launched_steps_or_the_save_in_flight_and_saves() -> None:
    (stage,) = one_gpu().stages
    step = step_time(one_gpu(), stage, 1, H200)
    for checkpoint, in_flight in (
        ({"save_every_steps": 50}, True),
        ({"save_every_steps": 50, "async_save": False}, False),
        ({"save_every_steps": None}, False),
    ):
        found = beside(one_gpu(checkpoint=checkpoint))
        before = max(4 * step.seconds, found["save_s"] if in_flight else 0.0)
        assert found["stop_s"] == pytest.approx(before + found["save_s"])
    twice = beside(one_gpu(checkpoint={"save_every_steps": None}, resilience={"rerun_every": 10}))
    assert twice["stop_s"] == pytest.approx(found["stop_s"] + step.timeline.seconds)


def test_failures_cost_half_an_interval_and_a_restart() -> None:
    """Llama 3's run: 419 interruptions in 54 days of 16,384 GPUs, by definition of the profile's figure."""
    found = failures(54 * 86400, 3600, 16_384, H200)
    assert found.count == pytest.approx(419, rel=0.02)
    assert found.lost_s == 1800 + 600
    assert found.seconds == found.count * 2400
    assert failures(54 * 86400, 3600, 16_384, H200, late_s=85).lost_s == 1800 + 85 + 600


def test_the_days_add_up() -> None:
    experiment = hunyuan_large(
        parallel=LAYOUT, checkpoint={"save_every_steps": 250}, evaluation=SETS | {"max_sequences": 1024}
    )
    found = costs(experiment, 512, H200)
    stage, run = found.stages
    data, shown = as_data(found), {(row.group, row.name): row.value for row in rows(found)}
    assert stage.beside is not None
    with_saving = stage.days * (1 + stage.beside.validation_share + stage.beside.save_share)
    assert stage.days_with_saving == pytest.approx(with_saving)
    assert shown["run", "days with saving"] == f"{with_saving:.3g}"
    lost = data["run"]["failures"] * data["run"]["failure_s"] / 86400
    assert data["run"]["failures"] == pytest.approx(with_saving * 24 * 512 / 50_000)
    assert shown["run", "days with failures"] == f"{with_saving + lost:.3g}"
    assert shown["run", "days"] == f"{run.days:.3g}"


def test_a_step_computed_twice_costs_its_passes_once_more() -> None:
    """Not the update, nor what is around the passes."""
    plain, twice = (hunyuan_large(parallel=LAYOUT, resilience={"rerun_every": every}) for every in (None, 50))
    step = step_time(plain, plain.stages[0], 512, H200)
    assert beside(plain, 512)["rerun_share"] == 0.0
    assert beside(twice, 512)["rerun_share"] == pytest.approx(step.timeline.seconds / step.seconds / 50)
    stage = costs(twice, 512, H200).stages[0]
    assert stage.beside is not None
    assert stage.days_with_saving == pytest.approx(stage.days * (1 + stage.beside.share))
    shown = {row.name: row.value for row in rows(costs(twice, 512, H200))}
    assert shown["computing twice"] == f"{stage.beside.rerun_share:.2%} more"
