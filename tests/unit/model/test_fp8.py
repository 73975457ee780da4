"""The emulated FP8 recipes: every value against an independent reference, the matmuls, the delayed scales."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.config.recipe import Operand, Recipe
from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.engines import training_step
from hunyuan_pretrain.model.expert_rows import RowSplits
from hunyuan_pretrain.model.fp8.emulated import Fp8Matmul
from hunyuan_pretrain.model.fp8.quantise import DelayedScale, dtype_of, quantize
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import build_model
from tests.helpers import tiny
from tests.helpers.fp8_comparisons import SPREAD, error_of_fp8
from tests.reference import fp8_reference
from tests.reference.fp8_reference import E4M3, E5M2

RECIPES = ("tensorwise", "blockwise", "mxfp8")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def recipe(name: str, fp8_format: str | None = None, **fields: Any) -> Recipe:
    found = PrecisionConfig(fp8_recipe=name, fp8_format=fp8_format, **fields).recipe
    assert found is not None
    return found


def product_of(chosen: Recipe, num_experts: int = 1, accumulate: bool = False) -> Fp8Matmul:
    return Fp8Matmul(chosen, num_experts, num_experts > 1, accumulate, "cpu")


def values_of(x_RC: torch.Tensor, chosen: Recipe, operand: Operand, along_rows: bool) -> np.ndarray:
    return product_of(chosen).operand(x_RC[None], operand, along_rows, slice(0, 1), True)[0].numpy()


def reference_of(x_RC: torch.Tensor, chosen: Recipe, operand: Operand, along_rows: bool) -> np.ndarray:
    fp8 = E5M2 if chosen.number_format(operand) == "e5m2" else E4M3
    block = {
        ("tensorwise", False): x_RC.shape,
        ("tensorwise", True): x_RC.shape,
        ("blockwise", False): (128, 128) if operand == "w" else (1, 128),
        ("blockwise", True): (128, 128) if operand == "w" else (128, 1),
        ("mxfp8", False): (1, 32),
        ("mxfp8", True): (32, 1),
    }[chosen.name, along_rows]
    return fp8_reference.quantize(x_RC.float().numpy(), chosen.name, fp8, block, torch.finfo(x_RC.dtype).max)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    both = ~np.isnan(expected)
    np.testing.assert_array_equal(actual.view(np.int32)[both], expected.view(np.int32)[both])


def numbers(generator: torch.Generator, R: int, C: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers times powers of two between 2^-spread and 2^spread, some of them zero."""
    x = torch.randn(R, C, generator=generator) * torch.exp2((torch.rand(R, C, generator=generator) * 2 - 1) * spread)
    return x.masked_fill(torch.rand(R, C, generator=generator) < 0.05, 0.0).to(dtype)


@pytest.mark.parametrize("along_rows", [False, True])
@pytest.mark.parametrize("operand", ["x", "w", "dy"])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    R=st.integers(1, 150),
    C=st.integers(1, 150),
    spread=st.sampled_from([1, 8, 30]),
    dtype=st.sampled_from([*DTYPES]),
)
def test_every_quantised_value_equals_the_reference(
    name: str, fp8_format: str, operand: Operand, along_rows: bool, seed: int, R: int, C: int, spread: int, dtype: str
) -> None:
    x_RC = numbers(torch.Generator().manual_seed(seed), R, C, spread, DTYPES[dtype])
    chosen = recipe(name, fp8_format)
    assert_same_bits(values_of(x_RC, chosen, operand, along_rows), reference_of(x_RC, chosen, operand, along_rows))


SPECIAL = {
    "zeros": [0.0, -0.0],
    "infinities": [float("inf"), 1.0, -float("inf"), -3.0],
    "nan": [float("nan"), 1.0, 1e-30],
    "subnormals": [1e-40, -3e-45, 1e-38, 2e-39],
    "tiny, of which a scale overflows": [1e-37, -5e-38, 3e-38],
    "largest": [3.3895e38, -3.3895e38, 1.0, 1e-10],
    "halfway between two codes": [448.0, 17.0, 19.0, 2.0**-9 * 1.5, 2.0**-10, 27.0, 464.0],
    "over a power of two": [448.0001, 1.0, -449.0],
    "where E8M0 ends": [2.0**-127 * 448, 2.0**-128 * 448, 2.0**-126 * 448 * 1.5, 2.0**-149],
}


