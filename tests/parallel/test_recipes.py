"""Every shipped recipe trains: one step of its structure, scaled down by the rule of `scaled_down`."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.ranks import fork_ranks
from tests.helpers.recipes import RECIPES, scaled_down
from tests.helpers.runs import VOCAB_SIZE

pytestmark = pytest.mark.slow


def structure(experiment: Experiment) -> str:
    """What a scaled-down recipe is made of, without names, rates and coefficients: many differ only in sizes."""
    apart = {
        "name": True,
        "run_dir": True,
        "model": {"moe_aux_loss_coeff"},
        "optimizer": {"lr"},
        "stages": {"__all__": {"name", "rope_alpha"}},
    }
    return str(experiment.model_dump(exclude=apart))


class Step(NamedTuple):
    loss: float
    grad_norm: float
    unchanged: list[str]
    """Matrices of this rank that are what they were."""


def train_one_step_each(experiments: list[Experiment]) -> list[Step]:
    """On every rank: the first step of each run."""
    from hunyuan_pretrain.model.fp8.parameters import unquantised
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
    from hunyuan_pretrain.train.optimizer import gather_parameters
    from hunyuan_pretrain.train.step import train_step

    found = []
    for experiment in experiments:
        gc.collect()  # the previous run, kept alive by reference cycles, holds process groups with their own threads
        run = setup.prepare(experiment)
        with setup.left_at_the_end(run):
            matrices = {
                f"{number} {name}": value
                for number, chunk in enumerate(run.chunks)
                for name, value in chunk.named_parameters()
                if value.dim() > 1
            }
            before = {name: unquantised(value.detach()).clone() for name, value in matrices.items()}
            apply_learning_rate(run, 0)
            result = train_step(run, run.schedule.stage(0), 0)
            gather_parameters(run.wrapped)
            same = [name for name, value in matrices.items() if unquantised(value.detach()).equal(before[name])]
            found.append(Step(result.loss, result.grad_norm, same))
    return found


@pytest.fixture(scope="module")
def steps(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Step]]:
    """Structure -> the first step, by rank."""
    folder = tmp_path_factory.mktemp("recipes")
    unique: dict[str, Experiment] = {}
    for path in RECIPES:
        small = scaled_down(load_experiment(path), corpus, folder / path.stem)
        unique.setdefault(structure(small), small)
    found: dict[str, list[Step]] = {}
    for world in sorted({small.parallel.world_size or 1 for small in unique.values()}):
        jobs = {key: small for key, small in unique.items() if small.parallel.world_size == world}
        ranks = fork_ranks(world, train_one_step_each, list(jobs.values()), timeout_s=600)
        found |= {key: [of_rank[number] for of_rank in ranks] for number, key in enumerate(jobs)}
    return found


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_one_step_of_every_recipe_trains(
    path: Path, steps: dict[str, list[Step]], corpus: Path, tmp_path: Path
) -> None:
    small = scaled_down(load_experiment(path), corpus, tmp_path)
    rules.check(small)
    by_rank = steps[structure(small)]
    assert len({(step.loss, step.grad_norm) for step in by_rank}) == 1, "the ranks report the same numbers"
    # weights of standard deviation 0.02 predict nearly evenly: the loss of an even guess, within what they add
    assert by_rank[0].loss == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    assert 0 < by_rank[0].grad_norm < math.inf
    assert [step.unchanged for step in by_rank] == [[]] * len(by_rank)


def test_scaling_down_keeps_every_kind_of_parallelism_and_recompute() -> None:
    """Together the scaled-down recipes use each axis, format and recompute option that a recipe uses."""
    whole = [load_experiment(path) for path in RECIPES]
    small = [scaled_down(experiment, Path("corpus"), Path("run")) for experiment in whole]

    def used(experiments: list[Experiment]) -> set[Any]:
        return {
            used
            for experiment in experiments
            for used in (
                *(name for name, value in experiment.parallel if name.endswith("parallel_size") and value > 1),
                experiment.parallel.recompute,
                experiment.precision.fp8_recipe,
                experiment.precision.fp8_parameters,
                experiment.optimizer.cpu_offload_fraction,
                experiment.optimizer.exp_avg_dtype,
            )
        }

    assert used(whole) == used(small)
    assert max(experiment.parallel.world_size or 1 for experiment in small) == 4
