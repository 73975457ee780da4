"""What is done about a step with a bad loss or gradient (resilience.*).

A step is judged between the reduction of its gradients and the update, from numbers that are the same on all ranks: the
sum of losses, and the norms as rank 0 has them, both in the sum over all ranks that every step has anyway. So all ranks
come to the same verdict without a message of its own, and no optimizer has to undo anything.

A limit is the mean plus a number of standard deviations of the last good steps of the stage, as in OLMo-core's
skip-step optimizers. Values of steps that were not updated do not count.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.config.decisions import Decision, InForce, Window
from hunyuan_pretrain.config.schedule import Piece, Schedule
from hunyuan_pretrain.config.schema import ResilienceConfig

LEAST_DEVIATION = 0.01
"""Of the mean: the standard deviation counts as at least this, so that a flat curve has no spikes."""


class Numbers(NamedTuple):
    """What a step is judged by."""

    loss: float
    grad_norm: float
    update_norm: float | None = None
    """train.update_norm; None: not computed."""

    @classmethod
    def unknown(cls) -> Numbers:
        """Of a step that was not finished."""
        return cls(math.nan, math.nan)

    def known(self) -> dict[str, float]:
        """By name, without what was not computed."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class Verdict:
    """What to do about a step."""

    kind: Literal["update", "skip", "rollback", "stop"]
    cause: Literal["nonfinite", "spike"] | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    is_in_ledger: bool = False
    """An earlier attempt has decided so; what this one computed does not matter."""


UPDATED = Verdict("update")


class Judge:
    """Decides about steps, in order; the same on all ranks."""

    def __init__(self, settings: ResilienceConfig, decisions: InForce, state: Mapping[str, Any] | None = None) -> None:
        """state: from `state`, of a checkpoint."""
        state = state or {}
        self._settings, self._skips = settings, decisions.skips
        self._stage: int | None = state.get("stage")
        self._in_a_row: int = state.get("in_a_row", 0)
        self._good: dict[str, deque[float]] = {}
        for name, values in state.get("good", {}).items():
            self._good[name] = self._window(values)

    @property
    def needs_update_norm(self) -> bool:
        """Whether `Numbers.update_norm` is computed."""
        return self._settings.on_spike is not None and self._settings.spike_update_norm_sigmas is not None

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; floats come back as they were."""
        good = {name: list(values) for name, values in self._good.items()}
        return {"stage": self._stage, "in_a_row": self._in_a_row, "good": good}

    def judge(self, step: int, stage: int, numbers: Numbers) -> Verdict:
        """The verdict on global step `step`, counted from 0, in this stage of the run."""
        if stage != self._stage:
            self._stage, self._good = stage, {}
        verdict = self._verdict(step, numbers)
        if verdict.kind != "update":
            self._in_a_row += 1
            return verdict
        self._in_a_row = 0
        for name, value in numbers.known().items():
            self._good.setdefault(name, self._window()).append(value)
        return verdict

    def _verdict(self, step: int, numbers: Numbers) -> Verdict:
        settings, thresholds = self._settings, self._thresholds()
        if step + 1 in self._skips:
            return Verdict("skip", None, thresholds, is_in_ledger=True)
        values = numbers.known()
        cause: Literal["nonfinite", "spike"]
        if not all(map(math.isfinite, values.values())):
            cause, kind = "nonfinite", settings.on_nonfinite
        elif settings.on_spike is not None and any(values[name] > limit for name, limit in thresholds.items()):
            cause, kind = "spike", settings.on_spike
        else:
            return Verdict("update", None, thresholds)
        if kind == "skip" and self._in_a_row >= settings.max_skips_in_a_row:
            kind = "stop"
        return Verdict(kind, cause, thresholds)

    def _thresholds(self) -> dict[str, float]:
        """The limit of each number that has one; none while half the window is empty."""
        settings, found = self._settings, {}
        if settings.on_spike is None:
            return {}
        for name, good in self._good.items():
            sigmas = getattr(settings, f"spike_{name}_sigmas")
            if sigmas is None or len(good) < (settings.spike_window_steps + 1) // 2:
                continue
            mean = math.fsum(good) / len(good)
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in good) / len(good))
            found[name] = mean + sigmas * max(deviation, LEAST_DEVIATION * abs(mean))
        return found

    def _window(self, values: Any = ()) -> deque[float]:
        return deque(values, maxlen=self._settings.spike_window_steps)


def shared_numbers(grad_norm: Tensor, update_norm: Tensor | None, rank: int) -> Tensor:
    """fp64 (3,): what this rank adds to the sums from which `numbers_of` reads. Every rank gets the norms of rank 0,
    and hears of one that is not finite anywhere."""
    update = torch.zeros_like(grad_norm) if update_norm is None else update_norm.to(grad_norm)
    norms = torch.stack((grad_norm, update)).double()
    bad = norms.isfinite().all().logical_not().double().reshape(1)
    return torch.cat((bad, norms if rank == 0 else torch.zeros_like(norms)))


def numbers_of(loss: float, sums: Tensor, has_update_norm: bool) -> Numbers:
    """`sums`: of `shared_numbers`, over all ranks."""
    bad, grad_norm, update_norm = sums.tolist()
    if bad and math.isfinite(grad_norm):
        grad_norm = math.nan
    return Numbers(loss, grad_norm, update_norm if has_update_norm else None)


# --- what the ledger says of a step -----------------------------------------------------------------------------------


def decision_on(
    schedule: Schedule, step: int, kind: Literal["skip", "rollback", "stop"], cause: Any, numbers: Numbers, **more: Any
) -> Decision:
    """The line of the ledger about global step `step`, counted from 0."""
    fields: dict[str, Any] = {"data": (data_of(schedule, step),), **more}
    return Decision(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        kind=kind,
        cause=cause,
        step=step + 1,
        tokens=schedule.tokens_after(step),
        stage=schedule.stage(step).name,
        values=numbers.known(),
        **fields,
    )


def data_of(schedule: Schedule, step: int) -> Window:
    """From the first to the last sequence of a step."""
    piece = schedule.piece_of_step(step)
    return piece.stage.name, first_position(piece, step), piece.next_position(step + 1 - piece.first_step)


def first_position(piece: Piece, step: int) -> int:
    """Position in the stage's data of the first sequence of a step of the piece."""
    return int(piece.position_of((step - piece.first_step) * piece.stage.global_batch_sequences))


def left_out(schedule: Schedule, to_step: int, step: int, margin: int) -> tuple[Window, ...]:
    """What a roll-back from global step `step` (counted from 0) to the state after `to_step` steps leaves out: all that
    was read since, and `margin` steps more."""
    first, last = schedule.piece_of_step(to_step), schedule.piece_of_step(step)
    end = last.next_position(step + 1 - last.first_step) + margin * last.stage.global_batch_sequences
    begins = {first.lane: first_position(first, to_step)}
    ends = {last.lane: end}
    found = []
    for lane in range(first.lane, last.lane + 1):
        of_lane = [piece for piece in schedule.pieces if piece.lane == lane]
        whole = of_lane[-1].next_position(of_lane[-1].num_steps)
        found.append((of_lane[-1].stage.name, begins.get(lane, 0), ends.get(lane, whole)))
    return tuple(found)