@pytest.mark.parametrize("dtype", [*DTYPES])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", [*SPECIAL])
def test_special_values_equal_the_reference(kind: str, name: str, fp8_format: str, dtype: str) -> None:
    values = torch.tensor(SPECIAL[kind])
    x_RC = torch.cat([values, values.flip(0), values]).repeat(3, 1).to(DTYPES[dtype])
    chosen = recipe(name, fp8_format)
    for operand, along_rows in (("x", False), ("x", True), ("w", False), ("dy", False)):
        assert_same_bits(values_of(x_RC, chosen, operand, along_rows), reference_of(x_RC, chosen, operand, along_rows))


def test_every_code_of_a_format_is_a_fixed_point() -> None:
    for name, fp8, operand in (("e4m3", E4M3, "x"), ("hybrid", E5M2, "dy")):
        codes = torch.tensor(np.concatenate([fp8.values, -fp8.values]), dtype=torch.float32)[None]
        np.testing.assert_array_equal(values_of(codes, recipe("tensorwise", name), operand, False), codes.numpy())


@pytest.mark.parametrize("dtype", [*DTYPES])
@pytest.mark.parametrize("name", RECIPES)
def test_a_matmul_and_its_gradients_use_the_quantised_operands(name: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(3)
    # over more powers of two than a format has: within its range, a scale that is a power of two changes no value, so
    # the block that it comes from would not matter
    x_RI, weight_OI = numbers(generator, 48, 160, 20, DTYPES[dtype]), numbers(generator, 96, 160, 20, DTYPES[dtype])
    grad_RO = numbers(generator, 48, 96, 20, DTYPES[dtype])
    chosen = recipe(name, "hybrid")
    x_RI.requires_grad_()
    weight_OI.requires_grad_()
    y_RO = product_of(chosen)(x_RI, weight_OI)
    y_RO.backward(grad_RO)

    def parts(x: torch.Tensor, operand: Operand, along_rows: bool) -> torch.Tensor:
        return torch.from_numpy(reference_of(x.detach(), chosen, operand, along_rows))

    expected = {
        "y": (y_RO, parts(x_RI, "x", False) @ parts(weight_OI, "w", False).T),
        "dx": (x_RI.grad, parts(grad_RO, "dy", False) @ parts(weight_OI, "w", True)),
        "dw": (weight_OI.grad, parts(grad_RO, "dy", True).T @ parts(x_RI, "x", True)),
    }
    for what, (found, product) in expected.items():
        assert found is not None
        torch.testing.assert_close(found.detach(), product.to(DTYPES[dtype]), rtol=0, atol=0, msg=what)


@pytest.mark.parametrize("splits", [RowSplits.equal(4, 32), RowSplits((32, 0, 40, 8))])
@pytest.mark.parametrize("name", ["delayed", *RECIPES])
def test_each_expert_is_quantised_separately(name: str, splits: RowSplits) -> None:
    """The experts together are bitwise identical to four linear layers, gradients included."""
    generator = torch.Generator().manual_seed(5)
    counts = list(splits.rows_e)
    weight_eOI = numbers(generator, 4 * 48, 64, 2, torch.float32).view(4, 48, 64).requires_grad_()
    x_RI = numbers(generator, sum(counts), 64, 3, torch.float32).requires_grad_()
    grad_RO = numbers(generator, sum(counts), 48, 3, torch.float32)
    product_of(recipe(name), 4)(x_RI, weight_eOI, splits).backward(grad_RO)
    assert x_RI.grad is not None
    assert weight_eOI.grad is not None
    for expert, (x, grad) in enumerate(zip(x_RI.detach().split(counts), grad_RO.split(counts), strict=True)):
        x, weight = x.clone().requires_grad_(), weight_eOI.detach()[expert].clone().requires_grad_()
        product_of(recipe(name))(x, weight).backward(grad)
        torch.testing.assert_close(weight.grad, weight_eOI.grad[expert], rtol=0, atol=0)
        torch.testing.assert_close(x.grad, x_RI.grad.split(counts)[expert], rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_rows_of_zeros_at_the_end_of_an_expert_change_nothing(name: str) -> None:
    """So the padding rows that kernels need for experts require no emulation."""
    generator = torch.Generator().manual_seed(6)
    weight_OI = numbers(generator, 32, 64, 2, torch.float32)
    x_RI, grad_RO = numbers(generator, 21, 64, 3, torch.float32), numbers(generator, 21, 32, 3, torch.float32)
    grads = []
    for extra in (0, 11):
        x, weight = torch.nn.functional.pad(x_RI, (0, 0, 0, extra)).requires_grad_(), weight_OI.clone().requires_grad_()
        y_RO = product_of(recipe(name))(x, weight)
        y_RO.backward(torch.nn.functional.pad(grad_RO, (0, 0, 0, extra)))
        assert x.grad is not None
        grads.append((y_RO.detach()[:21], x.grad[:21], weight.grad))
    for plain, padded in zip(*grads, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6)


def test_a_gradient_is_added_into_main_grad_in_its_dtype() -> None:
    generator = torch.Generator().manual_seed(7)
    x_RI, weight = (
        numbers(generator, 16, 32, 1, torch.bfloat16),
        numbers(generator, 48, 32, 1, torch.bfloat16).requires_grad_(),
    )
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(48, 32), False  # type: ignore[attr-defined]
    product_of(recipe("blockwise"), accumulate=True)(x_RI, weight).sum().backward()
    plain = weight.detach().clone().requires_grad_()
    product_of(recipe("blockwise"))(x_RI, plain).sum().backward()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert plain.grad is not None
    added = weight.main_grad - 1  # type: ignore[attr-defined]
    torch.testing.assert_close(added.bfloat16(), plain.grad, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "cla_group"])
def test_a_model_is_quantised_only_in_training_steps(recompute: str) -> None:
    """Outside a training step, as in validation, the model computes as without a recipe; inside, layers excluded from
    FP8 do too."""
    model = tiny.tiny_model(ffn_hidden_size=64, moe_ffn_hidden_size=48)
    inputs = tiny.packed_inputs(model)
    groups = tiny.world_of_one()

    def loss_and_gradients(quantises: bool, **precision: Any) -> tuple[float, dict[str, torch.Tensor]]:
        config = transformer_config(
            model, ParallelConfig(recompute=recompute), PrecisionConfig(dtype="fp32", **precision)
        )
        (built,) = build_model(config, groups, 1)
        with training_step([built], groups) if quantises else nullcontext():
            loss, _ = built(inputs)
            loss.backward()
        return loss.item(), {
            name: parameter.grad for name, parameter in built.named_parameters() if parameter.grad is not None
        }

    plain = loss_and_gradients(True)
    outside = loss_and_gradients(False, fp8_recipe="blockwise")
    inside = loss_and_gradients(True, fp8_recipe="blockwise")
    left_out = loss_and_gradients(
        True, fp8_recipe="blockwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=3
    )
    assert outside[0] == plain[0]
    for name, gradient in plain[1].items():
        torch.testing.assert_close(outside[1][name], gradient, rtol=0, atol=0, msg=name)
    assert inside[0] != plain[0]
    assert left_out[0] == plain[0], "none of the four layers is left"


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
def test_fp8_only_parameters_change_only_validation(name: str) -> None:
    """Training computes the same numbers; validation uses the weights' FP8 values, and leaves the weights unchanged."""
    model = tiny.tiny_model(ffn_hidden_size=64, moe_ffn_hidden_size=48)
    inputs, groups = tiny.packed_inputs(model), tiny.world_of_one()
    in_fp8 = ("linear_qkv.weight", "linear_q.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
    training, validation = [], []
    for is_kept in (False, True):
        formats = PrecisionConfig(fp8_recipe=name, fp8_parameters=is_kept)
        (built,) = build_model(transformer_config(model, ParallelConfig(), formats), groups, 1)
        before = {key: parameter.detach().clone() for key, parameter in built.named_parameters()}
        if is_kept:
            with torch.no_grad():
                found, _ = built(inputs)
            assert all(torch.equal(parameter, before[key]) for key, parameter in built.named_parameters())
            validation.append(found)
        with training_step([built], groups):
            loss, _ = built(inputs)
            loss.backward()
        training.append([loss, *(parameter.grad for parameter in built.parameters())])
        if not is_kept:  # the same model with weights that FP8 can hold
            for key, parameter in built.named_parameters():
                if key.endswith(in_fp8):
                    scale = torch.ones(1 if parameter.dim() == 2 else len(parameter)) if name == "delayed" else None
                    matrices = parameter.detach().view(-1, *parameter.shape[-2:])
                    _, values, inverse = quantize(matrices, recipe(name), "w", False, scale)
                    b, num_r, r, num_c, c = values.shape
                    whole = (values.float() * inverse).view(b, num_r * r, num_c * c)[
                        :, : matrices.shape[1], : matrices.shape[2]
                    ]
                    parameter.data = whole.to(parameter.dtype).view_as(parameter)
            with torch.no_grad():
                found, _ = built(inputs)
            validation.append(found)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*training, strict=True))
    assert torch.equal(*validation)
    assert validation[0] != training[0][0]


