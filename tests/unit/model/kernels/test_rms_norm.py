"""The kernel of residual, branch and RMSNorm against the plain function."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hunyuan_pretrain.model.kernels.rms_norm import PARTS
from hunyuan_pretrain.model.kernels.rms_norm import add_rms_norm as kernel_add_rms_norm
from hunyuan_pretrain.model.norm import add_rms_norm as plain_add_rms_norm
from tests.helpers.kernels import assert_rounded_once, results

EPS = 1e-5
kernel, plain = (
    partial(lambda function, x, weight: function(x, None, weight, EPS)[0], function)
    for function in (kernel_add_rms_norm, plain_add_rms_norm)
)
"""The norm alone, whose input nothing else reads."""


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (37, 40), (5, 64), (3, 1025), (PARTS + 3, 24)], ids=str)
def test_values_and_gradients_are_those_of_the_plain_function(
    rows: int, size: int, dtype: torch.dtype, device: str
) -> None:
    """Sizes that are no power of two, more rows than parts."""
    inputs = [normal(rows, size, dtype=dtype, device=device), normal(size, dtype=dtype, device=device, seed=1)]
    assert_rounded_once(kernel, plain, inputs, normal(rows, size, dtype=dtype, device=device, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_branch", [True, False])
def test_the_sum_and_its_two_gradients_are_those_of_the_plain_function(
    has_branch: bool, dtype: torch.dtype, device: str
) -> None:
    """Sums of these numbers are exact in bf16: otherwise the norm, that of the rounded sum, would differ by more than
    its own rounding."""
    x_TD, branch_TD = (torch.round(2 * normal(37, 40, device=device, seed=seed)).to(dtype) for seed in (0, 3))
    inputs = [x_TD, normal(40, dtype=dtype, device=device, seed=1), *[branch_TD] * has_branch]
    grads = tuple(normal(37, 40, dtype=dtype, device=device, seed=seed) for seed in (2, 4))

    def of(function: Any) -> Any:
        return lambda x, weight, branch=None: function(x, branch, weight, EPS)

    assert_rounded_once(of(kernel_add_rms_norm), of(plain_add_rms_norm), inputs, grads)
    sums = (
        lambda *x, f=function: of(f)(x[0], inputs[1], *x[1:])[1]
        for function in (kernel_add_rms_norm, plain_add_rms_norm)
    )
    assert_rounded_once(*sums, inputs[::2], grads[1])  # nothing reads the norm


@pytest.mark.parametrize("size", [40, 6400])
def test_the_norm_of_a_sum_has_the_bits_of_the_norm_of_its_rounded_result(size: int, device: str) -> None:
    """Recomputed norms (parallel.recompute) start from the sum."""
    x_TD, branch_TD = (normal(9, size, dtype=torch.bfloat16, device=device, seed=seed) for seed in (0, 3))
    weight_D = normal(size, dtype=torch.bfloat16, device=device, seed=1)
    output_TD, sum_TD = kernel_add_rms_norm(x_TD, branch_TD, weight_D, EPS)
    again_TD, same_TD = kernel_add_rms_norm(sum_TD, None, weight_D, EPS)
    assert torch.equal(output_TD, again_TD)
    assert same_TD.data_ptr() == sum_TD.data_ptr()
    if device == "cuda":  # the interpreter rounds to bf16 by cutting bits off
        assert torch.equal(sum_TD, x_TD + branch_TD)


def test_no_rows_give_no_rows(device: str) -> None:
    inputs = [torch.empty(0, 40, device=device), normal(40, device=device)]
    output, grad_x, grad_weight = results(kernel, inputs, torch.empty(0, 40, device=device))
    assert output.shape == grad_x.shape == (0, 40)
    assert (grad_weight == 0).all()


def test_tensors_of_any_row_stride_are_read_in_place(device: str) -> None:
    wide_TD = normal(9, 200, device=device)
    for grad in (wide_TD[:, 3:43], normal(40, 9, device=device).t(), torch.ones((), device=device).expand(9, 40)):
        assert_rounded_once(kernel, plain, [wide_TD[:, 7:47], normal(40, device=device, seed=1)], grad)


def test_zeros_and_large_numbers_give_finite_results(device: str) -> None:
    x_TD = torch.zeros(3, 40, device=device)
    x_TD[1], x_TD[2, 5] = 1e15, 1e15
    assert_rounded_once(kernel, plain, [x_TD, normal(40, device=device)], normal(3, 40, device=device, seed=1))


def test_what_the_kernel_would_misread_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"the RMSNorm kernel: x has shape \(9, 80\), strides \(1, 9\); the last dim"):
        kernel(normal(80, 9, device=device).t(), normal(80, device=device))


def test_only_input_weight_and_one_number_per_row_are_kept(device: str) -> None:
    inputs = [normal(4, 80, device=device).requires_grad_(), normal(80, device=device).requires_grad_()]
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernel(*inputs)
    assert [x.data_ptr() for x in kept[:2]] == [x.data_ptr() for x in inputs]
    assert [x.shape for x in kept[2:]] == [(4,)]


def test_with_a_branch_the_sum_is_kept_instead_of_both_terms(device: str) -> None:
    leaves = [normal(4, 80, device=device, seed=seed).requires_grad_() for seed in (0, 1)]
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        _, sum_TD = kernel_add_rms_norm(*leaves, normal(80, device=device), EPS)
    assert [x.data_ptr() for x in kept if x.numel() == sum_TD.numel()] == [sum_TD.data_ptr()]
