"""The emulated recipes against Transformer Engine's own kernels, value by value and step by step. `make test-gpu` runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.schema import PrecisionConfig
from hunyuan_pretrain.model.fp8 import Fp8Product, Operand, Recipe
from hunyuan_pretrain.runtime.device import missing_for_fp8, probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
DELAYED_SCALE = 0.37


def skip_unless_supported(recipe: str) -> None:
    machine = probe()
    need = missing_for_fp8(recipe, machine.gpus[0].capability, machine.cuda)
    if need:
        pytest.skip(f"{recipe} needs {need}")


def kernel_values(x_RC: torch.Tensor, recipe: Recipe, operand: Operand, along_rows: bool) -> torch.Tensor:
    """What the kernels' FP8 form of x_RC stands for, fp32."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    dtype = tex.DType.kFloat8E4M3 if recipe.dtype(operand) == torch.float8_e4m3fn else tex.DType.kFloat8E5M2
    direction = {"rowwise": not along_rows, "columnwise": along_rows}
    quantizer: Any
    if recipe.name == "delayed":
        scale, amax = torch.full((1,), DELAYED_SCALE, device="cuda"), torch.zeros(1, device="cuda")
        quantizer = Float8Quantizer(scale, amax, dtype, columnwise=False)
    elif recipe.name == "tensorwise":
        quantizer = Float8CurrentScalingQuantizer(dtype, torch.device("cuda"), columnwise=False)
    elif recipe.name == "blockwise":
        quantizer = Float8BlockQuantizer(dtype, block_scaling_dim=2 if operand == "w" else 1, **direction)
    else:
        quantizer = MXFP8Quantizer(dtype, **direction)
    return quantizer(x_RC).dequantize(dtype=torch.float32)


@pytest.mark.parametrize("along_rows", [False, True])
@pytest.mark.parametrize("operand", ["x", "w", "dy"])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("name", RECIPES)
def test_emulated_values_are_those_of_the_kernels(name: str, fp8_format: str, operand: Operand, along_rows: bool) -> None:
    """Bit by bit, in bf16, over more powers of two than the formats have; shapes are whole blocks and not."""
    skip_unless_supported(name)
    recipe = Recipe.of(PrecisionConfig(fp8_recipe=name, fp8_format=fp8_format))
    generator = torch.Generator().manual_seed(1)
    for shape in ((256, 384), (160, 96)):
        spread = torch.exp2(torch.randint(-20, 20, shape, generator=generator))
        x_RC = (
            (torch.randn(shape, generator=generator) * spread)
            .masked_fill(torch.rand(shape, generator=generator) < 0.05, 0)
            .bfloat16()
            .cuda()
        )
        product = Fp8Product(recipe, 1, False, False, "cuda")
        if name == "delayed":
            product.delayed[operand].scale_e.fill_(DELAYED_SCALE)
        emulated = product.operand(x_RC[None], operand, along_rows, slice(0, 1), True)[0]
        torch.testing.assert_close(kernel_values(x_RC, recipe, operand, along_rows), emulated, rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_an_emulated_step_is_that_of_the_kernels(name: str) -> None:
    """One linear layer with equal inputs, output and gradients: what remains is the order of sums and the rounding to bf16."""
    import transformer_engine.pytorch as te

    from hunyuan_pretrain.model.transformer_engine import te_recipe

    skip_unless_supported(name)
    precision = PrecisionConfig(fp8_recipe=name)
    generator = torch.Generator().manual_seed(2)
    T, D, F = 256, 384, 512
    x_TD, weight_FD, grad_TF = (torch.randn(shape, generator=generator).bfloat16().cuda() for shape in ((T, D), (F, D), (T, F)))
    linear = te.Linear(D, F, bias=False, params_dtype=torch.bfloat16, device="cuda")
    linear.weight.data.copy_(weight_FD)
    product = Fp8Product(Recipe.of(precision), 1, False, False, "cuda")

    def results(multiply: Any, weight: torch.Tensor) -> list[torch.Tensor]:
        x = x_TD.clone().requires_grad_()
        with te.autocast(enabled=True, recipe=te_recipe(precision)):
            output = multiply(x)
        return [output, *torch.autograd.grad(output, (x, weight), grad_TF)]

    emulated_weight = weight_FD.clone().requires_grad_()
    pairs = results(linear, linear.weight), results(lambda x: product(x, emulated_weight), emulated_weight)
    for kernels, emulated in zip(*pairs, strict=True):
        assert (kernels.float() - emulated.float()).norm() < 0.004 * emulated.float().norm(), "2^-8 is the step of bf16"
