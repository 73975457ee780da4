"""Cross-entropy of a linear output layer in chunks of tokens: the (T, V) logits are never materialised as a whole.

The gradient of a chunk's logits is known as soon as its softmax is, so the forward pass computes the gradients and the
backward pass only scales them. Memory beyond the inputs: one chunk of logits, in the dtype of the run and in fp32, and
the gradients of the hidden states and the weight.

On a GPU in bf16 a chunk's part of the weight gradient is added in fp32 by the GEMM itself, and, where it accumulates,
at once into an fp32 main_grad. Elsewhere each part is rounded to bf16 first, and the backward pass adds the sum of all.

With tensor parallelism the vocabulary is sharded over the ranks: each rank computes its columns of the logits, and the
softmax takes two small reductions per chunk.

Shapes: T tokens of this rank, U tokens of all P tensor-parallel ranks, D hidden, V rows of the weight on this rank, c
tokens of a chunk (of all ranks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS
from hunyuan_pretrain.parallel.collectives import all_gather_rows, reduce_scatter_rows
from hunyuan_pretrain.runtime.handover import handed_over

Accumulation = Literal["only use", "one of two uses"]
ChunkLoss = Callable[[Tensor, Tensor, Tensor, int, dist.ProcessGroup, bool], Tensor]
"""chunk_loss, or a function with its result."""

_ADDS_TO_FP32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
"""torch.addmm refuses an fp32 summand of bf16 factors before (pytorch pull request 167931)."""


def reduced(x: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType) -> Tensor:
    """Reduce x over `group` in place, and return it."""
    if group.size() > 1:
        handed_over("all_reduce", x, is_written=True)
        dist.all_reduce(x, op=op, group=group)
    return x


@torch.no_grad()
def chunk_loss(
    logits_cV: Tensor, label_c1: Tensor, weight_c1: Tensor, first_id: int, tp_group: dist.ProcessGroup, needs_grad: bool
) -> Tensor:
    """(): the weighted sum of a chunk's cross-entropies, fp32. The logits are overwritten, with needs_grad by their
    gradient. They are those of the ids from first_id on; label_c1 holds ids of the whole vocabulary.

    Communicates: tp_group, all-reduces of one and two fp32 numbers per token.
    """
    exp_cV, sum_exp_c1, label_logit_c1, label_c1, is_mine_c1 = _softmax_terms(logits_cV, label_c1, first_id, tp_group)
    if needs_grad:
        target_c1 = weight_c1 if is_mine_c1 is None else weight_c1 * is_mine_c1
        scale_c1 = weight_c1 / sum_exp_c1
        # the label's number is rounded after the subtraction, or little would be left of it near probability 1
        grad_label_c1 = exp_cV.gather(1, label_c1).mul_(scale_c1).sub_(target_c1)
        torch.mul(exp_cV, scale_c1, out=logits_cV)  # scaled and rounded at once
        logits_cV.scatter_(1, label_c1, grad_label_c1.to(logits_cV.dtype))
    return ((sum_exp_c1.log() - label_logit_c1) * weight_c1).sum()


def _softmax_terms(
    logits_cV: Tensor, label_c1: Tensor, first_id: int, tp_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(exp of the logits less the largest, their sum over the vocabulary, the label's logit less the largest, the
    label among this rank's ids, whether it is there; None: it is) in fp32. Logits in fp32 are overwritten."""
    max_c1 = reduced(logits_cV.amax(1, keepdim=True).float(), tp_group, dist.ReduceOp.MAX)
    # in fp32, and in place if the logits are
    exp_cV = (
        logits_cV if logits_cV.dtype == torch.float32 else logits_cV.new_empty(logits_cV.shape, dtype=torch.float32)
    )
    torch.sub(logits_cV, max_c1, out=exp_cV)
    if tp_group.size() == 1:
        label_logit_c1 = exp_cV.gather(1, label_c1)
        return exp_cV, exp_cV.exp_().sum(1, keepdim=True), label_logit_c1, label_c1, None
    is_mine_c1 = (label_c1 >= first_id) & (label_c1 < first_id + logits_cV.shape[1])
    label_c1 = torch.where(is_mine_c1, label_c1 - first_id, 0)
    label_logit_c1 = exp_cV.gather(1, label_c1) * is_mine_c1
    sums_c2 = torch.cat((label_logit_c1, exp_cV.exp_().sum(1, keepdim=True)), dim=1)
    label_logit_c1, sum_exp_c1 = reduced(sums_c2, tp_group, dist.ReduceOp.SUM).split(1, dim=1)
    return exp_cV, sum_exp_c1, label_logit_c1, label_c1, is_mine_c1


