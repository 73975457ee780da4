"""FP8 recipes under parallel layouts: N ranks quantise as one rank does, and a run that stops goes on bit by bit.

Rounding to FP8 is a step function: where layouts add up in another order, an operand may differ in its last bit of fp32 and one value in
some ten thousand is rounded to the other side. So a layout is not compared within the tolerance of test_layouts, but with the error that
the recipe itself makes: it has to be closer to one rank than CLOSENESS of the distance between one rank with the recipe and without. A
scale that is not agreed on moves every value, and is as far away as the recipe itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import experiment_fields

pytestmark = pytest.mark.slow

STEPS = 3
"""A delayed scale is 1 in the first step, and known of every tensor after the second."""
CLOSENESS = 0.1
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "ep": {"expert_model_parallel_size": 2},
    "etp": {"expert_tensor_parallel_size": 2},
    "tp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp ep": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
    "pp": {"pipeline_model_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
    "recompute": {"recompute": "cla_group", "expert_model_parallel_size": 2},
}
OWN_SCALES = ("ep", "etp", "tp", "tp ep", "cp", "recompute")
"""Layouts in which a rank has another part of a tensor, of which tensorwise takes a scale of its own, as Transformer Engine does."""
CASES = [(recipe, layout) for recipe in RECIPES for layout in LAYOUTS if recipe != "tensorwise" or layout not in OWN_SCALES]


def fields(corpus: Path, run_dir: Path, recipe: str | None, **changes: Any) -> dict[str, Any]:
    """A model whose shards on two ranks are whole blocks of every recipe."""
    found = experiment_fields(corpus, run_dir, steps=STEPS + 1)
    found["model"] |= {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "kv_channels": 64,
        "ffn_hidden_size": 256,
        "moe_ffn_hidden_size": 256,
        "moe_routing_group_tokens": 32,
        "init_method_std": 0.05,
    }
    found["precision"] = {"dtype": "fp32", "fp8_recipe": recipe}
    if recipe == "delayed":
        found["precision"]["fp8_amax_history_len"] = 4
    found["optimizer"] |= {"adam_eps": 1e-3}
    found["parallel"] = changes
    found["evaluation"] = {"data": None}
    found["logging"] |= {"wandb": "disabled", "tensorboard": False}
    return found


def gradients_of_all(work: list[dict[str, Any]]) -> list[list[dict[str, np.ndarray]]]:
    """Gradients of each step of each experiment, by name, on rank 0."""
    from hunyuan_pretrain.train.parity import trace_layout

    return [[trace.gradients for trace in trace_layout(Experiment.model_validate(one), STEPS)] for one in work]


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, list[dict[str, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("one")
    names = [None, *RECIPES]
    work = [fields(corpus, folder / str(name), name) for name in names]
    return dict(zip(names, run_ranks(1, gradients_of_all, work)[0], strict=True))


@pytest.fixture(scope="module")
def two_ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("two")
    work = [fields(corpus, folder / f"{recipe} {layout}", recipe, **LAYOUTS[layout]) for recipe, layout in CASES]
    return dict(zip(CASES, run_ranks(2, gradients_of_all, work)[0], strict=True))


def distances(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Relative distance in the last step, of each weight that an FP8 product has."""
    names = [name for name in b[-1] if ".linear_" in name]
    return {name: float(np.linalg.norm(a[-1][name] - b[-1][name]) / np.linalg.norm(b[-1][name])) for name in names}


@pytest.mark.parametrize(("recipe", "layout"), CASES)
def test_two_ranks_quantise_as_one(one_rank, two_ranks, recipe: str, layout: str) -> None:
    of_the_recipe = distances(one_rank[recipe], one_rank[None])
    of_the_layout = distances(two_ranks[recipe, layout], one_rank[recipe])
    assert min(of_the_recipe.values()) > 1e-3, "every product is quantised"
    far = {name: (found, of_the_recipe[name]) for name, found in of_the_layout.items() if found > CLOSENESS * of_the_recipe[name]}
    assert not far


def train_and_go_on(corpus: Path, folder: Path, saved: dict[str, Any], resumed: dict[str, Any]) -> list[Any]:
    """Gradients of steps 3 and 4 of a run of `saved`, and of `resumed` from its checkpoint after step 2; and the scales at their ends."""
    from hunyuan_pretrain.checkpoint import save_load
    from hunyuan_pretrain.model.fp8 import scaling_state
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.parity import trace_steps

    found = []
    for parallel in (saved, resumed):
        run = setup.prepare(Experiment.model_validate(fields(corpus, folder, "delayed", **parallel)))
        if not found:
            trace_steps(run, range(2))
            save_load.save(run.run_dir, 2, run.chunks, run.optimizer, None)
        else:
            assert run.first_step == 2, "it resumes"
        gradients = [trace.gradients for trace in trace_steps(run, range(2, 4))]
        found.append((gradients, {name: tensor.numpy().copy() for name, tensor in scaling_state(run.chunks).items()}))
        setup.leave(run)
    return found


def test_a_run_with_delayed_scales_goes_on_bit_by_bit(corpus, tmp_path) -> None:
    layout = LAYOUTS["tp ep"]
    for (gradients, scales), (resumed_gradients, resumed_scales) in run_ranks(2, train_and_go_on, corpus, tmp_path, layout, layout):
        assert [*scales] == [*resumed_scales]
        assert any((scale != 1).all() for name, scale in scales.items() if name.endswith("scale"))
        for name, scale in scales.items():
            np.testing.assert_array_equal(resumed_scales[name], scale, err_msg=name)
        for step, resumed_step in zip(gradients, resumed_gradients, strict=True):
            for name, gradient in step.items():
                np.testing.assert_array_equal(resumed_step[name], gradient, err_msg=name)


def test_delayed_scales_follow_their_tensors_to_another_layout(corpus, tmp_path) -> None:
    """From experts divided over the ranks to a pipeline: every layer and expert finds its own history again."""
    results = run_ranks(2, train_and_go_on, corpus, tmp_path, LAYOUTS["ep"], LAYOUTS["pp"])
    before = [scales for (_, scales), _ in results]
    after: dict[str, np.ndarray] = {}
    for _, (_, scales) in results:
        after |= scales
    assert set(after) == set(before[0])
    for name, scale in after.items():
        whole = np.concatenate([ranks[name] for ranks in before], axis=-1) if ".experts." in name else before[0][name]
        assert scale.shape == whole.shape
        # two steps after the change: the same up to the order of sums
        np.testing.assert_allclose(scale, whole, rtol=1e-3, atol=1e-12, err_msg=name)
