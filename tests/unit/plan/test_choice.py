"""The chosen layout is legal, fits, and is the fastest by the plan of those that are tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.choice import RECOMPUTE, fastest, fits, highest_peak, smallest_cluster
from hunyuan_pretrain.plan.hardware import load
from hunyuan_pretrain.plan.memory import TO_SPARE
from hunyuan_pretrain.plan.timing import step_time

CONFIGS = Path(__file__).parents[3] / "configs"
H100 = load("H100-80GB")


def without_layout(name: str, *overrides: str) -> Experiment:
    """A recipe on any number of ranks."""
    experiment = load_experiment(CONFIGS / "pretrain" / f"{name}.yaml", overrides)
    return experiment.model_copy(update={"parallel": type(experiment.parallel)(), "optimizer": experiment.optimizer})


@pytest.mark.parametrize(("name", "gpus"), [("hunyuan_300m_h100x1", 1), ("hunyuan_7b_h100x64", 64)])
def test_the_choice_is_legal_fits_and_is_no_slower_than_the_recipe(name: str, gpus: int) -> None:
    recipe = load_experiment(CONFIGS / "pretrain" / f"{name}.yaml")
    found = fastest(without_layout(name), gpus, H100)
    assert found is not None
    assert rules.find_problems(found, gpus) == []
    assert highest_peak(found, gpus).total <= (1 - TO_SPARE) * H100.memory_bytes
    seconds = [step_time(one, one.stages[-1], gpus, H100).seconds for one in (found, recipe)]
    assert seconds[0] <= seconds[1]


def test_two_model_chunks_are_chosen_where_they_fit_and_shorten_the_step() -> None:
    b200 = load("B200")
    found = fastest(without_layout("hunyuan_large_b200x512"), 512, b200)
    assert found is not None
    assert found.parallel.virtual_pipeline_model_parallel_size == 2
    assert fits(found, 512, b200)
    parallel = found.parallel.model_copy(update={"virtual_pipeline_model_parallel_size": 1})
    one = found.model_copy(update={"parallel": parallel})
    assert found.stages == one.stages
    seconds = [step_time(each, each.stages[-1], 512, b200).seconds for each in (found, one)]
    assert seconds[0] < seconds[1]


def test_no_less_recomputation_would_fit() -> None:
    found = fastest(without_layout("hunyuan_7b_h100x8"), 8, H100)
    assert found is not None
    less = RECOMPUTE[RECOMPUTE.index(found.parallel.recompute) - 1]
    parallel = found.parallel.model_copy(update={"recompute": less})
    assert not fits(found.model_copy(update={"parallel": parallel}), 8, H100)


def test_the_optimizer_goes_to_the_host_only_if_nothing_else_fits() -> None:
    one_server = without_layout("hunyuan_7b_h100x8", "optimizer.cpu_offload_fraction=0")
    assert (found := fastest(one_server, 8, H100)) is not None
    assert found.optimizer.cpu_offload_fraction == 1
    assert (found := fastest(one_server, 64, H100)) is not None
    assert found.optimizer.cpu_offload_fraction == 0


def test_a_batch_that_the_ranks_cannot_share_becomes_the_nearest_one() -> None:
    even = without_layout("hunyuan_7b_h100x64")
    stages = tuple(stage.model_copy(update={"global_batch_sequences": 1000}) for stage in even.stages)
    found = fastest(even.model_copy(update={"stages": stages}), 64, H100)
    assert found is not None
    ranks = 64 // found.parallel.pipeline_model_parallel_size
    assert {stage.global_batch_sequences for stage in found.stages} == {round(1000 / ranks) * ranks}


def test_what_does_not_fit_has_a_smallest_cluster() -> None:
    mid = without_layout("hunyuan_7b_h100x64")
    assert fastest(mid, 1, H100) is None
    fewest = smallest_cluster(mid, H100)
    assert fewest is not None
    assert fastest(mid, fewest, H100) is not None
    assert fastest(mid, fewest // 2, H100) is None
    assert smallest_cluster(mid, H100.model_copy(update={"memory_bytes": 2e9}), most=64) is None
