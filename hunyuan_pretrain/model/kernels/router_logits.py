"""Logits of the router, and the sum of its gradient and that of what reads the hidden states after it.

Bytes per token and channel of b bytes:

    forward   reads the hidden state: b
    backward  for the weight, reads the hidden state: b
              for the hidden state, reads the gradient of what follows, writes the sum: 2 b

That is the minimum. Logits and their gradient add 4 bytes per expert and token.

Weight and logits are fp32. A bf16 number is exact in TF32, and a TF32x3 product takes the other factor in two parts, 22
of fp32's 24 bits. fp32 hidden states are multiplied in fp32. The weight's gradient is a sum over all tokens: programs
sum SPLITS parts of them, and torch adds these, so the order is fixed.

Shapes: T tokens of this rank, D hidden, E experts, S parts of the tokens. In kernels: X experts, padded to a power of
two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hunyuan_pretrain.model.kernels.rows import check_layout
from hunyuan_pretrain.runtime.handover import handed_over

TOKENS, TILE = 32, 2048
"""Tokens of a tile, and numbers of a tile of the weight (experts, channels): 128 channels for 16 experts, fewer for
more, so that it fits in registers and shared memory."""
SPLITS = 32
"""Parts of the tokens in the weight's gradient: at D = 6400, 1,600 programs, and S E D fp32 numbers for each 8,192 or
more tokens."""


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    matrix, row, column, stride, num_rows, num_columns
):
    """(rows, columns) of a matrix; zeros outside."""
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, logits, num_tokens, hidden_row, weight_row,
    D: tl.constexpr, E: tl.constexpr, X: tl.constexpr, T: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes the logits of T tokens; they are contiguous."""
    token, expert = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, X)
    total = tl.zeros((T, X), tl.float32)
    for first in range(0, D, C):
        channel = first + tl.arange(0, C)
        hidden_TC = _tile(hidden, token, channel, hidden_row, num_tokens, D).to(tl.float32)
        weight_XC = _tile(weight, expert, channel, weight_row, E, D)
        total = tl.dot(hidden_TC, tl.trans(weight_XC), total, input_precision=PRECISION)
    mask = (token < num_tokens)[:, None] & (expert < E)[None, :]
    tl.store(logits + token.to(tl.int64)[:, None] * E + expert[None, :], total, mask=mask)


