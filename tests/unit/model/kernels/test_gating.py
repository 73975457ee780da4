"""The kernels of a router's weights, losses and statistics against the plain functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hunyuan_pretrain.model.functions import plain_functions
from hunyuan_pretrain.model.gating import gating as plain_gating
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.kernels.gating import gating
from hunyuan_pretrain.model.recycle_routing import Assignment, assign_within_capacity, assign_without_capacity
from hunyuan_pretrain.model.router import Router
from tests.helpers import assignments
from tests.helpers.kernels import nan_where_nothing_is_written

BOTH: dict[str, Any] = {"moe_router_topk": 2, "moe_z_loss_coeff": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "recycled": {},
    "z-loss": {"moe_z_loss_coeff": 0.1},
    "dropped": {"recycle_routing": False},
    "top 2, recycled": BOTH,
    "top 2, too few slots": BOTH | {"moe_expert_capacity_factor": 0.7},
    "top 3 of 5, dropped": BOTH
    | {"moe_router_topk": 3, "num_moe_experts": 5, "recycle_routing": False, "moe_expert_capacity_factor": 0.7},
    "dropless": {"moe_expert_capacity_factor": None, "recycle_routing": False},
    "dropless top 2": BOTH | {"moe_expert_capacity_factor": None, "recycle_routing": False},
    "several blocks in a group": {"num_moe_experts": 96, "moe_routing_group_tokens": 36, "moe_z_loss_coeff": 0.1},
    "no balance loss": {"moe_aux_loss_coeff": 0.0},
}


def case(device: str, groups: int = 3, seed: int = 0, **changes: Any) -> tuple[Tensor, Assignment, HunyuanConfig, int]:
    """Logits that are not those of the choices, as with choices of another run."""
    chosen_TK, config, layer, routing = assignments.case(seed, groups, device, **changes)
    assigned = (
        assign_without_capacity(chosen_TK, config.num_moe_experts, groups)
        if config.moe_expert_capacity_factor is None
        else assign_within_capacity(chosen_TK, config, layer, routing)
    )
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 3 * torch.randn(len(chosen_TK), config.num_moe_experts, generator=generator)
    return logits_TE.to(device), assigned, config, 2 * groups


def numbers(function: Any, logits_TE: Tensor, *others: Any, grad_TK: Tensor | None = None) -> dict[str, Tensor]:
    """Results, and the gradient of the logits, through their softmax too."""
    logits_TE = logits_TE.detach().requires_grad_()
    with nan_where_nothing_is_written():
        found = function(logits_TE, logits_TE.softmax(-1), *others)
        if grad_TK is None:
            generator = torch.Generator().manual_seed(7)
            grad_TK = torch.randn(found.weight_TK.shape, generator=generator).to(logits_TE.device)
        grads = [grad_TK, torch.tensor(1.7, device=logits_TE.device)]
        (grad_TE,) = torch.autograd.grad([found.weight_TK, found.loss], logits_TE, grads)
    return {name: x.detach() for name, x in found._asdict().items()} | {"gradient": grad_TE}


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Up to the order of sums and the device's exponential and logarithm, in fp32."""
    for name, expected in wanted.items():
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(actual[name], expected, rtol=1e-5, atol=1e-6 * largest, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", CASES)
def test_weights_losses_statistics_and_gradient_are_those_of_the_plain_function(name: str, device: str) -> None:
    for seed in (0, 1):
        arguments = case(device, seed=seed, **CASES[name])
        actual, wanted = numbers(gating, *arguments), numbers(plain_gating, *arguments)
        assert_same(actual, wanted)
        E = arguments[2].num_moe_experts
        counts = [*range(E + 3), E + 6]  # all but the losses and the entropy
        assert torch.equal(actual["statistics_X"][counts], wanted["statistics_X"][counts])
        assert actual["gradient"].abs().max() > 0


def test_a_weight_of_one_choice_is_the_probability_itself(device: str) -> None:
    logits_TE, assigned, config, groups = case(device)
    probs_TE = logits_TE.softmax(-1)
    weight_TK = gating(logits_TE, probs_TE, assigned, config, groups).weight_TK
    assert torch.equal(weight_TK, probs_TE.gather(1, assigned.expert_TK))


def test_a_gradient_may_have_any_row_stride(device: str) -> None:
    arguments = case(device, **BOTH)
    wide_TK = torch.randn(96, 7, generator=torch.Generator().manual_seed(1)).to(device)
    for grad_TK in (wide_TK[:, 3:5], wide_TK[:1, :2].expand(96, 2)):
        assert_same(*(numbers(function, *arguments, grad_TK=grad_TK) for function in (gating, plain_gating)))


def test_weights_or_losses_alone_have_gradients(device: str) -> None:
    logits_TE, *others = case(device, **BOTH)
    for field in ("weight_TK", "loss"):
        grads = []
        for function in (gating, plain_gating):
            leaf_TE = logits_TE.clone().requires_grad_()
            found = getattr(function(leaf_TE, leaf_TE.softmax(-1), *others), field)
            grads.append(torch.autograd.grad(found.square().sum(), leaf_TE)[0])
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)  # differences of numbers of order 1


def test_two_passes_have_the_same_bits_and_no_tokens_give_nothing(device: str) -> None:
    first, second = (numbers(gating, *case(device, **BOTH)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    logits_TE, assigned, config, groups = case(device)
    empty = assigned._replace(
        **{name: getattr(assigned, name)[:0] for name in ("row_TK", "token_R", "expert_TK", "chosen_nE")}
    )
    found = numbers(gating, logits_TE[:0], empty._replace(num_dropped=0), config, groups)
    assert found["weight_TK"].shape == (0, 1)
    assert not found["statistics_X"].any()
    assert found["loss"] == 0


def test_a_router_with_the_kernels_chooses_the_same_experts_among_equal_ones(device: str) -> None:
    """Softmax and top-k are torch's: half of all tokens have several largest logits."""
    _, config, layer, routing = assignments.case(0, 3, device, **BOTH)
    logits_TE = torch.randint(0, 3, (96, config.num_moe_experts), generator=torch.Generator().manual_seed(0)).float()
    plain = plain_functions()._replace(router_logits=lambda hidden, weight: (logits_TE.to(device), hidden))
    plans = [
        Router(config, layer, functions).to(device)(torch.zeros(96, 8, device=device), routing).plan
        for functions in (plain, plain._replace(gating=gating))
    ]
    assert torch.equal(plans[0].row_TK, plans[1].row_TK)
    assert torch.equal(plans[0].token_R, plans[1].token_R)
    torch.testing.assert_close(plans[0].weight_TK, plans[1].weight_TK)


def test_what_the_kernel_would_misread_is_refused(device: str) -> None:
    logits_TE, assigned, config, groups = case(device)
    probs_TE, wide_TE = logits_TE.softmax(-1), torch.zeros(96, 6, device=device)
    for wrong, found in (
        ((logits_TE, probs_TE.bfloat16()), r"probabilities are torch.bfloat16, shape \(96, 4\), strides \(4, 1\)"),
        ((logits_TE.t().contiguous().t(), probs_TE), r"logits are torch.float32, shape \(96, 4\), strides \(1, 96\)"),
        ((logits_TE, wide_TE[:, :4]), r"probabilities are torch.float32, shape \(96, 4\), strides \(6, 1\)"),
    ):
        with pytest.raises(ValueError, match=f"the gating kernel: {found}, but must be torch.float32 and contiguous"):
            gating(*wrong, assigned, config, groups)
