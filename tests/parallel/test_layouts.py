"""N ranks equal one rank: losses, routing, every gradient, the gradient norm and every parameter, on gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.layouts import Trace, merge, trace_layouts
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import experiment_fields

pytestmark = pytest.mark.slow
STEPS = 2
RELATIVE = 2e-5
"""Largest difference allowed in fp32, over the largest entry of a tensor: layouts differ in the order of their sums only."""

DENSE = {"use_distributed_optimizer": False}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # name: ranks, micro_batch_sequences, fields of parallel
    "one rank": (1, 8, DENSE),
    "one rank, 8 micro-batches": (1, 1, {}),
    "one rank, recompute": (1, 4, {"recompute": "cla_group"}),
    "data parallel": (2, 4, DENSE),
    "data parallel, distributed optimizer": (2, 4, {}),
    "data parallel, all overlapped": (2, 1, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "expert parallel": (2, 4, {"expert_model_parallel_size": 2} | DENSE),
    "expert parallel, distributed optimizer": (2, 2, {"expert_model_parallel_size": 2}),
    "expert parallel, overlapped, recompute": (
        2,
        2,
        {"expert_model_parallel_size": 2, "overlap_grad_reduce": True, "recompute": "cla_group"},
    ),
}
MODELS: dict[str, dict[str, Any]] = {
    "recycling": {},
    "dropless": {"moe_expert_capacity_factor": None, "recycle_routing": False},
    "top 2, dropping, untied": {
        "moe_router_topk": 2,
        "recycle_routing": False,
        "share_embeddings_and_output_weights": False,
        "moe_z_loss_coeff": 0.01,
    },
}
ALL = [("recycling", layout) for layout in LAYOUTS]
ALL += [(model, layout) for model in MODELS if model != "recycling" for layout in ("one rank", "expert parallel, distributed optimizer")]
BF16 = ("recycling, bf16", "expert parallel, distributed optimizer")


def fields(corpus: Path, run_dir: Path, model: str, layout: str) -> dict[str, Any]:
    _, micro_batch, parallel = LAYOUTS[layout]
    changes = {f"model__{key}": value for key, value in MODELS[model.removesuffix(", bf16")].items()}
    experiment = experiment_fields(corpus, run_dir, STEPS, parallel=parallel, stages__micro_batch_sequences=micro_batch, **changes)
    # Adam's first step divides a gradient by its own size: without a large epsilon the sign of noise would be an update
    experiment["optimizer"] |= {"adam_eps": 1e-3, "clip_grad": 0.5}
    experiment["precision"]["dtype"] = "bf16" if model.endswith("bf16") else "fp32"
    return experiment


@pytest.fixture(scope="module")
def traces(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Trace]:
    """All layouts of as many ranks in one job."""
    run_dir, found = tmp_path_factory.mktemp("runs"), {}
    for world_size in (1, 2):
        cases = [case for case in [*ALL, BF16] if LAYOUTS[case[1]][0] == world_size]
        experiments = [fields(corpus, run_dir / f"{world_size}_{number}", *case) for number, case in enumerate(cases)]
        ranks = run_ranks(world_size, trace_layouts, experiments, STEPS)
        found |= {case: merge([rank[number] for rank in ranks]) for number, case in enumerate(cases)}
    return found


def assert_close(actual: np.ndarray, expected: np.ndarray, name: str) -> None:
    assert actual.shape == expected.shape, name
    scale = np.abs(expected).max()
    assert scale > 0, f"{name} is zero, which compares nothing"
    difference = np.abs(actual - expected).max() / scale
    assert difference <= RELATIVE, f"{name}: differs by {difference:.2e} of its largest entry"


@pytest.mark.parametrize(("model", "layout"), [case for case in ALL if case[1] != "one rank"], ids=lambda value: value)
def test_layout_equals_one_rank(traces, model, layout):
    expected, actual = traces[model, "one rank"], traces[model, layout]
    for step in range(STEPS):
        for key in ("loss", "balance_loss", "grad_norm"):
            found, wanted = actual.records[step][key], expected.records[step][key]
            assert found == pytest.approx(wanted, rel=RELATIVE), f"step {step}: {key}"
        assert actual.records[step]["target_tokens"] == expected.records[step]["target_tokens"]
        assert actual.gradients[step].keys() == expected.gradients[step].keys()
        for name, gradient in expected.gradients[step].items():
            assert_close(actual.gradients[step][name], gradient, f"step {step}: gradient of {name}")
    for name, parameter in expected.parameters.items():
        assert_close(actual.parameters[name], parameter, name)


@pytest.mark.parametrize(("model", "layout"), [case for case in ALL if case[1] != "one rank"], ids=lambda value: value)
def test_every_token_goes_to_the_same_expert_under_every_layout(traces, model, layout):
    """Recycled tokens included, whose draw must not know the layout."""
    expected, actual = traces[model, "one rank"], traces[model, layout]
    assert len(expected.routing) == STEPS * 4 * 16, "steps x layers x routing groups"
    assert actual.routing.keys() == expected.routing.keys()
    for place, experts in expected.routing.items():
        assert np.array_equal(actual.routing[place], experts), place
    for name in ("overflow_share", "recycled_share", "dropped_share", "expert_load"):
        assert [record[name] for record in actual.records] == [record[name] for record in expected.records]


def test_the_comparison_meets_what_it_is_about(traces):
    """Tokens are recycled and dropped, gradients are clipped, parameters move."""
    recycling, dropping = traces["recycling", "one rank"].records[0], traces["top 2, dropping, untied", "one rank"].records[0]
    assert min(recycling["recycled_share"]) > 0.01
    assert min(dropping["dropped_share"]) > 0.01
    assert traces["dropless", "one rank"].records[0]["mean_dropped_share"] == 0
    assert recycling["grad_norm"] > 0.5
    after, gradients = traces["recycling", "one rank"].parameters, traces["recycling", "one rank"].gradients
    assert all(not np.array_equal(gradients[0][name], gradients[1][name]) for name in after)


def test_gradient_norm_is_that_of_the_gradients(traces):
    """Each expert counted once: under expert parallelism every rank knows a part of them only."""
    for trace in traces.values():
        for step, gradients in enumerate(trace.gradients):
            norm = np.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in gradients.values()))
            assert trace.records[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_bf16_is_near_fp32(traces):
    """Smoke: weights in bf16, gradients and main weights in fp32."""
    bf16, fp32 = traces[BF16], traces["recycling", BF16[1]]
    assert bf16.records[0]["loss"] == pytest.approx(fp32.records[0]["loss"], rel=0.01)
    assert bf16.records[1]["loss"] == pytest.approx(fp32.records[1]["loss"], rel=0.03)
    assert bf16.records[0]["loss"] != fp32.records[0]["loss"]
