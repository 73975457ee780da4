"""What a router computes after the assignment, in two kernels forward and one backward: combine weights, losses and
statistics; then the gradient of the logits.

Bytes per token, with E experts and K choices:

    forward   reads the probabilities 4 E, the logits 4 E for a z-loss, experts (and rows, where choices may be dropped)
              8 K; writes the weights 4 K
    backward  reads the probabilities 4 E, experts (and rows) 8 K and the gradient of the weights 4 K; writes 4 E

That is the minimum. A z-loss also keeps one number per token. A program of the first kernel takes a block of one
group's tokens and writes the sum of their probabilities; one program adds these sums up, block by block, then group by
group, so their order is fixed.

Shapes: T tokens of this rank, n routing groups, g tokens of a group, b blocks of a group, E experts, K top-k, X numbers
of packed statistics. In kernels: B tokens of a block, X experts padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hunyuan_pretrain.model.gating import Gating, capacity_of
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.recycle_routing import Assignment
from hunyuan_pretrain.model.routing import RouterStatistics
from hunyuan_pretrain.runtime.handover import handed_over

TILE = 2048
"""Numbers of a tile (tokens, experts): 16 for each thread. At 16 experts 128 tokens, 64 programs for 8,192."""


@triton.jit
def _tokens(g, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """(B,) tokens of this program (group, block of tokens), and whether they belong to the group."""
    in_group_B = tl.program_id(1) * B + tl.arange(0, B)
    return tl.program_id(0).to(tl.int64) * g + in_group_B, in_group_B < g


@triton.jit
def _sum_of_chosen(  # type: ignore[no-untyped-def]
    probs, expert_TK, token_B, is_token_B, E: tl.constexpr, K: tl.constexpr, B: tl.constexpr
):
    """(B,) the sum over a token's choices of the probability of the expert that computes it; 1 for a single choice,
    whose weight is not divided."""
    if K == 1:
        return tl.full((B,), 1.0, tl.float32)
    total_B = tl.zeros((B,), tl.float32)
    for k in tl.static_range(K):
        expert_B = tl.load(expert_TK + token_B * K + k, mask=is_token_B, other=0)
        total_B += tl.load(probs + token_B * E + expert_B, mask=is_token_B, other=1.0)
    return total_B


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    probs, logits, expert_TK, row_TK, weight_TK, sums, entropies, z_sums, lse_T, g, num_rows, HAS_Z: tl.constexpr,
    HAS_DROPS: tl.constexpr, E: tl.constexpr, K: tl.constexpr, B: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Weights of a block of tokens, and the sums over them of the probabilities, into (n, b, E), of their entropy and
    of logsumexp^2, into (n, b); logsumexp of each token. All matrices are contiguous."""
    token_B, is_token_B = _tokens(g, B)
    expert_X = tl.arange(0, X)
    mask = is_token_B[:, None] & (expert_X < E)[None, :]
    place_BX = token_B[:, None] * E + expert_X[None, :]
    block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    probs_BX = tl.load(probs + place_BX, mask=mask, other=0.0)
    tl.store(sums + block * E + expert_X, tl.sum(probs_BX, 0), mask=expert_X < E)
    surprise_BX = -probs_BX * tl.log(tl.where(probs_BX > 0.0, probs_BX, 1.0))
    tl.store(entropies + block, tl.sum(tl.sum(surprise_BX, 1), 0))
    total_B = _sum_of_chosen(probs, expert_TK, token_B, is_token_B, E, K, B)
    for k in tl.static_range(K):
        expert_B = tl.load(expert_TK + token_B * K + k, mask=is_token_B, other=0)
        weight_B = tl.load(probs + token_B * E + expert_B, mask=is_token_B, other=0.0) / total_B
        if HAS_DROPS:
            row_B = tl.load(row_TK + token_B * K + k, mask=is_token_B, other=0)
            weight_B = tl.where(row_B == num_rows, 0.0, weight_B)
        tl.store(weight_TK + token_B * K + k, weight_B, mask=is_token_B)
    if HAS_Z:
        logit_BX = tl.load(logits + place_BX, mask=mask, other=-float("inf"))
        largest_B = tl.where(is_token_B, tl.max(logit_BX, 1), 0.0)
        sum_B = tl.sum(tl.exp(logit_BX - largest_B[:, None]), 1)
        lse_B = largest_B + tl.log(tl.where(is_token_B, sum_B, 1.0))  # 0 past the end of the group
        tl.store(lse_T + token_B, lse_B, mask=is_token_B)
        tl.store(z_sums + block, tl.sum(lse_B * lse_B, 0))


