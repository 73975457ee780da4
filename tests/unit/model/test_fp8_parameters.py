"""FP8-only parameters, on Transformer Engine's Python code with CPU stand-ins for its kernels: results and checkpoints
are those of bf16 weights quantised in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.fp8_parameter_cases import (
    ParameterRun,
    broken_runs,
    differences_of_files,
    differences_of_shards,
    parameter_runs,
    values_and_gradients,
)
from tests.helpers.layouts import Layout
from tests.helpers.ranks import run_ranks
from tests.helpers.transformer_engine_cases import Build, Case

needs_package = pytest.mark.usefixtures("transformer_engine")

LAYOUTS = {
    "one rank": Layout(),
    "data": Layout(dp=2, overlap="everything", micro_batch=4),
    "experts": Layout(dp=2, ep=2, model="dropless", micro_batch=4),
    "tensor": Layout(tp=2, etp=2, micro_batch=4),
}
WORK = [
    ("delayed", "one rank"),
    ("tensorwise", "one rank"),
    ("blockwise", "one rank"),
    ("delayed", "data"),
    ("tensorwise", "tensor"),
    ("blockwise", "experts"),
]
STEPS = 3


def experiment(layout: Layout, corpus: Path, run_dir: Path, recipe: str, is_kept: bool) -> Experiment:
    """Sizes that FP8 supports; the first of 4 layers stays in bf16."""
    fields = layout.experiment(corpus, run_dir, STEPS + 1).model_dump(mode="json")
    fields["precision"] |= {
        "dtype": "bf16",
        "fp8_recipe": recipe,
        "fp8_parameters": is_kept,
        "num_layers_at_start_in_bf16": 1,
    }
    fields["precision"] |= {"fp8_amax_history_len": 4 if recipe == "delayed" else None}
    sizes = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64, "kv_channels": 8}
    fields["model"] |= sizes | {"num_attention_heads": 8, "num_query_groups": 4, "moe_routing_group_tokens": 64}
    fields["optimizer"]["clip_grad"] = (
        0.0  # the norm sums experts in another order, which would change the last bit of every update
    )
    fields["evaluation"] = {
        "data": str(corpus / "heldout"),
        "every_steps": 100,
        "max_sequences": 8,
        "micro_batch_sequences": 4,
    }
    return Experiment.model_validate(fields)


@pytest.fixture(scope="module")
def runs(
    transformer_engine: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Path, list[tuple[ParameterRun, ...]]]]:
    """By recipe and layout: the checkpoint folder, and what each rank observed with bf16 weights and with FP8-only
    weights."""
    found: dict[tuple[str, str], Any] = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp("fp8_parameters")
        work = [(recipe, name) for recipe, name in WORK if LAYOUTS[name].world_size == world_size]
        cases = [
            Case(
                experiment(LAYOUTS[name], corpus, folder / f"{recipe} {name}" / str(is_kept), recipe, is_kept),
                engine=True,
            )
            for recipe, name in work
            for is_kept in (False, True)
        ]
        ranks = run_ranks(world_size, parameter_runs, cases, range(STEPS), timeout_s=900)
        for number, (recipe, name) in enumerate(work):
            found[recipe, name] = (
                folder / f"{recipe} {name}",
                [tuple(rank[2 * number : 2 * number + 2]) for rank in ranks],
            )
    return found


def assert_same_numbers(mine: Any, theirs: Any) -> None:
    """Bitwise identical, except the model's weights, which only one of the two has in bf16."""
    assert mine.scalars | {"grad_norm": 0.0} == theirs.scalars | {"grad_norm": 0.0}
    assert mine.scalars["grad_norm"] == pytest.approx(theirs.scalars["grad_norm"], rel=1e-6)
    for kind in ("gradients", "moments"):
        arrays, expected = getattr(mine, kind), getattr(theirs, kind)
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=f"{kind} {name}")


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name"), WORK)
def test_training_is_unchanged_by_fp8_only_weights(recipe: str, name: str, runs: dict[Any, Any]) -> None:
    for rank, (plain, kept) in enumerate(runs[recipe, name][1]):
        assert_same_numbers(kept.trace, plain.trace)
        assert len(plain.trace.gradients) == (46 if rank == 0 else 0), "the first rank has those of all"
        assert kept.scales.keys() == plain.scales.keys()
        for key, scale in plain.scales.items():
            np.testing.assert_array_equal(kept.scales[key], scale, err_msg=key)
        assert plain.in_fp8 == []
        check_memory(plain, kept)
        assert kept.validation == pytest.approx(plain.validation, rel=1e-2)
        assert kept.validation != plain.validation


