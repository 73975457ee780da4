"""Scaling laws: made-up runs of known laws give the laws back, and runs that cannot determine one are refused."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from hunyuan_pretrain.diagnostics.scaling_laws import (
    Observation,
    ScalingError,
    best_settings,
    fit_loss_law,
    fit_plan_law,
    flops,
    require_spread,
)
from hunyuan_pretrain.diagnostics.setting_laws import fit_setting

TRUTH = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
SIZES, TOKENS = (1e7, 3e7, 1e8, 3e8, 1e9), (1e10, 3e10, 1e11)


def true_loss(n: float, d: float) -> float:
    return TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]


def made_up(noise: float, seed: int = 0, cells: Iterable[tuple[float, float]] | None = None) -> list[Observation]:
    generator = np.random.default_rng(seed)
    cells = cells if cells is not None else [(n, d) for n in SIZES for d in TOKENS]
    return [
        Observation(f"{n:g}x{d:g}", n, d, true_loss(n, d) * np.exp(noise * generator.standard_normal()), 1e-3, 1e6)
        for n, d in cells
    ]


def test_exact_runs_give_the_law_back() -> None:
    for name, found in fit_loss_law(made_up(0.0), draws=20).parameters().items():
        assert found.value == pytest.approx(TRUTH[name], rel=1e-6), name


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """20 sets of runs with noise: a 90% interval covers in 18 on average, and in at least 14 with probability 0.99."""
    hits = dict.fromkeys([*TRUTH, "target", "N", "D"], 0)
    target = true_loss(5.2e10, 7e12)
    exact = {name: found.value for name, found in fit_loss_law(made_up(0.0), draws=2).optimum(1e22).items()}
    for seed in range(20):
        law = fit_loss_law(made_up(2e-3, seed), draws=100, seed=seed)
        for name, found in law.parameters().items():
            hits[name] += found.low <= TRUTH[name] <= found.high
        predicted = law.predict(5.2e10, 7e12)
        hits["target"] += predicted.low <= target <= predicted.high
        for name in ("N", "D"):
            found = law.optimum(1e22)[name]
            hits[name] += found.low <= exact[name] <= found.high
    assert min(hits.values()) >= 14, hits


def test_few_runs_have_wide_intervals() -> None:
    cells = [(1e7, 1e10), (1e7, 1e11), (1e8, 3e10), (1e9, 1e10), (1e9, 1e11), (1e8, 1e11)]
    hits = 0
    for seed in range(20):
        predicted = fit_loss_law(made_up(3e-3, seed, cells), draws=100, seed=seed).predict(3e9, 3e11)
        hits += predicted.low <= true_loss(3e9, 3e11) <= predicted.high
    assert hits >= 14


def test_one_bad_run_does_not_decide_the_fit() -> None:
    runs = made_up(0.0)
    runs[7] = runs[7]._replace(loss=runs[7].loss * 1.2)
    law = fit_loss_law(runs, draws=2)
    for n in SIZES:
        for d in TOKENS:  # the run is 20% off; least squares would follow it by several percent
            assert law.predict(n, d).value == pytest.approx(true_loss(n, d), rel=3e-3)


def test_the_optimum_lies_on_the_budget_and_is_the_lowest_loss_there() -> None:
    law, budget = fit_loss_law(made_up(0.0), draws=2), 3e21
    best = law.optimum(budget)
    n, d = best["N"].value, best["D"].value
    assert flops(n, d) == pytest.approx(budget)
    assert best["loss"].value == pytest.approx(true_loss(n, d), rel=1e-6)
    for other in (n * 0.9, n * 1.1):
        assert true_loss(other, budget / (9.59 * other + 2.3e8)) > best["loss"].value


def test_the_law_is_in_n_without_embedding_and_the_budget_counts_it() -> None:
    """An embedding of 1e5 N^0.4 parameters: 94% of the smallest size, 28% of the largest."""

    def embedding(n: float) -> float:
        return 1e5 * n**0.4

    law = fit_loss_law([run._replace(embedding=embedding(run.n)) for run in made_up(0.0)], draws=2)
    for name, found in law.parameters().items():
        assert found.value == pytest.approx(TRUTH[name], rel=1e-6), name
    best, budget = law.optimum(3e21), 3e21
    n, d = best["N"].value, best["D"].value
    assert best["active"].value == pytest.approx(n + embedding(n))
    assert flops(n + embedding(n), d) == pytest.approx(budget)
    for other in (n * 0.9, n * 1.1):
        assert true_loss(other, budget / float(flops(other + embedding(other), 1))) > best["loss"].value


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([(1e7, 1e10), (1e8, 3e10), (1e9, 1e10), (1e9, 1e11)], "4 runs, at least 6 are needed for 5 parameters"),
        ([(1e7, d) for d in (1e10, 2e10, 3e10, 4e10, 5e10, 6e10)], "1 different N (without embedding), at least 3"),
        ([(n, 1e10) for n in (1e7, 2e7, 3e7, 5e7, 7e7, 9e7)], "1 different D (tokens), at least 3 are needed"),
        ([(1e7 * k, 1e10 * j) for k in (1, 2, 3) for j in (1, 2, 5)], "N (without embedding) varies by a factor of 3"),
        ([(n, 20 * n) for n in (1e7, 3e7, 1e8, 2e8, 3e8, 1e9)], "N and D vary together (correlation of their"),
    ],
)
def test_runs_that_do_not_determine_the_law_are_refused(cells: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(ScalingError) as refused:
        fit_loss_law(made_up(0.0, 0, cells))
    assert message in str(refused.value)
    assert str(refused.value).startswith("no fit of loss(N, D) = E + A/N^alpha + B/D^beta: ")


def test_tokens_that_differ_by_rounding_are_one_length() -> None:
    """D is rounded up to whole batches: 6.2e9 tokens with batches of 0.25M, 0.5M and 1M."""
    rounded = (6201278464.0, 6202327040.0, 6203375616.0)
    runs = [Observation(str(d), 1e8, d, loss, 1e-3, d) for d, loss in zip(rounded, (3.1, 3.0, 3.2), strict=True)]
    assert best_settings(runs) == [runs[1]]
    swept_batches = []
    for n in (1e7, 1e8):
        for batch, factor in zip((2.5e5, 5e5, 1e6), (1.05, 1.0, 1.05), strict=True):
            d = rounded[int(np.log2(batch / 2.5e5))]
            swept_batches.append(Observation(f"{n:g}", n, d, true_loss(n, d) * factor, 1e-3, batch))
    # two cells of three batches each, and each fits a parabola through its own three points but for one degree
    law = fit_setting(swept_batches, "batch_tokens", draws=2)
    assert law.predict(float(flops(1e8, rounded[0]))).value == pytest.approx(5e5, rel=0.01)


@pytest.mark.parametrize(("factor", "is_enough"), [(1.02, False), (1.29, False), (1.31, True)])
def test_sizes_that_differ_by_little_are_not_different(factor: float, is_enough: bool) -> None:
    cells = [(n, d) for n in (1e7, 1e7 * factor, 1e8) for d in (1e10, 3e10, 1e11)]
    if is_enough:
        require_spread(made_up(0.0, 0, cells))
        return
    with pytest.raises(
        ScalingError, match=r"2 different N \(without embedding\), at least 3 are needed, each 1.3 times"
    ):
        require_spread(made_up(0.0, 0, cells))


def test_a_parameter_that_a_bound_decides_is_warned_of() -> None:
    assert fit_loss_law(made_up(0.0), draws=20).warnings() == []
    runs = [run._replace(loss=1.7 + 400 / run.n**0.34) for run in made_up(0.0)]  # D has no effect
    found = fit_loss_law(runs, draws=20).warnings()
    assert any(line.startswith("B: the estimate and ") for line in found), found
    flat = [run._replace(loss=900 * run.compute**-0.005) for run in planned(0.0)]  # gamma is at least 0.01
    assert any(line.startswith("gamma: the estimate and ") for line in fit_plan_law(flat, draws=20).warnings())


def test_of_runs_that_differ_in_learning_rate_the_best_counts_with_all_its_seeds() -> None:
    one = Observation("a", 1e8, 1e10, 3.0, 1e-3, 1e6)
    runs = [one, one._replace(loss=3.2), one._replace(lr=2e-3, loss=2.9), one._replace(lr=2e-3, loss=3.0)]
    assert best_settings(runs) == runs[2:]


PLAN = [(n, 20 * n**1.1) for n in (1e7, 3e7, 1e8, 3e8, 1e9)]
"""Five sizes, each on the tokens that a rule gives it."""


def along(compute: float) -> float:
    return 1.8 + 900.0 * compute**-0.16


def planned(noise: float, seed: int = 0) -> list[Observation]:
    generator = np.random.default_rng(seed)
    runs = [Observation(f"{n:g}", n, d, 0.0, 1e-3, 1e6) for n, d in PLAN]
    return [run._replace(loss=along(run.compute) * np.exp(noise * generator.standard_normal())) for run in runs]


def test_a_ladder_on_one_plan_gives_the_loss_along_it() -> None:
    law = fit_plan_law(planned(0.0), draws=20)
    assert {name: found.value for name, found in law.parameters().items()} == pytest.approx(
        {"E": 1.8, "K": 900.0, "gamma": 0.16}, rel=1e-4
    )
    n, d = 1e10, 20 * 1e10**1.1
    hits = 0
    for seed in range(20):
        found = fit_plan_law(planned(2e-3, seed), draws=100, seed=seed).predict(n, d)
        hits += found.low <= along(float(flops(n, d))) <= found.high
    assert hits >= 14


def test_what_is_not_on_the_plan_is_refused() -> None:
    law = fit_plan_law(planned(0.0), draws=2)
    with pytest.raises(ScalingError, match="not on the plan of the runs, which would train "):
        law.predict(3e10, 1e11)
    with pytest.raises(ScalingError, match="4 runs, at least 5 are needed"):
        fit_plan_law(planned(0.0)[:4])
    with pytest.raises(ScalingError, match="compute varies by a factor of 1, at least 16 is needed"):
        fit_plan_law([planned(0.0)[0]] * 5)
    two_sizes = planned(0.0)[::4]
    with pytest.raises(ScalingError, match="2 different amounts of compute, at least 3 are needed"):
        fit_plan_law([*two_sizes, *two_sizes, *two_sizes])
    with pytest.raises(ScalingError, match="off a power law of C"):
        fit_plan_law(made_up(0.0))


def best_lr(compute: float) -> float:
    return 0.3 * compute**-0.12


def swept(noise: float, seed: int = 0, factors: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)) -> list[Observation]:
    """Runs at several learning rates around the best, three sizes."""
    generator = np.random.default_rng(seed)
    found = []
    for n, d in ((1e7, 1e10), (1e8, 3e10), (1e9, 1e11)):
        best = best_lr(float(flops(n, d)))
        for factor in factors:
            lr = 1.2 * best * factor
            loss = true_loss(n, d) * np.exp(0.02 * np.log(lr / best) ** 2 + noise * generator.standard_normal())
            found.append(Observation(f"{n:g} at {lr:g}", n, d, loss, lr, 1e6))
    return found


def test_the_best_learning_rate_against_compute_is_found() -> None:
    law = fit_setting(swept(0.0), "lr", draws=20)
    assert law.exponent().value == pytest.approx(-0.12)
    assert law.predict(1e23).value == pytest.approx(best_lr(1e23))
    hits = 0
    for seed in range(20):
        found = fit_setting(swept(2e-3, seed), "lr", draws=200, seed=seed).predict(1e23)
        hits += found.low <= best_lr(1e23) <= found.high
    assert hits >= 14


def test_the_best_batch_against_loss_is_found() -> None:
    def best(loss: float) -> float:
        return 5e8 * loss**-5

    runs = []
    for n, d in ((1e7, 1e10), (1e8, 3e10), (1e9, 1e11)):
        lowest = true_loss(n, d)
        for factor in (0.25, 0.5, 1, 2, 4):
            loss = lowest * np.exp(0.01 * np.log(factor) ** 2)
            runs.append(Observation("a", n, d, loss, 1e-3, best(lowest) * factor))
            runs.append(Observation("b", n, d, loss * 1.1, 9e-3, best(lowest) * factor))  # a worse learning rate
    law = fit_setting(runs, "batch_tokens", "loss", draws=20)
    assert law.exponent().value == pytest.approx(-5)
    assert law.predict(2.0).value == pytest.approx(best(2.0))


def test_settings_that_the_runs_do_not_determine_are_refused() -> None:
    with pytest.raises(ScalingError, match="0 sets of runs that differ only in lr, with 3 or more values each"):
        fit_setting(made_up(0.0), "lr")
    with pytest.raises(ScalingError, match="it would be outside the runs"):
        fit_setting(swept(0.0, factors=(2, 3, 4)), "lr")
    upside_down = [run._replace(loss=1 / run.loss) for run in swept(0.0)]
    with pytest.raises(ScalingError, match="no clear minimum over lr"):
        fit_setting(upside_down, "lr")
