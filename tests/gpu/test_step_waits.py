"""Launching a step never makes the host wait: CUDA itself raises where the host would. `make test-gpu` runs this."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hunyuan_pretrain.runtime.transfers import Incoming, Outgoing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def run(corpus: Any, tmp_path: Any, request: pytest.FixtureRequest) -> Any:
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.train import setup
    from tests.helpers.runs import experiment_fields

    parallel, measure_every = request.param
    fields = experiment_fields(
        corpus,
        tmp_path / "run",
        model__num_layers=2,
        model__hidden_size=64,
        model__ffn_hidden_size=128,
        model__moe_ffn_hidden_size=128,
        precision={"dtype": "bf16"},
        parallel=parallel,
    )
    fields["optimizer"]["measure_noise_scale_every_steps"] = measure_every
    fields["runtime"] |= {"probes": False, "device": "cuda"}
    run = setup.prepare(Experiment.model_validate(fields))
    yield run
    setup.leave(run)


@pytest.mark.parametrize(
    "run",
    [({}, None), ({"recompute": "cla_group"}, None), ({}, 1)],
    ids=["plain", "recomputed", "noise scale"],
    indirect=True,
)
def test_launching_a_step_never_makes_the_host_wait(run: Any) -> None:
    from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
    from hunyuan_pretrain.train.step import launch_step

    for step in range(2):  # kernels are loaded, state is made
        launch_step(run, run.schedule.stage(step), step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        apply_learning_rate(run, 2)
        launched = launch_step(run, run.schedule.stage(2), 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(launched.result().loss)


def test_copies_in_both_directions_arrive_whole() -> None:
    device = torch.device("cuda", 0)
    tensors = [torch.arange(5), torch.rand(7), torch.arange(12).view(3, 4), torch.zeros(0)]
    torch.cuda._sleep(10**8)  # the device is busy: the copies are only queued
    arrived = Incoming(tensors, device).take()
    back = [Outgoing(tensor * 2) for tensor in arrived]
    assert not any(outgoing.is_here for outgoing in back)
    for tensor, outgoing in zip(tensors, back, strict=True):
        assert torch.equal(outgoing.read(), tensor * 2)
