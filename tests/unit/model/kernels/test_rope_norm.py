"""The kernels of RoPE and head norm against the plain functions.

In fp32 results differ by the order of sums. In bf16 they are those of the plain function on the same numbers in fp32,
rounded once: to the nearest on a GPU, half an eps; towards zero by Triton's interpreter, up to an eps.

Shapes: T tokens, G key/value heads, R query heads of each, N query heads, X = R + 2, H head dim, h = H / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.model import norm

pytest.importorskip("triton")

from hunyuan_pretrain.model.kernels.rope_norm import qkv_rope_norm, rope_norm

EPS = 1e-5
WIDTHS = (32, 64, 80, 96, 128)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def table_of(T: int, H: int, device: str) -> tuple[Tensor, Tensor]:
    return norm.rope_table(torch.arange(T, device=device) * 7 + 3, 10_000.0, H)


def keys(weight_H: Tensor) -> Tensor:
    """A weight for the keys, where `weight_H` is that of the queries; bf16 represents it."""
    return numbers(tuple(weight_H.shape), torch.bfloat16, str(weight_H.device), 5).to(weight_H.dtype)


def results(function: Callable[..., Any], x: Tensor, weight_H: Tensor | None, eps: float | None) -> list[Tensor]:
    """Results, and gradients of the input and both weights, for output gradients that bf16 represents. `x` keeps its
    strides."""
    x = x.detach().requires_grad_()
    weights = [] if weight_H is None else [weight.detach().requires_grad_() for weight in (weight_H, keys(weight_H))]
    found = function(x, table_of(x.shape[0], x.shape[-1], str(x.device)), tuple(weights) or None, eps)
    outputs = found if isinstance(found, tuple) else (found,)
    grads = [numbers(tuple(out.shape), torch.bfloat16, str(x.device), 1).to(out.dtype) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, [x, *weights], grads)]


def compare(kernel: Callable[..., Any], plain: Callable[..., Any], x: Tensor, *arguments: Any) -> None:
    in_fp32 = [argument.float() if isinstance(argument, Tensor) else argument for argument in arguments]
    found, expected = results(kernel, x, *arguments), results(plain, x.float(), *in_fp32)
    eps = torch.finfo(x.dtype).eps / (2 if x.is_cuda else 1)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        is_rounded = a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=eps if is_rounded else 1e-5, atol=1e-5)
    for out in found[: len(found) - 2]:
        assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("H", WIDTHS)
def test_queries_keys_and_values_are_those_of_the_plain_function(device: str, H: int, dtype: torch.dtype) -> None:
    """3 key/value heads with 5 query heads each: no size is a power of two."""
    qkv_TGXH = numbers((3, 3, 5 + 2, H), dtype, device)
    compare(qkv_rope_norm, norm.qkv_rope_norm, qkv_TGXH, numbers((H,), dtype, device, 2), EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("H", WIDTHS)
def test_heads_are_those_of_the_plain_function(device: str, H: int, dtype: torch.dtype) -> None:
    """More heads than a tile holds."""
    compare(rope_norm, norm.rope_norm, numbers((2, 33, H), dtype, device), numbers((H,), dtype, device, 2), EPS)


@pytest.mark.parametrize("eps", [EPS, None])
def test_without_weight_and_without_norm(device: str, eps: float | None) -> None:
    compare(rope_norm, norm.rope_norm, numbers((5, 4, 80), torch.float32, device), None, eps)
    compare(qkv_rope_norm, norm.qkv_rope_norm, numbers((5, 2, 4, 80), torch.float32, device), None, eps)


def test_programs_of_several_tokens_sum_the_gradient_of_the_weight(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 tokens in programs of 3: the last one has two."""
    monkeypatch.setattr("hunyuan_pretrain.model.kernels.rope_norm.PROGRAMS", 4)
    weight_H = numbers((32,), torch.float32, device, 2)
    compare(qkv_rope_norm, norm.qkv_rope_norm, numbers((11, 2, 5, 32), torch.float32, device), weight_H, EPS)


def test_a_head_of_zeros_has_finite_gradients(device: str) -> None:
    x_TNH, weight_H = numbers((3, 4, 64), torch.float32, device), numbers((64,), torch.float32, device, 2)
    x_TNH[1, 2] = 0
    compare(rope_norm, norm.rope_norm, x_TNH, weight_H, EPS)


def test_no_tokens(device: str) -> None:
    weight_H = numbers((64,), torch.float32, device)
    q_TNH, k_TGH, v_TGH, grad, *of_weights = results(
        qkv_rope_norm, numbers((0, 2, 5, 64), torch.float32, device), weight_H, EPS
    )
    assert (q_TNH.shape, k_TGH.shape, v_TGH.shape, grad.shape) == ((0, 6, 64), (0, 2, 64), (0, 2, 64), (0, 2, 5, 64))
    assert not any(grad_weight_H.any() for grad_weight_H in of_weights)


# --- memory layouts ---------------------------------------------------------------------------------------------------


