"""FP8 under Transformer Engine's spec, on CPU stand-ins for its kernels: the wiring, and that it computes what our
emulation computes.

The stand-ins quantise with the emulation's arithmetic, every value of which tests/unit/model/test_fp8.py verifies. This
file verifies everything around it: which tensor is quantised, in which direction and blocks; from which step and ranks
its scale comes; what is saved for the backward pass, gathered in FP8, and multiplied with what. One side of the
comparison is Transformer Engine's own Python code, the other is ours, and they are bitwise identical.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.layouts import Layout
from tests.helpers.ranks import run_ranks
from tests.helpers.transformer_engine_cases import Fp8Run, fp8_runs, recorded_fp8_runs
from tests.helpers.transformer_engine_matmuls import BothSpecs, both_specs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("transformer_engine")]


# --- how it is wired --------------------------------------------------------------------------------------------------


def fp8_experiment(
    layout: Layout, corpus: Path, run_dir: Path, recipe: str = "delayed", **precision: Any
) -> Experiment:
    """Sizes that FP8 supports; the first and the last of 8 layers stay in bf16."""
    fields = layout.experiment(corpus, run_dir).model_dump(mode="json")
    fields["precision"] |= {
        "dtype": "bf16",
        "fp8_recipe": recipe,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    }
    fields["precision"] |= precision
    sizes = {
        "hidden_size": 64,
        "ffn_hidden_size": 64,
        "moe_ffn_hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
    }
    fields["model"] |= sizes | {"kv_channels": 8, "moe_routing_group_tokens": 64}
    return Experiment.model_validate(fields)


@pytest.fixture(scope="module")
def delayed(
    transformer_engine: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Fp8Run]]:
    """What each rank observed in two steps with the delayed recipe, by layout."""
    folder = tmp_path_factory.mktemp("fp8")
    layouts = {
        "whole batch": Layout(micro_batch=8),
        "4 micro-batches": Layout(micro_batch=2),
        "recompute": Layout(micro_batch=2, recompute="cla_group"),
        "dropless": Layout(micro_batch=2, model="dropless"),
        "ep": Layout(dp=2, ep=2, micro_batch=2),
        "etp": Layout(dp=2, etp=2, micro_batch=2),
        "vpp": Layout(pp=2, vpp=2, micro_batch=1),
    }
    found: dict[str, list[Fp8Run]] = {}
    for world_size in (1, 2):
        names = [name for name, layout in layouts.items() if layout.world_size == world_size]
        experiments = [fp8_experiment(layouts[name], corpus, folder / name, fp8_amax_history_len=4) for name in names]
        ranks = run_ranks(world_size, fp8_runs, experiments, 2)
        found |= {name: list(runs) for name, runs in zip(names, zip(*ranks, strict=True), strict=True)}
    return found


def test_the_first_and_last_layers_stay_out_of_fp8(delayed: dict[str, list[Fp8Run]]) -> None:
    (run,) = delayed["whole batch"]
    assert len(run.in_fp8) == 8 * 6
    assert all(in_fp8 == (1 <= int(name.split(".")[3]) <= 6) for name, in_fp8 in run.in_fp8.items())
    assert len(run.state) == 6 * 6 * 3 * 2  # layers, linears, operands, history and scale
    assert run.state["decoder.layers.1.mlp.experts.linear_fc1.x.history"].shape == (4, 4)


def test_scales_change_once_per_step_for_any_number_of_micro_batches(delayed: dict[str, list[Fp8Run]]) -> None:
    for name, runs in delayed.items():
        for run in runs:
            for calls in run.calls:
                # forward and backward pass; dense linears and experts
                updates = [(call, count) for call, count in calls.items() if call[0] == "update_scales"]
                assert sum(count for _, count in updates) == 4, (name, updates)
    (whole,), (parts,), (recomputed,) = (delayed[name] for name in ("whole batch", "4 micro-batches", "recompute"))
    for key, tensor in whole.state.items():
        if key.endswith(
            (".w.history", ".x.history")
        ):  # gradients, and with them the second step, are rounded from sums in another order
            np.testing.assert_allclose(parts.state[key][-2], tensor[-2], rtol=0.05)
        np.testing.assert_array_equal(recomputed.state[key], parts.state[key])
    for key, tensor in whole.state.items():
        if key.endswith(".history"):
            assert (tensor[:2] == 0).all(), key  # row 0 is the running step's, and two steps of four were made
            assert (tensor[2:] > 0).all(), key


def test_delayed_scales_change_in_every_replayed_step(corpus: Path, tmp_path: Path) -> None:
    """While a graph is recorded, Transformer Engine's modules leave their scales out of the update."""
    experiment = fp8_experiment(Layout(micro_batch=2), corpus, tmp_path / "run", fp8_amax_history_len=4)
    stage = experiment.stages[0]
    stage = stage.model_copy(update={"tokens": 5 * stage.global_batch_tokens})
    experiment = experiment.model_copy(update={"stages": (stage,)})
    ((computed, recorded),) = run_ranks(1, recorded_fp8_runs, experiment, 5)
    assert any(value != 1 for name, values in computed[1].items() if name.endswith("scale") for value in values)
    assert recorded == computed


def test_weights_are_quantised_once_per_step(delayed: dict[str, list[Fp8Run]]) -> None:
    """6 layers with 4 dense linears and 2 grouped ones of 4 experts each: inputs and gradients are quantised for every
    micro-batch, weights once."""
    products = 6 * (4 + 2 * 4)
    for name, micro_batches in (("whole batch", 1), ("4 micro-batches", 4)):
        (run,) = delayed[name]
        for calls in run.calls:
            assert sum(count for call, count in calls.items() if call[0] == "quantize") == products * (
                2 * micro_batches + 1
            )


