"""Recycle routing, capacity, combine weights and router losses."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.config.derived import expert_capacity
from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.recycle_routing import assign_slots, slot_priorities
from hunyuan_pretrain.model.router import Router
from hunyuan_pretrain.model.routing import DROPPED, EVALUATION, TrainingRouting
from tests.helpers import tiny

GROUPS = st.integers(1, 3)


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
    slots = assign_slots(chosen, E, C, slot_priorities(seed, 0, 0, torch.arange(n), E * C))
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
    recycled = assign_slots(chosen, E, C, slot_priorities(seed, 0, 0, torch.arange(n), E * C))
    dropping = assign_slots(chosen, E, C, None)
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


def test_draw_is_uniform_over_free_slots():
    """Chi-squared test over 24,000 draws: one overflowing token, five free slots of two experts (1 and 4 of them),
    other slots never."""
    draws, E, C = 24_000, 3, 4
    # expert 0 has 5 takers for 4 slots, expert 1 three, expert 2 none
    chosen = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]).expand(draws, 1, 8)
    slots = assign_slots(chosen, E, C, slot_priorities(7, 0, 0, torch.arange(draws), E * C))
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
    plan, _, statistics = module(hidden, routing)
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
    plan, _, statistics = module(hidden, routing)
    dropped = plan.row_TK == plan.num_rows
    assert dropped.sum() == statistics.dropped > 0
    assert (plan.weight_TK[dropped] == 0).all()
    assert (plan.weight_TK[~dropped] > 0).all()


def test_with_factor_one_and_recycling_every_expert_gets_exactly_its_capacity():
    module, config, hidden, routing = router()
    plan, _, statistics = module(hidden, routing)
    assert plan.is_permutation
    assert torch.equal(plan.token_R.sort().values, torch.arange(96))
    assert expert_of_row(plan, config).flatten().bincount().tolist() == [24] * 4
    assert statistics.dropped == 0


def test_balance_loss_uses_the_choices_before_recycling():
    module, _, hidden, routing = router()
    statistics = module(hidden, routing).statistics
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
        plan, loss, _ = module(hidden.detach(), routing)
        (plan.weight_TK.sum() * through_weight + loss).backward()
        return module.weight.grad

    weight_only, balance_only, both = gradient(0.0, 1.0), gradient(0.5, 0.0), gradient(0.5, 1.0)
    assert weight_only.abs().max() > 0
    assert balance_only.abs().max() > 0
    torch.testing.assert_close(both, weight_only + balance_only)
    torch.testing.assert_close(gradient(1.0, 0.0), 2 * balance_only)


def test_z_loss():
    module, _, hidden, routing = router(moe_z_loss_coeff=0.1, moe_aux_loss_coeff=0.0)
    _, loss, statistics = module(hidden, routing)
    logits = hidden.detach() @ module.weight.t()
    expected = logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(statistics.z_loss / 3, expected.detach())
    (gradient,) = torch.autograd.grad(loss, module.weight, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(0.1 * expected, module.weight)[0])


def test_router_is_fp32_in_a_bf16_model():
    model = tiny.build(tiny.tiny_model(), dtype="bf16")
    assert model.decoder.layers[0].mlp.router.weight.dtype == torch.float32
    assert model.decoder.layers[0].mlp.experts.linear_fc1.weight.dtype == torch.bfloat16
