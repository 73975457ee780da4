"""The fine-tuning experiments of configs/sft are legal and fit the GPUs in their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.rules import find_problems
from hunyuan_pretrain.plan.memory import host_missing, missing, peaks
from tests.helpers.recipes import CONFIGS, named_hardware

FILES = sorted((CONFIGS / "sft").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_fine_tuning_experiment_fits_its_gpus(path: Path) -> None:
    experiment, (hardware, gpus) = load_experiment(path), named_hardware(path)
    assert experiment.name == path.stem
    assert experiment.run_dir == f"runs/{path.stem}"
    assert experiment.parallel.world_size == gpus
    assert find_problems(experiment) == []
    for stage in experiment.stages:
        assert stage.task == "sft"
        found = peaks(experiment, stage, gpus)
        assert all(missing(peak, hardware) < 0 for peak in found)
        assert host_missing(found, hardware) < 0


def test_there_are_full_attention_only_and_lora() -> None:
    kinds = {load_experiment(path).tuning.is_partial for path in FILES}
    assert kinds == {True, False}
    assert {load_experiment(path).tuning.lora is not None for path in FILES} == {True, False}