def test_amax_is_reduced_over_the_ranks_that_hold_the_same_weight(delayed: dict[str, list[Fp8Run]]) -> None:
    (alone,) = delayed["whole batch"]
    for first, second in (delayed["ep"], delayed["etp"]):
        for key in first.state:
            if "experts.linear" not in key or "shared" in key:
                np.testing.assert_array_equal(first.state[key], second.state[key])
    ep, etp = delayed["ep"], delayed["etp"]
    assert [run.reductions for run in ep] == [[[2, 2]] * 2] * 2, (
        "experts are reduced over no other rank, which holds others"
    )
    assert [run.reductions for run in etp] == [[[2, 2, 2, 2]] * 2] * 2
    key = "decoder.layers.2.mlp.experts.linear_fc1.x.history"
    together = np.concatenate([run.state[key] for run in ep], axis=1)
    np.testing.assert_allclose(together[-2], alone.state[key][-2], rtol=0.01)


def test_rows_are_padded_only_if_the_capacity_is_not_a_multiple(delayed: dict[str, list[Fp8Run]]) -> None:
    """64 tokens of a routing group over 4 experts are 16 rows each; dropless, the router decides the number of rows."""
    assert [
        run.padded
        for name in ("whole batch", "4 micro-batches", "recompute", "ep", "etp", "vpp")
        for run in delayed[name]
    ] == [0] * 9
    (dropless,) = delayed["dropless"]
    assert dropless.padded > 0


@pytest.mark.parametrize(("recipe", "capability"), [("tensorwise", (9, 0)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))])
def test_other_recipes_keep_no_scales(recipe: str, capability: tuple[int, int], corpus: Path, tmp_path: Path) -> None:
    experiment = fp8_experiment(Layout(micro_batch=2), corpus, tmp_path, recipe)
    ((run,),) = run_ranks(1, fp8_runs, [experiment], 1, capability)
    assert run.state == {}
    assert sum(run.in_fp8.values()) == 36
    quantizer = {
        "tensorwise": "Float8CurrentScalingQuantizer",
        "blockwise": "Float8BlockQuantizer",
        "mxfp8": "MXFP8Quantizer",
    }[recipe]
    assert {call[1] for call in run.calls[0] if call[0] == "quantize"} == {quantizer}


# --- against the emulation --------------------------------------------------------------------------------------------

WORLDS = [(("delayed", "tensorwise", "blockwise"), (9, 0)), (("mxfp8",), (10, 0))]
"""The recipes that one process can run, and the compute capability of its simulated GPU: GEMMs on Blackwell read other
data."""
RECIPES = [recipe for recipes, _ in WORLDS for recipe in recipes]


@pytest.fixture(scope="module", params=[1, 2])
def compared(
    request: pytest.FixtureRequest,
    transformer_engine: None,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[BothSpecs]]:
    """What each rank computed under both specs, by recipe: on one rank, dropless, so that rows are padded; and with
    tensor and sequence parallelism."""
    ranks: int = request.param
    layout = Layout(model="dropless", micro_batch=4) if ranks == 1 else Layout(tp=2, micro_batch=4)
    found: dict[str, list[BothSpecs]] = {}
    for recipes, capability in WORLDS:
        experiments = {}
        for recipe in recipes:
            history = {"fp8_amax_history_len": 4} if recipe == "delayed" else {}
            experiments[recipe] = fp8_experiment(layout, corpus, tmp_path_factory.mktemp(recipe), recipe, **history)
            experiments[recipe] = experiments[recipe].model_copy(
                update={"model": experiments[recipe].model.model_copy(update={"num_layers": 4, "hidden_size": 128})}
            )
        results = run_ranks(ranks, both_specs, experiments, ranks, capability)
        found |= {recipe: [rank[recipe] for rank in results] for recipe in recipes}
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_matmul_equals_the_emulated_one(compared: dict[str, list[BothSpecs]], recipe: str) -> None:
    """Bitwise identical outputs, gradients and delayed scales of column- and row-parallel linears, after a norm, and of
    experts with equal or unequal rows; over three steps of two micro-batches, in which weights change."""
    for rank in compared[recipe]:
        assert len(rank.products) == (5 if len(compared[recipe]) == 1 else 3)
        for kind, tensors in rank.products.items():
            assert len(tensors) >= 15
            for name, (engine, emulated) in tensors.items():
                assert np.isfinite(engine).all(), name
                np.testing.assert_array_equal(engine, emulated, err_msg=f"{kind}: {name}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_equal_the_emulated_ones(compared: dict[str, list[BothSpecs]], recipe: str) -> None:
    """Two whole steps are bitwise identical: loss, every module's output, gradients, weights, moments and delayed
    scales."""
    from hunyuan_pretrain.diagnostics.parity import compare

    first, *others = compared[recipe]
    differences = compare(first.engine.traces, first.emulated.traces)
    assert len(differences) > 300
    assert [difference for difference in differences if difference.relative] == []
    for rank in (first, *others):
        assert (rank.engine.scales.keys(), len(rank.engine.scales)) == (
            rank.emulated.scales.keys(),
            72 if recipe == "delayed" else 0,
        )
        for name, scale in rank.engine.scales.items():
            np.testing.assert_array_equal(scale, rank.emulated.scales[name], err_msg=name)
        assert rank.engine.num_quantised > 0
        assert rank.emulated.num_quantised == 0, "the stand-ins have no part in it"
