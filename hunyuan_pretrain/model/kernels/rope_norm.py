"""RoPE, per-head RMSNorm and its weights in one kernel each way, from the qkv projection to what attention reads.

Bytes per token, with H values of b bytes in a head; N query heads, G key/value heads:

    forward   reads and writes 2 b H (N + 2G), with keys and values; 2 b H N without
    backward  reads and writes b H (3N + 5G), with keys and values; 3 b H N without
    both      read a token's row of the RoPE table once, 4 H bytes

That is the minimum for functions that return their results in memory: each input is read once, each result written
once. Only the input is saved, by reference. The plain function saves the normalised heads (b H N more to write) and a
number per head; here the backward pass computes both again from the input, which it reads instead of them. So the qkv
tensor stays in memory until then, 2 b H G bytes per token more than the normalised query heads. The gradient
of the weights' product is summed per program in fp32, which adds at most 4 H PROGRAMS bytes each way; another launch
adds these sums and multiplies by either weight.

Shapes: T tokens, N query heads, G key/value heads, R query heads of a key/value head, X heads of a group in the input
(R + 2 with keys and values, R without), H head dim, h = H / 2, P programs.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hunyuan_pretrain.model.kernels.rows import sum_of_parts
from hunyuan_pretrain.model.norm import HeadWeights
from hunyuan_pretrain.runtime.handover import handed_over

PROGRAMS = 4096
"""The most programs of a backward pass: several for every place on a GPU, few enough that their sums are small."""
TILE = 512
"""Elements of half a head that a program holds at a time, over all heads of the tile: 4 per thread, so that a thread of
the backward pass, which holds six such halves, needs about 70 registers."""
WIDEST = 256


@triton.jit
def _halves(pointer, mask, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of a tile of heads, in fp32."""
    low = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(pointer + HALF, mask=mask, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _weights(q_weight, k_weight, lane, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of the product of the weights, in fp32."""
    q_low, q_high = _halves(q_weight + lane, lane < HALF, HALF)
    k_low, k_high = _halves(k_weight + lane, lane < HALF, HALF)
    return q_low * k_low, q_high * k_high


@triton.jit
def _rotate(low, high, cos, sin):  # type: ignore[no-untyped-def]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _rotated_and_normalised(low, high, cos, sin, eps, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of a tile of heads after RoPE and norm, and 1 / rms of each head."""
    rstd = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * HALF) + eps)[:, None]
    low, high = _rotate(low * rstd, high * rstd, cos, sin)
    return low, high, rstd


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    q_weight,
    k_weight,
    q,
    k,
    v,
    eps,
    x_token,
    x_group,
    x_head,
    cos_token,
    sin_token,
    G: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_KV: tl.constexpr,
):
    """A program computes all heads of one token. `x_token` is the stride of x over tokens, and so on."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)[None, :]
    is_lane = lane < HALF
    cos_1h = tl.load(cos + token * cos_token + lane, mask=is_lane, other=0.0).to(tl.float32)
    sin_1h = tl.load(sin + token * sin_token + lane, mask=is_lane, other=0.0).to(tl.float32)
    x += token * x_token
    if HAS_WEIGHT:
        weight_low, weight_high = _weights(q_weight, k_weight, lane, HALF)
    for first in range(0, G * R, Q_ROWS):
        head = first + tl.arange(0, Q_ROWS)[:, None].to(tl.int64)
        mask = (head < G * R) & is_lane
        low, high = _halves(x + head // R * x_group + head % R * x_head + lane, mask, HALF)
        if HAS_NORM:
            low, high, _ = _rotated_and_normalised(low, high, cos_1h, sin_1h, eps, HALF)
        else:
            low, high = _rotate(low, high, cos_1h, sin_1h)
        if HAS_WEIGHT:
            low, high = low * weight_low, high * weight_high
        out = q + (token * (G * R) + head) * (2 * HALF) + lane
        tl.store(out, low, mask=mask)
        tl.store(out + HALF, high, mask=mask)
    if HAS_KV:
        for first in range(0, G, KV_ROWS):
            head = first + tl.arange(0, KV_ROWS)[:, None].to(tl.int64)
            mask = (head < G) & is_lane
            source = x + head * x_group + R * x_head + lane
            low, high = _halves(source, mask, HALF)
            v_low, v_high = _halves(source + x_head, mask, HALF)
            if HAS_NORM:
                low, high, _ = _rotated_and_normalised(low, high, cos_1h, sin_1h, eps, HALF)
            else:
                low, high = _rotate(low, high, cos_1h, sin_1h)
            out = (token * G + head) * (2 * HALF) + lane
            tl.store(k + out, low, mask=mask)
            tl.store(k + out + HALF, high, mask=mask)
            tl.store(v + out, v_low, mask=mask)
            tl.store(v + out + HALF, v_high, mask=mask)


@triton.jit
def _through_norm(grad_low, grad_high, y_low, y_high, rstd, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """From the gradient of y, the normalised heads, to that of the heads before the norm: (g - y mean(g y)) / rms."""
    mean = (tl.sum(grad_low * y_low + grad_high * y_high, axis=1) / (2 * HALF))[:, None]
    return (grad_low - y_low * mean) * rstd, (grad_high - y_high * mean) * rstd


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    q_weight,
    k_weight,
    grad_q,
    grad_k,
    grad_v,
    grad_x,
    grad_weight,
    num_tokens,
    tokens_of_program,
    eps,
    x_token,
    x_group,
    x_head,
    cos_token,
    sin_token,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    G: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_KV: tl.constexpr,
):
    """A program computes all heads of `tokens_of_program` consecutive tokens, and sums their gradients of the
    weights' product into its row of `grad_weight`. grad_x is contiguous."""
    X: tl.constexpr = R + 2 if HAS_KV else R
    lane = tl.arange(0, LANES)[None, :]
    is_lane = lane < HALF
    if HAS_WEIGHT:
        weight_low, weight_high = _weights(q_weight, k_weight, lane, HALF)
        sum_low = tl.zeros([Q_ROWS, LANES], dtype=tl.float32)
        sum_high = tl.zeros([Q_ROWS, LANES], dtype=tl.float32)
    start = tl.program_id(0) * tokens_of_program
    for number in range(start, tl.minimum(start + tokens_of_program, num_tokens)):
        token = tl.cast(number, tl.int64)
        cos_1h = tl.load(cos + token * cos_token + lane, mask=is_lane, other=0.0).to(tl.float32)
        sin_1h = tl.load(sin + token * sin_token + lane, mask=is_lane, other=0.0).to(tl.float32)
        for first in range(0, G * R, Q_ROWS):
            head = first + tl.arange(0, Q_ROWS)[:, None].to(tl.int64)
            mask = (head < G * R) & is_lane
            grad_low, grad_high = _halves(grad_q + token * q_token + head * q_head + lane, mask, HALF)
            if HAS_NORM:
                source = x + token * x_token + head // R * x_group + head % R * x_head + lane
                low, high = _halves(source, mask, HALF)
                y_low, y_high, rstd = _rotated_and_normalised(low, high, cos_1h, sin_1h, eps, HALF)
                if HAS_WEIGHT:
                    sum_low += grad_low * y_low
                    sum_high += grad_high * y_high
                    grad_low, grad_high = grad_low * weight_low, grad_high * weight_high
                grad_low, grad_high = _through_norm(grad_low, grad_high, y_low, y_high, rstd, HALF)
            grad_low, grad_high = _rotate(grad_low, grad_high, cos_1h, -sin_1h)
            out = grad_x + ((token * G + head // R) * X + head % R) * (2 * HALF) + lane
            tl.store(out, grad_low, mask=mask)
            tl.store(out + HALF, grad_high, mask=mask)
        if HAS_KV:
            for first in range(0, G, KV_ROWS):
                head = first + tl.arange(0, KV_ROWS)[:, None].to(tl.int64)
                mask = (head < G) & is_lane
                grad_low, grad_high = _halves(grad_k + token * k_token + head * k_head + lane, mask, HALF)
                v_low, v_high = _halves(grad_v + token * v_token + head * v_head + lane, mask, HALF)
                if HAS_NORM:
                    low, high = _halves(x + token * x_token + head * x_group + R * x_head + lane, mask, HALF)
                    y_low, y_high, rstd = _rotated_and_normalised(low, high, cos_1h, sin_1h, eps, HALF)
                    grad_low, grad_high = _through_norm(grad_low, grad_high, y_low, y_high, rstd, HALF)
                grad_low, grad_high = _rotate(grad_low, grad_high, cos_1h, -sin_1h)
                out = grad_x + ((token * G + head) * X + R) * (2 * HALF) + lane
                tl.store(out, grad_low, mask=mask)
                tl.store(out + HALF, grad_high, mask=mask)
                tl.store(out + 2 * HALF, v_low, mask=mask)
                tl.store(out + 3 * HALF, v_high, mask=mask)
    if HAS_WEIGHT:
        out = grad_weight + tl.program_id(0) * (2 * HALF) + tl.arange(0, LANES)
        tl.store(out, tl.sum(sum_low, axis=0), mask=tl.arange(0, LANES) < HALF)
        tl.store(out + HALF, tl.sum(sum_high, axis=0), mask=tl.arange(0, LANES) < HALF)


def _constants(x_TGXH: Tensor, has_norm: bool, has_weight: bool, has_kv: bool) -> dict[str, Any]:
    """Both kernels' compile-time arguments. A tile has TILE elements of each half, or fewer where all heads have
    fewer."""
    G, X, H = x_TGXH.shape[1:]
    R = X - 2 if has_kv else X
    lanes = triton.next_power_of_2(H // 2)
    q_rows, kv_rows = (min(max(TILE // lanes, 1), triton.next_power_of_2(heads)) for heads in (G * R, G))
    return {
        "G": G,
        "R": R,
        "HALF": H // 2,
        "LANES": lanes,
        "Q_ROWS": q_rows,
        "KV_ROWS": kv_rows,
        "HAS_NORM": has_norm,
        "HAS_WEIGHT": has_weight,
        "HAS_KV": has_kv,
        "num_warps": 4,
    }


class _RopeNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TGXH: Tensor,
        cos_T1h: Tensor,
        sin_T1h: Tensor,
        q_weight_H: Tensor | None,
        k_weight_H: Tensor | None,
        eps: float | None,
        has_kv: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        T, G, H = x_TGXH.shape[0], x_TGXH.shape[1], x_TGXH.shape[-1]
        ctx.constants = _constants(x_TGXH, eps is not None, q_weight_H is not None, has_kv)
        ctx.eps, ctx.layout = eps or 0.0, x_TGXH.shape
        q_TNH = x_TGXH.new_empty(T, G * ctx.constants["R"], H)
        k_TGH, v_TGH = (x_TGXH.new_empty(T, G, H) if has_kv else None for _ in range(2))
        if T:
            _forward_kernel[(T,)](
                x_TGXH,
                cos_T1h,
                sin_T1h,
                q_weight_H,
                k_weight_H,
                q_TNH,
                k_TGH,
                v_TGH,
                ctx.eps,
                *x_TGXH.stride()[:3],
                cos_T1h.stride(0),
                sin_T1h.stride(0),
                **ctx.constants,
            )
        # a rotation alone needs no input in the backward pass
        ctx.save_for_backward(x_TGXH if eps is not None else None, cos_T1h, sin_T1h, q_weight_H, k_weight_H)
        if k_TGH is None or v_TGH is None:
            return q_TNH
        return q_TNH, k_TGH, v_TGH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TGXH, cos_T1h, sin_T1h, q_weight_H, k_weight_H = ctx.saved_tensors
        T, H = ctx.layout[0], ctx.layout[-1]
        taken = handed_over("the kernel of rope_norm", *grads, knows_strides=True)
        grad_q_TNH, grad_k_TGH, grad_v_TGH = taken if len(taken) == 3 else (taken[0], None, None)
        grad_x_TGXH = grad_q_TNH.new_empty(ctx.layout)
        tokens_of_program = max(1, triton.cdiv(T, PROGRAMS))
        P = triton.cdiv(T, tokens_of_program)
        strides = [(0, 0) if x is None else x.stride()[:2] for x in (grad_q_TNH, grad_k_TGH, grad_v_TGH)]
        grad_weight_PH = None if q_weight_H is None else q_weight_H.new_empty(P, H, dtype=torch.float32)
        if T:
            _backward_kernel[(P,)](
                x_TGXH,
                cos_T1h,
                sin_T1h,
                q_weight_H,
                k_weight_H,
                grad_q_TNH,
                grad_k_TGH,
                grad_v_TGH,
                grad_x_TGXH,
                grad_weight_PH,
                T,
                tokens_of_program,
                ctx.eps,
                *((0, 0, 0) if x_TGXH is None else x_TGXH.stride()[:3]),
                cos_T1h.stride(0),
                sin_T1h.stride(0),
                *chain(*strides),
                **ctx.constants,
            )
        if grad_weight_PH is None:
            return grad_x_TGXH, None, None, None, None, None, None
        of_weights = sum_of_parts(grad_weight_PH, q_weight_H.dtype, (k_weight_H, q_weight_H))
        return grad_x_TGXH, None, None, *of_weights, None, None


def _check(x_TGXH: Tensor, table: tuple[Tensor, Tensor], weights: HeadWeights) -> None:
    """Raise ValueError for what the kernels would read wrongly."""
    T, H = x_TGXH.shape[0], x_TGXH.shape[-1]
    if H % 2 or H > WIDEST:
        raise ValueError(f"the kernel of rope_norm: {H} channels in a head, but it takes even numbers up to {WIDEST}")
    of_table = (T, 1, H // 2)
    needed = {"the input": (x_TGXH, x_TGXH.shape), "cos": (table[0], of_table), "sin": (table[1], of_table)}
    if weights is not None:
        needed |= {"the queries' weight": (weights[0], (H,)), "the keys' weight": (weights[1], (H,))}
    for name, (tensor, shape) in needed.items():
        if tensor.shape != shape or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
            layout = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            rule = f"it must be {tuple(shape)}, with a contiguous last dim"
            raise ValueError(f"the kernel of rope_norm: {name} has {layout}, but {rule}")
        if tensor.device != x_TGXH.device:
            raise ValueError(f"the kernel of rope_norm: {name} is on {tensor.device}, the input on {x_TGXH.device}")


def rope_norm(x_TNH: Tensor, table: tuple[Tensor, Tensor], weights: HeadWeights, eps: float | None) -> Tensor:
    """As norm.rope_norm; returns (T, N, H), contiguous. Raises ValueError if a last dim is not contiguous."""
    _check(x_TNH, table, weights)
    return _RopeNorm.apply(x_TNH[:, :, None], *table, *(weights or (None, None)), eps, False)


def qkv_rope_norm(
    qkv_TGXH: Tensor, table: tuple[Tensor, Tensor], weights: HeadWeights, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As norm.qkv_rope_norm; the results are contiguous, and the three gradients are written into one tensor. Raises
    ValueError if a last dim is not contiguous."""
    _check(qkv_TGXH, table, weights)
    return _RopeNorm.apply(qkv_TGXH, *table, *(weights or (None, None)), eps, True)
