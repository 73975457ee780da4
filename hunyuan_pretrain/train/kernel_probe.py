"""A check made once before training with Triton kernels: each gives what its plain function gives, forward and
backward.

Both get the same random numbers, in the sizes of this rank: a kernel can be wrong for one size or one GPU only, and a
loss curve would show it late, if at all. `runtime.probes: false` turns the check off.

Shapes: T tokens, N query heads, G key/value heads, X = N / G + 2, H head dim, D hidden, K top-k, R rows of experts, F
twice an expert's FFN size (both of this rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.model.functions import Functions, plain_functions
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.norm import rope_table
from hunyuan_pretrain.model.recycle_routing import Assignment, assign_within_capacity, assign_without_capacity
from hunyuan_pretrain.model.routing import RoutingPlan, TrainingRouting
from hunyuan_pretrain.parallel.agreement import give_back, reason_of
from hunyuan_pretrain.parallel.comparison import told_by, worst_of_ranks
from hunyuan_pretrain.runtime.seeding import fp32_matmuls
from hunyuan_pretrain.train import TrainingError
from hunyuan_pretrain.train.run import Run

CHUNK_TOKENS = 64
"""Of the loss: each is computed alone, over the whole vocabulary."""
MOST_ROWS = 4096
"""Of SwiGLU, each computed alone: all rows in fp32 could take more memory than training does."""
SUMMATION = 1e-4
"""Relative difference of fp32 sums in two orders; those of a weight's gradient have a term for every token and head."""


WITHOUT = "Set runtime.kernels=never to train without kernels"


class Found(NamedTuple):
    """How far a kernel is from its plain function on this rank."""

    difference: float
    """Relative; infinity if one of them failed."""
    reason: str
    """Where the difference is, or the error."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative difference of two right results of a run in `dtype`: the sums, and two roundings to nearest of
    half an eps each. The plain function computes in fp32, so only the kernel rounds: its result, and perhaps a number
    that it keeps for the backward pass."""
    return SUMMATION + torch.finfo(dtype).eps


def check_kernels(run: Run) -> str:
    """Compare each kernel with its plain function; returns a line for the log.

    Raises TrainingError, on every rank, if one differs by more than the tolerance, or fails, on any rank. Communicates:
    all ranks.
    """
    from hunyuan_pretrain.model.kernels import kernel_functions  # optional package

    batch = run.loader.micro_batches(min(run.first_step, run.loader.num_steps - 1))[0]
    config, num_tokens = run.chunks[0].config, len(batch.tokens_T) // run.groups.cp.size()
    inputs = Inputs(config, num_tokens, run.device, run.experiment.seed + dist.get_rank())
    kernels, plain = kernel_functions(), plain_functions()
    mine: dict[str, Found] = {}
    for name in Functions._fields:
        if getattr(kernels, name) is not getattr(plain, name) and (found := _found(kernels, name, inputs)) is not None:
            mine[name] = found
            try:
                give_back(run.device)
            except torch.AcceleratorError as error:
                what = f"the Triton kernel of {name} has left the GPU of this rank unusable: {found.reason or error}"
                raise TrainingError(f"{what}. {WITHOUT}") from error
    worst = dict(zip(mine, worst_of_ranks([found.difference for found in mine.values()]), strict=True))
    allowed = tolerance(config.params_dtype)
    wrong = ", ".join(
        f"{name} by {difference:.2g} (rank {rank}: {told_by(rank, mine[name].reason)})"
        for name, (difference, rank) in worst.items()
        if difference > allowed
    )
    if wrong:
        raise TrainingError(
            f"Triton kernels do not match the plain functions on random inputs in the sizes of this run: {wrong}; "
            f"rounding explains {allowed:.2g}, relative. {WITHOUT}"
        )
    return (
        f"probe: the kernels of {', '.join(worst)} match the plain functions, forward and backward "
        f"(largest relative difference {max(difference for difference, _ in worst.values()):.1e})"
    )


def _found(kernels: Functions, name: str, inputs: Inputs) -> Found | None:
    """What the comparison of one kernel gives; None if this model does not use it. Whatever fails is a reason, not an
    error: all ranks have to learn of it."""
    try:
        if (arguments := inputs.of(name)) is None:
            return None
        of_parts = differences(compared(kernels, name), compared(plain_functions(), name), arguments, inputs.seed)
        part = max(of_parts, key=of_parts.__getitem__)
        return Found(of_parts[part], f"{part} by {of_parts[part]:.2g}")
    except torch.OutOfMemoryError:
        return Found(math.inf, "no memory left to compare; runtime.probes=false trains without")
    except torch.AcceleratorError as error:
        return Found(math.inf, f"{type(error).__name__}: {reason_of(error)}")
    except Exception as error:  # whatever a compiler raises
        return Found(math.inf, f"{type(error).__name__}: {error}")


