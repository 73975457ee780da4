"""Scaling laws fitted to finished runs: the loss against model size and tokens.

The loss law is that of Chinchilla (arXiv 2203.15556, section 3.3): L(N, D) = E + A / N^alpha + B / D^beta, with a Huber
loss on log L. N are the active parameters without embedding and output layer, which are most of a small model and
little of a large one, so that a law in all of them bends. Compute is counted as in the Hunyuan-Large report (arXiv
2411.02265), with all active parameters: C = 9.59 N_active D + 2.3e8 D.

Shapes: R runs, S draws of the bootstrap, P = 5 parameters of a loss law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FLOPS_PER_PARAMETER = 9.59
FLOPS_PER_TOKEN = 2.3e8
"""The report's C = 9.59 N D + 2.3e8 D: FLOPs of training with N active parameters, embedding included, on D tokens. The
second term does not depend on N; below about 2e7 active parameters it is the larger one."""
HUBER_DELTA = 1e-3
"""Of log loss, as in Chinchilla: larger deviations count linearly, so that one bad run does not decide the fit."""
PARAMETERS = 5
FEWEST_RUNS = PARAMETERS + 1
"""One more than the law has parameters: with fewer, any data fit exactly and nothing says how uncertain they are."""
FEWEST_SIZES = 3
"""DIFFERENT N, and DIFFERENT D: two points do not tell an exponent from the constant."""
SAME = 1.01
"""Factor within which two D are one: tokens are rounded up to whole batches, so they differ a little with the batch."""
DIFFERENT = 1.3
"""Factor from which two N, D or amounts of compute count as different."""
LEAST_SPREAD = 4.0
"""Largest N over smallest N, and the same for D."""
MOST_CORRELATION = 0.95
"""Of log N and log D over the runs. With D in proportion to N the two terms cannot be told apart."""
FEWEST_OF_PLAN = 5
"""Runs for a law along a plan, with three parameters."""
MOST_OFF_PLAN = 1.5
"""Factor between N and that of the plan."""
MOST_AT_BOUND = 0.05
"""Share of draws at a bound of the fit from which on a parameter is warned of."""
COVERAGE = 0.9
"""Of every interval."""


class ScalingError(ValueError):
    """The runs do not determine the law; the message says what is missing."""


class Observation(NamedTuple):
    """A finished run."""

    name: str
    n: float
    """Active parameters without embedding and output layer."""
    d: float
    """Tokens trained on."""
    loss: float
    """nats per token."""
    lr: float
    batch_tokens: float
    embedding: float = 0.0
    """Parameters of embedding and output layer, once if they are tied."""

    @property
    def active(self) -> float:
        """All active parameters."""
        return self.n + self.embedding

    @property
    def compute(self) -> float:
        """FLOPs by the report's formula."""
        return float(flops(self.active, self.d))


class Interval(NamedTuple):
    """An estimate and its interval (COVERAGE)."""

    value: float
    low: float
    high: float


def flops(active: Array | float, d: Array | float) -> Array:
    """C = 9.59 N D + 2.3e8 D, in FLOPs, of all active parameters."""
    return np.asarray((FLOPS_PER_PARAMETER * np.asarray(active) + FLOPS_PER_TOKEN) * d)