def test_the_error_of_an_fp8_step_is_the_same_for_every_recipe_and_seed() -> None:
    """The bound for the comparison on a GPU: a third of the gradients' norm in this model, for every recipe and
    seed."""
    errors = [
        error_of_fp8(tiny.world_of_one(), False, name, "cpu", seed)[1]
        for name, seed in (("delayed", 1), ("blockwise", 1), ("blockwise", 3))
    ]
    middle = sum(errors) / len(errors)
    assert errors == pytest.approx([middle] * 3, rel=SPREAD)
    assert middle == pytest.approx(0.36, rel=SPREAD)


# --- delayed scales ---------------------------------------------------------------------------------------------------


def reference_history(
    amaxes: list[float], fp8: fp8_reference.Fp8, steps: int, takes_max: bool, margin: int
) -> list[float]:
    """Scale after each step: from the largest of the last `steps` amaxes that were not 0, otherwise the previous scale;
    the first scale is 1."""
    seen: list[float] = []
    scale, scales = 1.0, []
    for amax in amaxes:
        if amax != 0:
            seen.append(amax)
            chosen = max((a for a in seen[-steps:] if not np.isnan(a)), default=0.0) if takes_max else amax
            if np.isfinite(chosen) and chosen > 0:
                scale = fp8_reference.tensor_scale(chosen, fp8, margin)
        scales.append(scale)
    return scales


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    amaxes=st.lists(
        st.sampled_from([0.0, 1.0, 3.7, 0.01, 1e-42, 3e38, 1e5, float("inf"), float("nan")]), min_size=1, max_size=20
    ),
    steps=st.integers(1, 5),
    takes_max=st.booleans(),
    margin=st.integers(0, 3),
    operand=st.sampled_from(["x", "dy"]),
)
def test_a_delayed_scale_follows_its_history(
    amaxes: list[float], steps: int, takes_max: bool, margin: int, operand: Operand
) -> None:
    algo = "max" if takes_max else "most_recent"
    chosen = recipe("delayed", fp8_margin=margin, fp8_amax_history_len=steps, fp8_amax_compute_algo=algo)
    delayed = DelayedScale(chosen, operand, 1, "cpu")
    found = []
    for amax in amaxes:
        delayed.observe(torch.tensor([[[-amax]]]), slice(0, 1))
        delayed.update()
        found.append(delayed.scale_e.item())
    assert found == reference_history(amaxes, E5M2 if operand == "dy" else E4M3, steps, takes_max, margin)


