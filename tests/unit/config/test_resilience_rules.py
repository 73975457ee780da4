"""What resilience settings refuse, and what a change of them means for a run that resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.changes import Kind, sort
from hunyuan_pretrain.config.load import read, validate
from hunyuan_pretrain.config.schema import Experiment

DEMO = Path(__file__).parents[3] / "configs/dev/demo_cpu.yaml"
BACK = ["resilience.on_spike=rollback", "checkpoint.save_every_steps=50"]
UPDATE = "resilience.spike_update_norm_sigmas=6"


def problems(*overrides: str) -> list[str]:
    return [str(problem) for problem in rules.find_problems(validate(Experiment, read(DEMO, overrides)), None)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["resilience.on_spike=skip", "resilience.spike_loss_sigmas=null", "resilience.spike_grad_norm_sigmas=null"],
            "resilience.on_spike=skip: without spike_loss_sigmas, spike_grad_norm_sigmas and spike_update_norm_sigmas",
        ),
        ([UPDATE], "spike_update_norm_sigmas=6: without on_spike it is not computed"),
        (
            [UPDATE, "resilience.on_spike=skip", "optimizer.cpu_offload_fraction=0.5"],
            "optimizer.cpu_offload_fraction=0.5: moments are on the host",
        ),
        (
            ["resilience.on_nonfinite=rollback", "checkpoint.save_every_steps=null"],
            "resilience.on_nonfinite=rollback: checkpoint.save_every_steps=null saves only the end of the run",
        ),
        (
            [*BACK, "checkpoint.keep_last=2"],
            "checkpoint.keep_last=2: a roll-back by resilience.rollback_steps=100 needs the last 3 checkpoints with "
            "checkpoint.save_every_steps=50 (set it to at least 3)",
        ),
        (
            ["resilience.rerun_every=10", "runtime.deterministic=false"],
            "resilience.rerun_every=10: runtime.deterministic=false allows operations that give other bits",
        ),
        (
            ["resilience.rerun_every=10", "runtime.cuda_graphs=true"],
            "resilience.rerun_every=10: runtime.cuda_graphs=true: a recorded step holds its reductions",
        ),
    ],
)
def test_a_policy_that_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    found = problems(*overrides)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        ["resilience.on_nonfinite=skip"],
        ["resilience.on_spike=stop", UPDATE],
        [*BACK, "checkpoint.keep_last=3"],
        [*BACK, "checkpoint.keep_last=1", "resilience.rollback_steps=1"],
        [*BACK, "checkpoint.keep_last=null"],
        ["resilience.rerun_every=10"],
    ],
)
def test_a_policy_that_works_is_accepted(overrides: list[str]) -> None:
    assert not [problem for problem in problems(*overrides) if "resilience" in problem or "keep_last" in problem]


def test_a_changed_policy_is_recorded_and_the_check_of_hardware_is_not() -> None:
    assert sort("resilience.on_spike")[0] == Kind.recorded
    assert sort("resilience.rerun_every")[0] == Kind.harmless