# --- the loss ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta with its bootstrap."""

    estimate_P: Array
    """log E, log A', log B', alpha, beta; A' and B' are the terms at `centre`."""
    draws_SP: Array
    residuals_R: Array
    """log loss of each run minus the law's, scaled for the parameters fitted."""
    centre: tuple[float, float]
    """Geometric means of N and D."""
    bounds: tuple[Array, Array]
    """Lowest and highest of each parameter."""
    embedding: tuple[float, float] = (-np.inf, 0.0)
    """log of the embedding's parameters = embedding[0] + embedding[1] log N, over the runs."""

    def warnings(self, names: Sequence[str] = ("E", "A", "B", "alpha", "beta")) -> list[str]:
        """Parameters that the bounds decide, not the runs, by these names."""
        low, high = self.bounds
        found = []
        for index in np.flatnonzero(low < high).tolist():
            ends = [low[index], high[index]]
            at_bound = [
                float(np.isclose(theta[:, index, None], ends, rtol=0, atol=1e-6).any(axis=1).mean())
                for theta in (self.estimate_P[None], self.draws_SP)
            ]
            if at_bound[0] or at_bound[1] > MOST_AT_BOUND:
                estimate = "the estimate and " if at_bound[0] else ""
                found.append(
                    f"{names[index]}: {estimate}{at_bound[1]:.0%} of the draws are at a bound of the fit, so the runs "
                    "do not determine it and its interval means nothing"
                )
        return found

    def parameters(self) -> dict[str, Interval]:
        """E, A, B, alpha and beta."""
        theta = np.vstack([self.estimate_P, self.draws_SP]).T
        log_n, log_d = np.log(self.centre)
        found = {
            "E": np.exp(theta[0]),
            "A": np.exp(theta[1] + theta[3] * log_n),
            "B": np.exp(theta[2] + theta[4] * log_d),
            "alpha": theta[3],
            "beta": theta[4],
        }
        return {name: interval(values[0], values[1:]) for name, values in found.items()}

    def predict(self, n: float, d: float, seed: int = 0) -> Interval:
        """Loss of a further run with these N and D. The interval is one for that run: it includes
        the scatter of single runs around the law."""
        log_n, log_d = np.log(n / self.centre[0]), np.log(d / self.centre[1])
        theta = np.vstack([self.estimate_P, self.draws_SP])
        log_loss = _log_loss(theta, np.array([log_n]), np.array([log_d]))[:, 0]
        scatter = np.random.default_rng(seed).choice(self.residuals_R, len(self.draws_SP))
        return interval(np.exp(log_loss[0]), np.exp(log_loss[1:] + scatter))

    def optimum(self, compute: float) -> dict[str, Interval]:
        """N, all active parameters, D and loss of the best model for a budget in FLOPs, by the report's C. The
        embedding V(N) = v N^w follows that of the runs.

        With D = C / (9.59 (N + V) + 2.3e8) the loss has one minimum over N, because its slope in log N,
        -alpha A / N^alpha + beta B / D^beta * 9.59 (N + w V) / (9.59 (N + V) + 2.3e8), grows with N.
        """
        theta = np.vstack([self.estimate_P, self.draws_SP])
        low, high = np.full(len(theta), np.log(1e2)), np.full(len(theta), np.log(1e16))
        for _ in range(80):  # halves 32 nats: far below the precision of a double
            middle = (low + high) / 2
            n, d = self._on_budget(middle, compute)
            embedding = self._embedding(middle)
            share = FLOPS_PER_PARAMETER * (n + self.embedding[1] * embedding)
            share /= FLOPS_PER_PARAMETER * (n + embedding) + FLOPS_PER_TOKEN
            of_n = np.log(theta[:, 3]) + theta[:, 1] - theta[:, 3] * np.log(n / self.centre[0])
            of_d = np.log(theta[:, 4] * share) + theta[:, 2] - theta[:, 4] * np.log(d / self.centre[1])
            low, high = np.where(of_n > of_d, middle, low), np.where(of_n > of_d, high, middle)
        n, d = self._on_budget(low, compute)
        terms = (theta[:, 0], theta[:, 1] - theta[:, 3] * np.log(n / self.centre[0]))
        loss = np.exp(np.logaddexp(np.logaddexp(*terms), theta[:, 2] - theta[:, 4] * np.log(d / self.centre[1])))
        found = {"N": n, "active": n + self._embedding(low), "D": d, "loss": loss}
        return {name: interval(values[0], values[1:]) for name, values in found.items()}

    def _embedding(self, log_n: Array) -> Array:
        return np.asarray(np.exp(self.embedding[0] + self.embedding[1] * log_n))

    def _on_budget(self, log_n: Array, compute: float) -> tuple[Array, Array]:
        n = np.exp(log_n)
        return n, compute / flops(n + self._embedding(log_n), 1.0)


