"""The host launches a whole step without waiting for the device. Counted on the CPU by the operators called;
tests/gpu/test_step_waits.py asks CUDA."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
from hunyuan_pretrain.train.step import launch_step
from tests.helpers.host_waits import Operations
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields

MICRO_BATCHES = 4
READ_ON_THE_HOST = {"tolist": MICRO_BATCHES}
"""The boundaries of the documents of each micro-batch, which are read before they are sent."""
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def looks_of_step_2(corpus: Any, tmp_path: Any, **changes: Any) -> Counter[str]:
    """The first step makes the optimizer's state. The second is logged."""
    fields = experiment_fields(corpus, tmp_path, model__num_layers=2, **changes)
    run = on_this_rank(fields)
    launch_step(run, run.schedule.stage(0), 0)
    with Operations() as operations:
        apply_learning_rate(run, 1)
        launched = launch_step(run, run.schedule.stage(1), 1, is_logged=True)
    run.loader.close()
    assert launched.result().num_target_tokens > 0
    return operations.looks


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": {"dtype": "bf16"}, "parallel": OVERLAP | {"recompute": "cla_group"}},
        {"parallel": {"use_distributed_optimizer": False, "recompute": "selective"}},
        {"precision": {"dtype": "bf16", "fp8_recipe": "delayed"}},
        {"precision": {"dtype": "bf16", "fp8_recipe": "blockwise"}, "optimizer": {"lr": 1e-2, "clip_grad": 0.0}},
        {"optimizer": {"lr": 1e-2, "measure_noise_scale_every_steps": 1}},
    ],
    ids=["fp32", "bf16 overlapped", "plain optimizer", "delayed", "blockwise", "noise scale"],
)
def test_a_whole_step_never_makes_the_host_wait(corpus, tmp_path, changes):
    assert looks_of_step_2(corpus, tmp_path, **changes) == READ_ON_THE_HOST


def test_an_offloaded_optimizer_waits_for_the_norm(corpus, tmp_path):
    looks = looks_of_step_2(corpus, tmp_path, optimizer={"lr": 1e-2, "cpu_offload_fraction": 0.5})
    assert looks - Counter(READ_ON_THE_HOST), "its update on the host needs the gradients"