@triton.jit
def _hidden_kernel(  # type: ignore[no-untyped-def]
    grad_logits, weight, grad_after, grad_hidden, num_tokens, logits_row, weight_row, after_row,
    D: tl.constexpr, E: tl.constexpr, X: tl.constexpr, T: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program writes a tile of the hidden states' gradient, which is contiguous."""
    across: tl.constexpr = (D + C - 1) // C
    token = tl.program_id(0) // across * T + tl.arange(0, T)
    channel, expert = tl.program_id(0) % across * C + tl.arange(0, C), tl.arange(0, X)
    grad_TX = _tile(grad_logits, token, expert, logits_row, num_tokens, E)
    weight_XC = _tile(weight, expert, channel, weight_row, E, D)
    total = tl.dot(grad_TX, weight_XC, input_precision=PRECISION)
    if grad_after is not None:
        total += _tile(grad_after, token, channel, after_row, num_tokens, D).to(tl.float32)
    mask = (token < num_tokens)[:, None] & (channel < D)[None, :]
    tl.store(grad_hidden + token.to(tl.int64)[:, None] * D + channel[None, :], total, mask=mask)


@triton.jit
def _weight_kernel(  # type: ignore[no-untyped-def]
    grad_logits, hidden, parts, num_tokens, logits_row, hidden_row, tokens_of_part,
    D: tl.constexpr, E: tl.constexpr, X: tl.constexpr, T: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program sums C channels over a part of the tokens, into (S, E, D)."""
    across: tl.constexpr = (D + C - 1) // C
    part = tl.program_id(0) // across
    channel, expert = tl.program_id(0) % across * C + tl.arange(0, C), tl.arange(0, X)
    total = tl.zeros((X, C), tl.float32)
    end = tl.minimum((part + 1) * tokens_of_part, num_tokens)
    for first in range(part * tokens_of_part, end, T):
        token = first + tl.arange(0, T)
        grad_TX = _tile(grad_logits, token, expert, logits_row, end, E)
        hidden_TC = _tile(hidden, token, channel, hidden_row, end, D).to(tl.float32)
        total = tl.dot(tl.trans(grad_TX), hidden_TC, total, input_precision=PRECISION)
    mask = (expert < E)[:, None] & (channel < D)[None, :]
    tl.store(parts + (part * E + expert)[:, None] * D + channel[None, :], total, mask=mask)


class _Logits(Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_TD, weight_ED)
        ctx.set_materialize_grads(False)
        T, E = hidden_TD.shape[0], weight_ED.shape[0]
        logits_TE = torch.empty(T, E, dtype=torch.float32, device=hidden_TD.device)
        if T:
            _forward_kernel[(triton.cdiv(T, TOKENS),)](
                hidden_TD,
                weight_ED,
                logits_TE,
                T,
                hidden_TD.stride(0),
                weight_ED.stride(0),
                **_tiles(hidden_TD, weight_ED),
            )
        return logits_TE, hidden_TD

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor | None, grad_TD: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad_TE is None:
            return grad_TD, None
        hidden_TD, weight_ED = ctx.saved_tensors
        (grad_TE,) = handed_over("the logits kernel", grad_TE, dtype=torch.float32, knows_strides=True)
        if grad_TD is not None:
            (grad_TD,) = handed_over("the logits kernel", grad_TD, dtype=hidden_TD.dtype, knows_strides=True)
        tiles = _tiles(hidden_TD, weight_ED)
        return (
            _grad_hidden(grad_TE, hidden_TD, weight_ED, grad_TD, tiles) if ctx.needs_input_grad[0] else None,
            _grad_weight(grad_TE, hidden_TD, weight_ED, tiles) if ctx.needs_input_grad[1] else None,
        )


def _grad_hidden(
    grad_TE: Tensor, hidden_TD: Tensor, weight_ED: Tensor, after_TD: Tensor | None, tiles: dict[str, Any]
) -> Tensor:
    T, D = hidden_TD.shape
    result_TD = hidden_TD.new_empty(T, D)
    if T:
        after_row = 0 if after_TD is None else after_TD.stride(0)
        _hidden_kernel[(triton.cdiv(T, TOKENS) * triton.cdiv(D, tiles["C"]),)](
            grad_TE, weight_ED, after_TD, result_TD, T, grad_TE.stride(0), weight_ED.stride(0), after_row, **tiles
        )
    return result_TD


def _grad_weight(grad_TE: Tensor, hidden_TD: Tensor, weight_ED: Tensor, tiles: dict[str, Any]) -> Tensor:
    (T, D), E = hidden_TD.shape, weight_ED.shape[0]
    if not T:
        return torch.zeros_like(weight_ED)
    tokens = triton.cdiv(triton.cdiv(T, SPLITS), TOKENS) * TOKENS
    parts_SED = weight_ED.new_empty(triton.cdiv(T, tokens), E, D)
    _weight_kernel[(len(parts_SED) * triton.cdiv(D, tiles["C"]),)](
        grad_TE, hidden_TD, parts_SED, T, grad_TE.stride(0), hidden_TD.stride(0), tokens, **tiles
    )
    return parts_SED.sum(0)


def _tiles(hidden_TD: Tensor, weight_ED: Tensor) -> dict[str, Any]:
    """Compile-time arguments."""
    experts = max(16, triton.next_power_of_2(weight_ED.shape[0]))
    return {
        "D": hidden_TD.shape[1], "E": weight_ED.shape[0], "X": experts,
        "T": TOKENS, "C": max(16, TILE // experts), "num_warps": 4,
        "PRECISION": "ieee" if hidden_TD.dtype == torch.float32 else "tf32x3",
    }  # fmt: skip


def router_logits(hidden_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """As model.router_logits.router_logits. Raises ValueError if rows are not contiguous or the weight is not fp32."""
    kernel = "the logits kernel"
    if weight_ED.dtype != torch.float32:
        raise ValueError(f"{kernel}: weight is {weight_ED.dtype}, but must be torch.float32")
    check_layout(kernel, "hidden", hidden_TD, weight_ED.device)
    check_layout(kernel, "weight", weight_ED, weight_ED.device)
    return _Logits.apply(hidden_TD, weight_ED)
