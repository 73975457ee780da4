"""Recycle routing, capacity, combine weights and router losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_pretrain.config.derived import expert_capacity
from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.recycle_routing import assign_slots, assign_within_capacity, draw_key
from hunyuan_pretrain.model.recycle_routing import slot_priorities as priorities_of_key
from hunyuan_pretrain.model.router import Router
from hunyuan_pretrain.model.router_logits import router_logits
from hunyuan_pretrain.model.routing import DROPPED, EVALUATION, RouterStatistics, TrainingRouting
from tests.helpers import assignments, tiny

GROUPS = st.integers(1, 3)


def slot_priorities(seed: int, step: int, layer: int, group_n: torch.Tensor, num_slots: int) -> torch.Tensor:
    return priorities_of_key(draw_key(seed, step, layer), group_n, num_slots)


def random_choices(n: int, K: int, g: int, E: int, skew: float, seed: int) -> torch.Tensor:
    """Choices (n, K, g), skewed more towards few experts the larger `skew` is."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, g, E, generator=generator) + skew * torch.arange(E)
    return logits.topk(K, dim=-1).indices.transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    n=GROUPS,
    K=st.integers(1, 2),
    g=st.integers(1, 40),
    E=st.integers(2, 6),
    C=st.integers(1, 30),
    skew=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_capacity_is_never_exceeded_and_nothing_drops_while_a_slot_is_free(n, K, g, E, C, skew, seed):
    chosen = random_choices(n, K, g, E, skew, seed)
    slots, _ = assign_slots(chosen, E, C, slot_priorities(seed, 0, 0, torch.arange(n), E * C))
    for group in slots.reshape(n, -1):
        taken = group[group != DROPPED]
        assert taken.unique().numel() == taken.numel(), "a slot was given twice"
        assert ((taken >= 0) & (taken < E * C)).all()
        assert taken.numel() == min(K * g, E * C), "a choice was dropped while a slot was free"


@settings(max_examples=60, deadline=None)
@given(
    n=GROUPS,
    K=st.integers(1, 2),
    g=st.integers(1, 40),
    E=st.integers(2, 6),
    C=st.integers(1, 30),
    skew=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_first_choices_keep_their_expert(n, K, g, E, C, skew, seed):
    """Against a loop: first choices before second ones, tokens in order; the first C tokens of an expert stay, with or
    without recycling."""
    chosen = random_choices(n, K, g, E, skew, seed)
    recycled, _ = assign_slots(chosen, E, C, slot_priorities(seed, 0, 0, torch.arange(n), E * C))
    dropping, _ = assign_slots(chosen, E, C, None)
    for group in range(n):
        used = [0] * E
        for k in range(K):
            for token in range(g):
                expert = int(chosen[group, k, token])
                if used[expert] < C:
                    expected = expert * C + used[expert]
                    assert recycled[group, k, token] == dropping[group, k, token] == expected
                    used[expert] += 1
                else:
                    assert dropping[group, k, token] == DROPPED


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("recycle", [True, False], ids=["recycle", "drop"])
def test_assignment_equals_one_in_integers(recycle, factor):
    """Bitwise, over seeds, steps, layers, group numbers, K, and sizes that are no powers of two."""
    seed = 0
    for K in (1, 2, 3):
        for E, g in ((4, 32), (5, 30), (7, 45)):
            for n in (1, 3):
                changes = {"num_moe_experts": E, "moe_routing_group_tokens": g, "moe_router_topk": K}
                changes |= {"recycle_routing": recycle, "moe_expert_capacity_factor": factor}
                seed += 1
                arguments = assignments.case(seed, n, **changes)
                assigned, wanted = assign_within_capacity(*arguments), assignments.reference(*arguments)
                assert {name: getattr(assigned, name).tolist() for name in wanted} == wanted
                assert assigned.row_TK.is_contiguous()
                assert assigned.token_R.is_contiguous()
                dropped = sum(row == assigned.token_R.numel() for rows in wanted["row_TK"] for row in rows)
                assert assigned.num_dropped in (None, dropped)
                assert (assigned.num_dropped is None) == (not recycle)
                assert not assigned.is_permutation or sorted(wanted["token_R"]) == list(range(n * g))


@pytest.mark.parametrize("key", [(0, 0, 0), (3, 5, 2), (2**63 - 1, 10**9, 63), (-1, 7, 1)], ids=str)
def test_priorities_are_splitmix64_in_integers(key):
    groups = [0, 1, 2**40]
    wanted = [[assignments.priority(*key, group, slot) for slot in range(9)] for group in groups]
    assert slot_priorities(*key, torch.tensor(groups), 9).tolist() == wanted


def test_draw_is_uniform_over_free_slots():
    """Chi-squared test over 24,000 draws: one overflowing token, five free slots of two experts (1 and 4 of them),
    other slots never."""
    draws, E, C = 24_000, 3, 4
    # expert 0 has 5 takers for 4 slots, expert 1 three, expert 2 none
    chosen = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]).expand(draws, 1, 8)
    slots, _ = assign_slots(chosen, E, C, slot_priorities(7, 0, 0, torch.arange(draws), E * C))
    counts = torch.bincount(slots[:, 0, 4], minlength=E * C).double()
    assert counts[:7].sum() == 0, "a slot in use was drawn"
    expected = draws / 5
    chi_squared = ((counts[7:] - expected) ** 2 / expected).sum().item()
    assert chi_squared < 23.5, f"4 degrees of freedom, p = 1e-4: {counts[7:].tolist()}"


