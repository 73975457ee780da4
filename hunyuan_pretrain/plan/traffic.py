"""Bytes that one rank's kernels between the matmuls read and write in device memory, and how many there are. In closed
form, for the functions of a GPU in bf16; tests/benchmarks/step_bytes.py counts them from the code.

A row is a hidden state, in the dtype of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS, expert_capacity
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, OptimizerConfig


@dataclass(frozen=True)
class Traffic:
    """Bytes per token, and launches. Each has a forward and a backward pass."""

    layer_bytes: tuple[float, float]
    """Per token of one layer, over all tensor-parallel ranks."""
    layer_launches: tuple[float, float]
    """Kernels of one layer besides matmuls and attention."""
    swiglu_bytes: float
    """Of `layer_bytes`, SwiGLU's forward pass."""
    norm_bytes: float
    """Of `layer_bytes`, the forward pass of the two norms."""
    logit_bytes: float
    """Per logit, by the loss and its gradient, in the forward pass."""
    loss_launches: float
    """Kernels for a chunk of tokens, besides its three matmuls."""
    embedding_bytes: tuple[float, float]
    """Per token."""


def traffic(experiment: Experiment, imbalance: float = 1.0) -> Traffic:
    """What the functions of this project move: its kernels, or torch's operations with runtime.kernels=never.

    With torch's operations the norms are Transformer Engine's, one kernel each way. `imbalance`: rows of experts over
    those of even routing, where there is no capacity.
    """
    model, width = experiment.model, 2 if experiment.precision.dtype == "bf16" else 4
    slots = model.moe_router_topk * imbalance  # rows of experts for each token
    if model.moe_expert_capacity_factor is not None:
        slots = model.num_moe_experts * expert_capacity(model) / model.moe_routing_group_tokens
    row = model.hidden_size * width
    swiglu = (model.ffn_hidden_size + slots * model.expert_ffn_size) * width
    keys = model.num_query_groups / model.cla_share_factor
    heads = (model.num_attention_heads + keys) * model.head_dim * width
    # the gradients of a borrower's keys and values are added to those of the layers before it
    shared = 3 * 2 * model.num_query_groups * model.head_dim * width
    sums = shared * (model.cla_share_factor - 1) / model.cla_share_factor
    if experiment.runtime.kernels == "never":
        # norms, residual, router, permute, combine
        forward = (4 + 3 + 5.1 + (1 + slots) + (4 + 6 * slots)) * row + 29 * heads + 5 * swiglu
        backward = (6 + 6 + 13 + (3 + 2 * slots) + (4 + 10 * slots)) * row + 44 * heads + 11 * swiglu + sums
        launches, loss, per_loss = (110.0, 65.5), 28, 22
    else:
        # norms with the residual between them, router, permute, combine: the rows that each reads and writes
        forward = (6 + 1 + (1 + slots) + (3 + slots)) * row + 2 * heads + 3 * swiglu
        backward = (8 + 3 + (2 + slots) + (1 + 2 * slots)) * row + 3 * heads + 5 * swiglu + sums
        launches, loss, per_loss = (14.0, 17.5), 6, 11
    return Traffic(
        (forward, backward),
        launches,
        3 * swiglu,
        4 * row,
        loss * width / 2,
        per_loss,
        (2 * row, row + 16 * row / width),
    )


def loss_bytes(model: ModelConfig, bytes_per_logit: float, tokens: int, tp: int, gradient_bytes: int) -> float:
    """Bytes of the loss of a micro-batch of `tokens` tokens on one tensor-parallel rank, without its matmuls' operands:
    the logits, and the weight's gradient, which each chunk reads and writes."""
    vocabulary = model.padded_vocab_size / tp
    chunks = -(-tokens // LOSS_CHUNK_TOKENS["cuda"])
    return tokens * vocabulary * bytes_per_logit + 2 * gradient_bytes * chunks * vocabulary * model.hidden_size


def optimizer_bytes(optimizer: OptimizerConfig, gradient_bytes: int, buffer: int, shard: int) -> float:
    """Bytes that an update reads and writes on the device: zeros in the whole gradient buffer of `buffer` elements;
    norm, clipping, AdamW and the moving average of the `shard` elements that the device updates. docs/benchmarks.md has
    the parts; bf16 moments as in Transformer Engine 2.20, which does not convert them."""
    is_copied = gradient_bytes < 4 and not optimizer.use_precision_aware_optimizer
    read = 4 if is_copied else gradient_bytes  # of a gradient, by what follows the reduction
    moments = 8 if optimizer.exp_avg_dtype == optimizer.exp_avg_sq_dtype == "bf16" else 16
    # gradient; both moments, the main weight, read and written; with a remainder, the weight and the remainder
    update = read + moments + 8
    clipping = 2 * read if optimizer.clip_grad else 0
    weights = 0 if optimizer.use_precision_aware_optimizer else 6
    each = (6 if is_copied else 0) + read + clipping + update + weights
    if optimizer.ema_decay is not None:  # main weight read, average read and written; split ones are joined first
        each += 36 if optimizer.use_precision_aware_optimizer else 12
    return gradient_bytes * buffer + each * shard
