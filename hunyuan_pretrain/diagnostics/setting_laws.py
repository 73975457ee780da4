"""The best learning rate and batch as power laws of compute or loss, fitted to runs that vary them.

Shapes: S draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hunyuan_pretrain.diagnostics.scaling_laws import (
    COVERAGE,
    Array,
    Interval,
    Observation,
    ScalingError,
    best_settings,
    count_different,
    interval,
    same_tokens,
)


@dataclass(frozen=True)
class SettingLaw:
    """The best value of a setting: factor * against^exponent."""

    setting: str
    against: str
    """compute (FLOPs by the report's formula) or loss (nats)."""
    draws: Array
    """(1 + S, 2): log of the value at `centre` and the exponent; the estimate first."""
    centre: float

    def exponent(self) -> Interval:
        """Of the power law."""
        return interval(self.draws[0, 1], self.draws[1:, 1])

    def predict(self, against: float) -> Interval:
        """The best value at this compute or loss."""
        values = np.exp(self.draws[:, 0] + self.draws[:, 1] * np.log(against / self.centre))
        return interval(values[0], values[1:])


def fit_setting(
    runs: Sequence[Observation], setting: str, against: str = "compute", draws: int = 400, seed: int = 0
) -> SettingLaw:
    """Fit the best `setting` (lr or batch_tokens) as a power law of `against` (compute or loss).

    Runs that differ in nothing else form a cell. Within a cell log loss is a parabola of the log of the setting. Its
    curvature is the same for all cells, and its minimum moves on a line in log `against`: a linear regression. Of runs
    that differ in the other setting too, the best value of that one counts in fits of batch_tokens. Bootstrap as in
    `fit_loss_law`. Raises ScalingError if the runs do not determine it.
    """
    cells = _cells(runs, setting)
    places = [_against(cell, against) for cell in cells]
    if (count_different(places) if against == "compute" else len(set(places))) < 2:
        raise ScalingError(
            f"no fit of the best {setting}: {len(cells)} sets of runs that differ only in {setting}, with 3 or more "
            f"values each; at least 2, of different {against}, are needed"
        )
    x = np.log([getattr(run, setting) for cell in cells for run in cell])
    c = np.log([_against(cell, against) for cell in cells for _ in cell])
    z = np.log([run.loss for cell in cells for run in cell])
    cell_of = np.repeat(np.arange(len(cells)), [len(cell) for cell in cells])
    middle, centre = x.mean(), c.mean()
    x, c = x - middle, c - centre
    design = np.column_stack([cell_of[:, None] == np.arange(len(cells)), x**2, x, x * c])
    freedom = len(z) - design.shape[1]
    if freedom < 1:
        raise ScalingError(f"no fit of the best {setting}: {len(z)} runs for {design.shape[1]} parameters")
    inverse = np.linalg.pinv(design)
    smooth = design @ (inverse @ z)
    residuals = (z - smooth) * np.sqrt(len(z) / freedom)
    generator = np.random.default_rng(seed)
    scale = np.sqrt(freedom / generator.chisquare(freedom, size=(draws, 1)))
    drawn = smooth + generator.choice(residuals, size=(draws, len(z))) * scale
    curvature, slope, shift = (np.vstack([z, drawn]) @ inverse.T)[:, -3:].T
    if curvature[0] <= 0 or np.mean(curvature[1:] <= 0) > (1 - COVERAGE) / 2:
        raise ScalingError(
            f"no fit of the best {setting}: the losses have no clear minimum over {setting}; try values further apart"
        )
    kept = curvature > 0
    found = np.column_stack([middle - slope / (2 * curvature), -shift / (2 * curvature)])[kept]
    law = SettingLaw(setting, against, found, float(np.exp(centre)))
    _refuse_outside(law, cells)
    return law


def _cells(runs: Sequence[Observation], setting: str) -> list[list[Observation]]:
    """Runs that differ only in `setting`, and in D by rounding; at least three values of it."""
    found: dict[tuple[float, ...], list[Observation]] = {}
    tokens = same_tokens(runs)
    for run in runs:
        found.setdefault((run.n, tokens[run.d], *((run.batch_tokens,) if setting == "lr" else ())), []).append(run)
    cells = list(found.values())
    if setting == "batch_tokens":  # at each batch, the best learning rate
        cells = [
            [
                run
                for batch in sorted({run.batch_tokens for run in cell})
                for run in best_settings([run for run in cell if run.batch_tokens == batch])
            ]
            for cell in cells
        ]
    return [cell for cell in cells if len({getattr(run, setting) for run in cell}) >= 3]


def _against(cell: Sequence[Observation], against: str) -> float:
    return cell[0].compute if against == "compute" else min(run.loss for run in cell)


def _refuse_outside(law: SettingLaw, cells: Sequence[Sequence[Observation]]) -> None:
    """A parabola says nothing about values beyond those tried."""
    outside = []
    for cell in cells:
        tried = [getattr(run, law.setting) for run in cell]
        best = law.predict(_against(cell, law.against)).value
        if not min(tried) <= best <= max(tried):
            outside.append(f"{best:.3g} for {cell[0].name}, where {min(tried):.3g} to {max(tried):.3g} were tried")
    if outside:
        raise ScalingError(f"no fit of the best {law.setting}: it would be outside the runs ({'; '.join(outside)})")
