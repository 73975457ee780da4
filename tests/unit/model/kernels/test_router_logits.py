"""The kernel of the router's logits against the plain function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hunyuan_pretrain.model.kernels.router_logits import SPLITS, TOKENS, router_logits
from hunyuan_pretrain.model.router_logits import router_logits as plain_router_logits
from tests.helpers.kernels import assert_rounded_once

DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_equal(hidden_TD: Tensor, weight_ED: Tensor, grads: tuple[Tensor, ...]) -> None:
    """`grads`: of the logits, and of what reads the hidden states next, if anything does."""

    def of(function: Any) -> Any:
        return lambda *inputs: function(*inputs)[: len(grads)]

    assert_rounded_once(of(router_logits), of(plain_router_logits), [hidden_TD, weight_ED], grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts"),
    [(1, 8, 1), (37, 40, 3), (TOKENS, 128, 16), (100, 200, 17), (TOKENS * SPLITS + 5, 24, 4), (40, 70, 160)],
    ids=str,
)
@pytest.mark.parametrize("is_read_again", [True, False])
def test_values_and_gradients_are_those_of_the_plain_function(
    tokens: int, hidden: int, experts: int, is_read_again: bool, dtype: torch.dtype, device: str
) -> None:
    """Tiles that are not full, experts that are no power of two, more tokens than SPLITS tiles."""
    hidden_TD = normal(tokens, hidden, dtype=dtype, device=device)
    weight_ED = normal(experts, hidden, device=device, seed=1)
    grad_TE = normal(tokens, experts, device=device, seed=2)
    grad_TD = normal(tokens, hidden, dtype=dtype, device=device, seed=3)
    assert_equal(hidden_TD, weight_ED, (grad_TE, grad_TD) if is_read_again else (grad_TE,))


def test_no_tokens(device: str) -> None:
    grads = torch.empty(0, 3, device=device), torch.empty(0, 8, device=device)
    assert_equal(torch.empty(0, 8, device=device), normal(3, 8, device=device), grads)


def test_tensors_of_any_row_stride_are_read_in_place(device: str) -> None:
    wide = normal(50, 100, dtype=torch.bfloat16, device=device)
    grad_TE = normal(3, 50, device=device, seed=1).t()
    grad_TD = torch.ones((), dtype=torch.bfloat16, device=device).expand(50, 40)
    assert_equal(wide[:, 3:43], normal(3, 90, device=device)[:, :40], (grad_TE, grad_TD))


def test_the_hidden_states_alone_may_need_a_gradient(device: str) -> None:
    hidden_TD, weight_ED = normal(5, 8, device=device).requires_grad_(), normal(3, 8, device=device)
    logits_TE, again_TD = router_logits(hidden_TD, weight_ED)
    (grad_TD,) = torch.autograd.grad(again_TD.sum(), hidden_TD)
    assert torch.equal(grad_TD, torch.ones_like(hidden_TD)), "logits that nothing reads"
    logits_TE, _ = router_logits(hidden_TD, weight_ED)
    (grad_TD,) = torch.autograd.grad(logits_TE.sum(), hidden_TD)
    torch.testing.assert_close(grad_TD, weight_ED.sum(0).expand(5, 8))


def test_what_the_kernel_would_misread_is_refused(device: str) -> None:
    hidden_TD, weight_ED = normal(5, 8, device=device), normal(3, 8, device=device)
    with pytest.raises(ValueError, match=r"the logits kernel: weight is torch.bfloat16, but must be torch.float32"):
        router_logits(hidden_TD, weight_ED.bfloat16())
    with pytest.raises(ValueError, match=r"the logits kernel: hidden has shape \(8, 5\), strides \(1, 8\); the last"):
        router_logits(hidden_TD.t(), weight_ED)
