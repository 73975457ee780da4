"""The fastest layouts of a training stage on a number of GPUs that fit into their memory.

Every legal layout has a lower bound on its step time and on its state between steps (plan.bounds). Layouts are looked
at in the order of the first bound, until it passes the slowest of the best few: no other can be better than those.
A layout is timed with the choice of parallel.recompute that is fastest of those that fit.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan.bounds import Bounds
from hunyuan_pretrain.plan.counts import RankMemory
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.layouts import Layout, Legal, Refusals, applied
from hunyuan_pretrain.plan.memory import TO_SPARE, Kept, Peak, host_missing, kept_of_rank, peak_of_rank
from hunyuan_pretrain.plan.passes import Assumptions
from hunyuan_pretrain.plan.timing import StepTime, job_of, least_seconds, step_time


@dataclass(frozen=True)
class Choice:
    """A layout that fits."""

    layout: Layout
    recompute: str
    experiment: Experiment
    """With it, and with its training stage only."""
    step: StepTime
    peaks: list[Peak]


@dataclass
class Count:
    """Layouts that were rejected for one reason, each choice of recompute counted."""

    layouts: int = 0
    least: float = float("inf")
    """Bytes that the nearest one lacks, or seconds that the fastest one takes at least."""
    nearest: tuple[Layout, str] | None = None

    def add(self, layouts: int, amount: float, layout: Layout, recompute: str) -> None:
        """Count layouts, the nearest of which lacks `amount`."""
        self.layouts += layouts
        if amount < self.least:
            self.least, self.nearest = amount, (layout, recompute)


@dataclass
class Found:
    """What a search found for one training stage."""

    stage: StageConfig
    best: list[Choice] = field(default_factory=list)
    """The fastest first."""
    refused: Refusals = field(default_factory=Refusals)
    state: Count = field(default_factory=Count)
    """Do not fit: what they keep between steps is too much already."""
    peak: Count = field(default_factory=Count)
    """Do not fit: the peak is too high."""
    host: Count = field(default_factory=Count)
    """Do not fit into the host's memory."""
    slower: Count = field(default_factory=Count)
    """Take longer than the best few, by a lower bound or as timed."""


def search(
    experiment: Experiment,
    stage: StageConfig,
    gpus: int,
    hardware: Hardware,
    assumptions: Assumptions | None = None,
    shown: int = 5,
) -> Found:
    """The `shown` fastest layouts for `stage`, one of experiment.stages, on `gpus` GPUs; fewer if fewer fit. Raises
    ConfigError if the hardware cannot compute in the experiment's formats."""
    return _Search(experiment, stage, gpus, hardware, assumptions or Assumptions(), shown).run()


