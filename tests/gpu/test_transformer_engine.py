"""Transformer Engine's own kernels on a GPU: against the local spec in bf16, and a step in every FP8 recipe. `make
test-gpu` runs them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.recipe import RECIPES, RecipeName
from hunyuan_pretrain.config.schema import ParallelConfig
from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed
from hunyuan_pretrain.runtime.device import probe
from hunyuan_pretrain.runtime.policy import missing_for_fp8
from tests.helpers.fp8_comparisons import MODEL, SPREAD, built, error_of_fp8, inputs, median_error, step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@cache
def groups() -> Any:
    initialize_distributed("nccl", 60)
    return build_groups(ParallelConfig(), 60)


def test_a_bf16_step_matches_the_local_spec() -> None:
    (loss, gradients), (other_loss, others) = (
        step(built(groups(), engine), groups(), "cuda") for engine in (True, False)
    )
    assert loss == pytest.approx(other_loss, rel=2e-3)
    assert median_error(gradients, others) < 0.02


def skip_unless_supported(recipe: RecipeName) -> None:
    machine = probe()
    need = missing_for_fp8(RECIPES[recipe], machine.gpus[0].capability, machine.cuda)
    if need:
        pytest.skip(f"{recipe} needs {need}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_fp8_step_is_as_far_from_bf16_as_the_emulated_one(recipe: RecipeName) -> None:
    """Kernels and emulation quantise to the same values, but sums in another order round differently, and then single
    tokens change experts."""
    skip_unless_supported(recipe)
    (loss, error), (emulated_loss, emulated) = (
        error_of_fp8(groups(), engine, recipe, "cuda") for engine in (True, False)
    )
    assert max(loss, emulated_loss) < 0.02
    assert error == pytest.approx(emulated, rel=SPREAD)


@pytest.mark.parametrize("recipe", list(RECIPES)[:3])
def test_fp8_only_parameters_take_the_same_step(recipe: RecipeName) -> None:
    """Experts, which are then separate parameters, are reassembled."""
    skip_unless_supported(recipe)
    models = (built(groups(), True, recipe, is_kept) for is_kept in (True, False))
    (loss, gradients), (other_loss, others) = (step(model, groups(), "cuda") for model in models)
    assert loss == other_loss
    for name, gradient in others.items():
        experts = (
            [gradients[f"{name}{expert}"] for expert in range(MODEL.num_moe_experts)] if f"{name}0" in gradients else []
        )
        torch.testing.assert_close(
            torch.stack(experts) if experts else gradients[name], gradient, rtol=0, atol=0, msg=name
        )


@pytest.mark.parametrize("recipe", list(RECIPES)[:3])
def test_fp8_only_parameters_have_gradients_outside_a_step(recipe: RecipeName) -> None:
    """As the probes before training compute them."""
    skip_unless_supported(recipe)
    model = built(groups(), True, recipe, True)
    loss, _ = model(inputs("cuda"))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("engine", [False, True])
def test_the_host_never_waits_in_a_step_with_capacity(engine: bool) -> None:
    """The CPU twin of this test counts operators; here the driver detects the waits."""
    model, micro_batch = built(groups(), engine), inputs("cuda")
    for mode in ("default", "error"):  # the first step compiles and allocates
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = model(micro_batch)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
