"""Comparison of a kernel with the plain function, and routing plans for it.

Shapes: T tokens, K top-k, c = T * K choices, R rows of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hunyuan_pretrain.model.routing import RoutingPlan

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Grads = Tensor | tuple[Tensor, ...]


@contextmanager
def nan_where_nothing_is_written() -> Iterator[None]:
    """Inside this context torch.empty returns nan, so a number that a kernel leaves out is found every time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def results(function: Function, inputs: Sequence[Tensor], grad: Grads) -> list[Tensor]:
    """Outputs of `function`, and gradients of the inputs, in the layout of the inputs. `grad`: of each output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with nan_where_nothing_is_written():
        found = function(*inputs)
        outputs = (found,) if isinstance(found, Tensor) else found
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, grad)]


def assert_rounded_once(kernel: Function, plain: Function, inputs: Sequence[Tensor], grad: Grads) -> None:
    """Outputs and gradients are those of the plain function, computed in fp32 and rounded once to the kernel's dtype.

    In fp32 what remains is the order of sums and the device's exponential: 1e-5 of a number, and 1e-5 of the tensor's
    largest where terms cancel.
    In bf16, one rounding adds 2^-8 of the number; 2^-7 under Triton's interpreter, which cuts the bits off.
    """
    grads = (grad,) if isinstance(grad, Tensor) else grad
    rounding = 2**-8 if grads[0].is_cuda else 2**-7
    exact = results(plain, [x.float() for x in inputs], tuple(x.float() for x in grads))
    for actual, wanted in zip(results(kernel, inputs, grad), exact, strict=True):
        assert actual.shape == wanted.shape
        assert actual.isfinite().all()
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        rtol = 1e-5 + (rounding if actual.dtype == torch.bfloat16 else 0.0)
        torch.testing.assert_close(actual.float(), wanted, rtol=rtol, atol=1e-5 * largest)


def random_plan(T: int, K: int, R: int, dropped: int, device: str) -> RoutingPlan:
    """Choices in rows drawn at random, all but `dropped` of them; the other rows are empty."""
    generator = torch.Generator().manual_seed(3)
    choice_c = torch.randperm(T * K, generator=generator)[dropped:]
    row_c = torch.randperm(R, generator=generator)[: len(choice_c)]
    row_TK, token_R = torch.full((T * K,), R), torch.full((R,), T)
    row_TK[choice_c], token_R[row_c] = row_c, choice_c // K
    weight_TK = torch.rand(T * K, generator=generator).masked_fill(row_TK == R, 0.0)
    row_TK, weight_TK = row_TK.view(T, K).to(device), weight_TK.view(T, K).to(device)
    is_permutation = K == 1 and R == T and not dropped
    return RoutingPlan(weight_TK, row_TK, token_R.to(device), None, is_permutation)