class _Search:
    def __init__(
        self,
        experiment: Experiment,
        stage: StageConfig,
        gpus: int,
        hardware: Hardware,
        assumptions: Assumptions,
        shown: int,
    ) -> None:
        self.experiment, self.stage, self.gpus = experiment, stage, gpus
        self.hardware, self.assumptions, self.shown = hardware, assumptions, shown
        self.found = Found(stage)
        self.available = hardware.memory_bytes * (1 - TO_SPARE)
        self._kept: dict[tuple[Layout, int], Kept] = {}

    def run(self) -> Found:
        job_of(applied(self.experiment, self.stage, Layout()), self.stage, 1, self.hardware)  # refuses fp32
        found = self.found
        legal = Legal(self.experiment, self.stage, self.gpus)
        bounds = Bounds(self.experiment, self.stage, self.gpus, self.hardware, self.assumptions)
        found.refused, choices = legal.refused, legal.recompute
        ordered = []
        for layout in legal:
            state = bounds.state_bytes(layout)
            if state > self.available:
                found.state.add(len(choices), state - self.available, layout, choices[0])
                continue
            possible = []
            for recompute in choices:
                lacking = state + bounds.activation_bytes(layout, recompute) - self.available
                if lacking > 0:
                    found.peak.add(1, lacking, layout, recompute)
                else:
                    possible.append((bounds.seconds(layout, recompute), recompute))
            if possible:
                ordered.append((min(possible)[0], layout, sorted(possible, key=lambda one: one[0]), state))
        ordered.sort(key=lambda one: one[0])
        for _, layout, possible, state in ordered:
            self.look_at(layout, possible, state)
        return found

    @property
    def limit(self) -> float:
        """A step that takes longer is not among the best few."""
        best = self.found.best
        return best[-1].step.seconds if len(best) == self.shown else float("inf")

    def look_at(self, layout: Layout, possible: list[tuple[float, str]], state: int) -> None:
        """Time the layout with the fastest choice of recompute that fits, and keep it if it is among the best.
        `possible`: choices after their bounds, in seconds, in ascending order; `state`: Bounds.state_bytes."""
        fitting: list[tuple[float, str, Experiment]] = []
        for number, (bound, recompute) in enumerate(possible):
            if bound > self.limit:
                self.found.slower.add(len(possible) - number, bound, layout, recompute)
                break
            made = applied(self.experiment, self.stage, layout, recompute)
            if not self.fits(made, layout, recompute, state):
                continue
            job = job_of(made, made.stages[0], self.gpus, self.hardware, self.assumptions)
            fitting.append((least_seconds(job, self.limit), recompute, made))
            if recompute == "none" and not made.parallel.cpu_offloading_num_layers:
                self.found.slower.layouts += len(possible) - number - 1  # recomputing only adds time
                break
        fastest: Choice | None = None
        for least, recompute, made in sorted(fitting, key=lambda one: one[0]):
            limit = self.limit if fastest is None else min(self.limit, fastest.step.seconds)
            if least > limit:
                self.found.slower.add(1, least, layout, recompute)
                continue
            step = step_time(made, made.stages[0], self.gpus, self.hardware, self.assumptions)
            if step.seconds > limit or (fastest is not None and step.seconds >= limit):
                self.found.slower.add(1, step.seconds, layout, recompute)
                continue
            self.found.slower.layouts += fastest is not None
            fastest = Choice(layout, recompute, made, step, [])
        if fastest is not None:
            self.keep(fastest)

    def keep(self, choice: Choice) -> None:
        """Insert it among the best; of equals the one found first stays first."""
        best = self.found.best
        peaks = [self.peak(choice.experiment, choice.layout, rank) for rank in range(choice.layout.pipeline.ranks)]
        made = Choice(choice.layout, choice.recompute, choice.experiment, choice.step, peaks)
        bisect.insort(best, made, key=lambda one: one.step.seconds)
        for one in best[self.shown :]:
            self.found.slower.add(1, one.step.seconds, one.layout, one.recompute)
        del best[self.shown :]

    def fits(self, made: Experiment, layout: Layout, recompute: str, state: int) -> bool:
        """Whether every pipeline rank fits. The first, on which the most micro-batches wait, is looked at first, and
        that with `state`, a bound, for what it keeps."""
        nothing = Kept(RankMemory(0, 0, 0), 0, 0, 0)
        first = peak_of_rank(made, made.stages[0], self.gpus, 0, nothing, self.assumptions.imbalance)
        lacking = state + first.transient + first.slack - self.available
        if lacking > 0:
            self.found.peak.add(1, lacking, layout, recompute)
            return False
        found = []
        for rank in range(layout.pipeline.ranks):
            found.append(self.peak(made, layout, rank))
            lacking = found[-1].total - self.available
            if lacking > 0:
                self.found.peak.add(1, lacking, layout, recompute)
                return False
        lacking = host_missing(found, self.hardware)
        if lacking > 0:
            self.found.host.add(1, lacking, layout, recompute)
        return lacking <= 0

    def peak(self, made: Experiment, layout: Layout, rank: int) -> Peak:
        key = layout._replace(micro=1, method="all_gather"), rank
        if key not in self._kept:
            self._kept[key] = kept_of_rank(made, self.gpus, rank)
        return peak_of_rank(made, made.stages[0], self.gpus, rank, self._kept[key], self.assumptions.imbalance)