@torch.no_grad()
def token_cross_entropies(hidden_TD: Tensor, weight_VD: Tensor, label_U: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """(U,) fp32: -log softmax(W hidden[u])[label_U[u]], the same on every rank of `tp_group`; without gradients.

    Sharded and in chunks as `linear_cross_entropy`. Communicates: tp_group, its all-gathers and all-reduces.
    """
    tp, first_id = tp_group.size(), tp_group.rank() * weight_VD.shape[0]
    label_PT, chunk = label_U.view(tp, -1), max(LOSS_CHUNK_TOKENS[hidden_TD.device.type] // tp, 1)
    found = []
    for start in range(0, hidden_TD.shape[0], chunk):
        piece = slice(start, start + chunk)
        hidden_cD = all_gather_rows(hidden_TD[piece], tp_group) if tp > 1 else hidden_TD[piece]
        logits_cV, label_c1 = torch.mm(hidden_cD, weight_VD.t()), label_PT[:, piece].reshape(-1, 1)
        _, sum_exp_c1, label_logit_c1, _, _ = _softmax_terms(logits_cV, label_c1, first_id, tp_group)
        found.append((sum_exp_c1.log() - label_logit_c1).view(tp, -1))
    return torch.cat(found, dim=1).flatten()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Any,
        label_U: Tensor,
        loss_weight_U: Tensor,
        tp_group: dist.ProcessGroup,
        accumulate: Accumulation | None,
        chunk_loss: ChunkLoss,
        is_grad_enabled: bool,
    ) -> Tensor:
        # needs_input_grad is also true in a validation, under no_grad
        needs_grad = is_grad_enabled and any(ctx.needs_input_grad[:2])
        ctx.is_trained = needs_grad and ctx.needs_input_grad[1]  # else the weight is frozen
        # reduce-scatter writes into its rows: contiguous, whatever the strides of hidden_TD
        grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape if needs_grad else (0, hidden_TD.shape[1]))
        is_added = bool(
            ctx.is_trained
            and accumulate
            and _gemm_adds_in_fp32(hidden_TD)
            and weight_VD.main_grad.dtype == torch.float32  # bf16 with precision.grad_reduce_in_fp32=false
        )
        if is_added:
            grad_weight_VD = weight_VD.main_grad
        else:
            grad_weight_VD = torch.empty_like(weight_VD if ctx.is_trained else weight_VD[:0], dtype=torch.float32)
        loss = torch.zeros(
            (), dtype=torch.float64, device=hidden_TD.device
        )  # a sum over thousands of chunks, whose number depends on the layout
        tp, first_id = tp_group.size(), tp_group.rank() * weight_VD.shape[0]
        label_PT, loss_weight_PT = label_U.view(tp, -1), loss_weight_U.view(tp, -1)
        chunk = max(LOSS_CHUNK_TOKENS[hidden_TD.device.type] // tp, 1)
        for start in range(0, hidden_TD.shape[0], chunk):
            piece = slice(start, start + chunk)
            hidden_cD = all_gather_rows(hidden_TD[piece], tp_group) if tp > 1 else hidden_TD[piece]
            label_c1, weight_c1 = (x[:, piece].reshape(-1, 1) for x in (label_PT, loss_weight_PT))
            logits_cV = torch.mm(hidden_cD, weight_VD.t())
            loss += chunk_loss(logits_cV, label_c1, weight_c1, first_id, tp_group, needs_grad)
            if needs_grad:
                grad_cV = logits_cV  # chunk_loss has written it there
                if tp == 1:
                    torch.mm(grad_cV, weight_VD, out=grad_hidden_TD[piece])
                else:
                    reduce_scatter_rows(grad_cV @ weight_VD, tp_group, out=grad_hidden_TD[piece])
                if not ctx.is_trained:
                    continue
                _add_product(grad_weight_VD, grad_cV.t(), hidden_cD, is_first=start == 0 and not is_added)
        ctx.is_added = is_added
        ctx.save_for_backward(grad_hidden_TD, None if is_added else grad_weight_VD)
        ctx.weight, ctx.accumulate = weight_VD, accumulate
        return loss.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        if ctx.is_added:
            # the weight's gradient can no longer be scaled; the host does not wait for the answer
            torch._assert_async(grad == 1, "linear_cross_entropy: the loss that accumulates in main_grad was scaled")
        else:
            grad_hidden_TD = grad_hidden_TD.mul_(grad)
        if not ctx.is_trained:
            return grad_hidden_TD, *(None,) * 7
        if ctx.accumulate is None:
            return grad_hidden_TD, grad_weight_VD.mul_(grad).to(ctx.weight.dtype), *(None,) * 6
        if not ctx.is_added:
            ctx.weight.main_grad.addcmul_(grad_weight_VD, grad)
        if ctx.accumulate == "one of two uses":
            return grad_hidden_TD, None, *(None,) * 6
        # core's hook then skips its own addition; the returned tensor is never read
        ctx.weight.grad_added_to_main_grad = True
        return grad_hidden_TD, torch.empty_like(ctx.weight), *(None,) * 6


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_U: Tensor,
    loss_weight_U: Tensor,
    tp_group: dist.ProcessGroup,
    accumulate: Accumulation | None = None,
    chunk_loss: ChunkLoss = chunk_loss,
) -> Tensor:
    """sum_u loss_weight_U[u] * -log softmax(W hidden[u])[label_U[u]], an fp32 scalar, the same on every rank of
    `tp_group`.

    W is sharded over `tp_group` by rows, hidden by tokens (sequence parallelism); labels and loss weights cover all
    tokens. With `accumulate` the weight's gradient goes straight into `weight_VD.main_grad`. As the "only use" of the
    weight, the backward pass also tells core that the gradient is there; as "one of two uses" (tied embedding) it
    leaves that to the other use. On a GPU in bf16 the forward pass already adds it, so with `accumulate` each forward
    pass needs its backward pass, with a gradient of 1, as core's schedules run them; another gradient fails there.
    `chunk_loss` computes the loss of each chunk and the gradient of its logits.
    Communicates: tp_group, per chunk: an all-gather of hidden states, two all-reduces of one and two numbers per token,
    and a reduce-scatter of the hidden states' gradient.
    """
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, label_U, loss_weight_U, tp_group, accumulate, chunk_loss, torch.is_grad_enabled()
    )


def _gemm_adds_in_fp32(x: Tensor) -> bool:
    """Whether a GEMM of tensors like x can add its product to an fp32 tensor without rounding it first."""
    return x.device.type != "cpu" and x.dtype != torch.float32 and _ADDS_TO_FP32


def _add_product(sum_VD: Tensor, left_Vc: Tensor, right_cD: Tensor, is_first: bool) -> None:
    """sum_VD += left_Vc @ right_cD in fp32; the first product overwrites."""
    if left_Vc.dtype == torch.float32:
        sum_VD.addmm_(left_Vc, right_cD, beta=0 if is_first else 1)
    elif not _gemm_adds_in_fp32(left_Vc):
        part_VD = left_Vc @ right_cD
        sum_VD.copy_(part_VD) if is_first else sum_VD.add_(part_VD)
    elif is_first:
        torch.mm(left_Vc, right_cD, out_dtype=torch.float32, out=sum_VD)
    else:
        torch.addmm(sum_VD, left_Vc, right_cD, out_dtype=torch.float32, out=sum_VD)