def test_the_same_key_repeats_the_draw_and_any_other_key_changes_it():
    group = torch.arange(4)
    draw = slot_priorities(1, 2, 3, group, 64)
    assert torch.equal(draw, slot_priorities(1, 2, 3, group, 64))
    assert torch.equal(draw[2:], slot_priorities(1, 2, 3, group[2:], 64)), (
        "a group's draw must not depend on its neighbours"
    )
    others = [slot_priorities(*key, group, 64) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3))]
    assert all((draw != other).all() for other in others)
    assert draw.min() >= 0
    assert draw.flatten().unique().numel() == draw.numel()


def router(**changes):
    model = tiny.tiny_model(**changes)
    config = transformer_config(model, ParallelConfig(), PrecisionConfig(dtype="fp32"))
    module = Router(config, layer=1)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(96, model.hidden_size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return module, config, hidden, TrainingRouting(3, 5, torch.arange(3), 3)


def expert_of_row(plan, config, n=3):
    return plan.row_TK // (n * expert_capacity(config.model))


def test_combine_weight_is_the_probability_at_the_new_expert():
    module, config, hidden, routing = router()
    plan, _, statistics_X, _ = module(hidden, routing)
    statistics = RouterStatistics.unpacked(statistics_X)
    probs = (hidden @ module.weight.t()).softmax(-1)
    expert = expert_of_row(plan, config)
    assert statistics.recycled > 0
    assert not torch.equal(expert, probs.topk(1).indices)
    torch.testing.assert_close(plan.weight_TK, probs.gather(1, expert))


def test_topk_weights_are_renormalised_and_top1_is_the_raw_probability():
    module, _, hidden, _ = router(moe_router_topk=2)
    weights = module(hidden, EVALUATION).plan.weight_TK
    torch.testing.assert_close(weights.sum(-1), torch.ones(96))
    module, _, hidden, _ = router()
    probs = (hidden @ module.weight.t()).softmax(-1)
    torch.testing.assert_close(module(hidden, EVALUATION).plan.weight_TK, probs.max(-1, keepdim=True).values)


def test_without_recycling_overflow_is_dropped_with_weight_zero():
    module, _, hidden, routing = router(recycle_routing=False)
    plan, _, statistics_X, _ = module(hidden, routing)
    statistics = RouterStatistics.unpacked(statistics_X)
    dropped = plan.row_TK == plan.num_rows
    assert dropped.sum() == statistics.dropped > 0
    assert (plan.weight_TK[dropped] == 0).all()
    assert (plan.weight_TK[~dropped] > 0).all()


def test_with_factor_one_and_recycling_every_expert_gets_exactly_its_capacity():
    module, config, hidden, routing = router()
    plan, _, statistics_X, _ = module(hidden, routing)
    statistics = RouterStatistics.unpacked(statistics_X)
    assert plan.is_permutation
    assert torch.equal(plan.token_R.sort().values, torch.arange(96))
    assert expert_of_row(plan, config).flatten().bincount().tolist() == [24] * 4
    assert statistics.dropped == 0


def test_balance_loss_uses_the_choices_before_recycling():
    module, _, hidden, routing = router()
    statistics = RouterStatistics.unpacked(module(hidden, routing).statistics_X)
    probs = (hidden @ module.weight.t()).softmax(-1).view(3, 32, 4)
    chosen = torch.nn.functional.one_hot(probs.argmax(-1), 4).float()
    expected = 4 * (probs.mean(1) * chosen.mean(1)).sum(-1)
    torch.testing.assert_close(statistics.balance_loss, expected.sum().detach())
    assert torch.equal(statistics.chosen_E, chosen.sum((0, 1)))


def test_gradient_reaches_the_router_through_combine_weight_and_through_balance_loss():
    """Each path alone gives a gradient, and together they give the sum; the balance loss enters with its
    coefficient."""

    def gradient(coefficient: float, through_weight: float) -> torch.Tensor:
        module, _, hidden, routing = router(moe_aux_loss_coeff=coefficient)
        plan, loss, *_ = module(hidden.detach(), routing)
        (plan.weight_TK.sum() * through_weight + loss).backward()
        return module.weight.grad

    weight_only, balance_only, both = gradient(0.0, 1.0), gradient(0.5, 0.0), gradient(0.5, 1.0)
    assert weight_only.abs().max() > 0
    assert balance_only.abs().max() > 0
    torch.testing.assert_close(both, weight_only + balance_only)
    torch.testing.assert_close(gradient(1.0, 0.0), 2 * balance_only)


@pytest.mark.parametrize("changes", [{}, {"moe_router_topk": 2, "moe_expert_capacity_factor": 0.7}], ids=str)
@pytest.mark.parametrize("recycle", [True, False], ids=["recycle", "drop"])
def test_statistics_count_the_choices(changes, recycle):
    """Against counts of the choices themselves."""
    module, config, hidden, routing = router(recycle_routing=recycle, **changes)
    plan, _, statistics_X, _ = module(hidden, routing)
    statistics = RouterStatistics.unpacked(statistics_X)
    chosen_TK = module.choose((hidden @ module.weight.t()).softmax(-1), routing)
    dropped = plan.row_TK == plan.num_rows
    moved = ~dropped & (expert_of_row(plan, config) != chosen_TK)
    assert statistics.dropped == dropped.sum()
    assert statistics.recycled == moved.sum()
    assert (moved.sum() > 0) == recycle
    assert statistics.overflow == statistics.dropped + statistics.recycled > 0
    assert statistics.chosen_E.tolist() == chosen_TK.flatten().bincount(minlength=4).tolist()
    assert statistics.tokens == 96
    assert all(number.dtype == torch.float32 for number in statistics)


class Operations(TorchDispatchMode):
    """Counts the operators that compute something: a launch each on a GPU."""

    VIEWS = ("view", "_unsafe_view", "t", "transpose", "unsqueeze", "squeeze", "slice", "select", "expand", "detach")

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func._schema.name.removeprefix("aten::") not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        ({}, 73, 17),
        ({"moe_router_topk": 2, "moe_z_loss_coeff": 0.1}, 84, 34),
        ({"recycle_routing": False}, 41, 18),
        ({"moe_expert_capacity_factor": None, "recycle_routing": False}, 26, 17),
    ],
    ids=["recycle", "top 2 with z-loss", "drop", "dropless"],
)
def test_the_router_launches_no_more_operations_than_these(changes, forward, backward):
    """A forward pass with recycling once had 137. The bounds leave room for two more of another torch."""
    module, _, hidden, routing = router(**changes)
    hidden = hidden.detach().bfloat16().requires_grad_()
    with Operations() as operations:
        plan, loss, *_ = module(hidden, routing)
    assert operations.number <= forward + 2
    with Operations() as operations:
        torch.autograd.backward((plan.weight_TK, loss), (torch.ones_like(plan.weight_TK), torch.ones(())))
    assert operations.number <= backward + 2


