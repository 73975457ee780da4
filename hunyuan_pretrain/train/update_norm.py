"""The norm of the update that Adam is about to make, computed without making it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from hunyuan_pretrain.train.optimizer import (
    clip_divisor,
    counted_gradients,
    device_of,
    gradient_of,
    sum_of_squares,
)

MOMENTS = ("exp_avg", "exp_avg_sq")

PIECE = 1 << 22
"""Elements that are computed at once: what is computed is not kept."""


@torch.no_grad()
def update_norm(optimizer: MegatronOptimizer, grad_norm: Tensor) -> Tensor:
    """fp64 () L2 norm over the whole model of m / (sqrt(v) + eps) after this step's clipped gradients, bias-corrected:
    the update before it is scaled by the learning rate, without weight decay.

    To be called after `optimizer.prepare_grads`, with the norm before clipping. Changes nothing. The optimizer's state
    must be on the device of the weights. Communicates: all groups of the optimizer.
    """
    divisor = clip_divisor(optimizer, grad_norm)
    sums: dict[dist.ProcessGroup, Tensor] = {}
    for part in optimizer.chained_optimizers:
        group = part.get_grad_stats_parallel_group()
        total = sums.setdefault(group, torch.zeros((), dtype=torch.float64, device=device_of(group)))
        for update in _updates(part, divisor):
            total += sum_of_squares([update]).to(total.device)
    for group, total in sums.items():
        dist.all_reduce(total, group=group)
    return torch.stack([total.to(grad_norm.device) for total in sums.values()]).sum().sqrt()


def _updates(part: Any, divisor: Tensor | None) -> Iterator[Tensor]:
    """The update of every weight whose elements count here, one piece after another."""
    counted = counted_gradients(part)
    ids = {id(gradient) for gradient in counted}
    groups = part.optimizer.param_groups if counted else []
    for group in groups:
        for weight in group["params"]:
            gradient = gradient_of(part, weight)
            if gradient is None or id(gradient) not in ids:
                continue
            state = part.optimizer.state.get(weight, {})
            count = float(state.get("step", group.get("step", 0))) + 1
            flat = [one.reshape(-1) for one in (gradient, *(state[key] for key in MOMENTS if key in state))]
            for start in range(0, gradient.numel(), PIECE):
                pieces = [one[start : start + PIECE].float() for one in flat]
                yield _update(pieces[0], pieces[1:], divisor, group, count)


def _update(
    gradient: Tensor, moments: list[Tensor], divisor: Tensor | None, group: dict[str, Any], count: float
) -> Tensor:
    """moments: empty before the first update."""
    gradient = gradient if divisor is None else gradient / divisor.to(gradient.device)
    beta1, beta2 = group["betas"]
    mean, square = gradient * (1 - beta1), gradient.square() * (1 - beta2)
    if moments:
        mean, square = mean + moments[0] * beta1, square + moments[1] * beta2
    denominator = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
    return (mean / (1 - beta1**count)).div_(denominator)