@triton.jit(do_not_specialize=["num_groups", "num_blocks", "num_dropped", "num_tokens"])
def _losses_kernel(  # type: ignore[no-untyped-def]
    chosen_nE, sums, entropies, z_sums, loss, statistics, g, num_groups, num_blocks, num_dropped, num_tokens,
    balance_factor, z_factor, capacity: tl.constexpr, HAS_Z: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """One program: the loss, and the statistics in the order of RouterStatistics. capacity: None without one.
    num_dropped: -1 if all choices that overflow are dropped."""
    expert_X, row = tl.arange(0, X), tl.arange(0, ROWS)
    is_expert_X = expert_X < E
    chosen_X = tl.zeros((X,), tl.float32)
    balance, overflow, entropy, z = 0.0, 0.0, 0.0, 0.0
    for group in range(num_groups):
        sum_X = tl.zeros((X,), tl.float32)
        for first in range(0, num_blocks, ROWS):
            block = first + row
            place = (group * num_blocks + block)[:, None] * E + expert_X[None, :]
            mask = (block < num_blocks)[:, None] & is_expert_X[None, :]
            sum_X += tl.sum(tl.load(sums + place, mask=mask, other=0.0), 0)
            at, is_block = group * num_blocks + block, block < num_blocks
            entropy += tl.sum(tl.load(entropies + at, mask=is_block, other=0.0), 0)
            if HAS_Z:
                z += tl.sum(tl.load(z_sums + at, mask=is_block, other=0.0), 0) / g
        of_group_X = tl.load(chosen_nE + group * E + expert_X, mask=is_expert_X, other=0).to(tl.float32)
        chosen_X += of_group_X
        balance += E * tl.sum(sum_X / g * (of_group_X / (K * g)), 0)
        if capacity is not None:
            overflow += tl.sum(tl.maximum(of_group_X - capacity, 0.0), 0)
    dropped = overflow
    if num_dropped >= 0:
        dropped = num_dropped.to(tl.float32)
    tl.store(loss, balance_factor * balance + z_factor * z)
    tl.store(statistics + expert_X, chosen_X, mask=is_expert_X)
    tl.store(statistics + E, overflow)
    tl.store(statistics + E + 1, overflow - dropped)
    tl.store(statistics + E + 2, dropped)
    tl.store(statistics + E + 3, balance)
    tl.store(statistics + E + 4, z)
    tl.store(statistics + E + 5, entropy)
    tl.store(statistics + E + 6, num_tokens.to(tl.float32))


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    probs, expert_TK, row_TK, chosen_nE, lse_T, grad_weight, grad_loss, grad_logits, g, num_rows, grad_row,
    balance_factor, z_factor, HAS_Z: tl.constexpr, HAS_DROPS: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    B: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of tokens' logits, which is contiguous: of the softmax, from that of the probabilities;
    of logsumexp^2, 2 logsumexp times the probabilities."""
    token_B, is_token_B = _tokens(g, B)
    expert_X = tl.arange(0, X)
    mask = is_token_B[:, None] & (expert_X < E)[None, :]
    place_BX = token_B[:, None] * E + expert_X[None, :]
    probs_BX = tl.load(probs + place_BX, mask=mask, other=0.0)
    scale = tl.load(grad_loss)
    chosen_X = tl.load(chosen_nE + tl.program_id(0) * E + expert_X, mask=expert_X < E, other=0).to(tl.float32)
    grad_BX = tl.zeros((B, X), tl.float32) + (scale * balance_factor * E / g * (chosen_X / (K * g)))[None, :]
    total_B = _sum_of_chosen(probs, expert_TK, token_B, is_token_B, E, K, B)
    dot_B = tl.zeros((B,), tl.float32)  # of a token's weights and their gradients, as the weights sum to 1
    for k in tl.static_range(2 * K if K > 1 else 1):
        choice = token_B * K + k % K
        expert_B = tl.load(expert_TK + choice, mask=is_token_B, other=0)
        grad_B = tl.load(grad_weight + token_B * grad_row + k % K, mask=is_token_B, other=0.0)
        if HAS_DROPS:
            grad_B = tl.where(tl.load(row_TK + choice, mask=is_token_B, other=0) == num_rows, 0.0, grad_B)
        if K > 1 and k < K:
            dot_B += grad_B * tl.load(probs + token_B * E + expert_B, mask=is_token_B, other=0.0) / total_B
        else:
            is_of_BX = expert_B[:, None] == expert_X[None, :]
            grad_BX += tl.where(is_of_BX, ((grad_B - dot_B) / total_B)[:, None], 0.0)
    grad_BX = probs_BX * (grad_BX - tl.sum(grad_BX * probs_BX, 1)[:, None])
    if HAS_Z:
        lse_B = tl.load(lse_T + token_B, mask=is_token_B, other=0.0)
        grad_BX += (scale * z_factor * 2.0 / g) * lse_B[:, None] * probs_BX
    tl.store(grad_logits + place_BX, grad_BX, mask=mask)


class _Gating(Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, probs_TE: Tensor, assigned: Assignment, balance_factor: float, z_factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (T, E), (n, K), device = probs_TE.shape, (len(assigned.chosen_nE), assigned.row_TK.shape[1]), probs_TE.device
        g, has_z = T // n if n else 1, z_factor != 0.0
        ctx.shape = _shape(E, K, g, assigned) | {"HAS_Z": has_z}
        ctx.factors, ctx.num_rows, ctx.num_groups = (balance_factor, z_factor), assigned.token_R.shape[0], n
        blocks = triton.cdiv(g, ctx.shape["B"])
        weight_TK = torch.empty(T, K, dtype=torch.float32, device=device)
        sums_nbE = torch.empty(n, blocks, E, dtype=torch.float32, device=device)
        entropy_nb = torch.empty(n, blocks, dtype=torch.float32, device=device)
        z_nb = torch.empty(n, blocks, dtype=torch.float32, device=device) if has_z else None
        lse_T = torch.empty(T, dtype=torch.float32, device=device) if has_z else None
        loss = torch.empty((), dtype=torch.float32, device=device)
        statistics_X = torch.empty(RouterStatistics.packed_size(E), dtype=torch.float32, device=device)
        tables = assigned.expert_TK, assigned.row_TK if ctx.shape["HAS_DROPS"] else None
        if n:
            _weights_kernel[(n, blocks)](
                probs_TE, logits_TE if has_z else None, *tables, weight_TK, sums_nbE, entropy_nb, z_nb, lse_T, g,
                ctx.num_rows, **ctx.shape,
            )  # fmt: skip
        has_capacity = assigned.rows_E is None
        dropped = -1 if assigned.num_dropped is None else assigned.num_dropped
        _losses_kernel[(1,)](
            assigned.chosen_nE, sums_nbE, entropy_nb, z_nb, loss, statistics_X, g, n, blocks, dropped, T, *ctx.factors,
            capacity=capacity_of(assigned) if has_capacity and n else None, HAS_Z=has_z, E=E, K=K,
            ROWS=min(triton.next_power_of_2(blocks), max(1, TILE // ctx.shape["X"])), X=ctx.shape["X"], num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(probs_TE, *tables, assigned.chosen_nE, lse_T)
        ctx.mark_non_differentiable(statistics_X)
        ctx.set_materialize_grads(False)  # zeros for the statistics would be a launch of their own
        return weight_TK, loss, statistics_X

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor | None, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        probs_TE, *tables, lse_T = ctx.saved_tensors
        if grad_TK is None:
            grad_TK = probs_TE.new_zeros(len(probs_TE), ctx.shape["K"])
        if grad_loss is None:
            grad_loss = probs_TE.new_zeros(())
        (grad_TK,) = handed_over("the gating kernel", grad_TK, dtype=torch.float32, knows_strides=True)
        (grad_loss,) = handed_over("the gating kernel", grad_loss, dtype=torch.float32)
        T, n = len(probs_TE), ctx.num_groups
        grad_TE = torch.empty_like(probs_TE)
        if n:
            _gradient_kernel[(n, triton.cdiv(T // n, ctx.shape["B"]))](
                probs_TE, *tables, lse_T, grad_TK, grad_loss, grad_TE, T // n, ctx.num_rows, grad_TK.stride(0),
                *ctx.factors, **ctx.shape,
            )  # fmt: skip
        return grad_TE, None, None, None, None


def _shape(E: int, K: int, g: int, assigned: Assignment) -> dict[str, Any]:
    """Compile-time arguments."""
    experts = triton.next_power_of_2(E)
    block = max(16, min(triton.next_power_of_2(g), TILE // experts))
    return {"HAS_DROPS": assigned.num_dropped != 0, "E": E, "K": K, "B": block, "X": experts, "num_warps": 4}


def gating(
    logits_TE: Tensor, probs_TE: Tensor, assigned: Assignment, config: HunyuanConfig, num_global_groups: int
) -> Gating:
    """As model.gating.gating, but the whole gradient goes to logits_TE, none to probs_TE: the kernel knows the
    derivative of the softmax. Raises ValueError for logits or probabilities that are not fp32 or not contiguous."""
    kernel = "the gating kernel"
    for name, tensor in (("logits", logits_TE), ("probabilities", probs_TE)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            found = f"{tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            raise ValueError(f"{kernel}: {name} are {found}, but must be torch.float32 and contiguous")
    # those of the assignment kernels are contiguous; the plain function's may be slices, as may choices of another run
    tables = {name: getattr(assigned, name).contiguous() for name in ("expert_TK", "row_TK", "chosen_nE")}
    for name, table in tables.items():
        if table.device != logits_TE.device:
            raise ValueError(f"{kernel}: {name} is on {table.device}, but must be on {logits_TE.device}")
    assigned = assigned._replace(**tables)
    factors = config.moe_aux_loss_coeff / num_global_groups, (config.moe_z_loss_coeff or 0.0) / num_global_groups
    return Gating(*_Gating.apply(logits_TE, probs_TE.detach(), assigned, *factors))
