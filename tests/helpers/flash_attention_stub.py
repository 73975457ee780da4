"""CPU stand-ins for FlashAttention's kernels for packed documents: torch's operator, and the packages flash-attn and
flash-attn-3. They compute the definition, and refuse what the kernels refuse or would misread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

calls: list[tuple[str, bool]] = []
"""(kernel, whether its backward pass is deterministic) of each forward call."""


def check(q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any) -> None:
    """Raise RuntimeError for arguments that the kernels refuse, or with which they leave out rows or read others."""
    problems: list[str] = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.bfloat16:
            problems.append(f"{name} is {x.dtype}")
        if x.dim() != 3 or x.stride(-1) != 1:
            problems.append(f"{name} has shape {tuple(x.shape)}, strides {x.stride()}")
        if x.shape[-1] % 8 or x.shape[-1] > 256:
            problems.append(f"{name} has head width {x.shape[-1]}")
    if q.shape[1] % k.shape[1] or k.shape != v.shape:
        problems.append(f"{q.shape[1]} query heads, keys {tuple(k.shape)}, values {tuple(v.shape)}")
    for name, cu, longest, rows in (("q", cu_q, max_q, len(q)), ("k", cu_k, max_k, len(k))):
        if not isinstance(cu, Tensor) or cu.dtype != torch.int32 or not cu.is_contiguous() or cu.device != q.device:
            problems.append(f"cu_seqlens_{name}: {cu!r}")
        elif cu[0] != 0 or cu[-1] != rows or (lengths := cu.diff()).min() < 0:
            problems.append(f"cu_seqlens_{name} is {cu.tolist()} for {rows} rows")
        elif type(longest) is not int or longest < lengths.max():  # of a longer document, rows would be left out
            problems.append(f"max_seqlen_{name} is {longest!r}")
    if problems:
        raise RuntimeError("; ".join(problems))


def definition(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)) v of each document, the mask ending at its last query and last key."""
    outs = [
        torch.einsum("nts,snh->tnh", _weights(q[rows], k[keys]), _wide(v[keys], q))
        for rows, keys in _slices(cu_q, cu_k)
    ]
    return torch.cat(outs).to(q.dtype)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `definition`, written out: inside an operator autograd records nothing."""
    grads = [torch.zeros(x.shape) for x in (q, k, v)]
    for rows, keys in _slices(cu_q, cu_k):
        dout, weights = grad[rows].float(), _weights(q[rows], k[keys])
        dweights = torch.einsum("tnh,snh->nts", dout, _wide(v[keys], q))
        inner = (dout * out[rows].float()).sum(-1).T[..., None]
        dscores = weights * (dweights - inner) * q.shape[-1] ** -0.5
        grads[0][rows] = torch.einsum("nts,snh->tnh", dscores, _wide(k[keys], q))
        for number, wide in (
            (1, torch.einsum("nts,tnh->snh", dscores, q[rows].float())),
            (2, torch.einsum("nts,tnh->snh", weights, dout)),
        ):
            grads[number][keys] = wide.unflatten(1, (k.shape[1], -1)).sum(2)
    return tuple(x.to(q.dtype) for x in grads)


def _slices(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    return [
        (slice(*rows), slice(*keys))
        for rows, keys in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
        if rows[0] < rows[1]  # documents without tokens, at the end
    ]


def _weights(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("tnh,snh->nts", q.float(), _wide(k, q)) * q.shape[-1] ** -0.5
    is_hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
    return scores.masked_fill(is_hidden, -torch.inf).softmax(-1)


def _wide(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)


@contextmanager
def torch_operator() -> Iterator[None]:
    """Inside the context, torch's operator runs on a CPU: under its own schema and derivative."""
    library = torch.library.Library("aten", "IMPL")

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        dropout: float,
        is_causal: bool,
        returns_mask: bool,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        check(q, k, v, cu_q, cu_k, max_q, max_k)
        assert (dropout, is_causal, returns_mask) == (0.0, True, False)
        assert not any(option is not None for option in options.values()), options
        calls.append(("torch_varlen", torch.are_deterministic_algorithms_enabled()))
        nothing = torch.empty(0)
        logsumexp_NT = torch.zeros(q.shape[1], len(q))
        return definition(q, k, v, cu_q, cu_k), logsumexp_NT, torch.zeros(2, dtype=torch.uint64), nothing, nothing

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any, **options: Any
    ) -> tuple[Tensor, ...]:
        cu_q, cu_k, max_q, max_k, dropout, is_causal = rest[:6]
        check(q, k, v, cu_q, cu_k, max_q, max_k)
        assert (dropout, is_causal) == (0.0, True)
        assert logsumexp.shape == (q.shape[1], len(q))
        assert torch.equal(out, definition(q, k, v, cu_q, cu_k))
        return gradients(grad, q, k, v, out, cu_q, cu_k)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        out = definition(q, k, v, cu_q, cu_k)
        ctx.save_for_backward(q, k, v, out, cu_q, cu_k)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if grad.stride(-1) != 1:
            raise RuntimeError("the gradient's last dim is not contiguous")
        return *gradients(grad, *ctx.saved_tensors), None, None


def _two(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> Tensor:
    """With the arguments of flash-attn 2.8."""
    assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, True, (-1, -1), 0.0)
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    calls.append(("flash_attn_2", deterministic))
    return _Kernel.apply(q, k, v, cu_seqlens_q, cu_seqlens_k)


def _three(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: None = None,
    seqused_k: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor:
    """With the arguments of flash-attn-3."""
    assert (seqused_q, seqused_k, softmax_scale, causal, window_size) == (None, None, None, True, (-1, -1))
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    calls.append(("flash_attn_3", deterministic))
    return _Kernel.apply(q, k, v, cu_seqlens_q, cu_seqlens_k)


def _three_early(*args: Any, **options: Any) -> tuple[Tensor, None]:
    """An early flash-attn-3 returns the logsumexp too."""
    return _three(*args, **options), None


@contextmanager
def packages(is_early: bool = False) -> Iterator[None]:
    """Inside the context, flash-attn and flash-attn-3 can be imported; the early one inside its package only."""
    two, three = ModuleType("flash_attn"), ModuleType("flash_attn_interface")
    two.flash_attn_varlen_func = _two  # type: ignore[attr-defined]
    three.flash_attn_varlen_func = _three_early if is_early else _three  # type: ignore[attr-defined]
    modules: dict[str, Any] = {"flash_attn": two, "flash_attn_interface": three}
    if is_early:
        del modules["flash_attn_interface"]
        modules |= {"flash_attn_3": ModuleType("flash_attn_3"), "flash_attn_3.flash_attn_interface": three}
    sys.modules.update(modules)  # not patch.dict: it would also forget what torch imports meanwhile
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


@contextmanager
def everything() -> Iterator[None]:
    """All stand-ins."""
    calls.clear()
    with torch_operator(), packages():
        yield
