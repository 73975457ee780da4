"""AdamW for core's precision-aware optimizer on a CPU.

On a GPU core uses Transformer Engine's FusedAdam, which exists only there. This class keeps the same state under the
same names, so checkpoints and resumed runs need not know which of the two wrote it, and computes the same formula in
the same order, in fp32. It is written to be read and tested, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint.split_weights import REMAINDER, join, remainder_of, round_into


class PrecisionAwareAdamW(torch.optim.Optimizer):
    """AdamW whose moments may be bf16 and whose fp32 main weights are split (checkpoint.split_weights).

    Weights are bf16, or fp32, which are then their own main weights. The gradient of a weight is its attribute
    `decoupled_grad`, in any format: torch wants `grad` in the format of the weight. Moments are read as fp32 and
    rounded to nearest when they are stored; the update uses them before they are rounded.

    groups: parameter groups with lr, betas, eps and weight_decay. dtypes: the formats of "exp_avg" and "exp_avg_sq".
    """

    def __init__(self, groups: list[dict[str, Any]], dtypes: dict[str, torch.dtype]) -> None:
        super().__init__(groups, {})
        self._dtypes = dtypes

    def set_scaled_state(self, weight: Tensor, name: str, value: Tensor) -> None:
        """Store a moment (given in fp32) or a remainder (int16). Transformer Engine's name, where formats that need a
        scale get one."""
        self.state[weight][name] = value.to(self._dtypes.get(name, value.dtype), copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. Updates are counted by group, as in Transformer Engine."""
        assert closure is None, "gradients are ready before the step"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for weight in group["params"]:
                if getattr(weight, "decoupled_grad", None) is not None:
                    self._update(group, weight, weight.decoupled_grad.float())

    def _update(self, group: dict[str, Any], weight: Tensor, grad: Tensor) -> None:
        state, is_split = self.state[weight], weight.dtype != torch.float32
        if not state:
            for name in self._dtypes:
                self.set_scaled_state(weight, name, torch.zeros_like(weight, dtype=torch.float32))
            if is_split:
                self.set_scaled_state(weight, REMAINDER, torch.zeros_like(weight, dtype=torch.int16))
        main = torch.empty_like(weight, dtype=torch.float32) if is_split else weight
        if is_split:
            join(weight, state[REMAINDER], main)
        # fp32 factors, as in the kernel: where a moment is close to halfway between two bf16 numbers, they decide
        (beta1, rest1), (beta2, rest2) = (_fp32_factors(beta) for beta in group["betas"])
        step = group["step"]
        first, second = (state[name].float() for name in ("exp_avg", "exp_avg_sq"))  # the state itself, if it is fp32
        first.mul_(beta1).add_(grad * rest1)
        second.mul_(beta2).add_((grad * rest2).mul_(grad))
        denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (first / (1 - beta1**step)).div_(denominator).add_(main * group["weight_decay"])
        main.sub_(update.mul_(group["lr"]))
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        if is_split:
            state[REMAINDER].copy_(remainder_of(main))
            round_into(weight, main)


def _fp32_factors(beta: float) -> tuple[float, float]:
    """(beta, 1 - beta), both rounded to fp32, the second from the first."""
    rounded = torch.tensor(beta, dtype=torch.float32)
    return rounded.item(), (1 - rounded).item()