def fit_loss_law(runs: Sequence[Observation], draws: int = 400, seed: int = 0) -> LossLaw:
    """Fit the loss law. Of runs that differ only in learning rate or batch, the best setting counts.

    The bootstrap adds drawn residuals to the fitted log losses and fits again. Residuals are scaled by
    sqrt(R / (R - 5)) because the fit follows the data, and by sqrt((R - 5) / chi2) because few runs know their own
    scatter badly.
    Raises ScalingError if the runs do not determine the law.
    """
    used = best_settings(runs)
    require_spread(used)
    n, d, loss = (np.array([getattr(run, name) for run in used]) for name in ("n", "d", "loss"))
    law = _fit(n, d, loss, (LOWEST, HIGHEST), PARAMETERS, draws, seed)
    embedding = np.array([run.embedding for run in used])
    if not embedding.all():
        return law
    slope, start = np.polyfit(np.log(n), np.log(embedding), 1)
    return replace(law, embedding=(float(start), float(slope)))


def _fit(
    n: Array, d: Array, loss: Array, bounds: tuple[Array, Array], parameters: int, draws: int, seed: int
) -> LossLaw:
    """The fit and its bootstrap; `parameters` of the law are free within `bounds`."""
    centre = (float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean())))
    x, y, z = np.log(n / centre[0]), np.log(d / centre[1]), np.log(loss)
    fitted, costs = _minimise(_starts(z), x, y, z, bounds)
    estimate = fitted[np.argmin(costs)]
    smooth = _log_loss(estimate[None], x, y)[0]
    freedom = len(z) - parameters
    residuals = (z - smooth) * np.sqrt(len(z) / freedom)
    generator = np.random.default_rng(seed)
    scale = np.sqrt(freedom / generator.chisquare(freedom, size=(draws, 1)))
    drawn = smooth + generator.choice(residuals, size=(draws, len(z))) * scale
    samples, _ = _minimise(np.repeat(estimate[None], draws, axis=0), x, y, drawn, bounds)
    return LossLaw(estimate, samples, residuals, centre, bounds)


class PlanLaw(NamedTuple):
    """L = E + K / C^gamma over runs whose sizes and D follow one plan. It knows no other sizes for the same C."""

    law: LossLaw
    """Of C in place of N, without the term of D."""
    line: tuple[float, float]
    """log of the active parameters, embedding included as in C, = line[0] + line[1] log C: the plan."""

    def warnings(self) -> list[str]:
        """As LossLaw.warnings."""
        return self.law.warnings(("E", "K", "", "gamma", ""))

    def parameters(self) -> dict[str, Interval]:
        """E, K and gamma."""
        found = self.law.parameters()
        return {"E": found["E"], "K": found["A"], "gamma": found["alpha"]}

    def predict(self, active: float, d: float) -> Interval:
        """Loss of a further run, by all its active parameters. Raises ScalingError if it is off the plan."""
        compute = float(flops(active, d))
        planned = float(np.exp(self.line[0] + self.line[1] * np.log(compute)))
        if not 1 / MOST_OFF_PLAN <= active / planned <= MOST_OFF_PLAN:
            size = f"{planned:.3g} active parameters"
            raise ScalingError(f"not on the plan of the runs, which would train {size} with {compute:.3g} FLOPs")
        return self.law.predict(compute, self.law.centre[1])


