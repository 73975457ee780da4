"""The SwiGLU kernel against the plain function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hunyuan_pretrain.model.kernels.swiglu import swiglu
from hunyuan_pretrain.model.swiglu import swiglu as plain_swiglu
from tests.helpers.kernels import assert_rounded_once, results


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1), (37, 40), (5, 64), (3, 1025), (2, 2100)], ids=lambda number: str(number)
)
def test_values_and_gradients_are_those_of_the_plain_function(
    rows: int, size: int, dtype: torch.dtype, device: str
) -> None:
    """Rows shorter than a tile, several to a tile, and longer ones; sizes that are no power of two."""
    x_TF = normal(rows, 2 * size, dtype=dtype, device=device)
    assert_rounded_once(swiglu, plain_swiglu, [x_TF], normal(rows, size, dtype=dtype, device=device, seed=1))


def test_no_rows_give_no_rows(device: str) -> None:
    output, grad = results(swiglu, [torch.empty(0, 80, device=device)], torch.empty(0, 40, device=device))
    assert output.shape == (0, 40)
    assert grad.shape == (0, 80)


def test_rows_of_a_wider_tensor_are_read_in_place(device: str) -> None:
    wide_TF = normal(9, 200, device=device)
    grad = normal(9, 99, device=device, seed=1)
    x_TF, grad = wide_TF[:, 7:87], grad[:, 3:43]
    assert not x_TF.is_contiguous()
    assert_rounded_once(swiglu, plain_swiglu, [x_TF], grad)


def test_a_gradient_of_any_layout_is_read_rightly(device: str) -> None:
    x_TF = normal(9, 80, device=device)
    for grad in (normal(40, 9, device=device).t(), torch.ones((), device=device).expand(9, 40)):
        assert_rounded_once(swiglu, plain_swiglu, [x_TF], grad)


def test_saturated_gates_give_no_nan(device: str) -> None:
    """Sigmoids of 0 and 1, to the last bit."""
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4], device=device)
    x_TF = torch.cat([gate, torch.full_like(gate, 3.0)])[None]
    assert_rounded_once(swiglu, plain_swiglu, [x_TF], torch.ones(1, 6, device=device))


def test_rows_that_are_not_contiguous_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"the SwiGLU kernel: input has shape \(9, 80\), strides \(1, 9\); the last"):
        swiglu(normal(80, 9, device=device).t())


def test_only_the_input_is_kept_for_the_backward_pass(device: str) -> None:
    x_TF = normal(4, 80, device=device).requires_grad_()
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        swiglu(x_TF)
    assert kept == [x_TF.data_ptr()]
