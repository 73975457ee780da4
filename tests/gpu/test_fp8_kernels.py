"""The emulated recipes against Transformer Engine's own kernels, value by value and step by step. `make test-gpu` runs
them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.recipe import RECIPES, Operand, RecipeName
from hunyuan_pretrain.config.schema import PrecisionConfig
from hunyuan_pretrain.model.fp8.emulated import Fp8Matmul
from hunyuan_pretrain.runtime.device import probe
from hunyuan_pretrain.runtime.policy import missing_for_fp8
from tests.helpers.fp8_comparisons import DELAYED_SCALE, kernel_values, wide_numbers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def skip_unless_supported(recipe: RecipeName) -> None:
    machine = probe()
    need = missing_for_fp8(RECIPES[recipe], machine.gpus[0].capability, machine.cuda)
    if need:
        pytest.skip(f"{recipe} needs {need}")


@pytest.mark.parametrize("along_rows", [False, True])
@pytest.mark.parametrize("operand", ["x", "w", "dy"])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("name", RECIPES)
def test_emulated_values_match_the_kernels(name: str, fp8_format: str, operand: Operand, along_rows: bool) -> None:
    """Bitwise identical, in bf16, for shapes of whole blocks and others."""
    skip_unless_supported(name)
    recipe = PrecisionConfig(fp8_recipe=name, fp8_format=fp8_format).recipe
    assert recipe is not None
    generator = torch.Generator().manual_seed(1)
    for shape in ((256, 384), (160, 96)):
        x_RC = wide_numbers(generator, shape).cuda()
        product = Fp8Matmul(recipe, 1, False, False, "cuda")
        if name == "delayed":
            product.delayed[operand].scale_e.fill_(DELAYED_SCALE)
        emulated = product.operand(x_RC[None], operand, along_rows, slice(0, 1), True)[0]
        torch.testing.assert_close(kernel_values(x_RC, recipe, operand, along_rows), emulated, rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_an_emulated_step_matches_the_kernels(name: str) -> None:
    """Output and gradients of one linear layer with equal inputs: what remains is the order of sums and rounding to
    bf16."""
    import transformer_engine.pytorch as te

    from hunyuan_pretrain.model.engine.fp8 import te_recipe

    skip_unless_supported(name)
    recipe = RECIPES[name]
    generator = torch.Generator().manual_seed(2)
    T, D, F = 256, 384, 512
    x_TD, weight_FD, grad_TF = (
        torch.randn(shape, generator=generator).bfloat16().cuda() for shape in ((T, D), (F, D), (T, F))
    )
    linear = te.Linear(D, F, bias=False, params_dtype=torch.bfloat16, device="cuda")
    linear.weight.data.copy_(weight_FD)
    product = Fp8Matmul(recipe, 1, False, False, "cuda")

    def results(multiply: Any, weight: torch.Tensor) -> list[torch.Tensor]:
        x = x_TD.clone().requires_grad_()
        with te.autocast(enabled=True, recipe=te_recipe(recipe)):
            output = multiply(x)
        return [output, *torch.autograd.grad(output, (x, weight), grad_TF)]

    emulated_weight = weight_FD.clone().requires_grad_()
    pairs = results(linear, linear.weight), results(lambda x: product(x, emulated_weight), emulated_weight)
    for kernels, emulated in zip(*pairs, strict=True):
        assert (kernels.float() - emulated.float()).norm() < 0.004 * emulated.float().norm(), "2^-8 is the step of bf16"