def test_logits_keep_the_hidden_states_as_they_came_and_change_no_number():
    """In bf16 the router keeps the tensor that other layers keep as well: 2 bytes a number, and no fp32 copy of 4."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for dtype in (torch.bfloat16, torch.float32):
        hidden = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        found, kept = [], []
        for function in (lambda x, w: router_logits(x, w)[0], lambda x, w: torch.nn.functional.linear(x.float(), w)):
            kept.append([])
            with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept[-1].append(x) or x, lambda x: x):
                logits = function(hidden, weight)
            found.append([logits, *torch.autograd.grad(logits.square().sum(), (hidden, weight))])
        assert all(map(torch.equal, *found))
        ours, autograds = ([x for x in tensors if x.numel() == hidden.numel()] for tensors in kept)
        assert [x.data_ptr() for x in ours] == [hidden.data_ptr()]
        assert [x.nbytes for x in autograds] == [96 * 64 * 4]


def test_the_router_keeps_no_hidden_states_of_its_own():
    """Kept for the backward pass, per token: the bf16 hidden state, shared with the other layers, and less than 200
    bytes of its own for 4 experts."""
    module, _, _, routing = router(hidden_size=256, num_attention_heads=8)
    hidden = torch.randn(96, 256).bfloat16().requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
    ):
        module(hidden, routing)
    shared = [kept.pop(x.untyped_storage().data_ptr()) for x in (hidden, module.weight)]
    assert shared == [hidden.nbytes, module.weight.nbytes]
    assert 0 < sum(kept.values()) < 200 * 96


def test_z_loss():
    module, _, hidden, routing = router(moe_z_loss_coeff=0.1, moe_aux_loss_coeff=0.0)
    _, loss, statistics_X, _ = module(hidden, routing)
    statistics = RouterStatistics.unpacked(statistics_X)
    logits = hidden.detach() @ module.weight.t()
    expected = logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(statistics.z_loss / 3, expected.detach())
    (gradient,) = torch.autograd.grad(loss, module.weight, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(0.1 * expected, module.weight)[0])


def test_router_is_fp32_in_a_bf16_model():
    model = tiny.build(tiny.tiny_model(), dtype="bf16")
    assert model.decoder.layers[0].mlp.router.weight.dtype == torch.float32
    assert model.decoder.layers[0].mlp.experts.linear_fc1.weight.dtype == torch.bfloat16