@needs_package
@pytest.mark.slow
def test_checkpoints_are_bitwise_identical(runs: dict[Any, Any]) -> None:
    """Weights, main weights, moments and scales."""
    folders = [folder for folder, _ in runs.values()]
    checkpoints = [
        [folder / str(is_kept) / f"checkpoints/step_{STEPS:07d}" for is_kept in (False, True)] for folder in folders
    ]
    assert differences_of_files(checkpoints) == [[]] * len(folders)


def check_memory(plain: ParameterRun, kept: ParameterRun) -> None:
    """Every quantised weight takes half the bytes; norms, routers, embedding and the bf16 layer are unchanged."""
    assert kept.in_fp8
    assert not any(name.startswith("decoder.layers.0.") for name in kept.in_fp8)
    products = {name.rpartition(".")[0].rpartition(".")[2] for name in kept.in_fp8}
    assert products == {"linear_qkv", "linear_q", "linear_proj", "linear_fc1", "linear_fc2"}
    assert kept.buffers["torch.float32"] == plain.buffers["torch.float32"]
    saved = plain.buffers["torch.bfloat16"] - kept.buffers["torch.bfloat16"]
    assert kept.buffers["torch.uint8"] == pytest.approx(saved / 2, rel=1e-2)  # buffers are padded


@needs_package
@pytest.mark.slow
def test_a_run_resumes_with_or_without_fp8_only_weights(corpus: Path, tmp_path: Path, runs: dict[Any, Any]) -> None:
    """After resuming from a checkpoint, the last step is bitwise identical to an uninterrupted run, whichever way the
    weights were kept before."""
    for recipe in ("delayed", "blockwise"):
        name = "one rank"
        cases = []
        for first, then in ((True, True), (True, False), (False, True)):
            folder = tmp_path / f"{recipe} {first} {then}"
            cases.append(
                [
                    Case(experiment(LAYOUTS[name], corpus, folder, recipe, is_kept), engine=True)
                    for is_kept in (first, then)
                ]
            )
        (found,) = run_ranks(1, broken_runs, cases, STEPS)
        for mine in found:
            assert_same_numbers(mine.trace, runs[recipe, name][1][0][0].trace)


@needs_package
@pytest.mark.slow
def test_a_new_run_starts_from_the_weights_of_another(corpus: Path, tmp_path: Path, runs: dict[Any, Any]) -> None:
    """From the bf16 weights of a checkpoint, not from what FP8 holds of them."""
    cases = []
    for is_kept in (False, True):
        fields = experiment(LAYOUTS["one rank"], corpus, tmp_path / str(is_kept), "blockwise", is_kept).model_dump(
            mode="json"
        )
        fields["checkpoint"]["init_from"] = str(
            runs["blockwise", "one rank"][0] / f"False/checkpoints/step_{STEPS:07d}"
        )
        cases.append(Case(Experiment.model_validate(fields), engine=True))
    ((plain, kept),) = run_ranks(1, parameter_runs, cases, range(2))
    assert_same_numbers(kept.trace, plain.trace)


@needs_package
@pytest.mark.slow
def test_checkpoints_place_separate_expert_parameters_like_one_joint_parameter() -> None:
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    builds = [
        Build({}),
        Build({}, tensor | {"expert_model_parallel_size": 4}, 8, (0, 3, 7)),
        Build({}, tensor | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, 8, (0, 5)),
        Build({}, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, 8, (0, 5)),
    ]
    (found,) = run_ranks(1, differences_of_shards, builds)
    assert found == []


@needs_package
def test_quantisers_match_the_emulation_and_fp8_only_weights_have_gradients_outside_a_step() -> None:
    """In either direction and format; and gradients are those of the values that a weight represents, as the probes
    before training compute them."""
    ((wrong_values, wrong_gradients),) = run_ranks(1, values_and_gradients, ("delayed", "tensorwise", "blockwise"))
    assert wrong_values == []
    assert wrong_gradients == []
