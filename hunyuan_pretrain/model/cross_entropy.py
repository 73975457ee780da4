"""Cross-entropy of a linear output layer in chunks of tokens: the (T, V) logits never exist as a whole.

The gradient of a chunk's logits is known as soon as its softmax is, so forward computes the gradients too and backward
only scales them. Memory beyond the inputs: one chunk of logits, the gradient of the hidden states, the gradient of the weight.

Shapes: T tokens of this rank, D hidden, V padded vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens of one chunk: on a CPU its logits stay in the cache, on a GPU the products stay efficient."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, loss_weight_T: Tensor, accumulate: bool) -> Tensor:
        needs_grad = any(ctx.needs_input_grad[:2])
        grad_hidden_TD = torch.empty_like(hidden_TD if needs_grad else hidden_TD[:0])
        grad_weight_VD = torch.empty_like(weight_VD if needs_grad else weight_VD[:0], dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        chunk = CHUNK_TOKENS[hidden_TD.device.type]
        for start in range(0, hidden_TD.shape[0], chunk):
            piece = slice(start, start + chunk)
            hidden_cD, label_c1, weight_c1 = hidden_TD[piece], label_T[piece, None], loss_weight_T[piece, None]
            logits_cV = torch.mm(hidden_cD, weight_VD.t()).float()
            logits_cV.sub_(logits_cV.amax(1, keepdim=True))
            label_logit_c1 = logits_cV.gather(1, label_c1)
            sum_exp_c1 = logits_cV.exp_().sum(1, keepdim=True)
            loss += ((sum_exp_c1.log() - label_logit_c1) * weight_c1).sum()
            if needs_grad:
                grad_cV = logits_cV.mul_(weight_c1 / sum_exp_c1).scatter_add_(1, label_c1, -weight_c1).to(hidden_TD.dtype)
                torch.mm(grad_cV, weight_VD, out=grad_hidden_TD[piece])
                if grad_cV.dtype == torch.float32:
                    grad_weight_VD.addmm_(grad_cV.t(), hidden_cD, beta=1 if start else 0)
                else:
                    part_VD = grad_cV.t() @ hidden_cD
                    grad_weight_VD = grad_weight_VD.add_(part_VD) if start else part_VD.float()
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight, ctx.accumulate = weight_VD, accumulate
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        grad_hidden_TD = grad_hidden_TD.mul_(grad)
        if not ctx.accumulate:
            return grad_hidden_TD, grad_weight_VD.mul_(grad).to(ctx.weight.dtype), None, None, None
        ctx.weight.main_grad.addcmul_(grad_weight_VD, grad)
        return grad_hidden_TD, None, None, None, None


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, loss_weight_T: Tensor, accumulate: bool = False) -> Tensor:
    """sum_t loss_weight_T[t] * -log softmax(weight_VD hidden_TD[t])[label_T[t]], a fp32 scalar.

    With `accumulate` the weight's gradient goes straight into `weight_VD.main_grad`, where some other use of the weight (the tied
    embedding) brings the gradient that autograd waits for. Communicates nothing.
    """
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, label_T, loss_weight_T, accumulate)
