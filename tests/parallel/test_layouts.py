"""N ranks equal one rank, on gloo: losses, routing, activations, every gradient, the gradient norm, every parameter and
moment.

A few layouts always run. `make test-layouts` runs all of them: every legal combination of sizes, sparsely crossed with
everything else that must not change the result, and random models under random layouts.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.layouts import (
    CONTEXT_PARALLEL_SIZES,
    LARGEST_WORLD,
    MODELS,
    SIZES,
    VARIANTS,
    Comparison,
    Comparisons,
    Layout,
    every_product,
    pairs,
    random_layout,
    sparsely_crossed,
)

pytestmark = pytest.mark.slow

ALWAYS = [
    Layout(micro_batch=1, recompute="cla_group"),
    Layout(overlap="everything", recompute="selective"),
    Layout(dp=2, micro_batch=4, later_micro_batch=1, overlap="everything"),
    Layout(dp=2, ep=2, model="dropless", recompute="selective"),
    Layout(dp=2, etp=2, optimizer="half offloaded", overlap="everything"),
    Layout(dp=2, etp=2, model="top 2", optimizer="plain"),
    Layout(tp=2, optimizer="plain"),
    Layout(tp=2, ep=2, recompute="cla_group"),
    Layout(tp=2, etp=2, model="dropless", overlap="gradients", recompute="swiglu+norms"),
    Layout(cp=2, recompute="cla_group", model="4 key/value heads"),
    Layout(cp=2, ep=2, attention="all_to_all", model="top 2"),
    Layout(pp=2, optimizer="plain", pipeline=(2, 6), model="top 2"),
    Layout(pp=2, micro_batch=4, later_micro_batch=1, overlap="gradients"),
    Layout(pp=2, vpp=2, micro_batch=1, overlap="everything", recompute="selective"),
    Layout(tp=2, pp=2, ep=2),
    Layout(tp=2, dp=2, ep=2, etp=2, model="top 2", overlap="everything", recompute="selective+norms"),
    Layout(pp=2, vpp=2, dp=2, ep=2, micro_batch=1, optimizer="plain", recompute="cla_group"),
    Layout(tp=2, cp=2, ep=4),
]
ALWAYS = [layout for layout in ALWAYS if layout.cp in CONTEXT_PARALLEL_SIZES]
BF16 = [Layout(tp=2, ep=2, model="bf16"), Layout(pp=2, model="bf16", optimizer="plain")]
PRODUCTS = list(every_product())
ALL = sparsely_crossed(layout for layout in PRODUCTS if not layout.problems())
RANDOM_ALWAYS = [random_layout(seed, 2) for seed in range(6)]
RANDOM_ALL = [random_layout(seed, 4) for seed in range(24)]


@pytest.fixture(scope="module")
def comparisons(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparisons:
    """Comparisons of every layout that a selected test of this file has as its parameter, so that layouts of one world
    size share a job."""
    selected = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    layouts = [value for item in selected for value in item.callspec.params.values() if isinstance(value, Layout)]
    return Comparisons(corpus, tmp_path_factory.mktemp("layouts"), layouts)


def check(comparisons: Comparisons, layout: Layout) -> None:
    compared, reference = comparisons[layout], comparisons.reference(layout)
    assert not compared.complaint(), f"{layout} is not one rank: {compared.complaint()}"
    for step, trace in enumerate(reference):
        assert compared.scalars[step]["target_tokens"] == trace.scalars["target_tokens"]
        assert compared.shares[step] == trace.shares, "expert load, recycled and dropped shares are counts"


@pytest.mark.parametrize("layout", ALWAYS, ids=str)
def test_layout_equals_one_rank(comparisons, layout):
    check(comparisons, layout)


@pytest.mark.layouts_all
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_every_legal_layout_equals_one_rank(comparisons, layout):
    check(comparisons, layout)


@pytest.mark.parametrize("layout", RANDOM_ALWAYS, ids=str)
def test_random_model_under_a_random_layout_equals_one_rank(comparisons, layout):
    check(comparisons, layout)


@pytest.mark.layouts_all
@pytest.mark.parametrize("layout", RANDOM_ALL, ids=str)
def test_more_random_models_under_random_layouts_equal_one_rank(comparisons, layout):
    check(comparisons, layout)


@pytest.mark.parametrize("layout", [layout for layout in ALWAYS if layout.later_micro_batch], ids=str)
def test_a_later_stage_may_have_more_micro_batches(comparisons, layout):
    """With gradients reduced during the backward pass: core must not assume the first stage's number of micro-batches
    for every stage."""
    assert layout.overlap != "nothing"
    assert layout.later_micro_batch < layout.micro_batch
    check(comparisons, layout)


@pytest.mark.parametrize("layout", BF16, ids=str)
def test_bf16_is_close_to_fp32(comparisons, layout):
    """Smoke test: weights in bf16, gradients and main weights in fp32. Even then, ranks that hold copies agree
    bitwise."""
    compared, fp32 = comparisons[layout], comparisons.reference(Layout())
    for step, allowed in enumerate((0.01, 0.03)):
        assert compared.scalars[step]["loss"] == pytest.approx(fp32[step].scalars["loss"], rel=allowed)
        assert compared.scalars[step]["loss"] != fp32[step].scalars["loss"]
    assert not [difference.name for difference in compared.differences if difference.kind == "copies"]


def test_the_compared_runs_exercise_what_is_compared(comparisons):
    """Tokens are recycled and dropped, gradients are clipped, parameters change, and no compared quantity is all
    zero."""
    recycling, dropping, dropless = (
        comparisons.reference(Layout(model=model)) for model in ("recycling", "top 2", "dropless")
    )
    assert min(recycling[0].shares["recycled_share"]) > 0.01
    assert min(dropping[0].shares["dropped_share"]) > 0.01
    assert sum(dropless[0].shares["overflow_share"]) == 0
    for traces in (recycling, dropping, dropless):
        for trace in traces:
            assert trace.scalars["grad_norm"] > 0.5, "clipped"
            assert len(trace.routing) == 8, "a table for each layer"
            assert not trace.conflicts
            compared = trace.gradients, trace.parameters, trace.moments, trace.activations
            assert all(tensors for tensors in compared)
            assert not [name for tensors in compared for name, value in tensors.items() if not value.any()]
            assert all(trace.scalars.values())
        first, second = traces
        assert first.parameters.keys() == first.gradients.keys()
        assert all((second.parameters[name] != first.parameters[name]).any() for name in first.parameters)
        assert len(first.moments) == 3 * len(first.parameters), "both moments and the average of the weights"


@pytest.mark.parametrize("layout", [layout for layout in ALWAYS if layout.world_size > 1], ids=str)
def test_gradient_norm_counts_every_shard_exactly_once(comparisons, layout):
    """Each shard and each expert is counted once, and copies never, although a rank holds only some of them."""
    compared = comparisons[layout]
    for scalars, norm in zip(compared.scalars, compared.norms, strict=True):
        assert scalars["grad_norm"] == pytest.approx(norm, rel=1e-5)


def legal(layout: Layout) -> bool:
    """Which layouts the rules should accept, derived from the sizes of the model: 8 layers in 4 groups, 64 tokens in 8
    routing groups."""
    kv_heads = MODELS[layout.model].get("num_query_groups", 2)
    micro_batches, rest = divmod(8, layout.micro_batch * layout.dp)
    return (
        kv_heads % layout.tp == 0
        and (layout.vpp == 1 or layout.pp > 1)
        and 4 % (layout.pp * layout.vpp) == 0
        and 4 % layout.ep == 0
        and 40 % layout.etp == 0
        and 8 % layout.cp == 0
        and 8 // layout.cp * layout.micro_batch % layout.tp == 0
        and layout.world_size % (layout.ep * layout.etp * layout.pp) == 0
        and rest == 0
        and (layout.vpp == 1 or micro_batches % layout.pp == 0)
    )


def test_every_layout_runs_or_is_refused_with_a_reason():
    """Also for sizes that divide nothing."""
    odd = every_product({name: (*values, 3) for name, values in SIZES.items()} | {"cp": (1, 2, 3, 4, 8)})
    for layout in [*PRODUCTS, *odd]:
        problems = layout.problems()
        assert bool(problems) != legal(layout), f"{layout}: {problems}"
        for problem in problems:
            section, _, name = problem.path.partition(".")
            assert section in ("parallel", "stages", "model"), problem
            assert name, problem
            assert problem.rule, problem
            assert problem.hint, problem


def test_the_layout_sets_cover_every_size_and_variant():
    """The layouts that always run contain every size and variant; the full set contains every legal pair of a size and
    a variant."""
    for name, values in (SIZES | VARIANTS).items():
        small = [value for value in values if name not in SIZES or value <= 2]
        wanted = {value for value in small if CONTEXT_PARALLEL_SIZES != (1,) or value != "all_to_all"}
        assert {getattr(layout, name) for layout in ALWAYS} >= wanted, name
    assert Counter(layout.world_size for layout in ALWAYS)[4] <= 4
    assert max(layout.world_size for layout in ALL) == LARGEST_WORLD
    assert len(ALL) == len(set(ALL)) > 80
    met = set().union(*(pairs(layout) for layout in ALL))
    wanted = {
        (s, size, v, choice)
        for s, sizes in SIZES.items()
        for v, choices in VARIANTS.items()
        for size in sizes[1:]
        for choice in choices
    }
    missing = {pair for pair in wanted - met if not is_impossible(*pair)}
    assert not missing


def is_impossible(size: str, value: int, variant: str, choice: Any) -> bool:
    """tp 4 needs 4 key/value heads; all_to_all needs context parallelism and a head for each of its ranks; a batch is 8
    sequences."""
    if variant == "model":
        return (size, value) == ("tp", 4) and choice != "4 key/value heads"
    if choice == "all_to_all":
        return CONTEXT_PARALLEL_SIZES == (1,) or (size, value) in (("tp", 4), ("cp", 8), ("dp", 8))
    return variant == "micro_batch" and size == "dp" and value * choice > 8


def test_random_layouts_differ_and_are_reproducible():
    assert len({layout.model for layout in RANDOM_ALL}) == len(RANDOM_ALL)
    assert {layout.world_size for layout in RANDOM_ALL} == {2, 4}
    assert [random_layout(seed, 4) for seed in range(3)] == RANDOM_ALL[:3]


def test_a_single_wrong_number_is_reported(comparisons):
    """Test of the comparison itself: one element off by more than the tolerance, one token routed to another expert,
    one copy that differs."""
    from copy import deepcopy

    from hunyuan_pretrain.diagnostics.parity import TOLERANCE, compare

    reference = comparisons.reference(Layout())

    def first_complaint(change) -> tuple[str, str]:
        actual = deepcopy(reference)
        change(actual[1])
        differences = compare(actual, reference)
        found = [difference for difference in differences if not difference.is_within]
        assert len(found) == 1
        assert found[0].step == 1
        complaint = Comparison(differences, [], [], []).complaint()
        assert f"1 of {len(differences)} differ, first:\n{found[0].kind} {found[0].name} in step 1: " in complaint
        return found[0].kind, found[0].name

    name = "decoder.layers.3.mlp.experts.linear_fc1.weight"

    def off(tensor: np.ndarray, factor: float) -> None:
        tensor.reshape(-1)[17] += factor * TOLERANCE * np.abs(tensor).max()

    for kind, tensors in (("gradient", "gradients"), ("parameter", "parameters")):
        assert first_complaint(lambda trace, tensors=tensors: off(getattr(trace, tensors)[name], 2)) == (kind, name)
    moment = f"exp_avg of {name}"
    assert first_complaint(lambda trace: off(trace.moments[moment], -2)) == ("moment", moment)
    router = "decoder.layers.3.router"
    assert first_complaint(lambda trace: np.put(trace.routing[router], 5, 1 - trace.routing[router][5])) == (
        "routing",
        router,
    )
    assert first_complaint(lambda trace: trace.conflicts.append("x")) == ("copies", "x")
    assert first_complaint(lambda trace: trace.scalars.update(grad_norm=trace.scalars["grad_norm"] * 1.0001)) == (
        "scalar",
        "grad_norm",
    )
    within = deepcopy(reference)
    off(within[1].gradients[name], 0.5)
    assert all(difference.is_within for difference in compare(within, reference))