def fit_plan_law(runs: Sequence[Observation], draws: int = 400, seed: int = 0) -> PlanLaw:
    """Fit the loss along a plan, for runs that cannot tell N from D (`fit_loss_law`). Raises ScalingError if there are
    too few of them, or if their compute varies too little."""
    used = best_settings(runs)
    active, loss, compute = (np.array([getattr(run, name) for run in used]) for name in ("active", "loss", "compute"))
    missing = []
    if len(used) < FEWEST_OF_PLAN:
        missing.append(f"{len(used)} runs, at least {FEWEST_OF_PLAN} are needed")
    elif (different := count_different(list(compute))) < FEWEST_SIZES:
        missing.append(f"{different} different amounts of compute, at least {FEWEST_SIZES} are needed")
    if compute.max() < LEAST_SPREAD**2 * compute.min():
        ratio = compute.max() / compute.min()
        missing.append(f"compute varies by a factor of {ratio:.2g}, at least {LEAST_SPREAD**2:g} is needed")
    if missing:
        raise ScalingError("no fit of loss(C) = E + K/C^gamma: " + "; ".join(missing))
    slope, start = np.polyfit(np.log(compute), np.log(active), 1)
    off = np.exp(np.abs(np.log(active) - start - slope * np.log(compute)).max())
    if off > MOST_OFF_PLAN:
        raise ScalingError(f"no fit of loss(C) = E + K/C^gamma: N is a factor of {off:.2g} off a power law of C")
    fixed = [np.where(WITHOUT_D, NO_TERM, bound) for bound in (LOWEST, HIGHEST)]
    law = _fit(compute, np.ones_like(compute), loss, (fixed[0], fixed[1]), 3, draws, seed)
    return PlanLaw(law, (float(start), float(slope)))


def same_tokens(runs: Sequence[Observation]) -> dict[float, float]:
    """D of each run -> one D for all that are within a factor of SAME."""
    found: dict[float, float] = {}
    first = 0.0
    for d in sorted({run.d for run in runs}):
        first = first if first and d <= SAME * first else d
        found[d] = first
    return found


def count_different(values: Sequence[float]) -> int:
    """How many of the values are DIFFERENT from each other, at most."""
    count, last = 0, 0.0
    for value in sorted(values):
        if not count or value >= DIFFERENT * last:
            count, last = count + 1, value
    return count


def best_settings(runs: Sequence[Observation]) -> list[Observation]:
    """Of each (N, D), the runs with the learning rate and batch whose mean loss is lowest."""
    cells: dict[tuple[float, float], dict[tuple[float, float], list[Observation]]] = {}
    tokens = same_tokens(runs)
    for run in runs:
        cells.setdefault((run.n, tokens[run.d]), {}).setdefault((run.lr, run.batch_tokens), []).append(run)
    found = []
    for settings in cells.values():
        found += min(settings.values(), key=lambda same: float(np.mean([run.loss for run in same])))
    return found


def require_spread(runs: Sequence[Observation]) -> None:
    """Raise ScalingError if runs of these N and D cannot determine a loss law, whatever their losses."""
    missing = []
    if len(runs) < FEWEST_RUNS:
        missing.append(f"{len(runs)} runs, at least {FEWEST_RUNS} are needed for {PARAMETERS} parameters")
    for label, values in (("N (without embedding)", [r.n for r in runs]), ("D (tokens)", [r.d for r in runs])):
        if (different := count_different(values)) < FEWEST_SIZES:
            missing.append(
                f"{different} different {label}, at least {FEWEST_SIZES} are needed, each {DIFFERENT:g} times the last"
            )
        elif max(values) < LEAST_SPREAD * min(values):
            ratio = max(values) / min(values)
            missing.append(f"{label} varies by a factor of {ratio:.2g}, at least {LEAST_SPREAD:g} is needed")
    if not missing:
        correlation = float(np.corrcoef(np.log([r.n for r in runs]), np.log([r.d for r in runs]))[0, 1])
        if abs(correlation) > MOST_CORRELATION:
            missing.append(
                f"N and D vary together (correlation of their logarithms {correlation:.2f}, at most "
                f"{MOST_CORRELATION} is allowed), so their terms cannot be told apart: train some sizes on fewer or "
                "more tokens"
            )
    if missing:
        raise ScalingError("no fit of loss(N, D) = E + A/N^alpha + B/D^beta: " + "; ".join(missing))


