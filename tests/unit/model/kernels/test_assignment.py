"""The kernels that assign choices within the capacity give the numbers of the plain function, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl  # noqa: F401  # the interpreter looks for it in the file of a kernel

from hunyuan_pretrain.model import recycle_routing
from hunyuan_pretrain.model.functions import plain_functions
from hunyuan_pretrain.model.kernels import assignment
from hunyuan_pretrain.model.recycle_routing import assign_within_capacity, draw_keys
from hunyuan_pretrain.model.router import Router
from tests.helpers import assignments
from tests.helpers.assignments import assert_same

KERNEL = assignment.assign_within_capacity
RECYCLES = pytest.mark.parametrize("recycle", [True, False], ids=["recycle", "drop"])


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("topk", [1, 2])
@RECYCLES
def test_equals_the_plain_function(recycle: bool, topk: int, factor: float, device: str) -> None:
    """Over seeds, layers, and numbers of groups, experts and tokens that are no powers of two."""
    for seed, (n, E, g) in enumerate([(1, 4, 32), (3, 5, 30), (2, 8, 33)]):
        changes: dict[str, Any] = {"num_moe_experts": E, "moe_routing_group_tokens": g, "moe_router_topk": topk}
        changes |= {"recycle_routing": recycle, "moe_expert_capacity_factor": factor}
        assert_same(KERNEL, assign_within_capacity, assignments.case(seed, n, device, **changes))


@pytest.mark.parametrize("layer", [0, 3])
def test_keys_in_memory_draw_as_the_numbers_they_come_from(layer: int, device: str) -> None:
    """In the kernel and in the plain function, bitwise."""
    chosen_TK, config, _, routing = assignments.case(3, 3, device)
    in_memory = routing._replace(key_L=draw_keys(routing.seed, routing.step, 4).to(device), seed=0, step=0)
    wanted = assign_within_capacity(chosen_TK, config, layer, routing)
    for assign in (KERNEL, assign_within_capacity):
        actual = assign(chosen_TK, config, layer, in_memory)
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True) if isinstance(b, torch.Tensor))
    other = assign_within_capacity(chosen_TK, config, layer, in_memory._replace(key_L=in_memory.key_L + 1))
    assert not torch.equal(other.row_TK, wanted.row_TK)


@pytest.mark.parametrize("topk", [1, 3])
@RECYCLES
def test_equals_the_plain_function_over_many_blocks_and_tiles(
    recycle: bool, topk: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group's choices in several blocks, whose edges are not those of first and second choices, and its slots in
    several tiles."""
    monkeypatch.setattr(assignment, "TILE", 128)  # 16 choices of 8 experts
    g, factor = (72, 1.1) if topk == 1 else (40, 0.7)
    changes: dict[str, Any] = {"num_moe_experts": 6, "moe_routing_group_tokens": g, "moe_router_topk": topk}
    changes |= {"recycle_routing": recycle, "moe_expert_capacity_factor": factor}
    assert_same(KERNEL, assign_within_capacity, assignments.case(2, 2, device, **changes))


def test_reads_choices_and_group_numbers_at_any_strides(device: str) -> None:
    chosen_TK, config, layer, routing = assignments.case(4, 3, device, moe_router_topk=2)
    apart_TK = torch.stack([chosen_TK.t(), chosen_TK.t() - 1], -1)[..., 0].t()
    apart_n = torch.stack([routing.group_n, routing.group_n + 1], 1)[:, 0]
    assert not apart_TK.is_contiguous()
    assert apart_n.stride(0) == 2
    assert_same(KERNEL, assign_within_capacity, (apart_TK, config, layer, routing._replace(group_n=apart_n)))


@triton.jit
def two_bits(key):
    """A hash with four values."""
    return key & 3


def test_equal_priorities_are_taken_in_the_order_of_the_slots(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two slots of a group tie in practice; a sort by rank must give every slot a place of its own even then."""
    if device == "cuda":
        pytest.skip("a compiled kernel cannot be given another hash")
    monkeypatch.setattr(recycle_routing, "_mix", lambda keys: keys & 3)
    monkeypatch.setattr(assignment, "_mix", two_bits)
    assert_same(KERNEL, assign_within_capacity, assignments.case(2, 2, device))


def test_no_tokens(device: str) -> None:
    chosen_TK, config, layer, routing = assignments.case(0, 1, device)
    none = routing._replace(group_n=routing.group_n[:0])
    assigned = KERNEL(chosen_TK[:0], config, layer, none)
    assert assigned.row_TK.shape == (0, 1)
    assert assigned.token_R.shape == (0,)


def test_refuses_what_it_would_read_wrongly(device: str) -> None:
    chosen_TK, config, layer, routing = assignments.case(0, 2, device)
    with pytest.raises(ValueError, match=r"experts are torch.int32, group numbers torch.int64; must be int64"):
        KERNEL(chosen_TK.int(), config, layer, routing)
    with pytest.raises(ValueError, match="assignment: 63 tokens and 2 group numbers are no whole groups of 32 tokens"):
        KERNEL(chosen_TK[:-1], config, layer, routing)
    with pytest.raises(ValueError, match="assignment: 64 tokens and 1 group numbers"):
        KERNEL(chosen_TK, config, layer, routing._replace(group_n=routing.group_n[:1]))


def test_a_router_with_the_kernels_returns_the_same(device: str) -> None:
    """Every number of plan, loss and statistics."""
    _, config, layer, routing = assignments.case(0, 3, device, moe_router_topk=2, moe_expert_capacity_factor=0.7)
    functions = plain_functions()
    routers = [
        Router(config, layer, of_router).to(device) for of_router in (functions, functions._replace(assign=KERNEL))
    ]
    weight_ED = torch.randn(config.num_moe_experts, config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden_TD = torch.randn(96, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(device)
    numbers = []
    for router in routers:
        router.weight.data.copy_(weight_ED)
        plan, loss, statistics_X, _ = router(hidden_TD, routing)
        numbers.append([plan.weight_TK, plan.row_TK, plan.token_R, loss, statistics_X])
    assert routers[1].functions.assign is KERNEL
    assert all(map(torch.equal, *numbers))