def test_a_delayed_scale_takes_the_largest_value_of_all_micro_batches() -> None:
    delayed = DelayedScale(recipe("delayed"), "x", 1, "cpu")
    for amax in (2.0, 7.0, 3.0):
        delayed.observe(torch.tensor([[[amax]]]), slice(0, 1))
    delayed.update()
    assert delayed.scale_e.item() == 64.0


def test_a_delayed_matmul_quantises_with_the_scale_of_earlier_steps() -> None:
    product = product_of(recipe("delayed"))
    x_RI = torch.tensor([[1000.0, 3.3]])
    first = product.operand(x_RI[None], "x", False, slice(0, 1), True)
    assert first[0].tolist() == [[448.0, 3.25]]  # scale 1: the large value saturates
    product.delayed["x"].update()  # type: ignore[operator]
    second = product.operand(x_RI[None], "x", False, slice(0, 1), True)
    scale = fp8_reference.tensor_scale(1000.0, E4M3)
    expected = [
        fp8_reference._fp32(
            fp8_reference.round_to_fp8(fp8_reference._fp32(v * scale), E4M3) * fp8_reference._fp32(1 / scale)
        )
        for v in (1000.0, fp8_reference._fp32(3.3))
    ]
    assert second[0, 0].tolist() == expected


def test_the_formats_of_a_recipe_match_transformer_engine() -> None:
    chosen = {name: recipe(name) for name in ("delayed", *RECIPES)}
    assert {name: dtype_of(one, "dy") for name, one in chosen.items()} == {
        "delayed": torch.float8_e5m2,
        "tensorwise": torch.float8_e5m2,
        "blockwise": torch.float8_e4m3fn,
        "mxfp8": torch.float8_e4m3fn,
    }
    assert {dtype_of(one, operand) for one in chosen.values() for operand in ("x", "w")} == {torch.float8_e4m3fn}
    assert dtype_of(recipe("mxfp8", "hybrid"), "dy") == torch.float8_e5m2
    assert (chosen["delayed"].history_steps, chosen["delayed"].takes_max, chosen["delayed"].margin) == (1024, True, 0)


def test_quantised_blocks_are_padded_to_full_size() -> None:
    scaled, values, inverse = quantize(torch.ones(2, 130, 70), recipe("blockwise"), "w", False)
    assert scaled.shape == values.shape == (2, 2, 128, 1, 128)
    assert inverse.shape == (2, 2, 1, 1, 1)
