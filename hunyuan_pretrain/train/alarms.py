"""Alarms: what somebody should look at while a run goes on (logging.alarms). They change nothing of the run.

Each looks at the records of logged steps. What lasts is reported once, when it has lasted logging.alarms.after_steps
steps, and once more when it ends; a jump of the loss is reported at once, and again only after as many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from hunyuan_pretrain.config.schema import AlarmsConfig
from hunyuan_pretrain.train.metrics import DEAD_LOAD

OF_MEAN, OF_DEVIATION = 0.1, 0.02
"""Weight of a new loss in the running mean, and of its squared distance from it: about the last 10 and 50 records. The
mean follows the fall of the loss, and its lag is part of the distance."""
WARM_UP = 50
"""Records before a jump can be told from the fall of the loss at the beginning."""
CLIPPED = 4.0
"""Usual distances: a loss farther from the mean counts as if it were this far."""
LEAST_SHARE = 0.1
"""Of a step: a rank whose host is slower than others by less costs little."""


class EventLog(Protocol):
    """What runtime.logging.RunLog provides."""

    def event(self, kind: str, text: str, step: int | None = None) -> None: ...


class Alarms:
    """Of one process of a run, on rank 0."""

    def __init__(self, settings: AlarmsConfig, num_experts: int, log: EventLog) -> None:
        self._settings, self._num_experts, self._log = settings, num_experts, log
        self._since: dict[str, int] = {}
        """What lasts -> the first step of it."""
        self._reported: dict[str, str] = {}
        """What lasts and was reported -> how its end is reported."""
        self._loss = RunningLoss()
        self._quiet_until = 0

    def after(self, record: dict[str, Any]) -> None:
        """Look at the record of a logged step."""
        step = record["step"]
        for what, is_so, text, end in self._lasting(record):
            self._follow(step, what, is_so, text, end)
        self._look_for_jump(step, record["loss"])

    def _lasting(self, record: dict[str, Any]) -> Iterator[tuple[str, bool, Callable[[], str], str]]:
        """(what, whether it is so now, its text, the text of its end)."""
        settings, seconds = self._settings, record["seconds"]
        if settings.dead_experts:
            yield "dead", record["dead_experts"] > 0, lambda: self._dead_text(record), "no expert is dead any more"
        if (limit := settings.expert_load_above) is not None:
            load = record["max_expert_load"]
            text = f"the busiest expert is chosen {load:.3g} times as often as an even share (limit {limit:g})"
            yield "load", load > limit, lambda: text, f"no expert is above {limit:g} times an even share any more"
        if (share := settings.data_wait_share_above) is not None:
            rank = record.get("max_data_wait_rank", 0)
            waited = record.get("max_data_wait_seconds", record["data_wait_seconds"])
            text = f"rank {rank} waited {waited:.3g} s for the batch of a step of {seconds:.3g} s (limit {share:.0%})"
            yield "data", waited > share * seconds, lambda: text, "batches are there in time again"
        if (factor := settings.slow_rank_above) is not None and "median_launch_seconds" in record:
            slowest, usual = record["max_launch_seconds"], record["median_launch_seconds"]
            is_slow = slowest > factor * usual and slowest - usual > LEAST_SHARE * seconds
            rank = record["max_launch_rank"]
            text = f"rank {rank} is slow: its host takes {slowest:.3g} s to launch a step, the median {usual:.3g} s"
            yield "rank", is_slow, lambda: text, "no rank is slower than the others any more"

    def go_back(self, step: int) -> None:
        """The run goes on after `step` steps, which may be fewer than those that it told of."""
        self._quiet_until = min(self._quiet_until, step)
        self._since = {what: min(since, step) for what, since in self._since.items()}

    def _follow(self, step: int, what: str, is_so: bool, text: Callable[[], str], end: str) -> None:
        if not is_so:
            self._since.pop(what, None)
            if (said := self._reported.pop(what, None)) is not None:
                self._log.event("alarm over", said, step)
            return
        first = self._since.setdefault(what, step)
        if what not in self._reported and step - first >= self._settings.after_steps:
            self._reported[what] = end
            self._log.event("alarm", f"{text()}, since step {first}", step)

    def _look_for_jump(self, step: int, loss: float) -> None:
        limit = self._settings.loss_jump_above
        if limit is not None and (jump := self._loss.jump(loss)) > limit and step >= self._quiet_until:
            self._quiet_until = step + self._settings.after_steps
            mean = self._loss.mean
            far = f"{jump:.3g} times the usual distance above its mean {mean:.4g}"
            text = f"the loss is {loss:.4g}, {far} (limit {limit:g})"
            self._log.event("alarm", text, step)
        self._loss.add(loss)

    def _dead_text(self, record: dict[str, Any]) -> str:
        dead = [
            f"layer {layer}: {', '.join(map(str, experts))}"
            for layer, loads in enumerate(record["expert_load"])
            if (experts := [expert for expert, load in enumerate(loads) if load * self._num_experts < DEAD_LOAD])
        ]
        shown = "; ".join(dead[:4]) + (f"; and {len(dead) - 4} more layers" if len(dead) > 4 else "")
        return f"{record['dead_experts']} dead experts ({shown})"


class RunningLoss:
    """Running mean of the loss, and how far losses usually are from it."""

    def __init__(self) -> None:
        self.mean, self._squared, self._count = 0.0, 0.0, 0

    def jump(self, loss: float) -> float:
        """By how many usual distances a loss is above the mean; 0 while too few are known."""
        if self._count < WARM_UP or self._squared == 0.0:
            return 0.0
        return (loss - self.mean) / math.sqrt(self._squared)

    def add(self, loss: float) -> None:
        """The next loss. One that is not finite is left out."""
        if not math.isfinite(loss):
            return
        distance = loss - self.mean if self._count else 0.0
        if self._count > WARM_UP // 5:  # one outlier would hide the next ones
            most = CLIPPED * math.sqrt(self._squared)
            distance = min(max(distance, -most), most)
        self._count += 1
        self.mean += max(1 / self._count, OF_MEAN) * (distance if self._count > 1 else loss)
        weight = max(1 / self._count, OF_DEVIATION)
        self._squared += weight * (distance * distance - self._squared)