# --- the comparison ---------------------------------------------------------------------------------------------------


def differences(
    kernel: Callable[..., Any], plain: Callable[..., Any], arguments: Sequence[Any], seed: int
) -> dict[str, float]:
    """Largest difference of each result, and of the gradient of each floating-point argument, for random output
    gradients.

    The plain function gets the same numbers in fp32. Differences are relative, per row: to the norm of the row, or of a
    typical row where that is larger. Infinity for results that are not finite, and for integers that differ.
    """
    dtype = next((x.dtype for x in arguments if _is_float(x)), torch.float32)
    found = _results(kernel, arguments, dtype, seed)
    with fp32_matmuls():
        expected = _results(plain, [x.float() if _is_float(x) else x for x in arguments], dtype, seed)
    assert found.keys() == expected.keys(), f"{list(found)} instead of {list(expected)}"
    return {name: _difference(found[name], expected[name]) for name in expected}


def compared(functions: Functions, name: str) -> Callable[..., Any]:
    """The function `name` of a set, in a form that returns all that it computes."""
    if name == "gating":  # of probabilities that are the softmax of the logits, so that both give one gradient
        return lambda logits_TE, *others: functions.gating(logits_TE, logits_TE.softmax(-1), *others)
    if name in ("rope_norm", "qkv_rope_norm"):

        def with_weights(x: Tensor, table: Any, q_weight_H: Tensor | None, k_weight_H: Any, eps: float | None) -> Any:
            return getattr(functions, name)(x, table, None if q_weight_H is None else (q_weight_H, k_weight_H), eps)

        return with_weights
    if name != "chunk_loss":
        return getattr(functions, name)

    def with_gradient(logits_cV: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        written_cV = logits_cV.detach().clone()
        return functions.chunk_loss(written_cV, *others), written_cV

    return with_gradient


def _results(function: Callable[..., Any], arguments: Sequence[Any], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Results and gradients by name. The gradients of the results are numbers of `dtype`."""
    arguments = [x.detach().requires_grad_() if _is_float(x) else x for x in arguments]  # with their strides
    found = function(*arguments)
    outputs = found if isinstance(found, tuple) else (found,)
    names = getattr(found, "_fields", [f"result {number}" for number in range(1, len(outputs) + 1)])
    results = dict(zip(names, outputs, strict=True))
    differentiable = [x for x in outputs if _is_float(x) and x.requires_grad]
    if differentiable:
        inputs = {number: x for number, x in enumerate(arguments, start=1) if _is_float(x)}
        generator = torch.Generator(differentiable[0].device).manual_seed(seed)
        grads = [
            torch.randn(x.shape, generator=generator, device=x.device).to(dtype).to(x.dtype) for x in differentiable
        ]
        of_inputs = torch.autograd.grad(differentiable, list(inputs.values()), grads, allow_unused=True)
        results |= {f"gradient of argument {number}": grad for number, grad in zip(inputs, of_inputs, strict=True)}
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in results.items()}


def _difference(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if a is b or (type(a) is type(b) and a == b) else math.inf
    if a.shape != b.shape or not b.is_floating_point():
        return 0.0 if a.shape == b.shape and bool((a == b).all()) else math.inf
    if not b.numel():
        return 0.0
    rows = (-1, b.shape[-1]) if b.dim() > 1 else (1, -1)
    difference_r = (a.float() - b).reshape(rows).norm(dim=1)
    norm_r = b.reshape(rows).norm(dim=1)
    typical = norm_r.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (difference_r / norm_r.clamp(min=typical)).nan_to_num(nan=math.inf).max().item()


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


# --- arguments --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Random arguments in the sizes of one rank: a method for each of Functions, with its name."""

    config: HunyuanConfig
    num_tokens: int
    """Of the attention."""
    device: torch.device
    seed: int

    def of(self, name: str) -> tuple[Any, ...] | None:
        """Arguments of the function `name`; None if this model does not use it."""
        return getattr(self, name)()

    def add_rms_norm(self) -> tuple[Any, ...]:
        x_TD, branch_TD = (self._numbers(self.tokens_of_experts, self.config.hidden_size, draw=draw) for draw in (0, 2))
        return x_TD, branch_TD, self._numbers(self.config.hidden_size, draw=1), self.config.layernorm_epsilon

    def rope_norm(self) -> tuple[Any, ...]:
        """Those of a borrower's queries."""
        N = self.config.num_attention_heads // self.config.tensor_model_parallel_size
        return self._numbers(self.num_tokens, N, self.config.kv_channels), *self._of_head_norm()

    def qkv_rope_norm(self) -> tuple[Any, ...]:
        G = self.config.num_query_groups // self.config.tensor_model_parallel_size
        X = self.config.num_attention_heads // self.config.num_query_groups + 2
        return self._numbers(self.num_tokens, G, X, self.config.kv_channels), *self._of_head_norm()

    def swiglu(self) -> tuple[Any, ...]:
        """Those of the routed experts, where every rank gets as many rows as it sends."""
        ranks = self.config.parallel.expert_tensor_parallel_size
        F = 2 * self.config.model.expert_ffn_size // ranks
        return (self._numbers(min(self.plan.num_rows * ranks, MOST_ROWS), F),)

    def router_logits(self) -> tuple[Any, ...]:
        weight_ED = self._numbers(self.config.num_moe_experts, self.config.hidden_size, dtype=torch.float32, draw=1)
        return self._numbers(self.tokens_of_experts, self.config.hidden_size), weight_ED

    def permute(self) -> tuple[Any, ...]:
        return self._numbers(self.tokens_of_experts, self.config.hidden_size), self.plan

    def combine(self) -> tuple[Any, ...]:
        rows_RD = self._numbers(self.plan.num_rows, self.config.hidden_size)
        shared_TD, residual_TD = (
            self._numbers(self.tokens_of_experts, self.config.hidden_size, draw=draw) for draw in (1, 2)
        )
        return rows_RD, self.plan.weight_TK, self.plan, shared_TD, residual_TD

    def assign(self) -> tuple[Any, ...] | None:
        """None without a capacity: then nothing is assigned."""
        if self.config.moe_expert_capacity_factor is None:
            return None
        n = self.tokens_of_experts // self.config.model.moe_routing_group_tokens
        routing = TrainingRouting(self.seed, 0, torch.arange(n, device=self.device), n)
        return self._choices(), self.config, 0, routing

    def gating(self) -> tuple[Any, ...]:
        logits_TE = self._numbers(self.tokens_of_experts, self.config.num_moe_experts, dtype=torch.float32)
        return logits_TE, self._assigned, self.config, 2 * len(self._assigned.chosen_nE)

    def chunk_loss(self) -> tuple[Any, ...]:
        """Those of a rank whose ids are the whole vocabulary: it reduces nothing with others."""
        V = self.config.model.padded_vocab_size // self.config.tensor_model_parallel_size
        label_c1 = torch.arange(CHUNK_TOKENS, device=self.device)[:, None] * 7 % V
        weight_c1 = self._numbers(CHUNK_TOKENS, 1, dtype=torch.float32, draw=1).abs()
        return self._numbers(CHUNK_TOKENS, V), label_c1, weight_c1, 0, SimpleNamespace(size=lambda: 1), True

    @property
    def tokens_of_experts(self) -> int:
        """Tokens that a rank sends to experts."""
        return self.num_tokens // (self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1)

    @cached_property
    def plan(self) -> RoutingPlan:
        """Where the choices of `assign` go, by the plain functions; the weights are random."""
        assigned = self._assigned
        weight_TK = self._numbers(*assigned.row_TK.shape, dtype=torch.float32)
        return RoutingPlan(weight_TK, assigned.row_TK, assigned.token_R, assigned.rows_E, assigned.is_permutation)

    @cached_property
    def _assigned(self) -> Assignment:
        arguments = self.assign()
        if arguments is None:
            n = self.tokens_of_experts // self.config.model.moe_routing_group_tokens
            return assign_without_capacity(self._choices(), self.config.num_moe_experts, n)
        return assign_within_capacity(*arguments)

    def _choices(self) -> Tensor:
        """(T, K) experts; every second token prefers the first two, so that some choices overflow."""
        E, K = self.config.num_moe_experts, self.config.moe_router_topk
        logits_TE = torch.randn(self.tokens_of_experts, E, generator=torch.Generator().manual_seed(self.seed))
        logits_TE[::2, :2] += 9.0
        return logits_TE.topk(K, dim=-1).indices.to(self.device)

    def _of_head_norm(self) -> tuple[Any, ...]:
        """RoPE table, both weights and eps."""
        positions_T = torch.arange(self.num_tokens, device=self.device)
        table = rope_table(positions_T, self.config.model.rotary_base, self.config.kv_channels)
        if not self.config.qk_layernorm:
            return table, None, None, None
        weights = (self._numbers(self.config.kv_channels, draw=draw) for draw in (1, 2))
        return table, *weights, self.config.layernorm_epsilon

    def _numbers(self, *shape: int, dtype: torch.dtype | None = None, draw: int = 0) -> Tensor:
        """Normally distributed, in the dtype of the run; other numbers for another `draw`."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1000 + draw)
        numbers = torch.randn(shape, generator=generator, device=self.device)
        return numbers.to(dtype or self.config.params_dtype)