def test_inputs_may_have_any_strides_over_tokens_and_heads(device: str) -> None:
    weight_H = numbers((64,), torch.float32, device, 2)
    wide_TGXH = numbers((5, 4, 6, 80), torch.float32, device)
    by_head_NTH = numbers((6, 5, 64), torch.float32, device)
    for x_TNH in (wide_TGXH[:, :, 1, 8:72], by_head_NTH.transpose(0, 1), wide_TGXH[::2, :, 3, :64]):
        assert not x_TNH.is_contiguous()
        compare(rope_norm, norm.rope_norm, x_TNH, weight_H, EPS)
    compare(qkv_rope_norm, norm.qkv_rope_norm, wide_TGXH[:, 1:3, 1:5, :64], weight_H, EPS)


def test_gradients_may_have_any_strides(device: str) -> None:
    """Attention may return its three gradients as slices of one tensor, and a sum expands a single number."""
    qkv_TGXH, weight_H = numbers((5, 2, 5, 64), torch.float32, device), numbers((64,), torch.float32, device, 2)
    table, packed = table_of(5, 64, device), numbers((5, 6 + 2 + 2, 2, 64), torch.float32, device, 1)
    for grads in ([packed[:, :6, 1], packed[:, 6:8, 0], packed[:, 8:, 1]], None):
        pair = []
        for function in (qkv_rope_norm, norm.qkv_rope_norm):
            leaves = x, *weights = [y.clone().requires_grad_() for y in (qkv_TGXH, weight_H, keys(weight_H))]
            outputs = function(x, table, tuple(weights), EPS)
            if grads is None:
                pair.append(torch.autograd.grad(sum(out.sum() for out in outputs), leaves))
            else:
                pair.append(torch.autograd.grad(outputs, leaves, grads))
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_results_that_nothing_reads_have_no_gradient(device: str) -> None:
    """The keys of an owner whose attention is not differentiated."""
    qkv_TGXH, weight_H = numbers((5, 2, 5, 64), torch.float32, device), numbers((64,), torch.float32, device, 2)
    pair = []
    for function in (qkv_rope_norm, norm.qkv_rope_norm):
        x = qkv_TGXH.clone().requires_grad_()
        pair.append(
            torch.autograd.grad(
                function(x, table_of(5, 64, device), (weight_H, keys(weight_H)), EPS)[1].square().sum(), x
            )[0]
        )
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, "the input has shape (5, 4, 64), strides"),
        ({"x": lambda x: x[..., :63]}, "63 channels in a head, but it takes even numbers up to 256"),
        ({"x": lambda x: x.repeat(1, 1, 5)}, "320 channels in a head, but it takes even numbers up to 256"),
        ({"cos": lambda cos: cos[:3]}, "cos has shape (3, 1, 32), strides (32, 32, 1), but it must be (5, 1, 32)"),
        ({"sin": lambda sin: sin.repeat(1, 1, 2)[..., ::2]}, "sin has shape (5, 1, 32), strides (64, 64, 2)"),
        (
            {"weight": lambda weight: weight[None]},
            "the queries' weight has shape (1, 64), strides (64, 1), but it must be (64,)",
        ),
    ],
)
def test_what_would_be_read_wrongly_is_refused(device: str, change: dict[str, Any], reason: str) -> None:
    cos, sin = table_of(5, 64, device)
    given = {"x": numbers((5, 4, 64), torch.float32, device), "cos": cos, "sin": sin}
    given["weight"] = numbers((64,), torch.float32, device)
    for name, changed in change.items():
        given[name] = changed(given[name])
    with pytest.raises(ValueError, match="the kernel of rope_norm: ") as caught:
        rope_norm(given["x"], (given["cos"], given["sin"]), (given["weight"], keys(cos[0, 0, :1].expand(64))), EPS)
    assert reason in str(caught.value)


# --- what the backward pass keeps and moves ---------------------------------------------------------------------------


@pytest.mark.parametrize("has_norm", [True, False])
def test_only_the_input_is_kept_for_the_backward_pass(device: str, has_norm: bool) -> None:
    """And nothing of the size of its queries without a norm."""
    qkv_TGXH, weight_H = numbers((5, 2, 5, 64), torch.float32, device), numbers((64,), torch.float32, device)
    table, kept = table_of(5, 64, device), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        qkv_rope_norm(
            qkv_TGXH.requires_grad_(), table, (weight_H, weight_H) if has_norm else None, EPS if has_norm else None
        )
    large = [tensor.data_ptr() for tensor in kept if tensor.numel() >= qkv_TGXH.numel() // 5]
    assert large == [qkv_TGXH.data_ptr()] * has_norm


def test_two_passes_have_the_same_bits(device: str) -> None:
    x_TNH, weight_H = numbers((3, 9, 80), torch.bfloat16, device), numbers((80,), torch.float32, device, 2)
    for a, b in zip(results(rope_norm, x_TNH, weight_H, EPS), results(rope_norm, x_TNH, weight_H, EPS), strict=True):
        assert torch.equal(a, b)