LOWEST, HIGHEST = np.array([-12.0, -12.0, -12.0, 0.01, 0.01]), np.array([6.0, 6.0, 6.0, 3.0, 3.0])
"""Bounds of the parameters. A term of e^-12 nats is none."""
WITHOUT_D, NO_TERM = np.array([False, False, True, False, True]), np.array([0.0, 0.0, -12.0, 0.0, 1.0])
"""The parameters of the term of D, and their values without it."""


def _log_loss(theta_SP: Array, x_R: Array, y_R: Array) -> Array:
    """log L (S, R); x, y: log N and log D relative to the centre."""
    return np.asarray(np.logaddexp(np.logaddexp(*_terms(theta_SP, x_R, y_R)[:2]), _terms(theta_SP, x_R, y_R)[2]))


def _terms(theta_SP: Array, x_R: Array, y_R: Array) -> tuple[Array, Array, Array]:
    """Logarithms of the three terms, each (S, R)."""
    e, a, b, alpha, beta = (theta_SP[:, index, None] for index in range(PARAMETERS))
    return e + 0 * x_R, a - alpha * x_R, b - beta * y_R


def _starts(log_loss_R: Array) -> Array:
    """Where the fit starts: a grid of exponents and of the loss's split at the centre."""
    centre = float(np.mean(log_loss_R))
    exponents = (0.1, 0.3, 0.6, 1.0)
    return np.array(
        [
            [centre + np.log(share), centre + np.log((1 - share) / 2), centre + np.log((1 - share) / 2), alpha, beta]
            for share in (0.3, 0.7, 0.95)
            for alpha in exponents
            for beta in exponents
        ]
    )


def _minimise(
    theta_SP: Array, x_R: Array, y_R: Array, log_loss: Array, bounds: tuple[Array, Array], steps: int = 300
) -> tuple[Array, Array]:
    """Minimise the Huber loss from every start at once by Levenberg-Marquardt with reweighting. `log_loss`: (R,) or (S,
    R). Returns the parameters (S, P) and the losses (S,)."""
    theta, damping = np.clip(theta_SP, *bounds), np.full(len(theta_SP), 1e-2)
    residual, cost = _huber(theta, x_R, y_R, log_loss)
    for _ in range(steps):
        terms = _terms(theta, x_R, y_R)
        total = np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])
        e, a, b = (np.exp(term - total) for term in terms)
        jacobian = np.stack([e, a, b, -a * x_R, -b * y_R], axis=-1)  # (S, R, P)
        weight = np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residual), 1e-300))
        weighted = jacobian * weight[..., None]
        normal = np.einsum("srp,srq->spq", weighted, jacobian)
        diagonal = np.einsum("spp->sp", normal)
        lift = damping[:, None] * np.maximum(diagonal, 1e-9)
        slope = np.einsum("srp,sr->sp", weighted, residual)
        step = np.linalg.solve(normal + lift[:, :, None] * np.eye(PARAMETERS), slope[..., None])[..., 0]
        tried = np.clip(theta + step, *bounds)
        new_residual, new_cost = _huber(tried, x_R, y_R, log_loss)
        is_better = new_cost < cost
        theta = np.where(is_better[:, None], tried, theta)
        residual = np.where(is_better[:, None], new_residual, residual)
        cost = np.where(is_better, new_cost, cost)
        damping = np.clip(np.where(is_better, damping / 3, damping * 4), 1e-12, 1e8)
    return theta, cost


def _huber(theta: Array, x_R: Array, y_R: Array, log_loss: Array) -> tuple[Array, Array]:
    """Residuals (S, R) and their Huber losses (S,)."""
    residual = log_loss - _log_loss(theta, x_R, y_R)
    size = np.abs(residual)
    each = np.where(size <= HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
    return residual, each.sum(axis=1)


def interval(value: float, draws: Array) -> Interval:
    """The estimate with the quantiles of its draws."""
    low, high = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(value), float(low), float(high))
