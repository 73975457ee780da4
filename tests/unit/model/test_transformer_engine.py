"""Transformer Engine's spec against the local one, with CPU stand-ins for its kernels: this verifies the wiring, not
the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan_pretrain.model.expert_rows import RowSplits
from tests.helpers.layouts import STEPS, Comparisons, Layout
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import build, packed_inputs, tiny_model
from tests.helpers.transformer_engine_cases import (
    LAYOUTS,
    Build,
    Case,
    attention_at_the_bound,
    attention_differences,
    checkpoints_under_both_specs,
    differences_of_builds,
    gradients,
    norms_of_builds,
    recipe_fields,
    traces,
)

needs_package = pytest.mark.usefixtures("transformer_engine")


def tensor(size: int, **others: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size, "sequence_parallel": True} | others


BUILDS = [
    Build({}),
    Build({}, {"recompute": "swiglu+norms"}),
    Build({"cla_share_factor": 1}),
    Build({}, has_kernels=True),
    Build({}, precision={"fp8_recipe": "delayed", "num_layers_at_start_in_bf16": 1}, has_kernels=True),
    Build({"qk_layernorm": False}),
    Build({"share_embeddings_and_output_weights": False}),
    Build({"moe_router_topk": 2, "recycle_routing": False}),
    Build({"moe_expert_capacity_factor": None, "recycle_routing": False}),
    Build({}, tensor(2, expert_model_parallel_size=4), 8, (0, 3, 7)),
    Build({}, tensor(2, expert_model_parallel_size=2, expert_tensor_parallel_size=2), 8, (0, 5)),
    Build({"share_embeddings_and_output_weights": False}, tensor(2, pipeline_model_parallel_size=2), 4, (0, 1, 3)),
    Build({}, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, 8, (0, 5)),
    Build(
        {"num_layers": 8},
        tensor(2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        8,
        (0, 3, 6),
    ),
    *(
        Build({}, precision={"fp8_recipe": recipe, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1})
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
    ),
]


@needs_package
@pytest.mark.slow
def test_parameters_match_the_local_spec() -> None:
    """Names, order, shapes, formats, attributes, and the position of each shard in the whole parameter, on a rank of a
    simulated world."""
    (found,) = run_ranks(1, differences_of_builds, BUILDS)
    assert found == []


@needs_package
@pytest.mark.slow
def test_with_kernels_a_norm_is_fused_only_where_it_writes_fp8() -> None:
    """With delayed scales, in the layers that compute in FP8; never where norms are recomputed."""
    ours, theirs = "hunyuan_pretrain.model.norm", "hunyuan_pretrain.model.engine.layers"
    of_recipes: Any = {
        name: {"fp8_recipe": name, "num_layers_at_start_in_bf16": 1} for name in ("delayed", "blockwise")
    }
    recomputed = {"recompute": "norms"}
    expected = [
        (Build({}), ["fused"] * 4),
        (Build({}, recomputed), [f"{theirs}, kept"] * 4),
        (Build({}, precision=of_recipes["blockwise"]), ["fused"] * 4),
        (Build({}, has_kernels=True), [ours] * 4),
        (Build({}, recomputed, has_kernels=True), [f"{ours}, kept"] * 4),
        (Build({}, precision=of_recipes["blockwise"], has_kernels=True), [ours] * 4),
        (Build({}, precision=of_recipes["delayed"], has_kernels=True), [ours] + ["fused"] * 3),
    ]
    (found,) = run_ranks(1, norms_of_builds, [build for build, _ in expected])
    assert found == [norms for _, norms in expected]


@needs_package
@pytest.mark.slow
def test_a_step_with_kernels_matches_the_local_spec() -> None:
    """Loss and every gradient, in fp32. The norms are then this project's, which add the branch and the gradient of the
    residual."""
    pytest.importorskip("triton")
    ((local, *others),) = run_ranks(1, gradients, [(False, "none"), (True, "none"), (True, "norms")])
    for found in others:
        assert found.keys() == local.keys()
        for name, expected in local.items():
            assert np.abs(expected).max() > 0, name
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@needs_package
@pytest.mark.slow
def test_steps_on_one_rank_match_the_local_spec(corpus: Path, tmp_path: Path) -> None:
    """Losses, every gradient, moment and weight of two fp32 steps, and the update itself: the reference uses torch's
    AdamW."""
    layouts = [
        Layout(),
        Layout(model="dropless", micro_batch=4),
        Layout(model="top 2", recompute="selective", optimizer="plain"),
        Layout(recompute="cla_group", micro_batch=1, overlap="everything"),
    ]
    check(layouts, corpus, tmp_path, world_size=1, unfused=(2,))


@needs_package
@pytest.mark.slow
def test_steps_on_two_ranks_match_the_local_spec(corpus: Path, tmp_path: Path) -> None:
    layouts = [
        Layout(dp=2, ep=2, model="dropless"),
        Layout(tp=2),
        Layout(tp=2, etp=2, model="top 2", overlap="everything"),
        Layout(cp=2, ep=2),
        Layout(pp=2, vpp=2, micro_batch=1, overlap="everything", recompute="selective"),
    ]
    check(layouts, corpus, tmp_path, world_size=2, unfused=(1,))


def check(layouts: Sequence[Layout], corpus: Path, folder: Path, world_size: int, unfused: Sequence[int]) -> None:
    """Within the tolerance of layouts; `unfused`: indices of the layouts whose weight gradients are not accumulated in
    the GEMM."""
    from hunyuan_pretrain.diagnostics.parity import compare

    references = Comparisons(corpus, folder / "references", layouts)
    cases = [
        Case(layout.experiment(corpus, folder / str(number)), engine=True, is_fused=number not in unfused)
        for number, layout in enumerate(layouts)
    ]
    found = run_ranks(world_size, traces, cases, STEPS)[0]
    for layout, mine in zip(layouts, found, strict=True):
        compared = compare(mine, references.reference(layout))
        assert len(compared) > 500
        assert [difference for difference in compared if not difference.is_within] == [], str(layout)


@needs_package
@pytest.mark.slow
def test_a_bf16_step_matches_the_local_spec(corpus: Path, tmp_path: Path) -> None:
    """With Transformer Engine's attention too, which rounds differently: a token that changes experts as a result
    changes gradients."""
    experiment = Layout(model="bf16").experiment(corpus, tmp_path)
    cases = [
        Case(experiment, engine=False),
        Case(experiment, engine=True),
        Case(experiment, engine=True, has_attention=True),
    ]
    local, engine, attention = (steps[0] for steps in run_ranks(1, traces, cases, 1)[0])
    for name in ("loss", "grad_norm"):
        assert engine.scalars[name] == pytest.approx(local.scalars[name], rel=1e-4)
        assert attention.scalars[name] == pytest.approx(local.scalars[name], rel=1e-2)
    for name, gradient in local.gradients.items():
        assert np.linalg.norm(engine.gradients[name] - gradient) < 0.02 * np.linalg.norm(gradient), name


@needs_package
@pytest.mark.slow
def test_a_checkpoint_of_one_spec_loads_under_the_other(corpus: Path, tmp_path: Path) -> None:
    """Weights and moments are bitwise identical, also when saved again, and both exports are equal."""
    experiment = Layout(optimizer="plain").experiment(corpus, tmp_path)
    (found,) = run_ranks(1, checkpoints_under_both_specs, experiment, tmp_path)
    assert found == {False: [], True: []}


@needs_package
def test_recipes_apply_the_settings_and_leave_the_rest_to_transformer_engine() -> None:
    settings = [
        {"fp8_recipe": "delayed"},
        {
            "fp8_recipe": "delayed",
            "fp8_format": "e4m3",
            "fp8_margin": 1,
            "fp8_amax_history_len": 16,
            "fp8_amax_compute_algo": "max",
        },
        {"fp8_recipe": "tensorwise"},
        {"fp8_recipe": "blockwise"},
        {"fp8_recipe": "blockwise", "fp8_format": "hybrid"},
        {"fp8_recipe": "mxfp8"},
    ]
    (found,) = run_ranks(1, recipe_fields, settings)
    formats = [(fields["class"], fields["fp8_format"]) for fields in found]
    assert formats == [
        ("DelayedScaling", "HYBRID"),
        ("DelayedScaling", "E4M3"),
        ("Float8CurrentScaling", "HYBRID"),
        ("Float8BlockScaling", "E4M3"),
        ("Float8BlockScaling", "HYBRID"),
        ("MXFP8BlockScaling", "E4M3"),
    ]
    names = ("margin", "amax_history_len", "amax_compute_algo", "reduce_amax", "fp8_dpa", "fp8_mha")
    assert [found[0][name] for name in names] == [0, 1024, "max", True, False, False]
    assert [found[1][name] for name in names] == [1, 16, "max", True, False, False]


@needs_package
def test_attention_is_correct_for_any_memory_layout_of_queries_keys_and_values() -> None:
    """Whole documents, the blocks of context-parallel ranks, and sequences of one length; the stand-in reads memory in
    the layout that Transformer Engine detects."""
    # the third has keys of the first document that no query attends to
    works = [None, [(0, 24), (72, 96)], [(24, 72)], "batch"]
    heads = [(4, 2, 64), (2, 1, 80), (2, 2, 96), (4, 1, 128)]
    (found,) = run_ranks(1, attention_differences, [0, 20, 44, 51, 96], works, heads)
    assert len(found) == len(works) * len(heads) * len(LAYOUTS) * 2
    masks = ["PADDING_CAUSAL", "PADDING_CAUSAL_BOTTOM_RIGHT", "PADDING_CAUSAL_BOTTOM_RIGHT", "CAUSAL"]
    expected = [f"NVTE_{mask}_MASK" for mask in masks for _ in range(2 * len(LAYOUTS))] * len(heads)
    assert [mask for _, mask, _ in found] == expected
    wrong = [f"{case}: {error}" for case, _, error in found if isinstance(error, str) or not error < 2**-6]
    assert not wrong, "\n".join(wrong)


@needs_package
def test_documents_without_a_transformer_engine_kernel_get_local_attention() -> None:
    """On Hopper with determinism, versions after 2.11 refuse long documents; the bound is theirs."""
    ((version, refused, computed),) = run_ranks(1, attention_at_the_bound)
    is_refused = version > (2, 11)
    assert refused == [False, is_refused]
    assert computed == [(2, 0), (0, 1) if is_refused else (2, 0)], "calls of its kernels, and warnings"


# --- without the package ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 0.75, 1.0])
def test_rows_of_zeros_change_nothing(factor: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(moe_expert_capacity_factor=factor, recycle_routing=False)
    whole, padded = build(model), build(model)
    asked: list[RowSplits] = []
    for layer in padded.decoder.layers:
        layer.mlp.experts.row_multiple = lambda: 16
        forward = layer.mlp.experts.linear_fc1.forward
        layer.mlp.experts.linear_fc1.forward = lambda x, splits, forward=forward: (
            asked.append(splits),
            forward(x, splits),
        )[1]
    losses = []
    for one in (whole, padded):
        loss, _ = one(packed_inputs(model))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(rows % 16 == 0 for splits in asked for rows in splits.rows_e)
    for (name, mine), (_, theirs) in zip(padded.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=name)
