"""The layouts that a number of GPUs can run: their sizes, the rules that exclude others, and how their settings are
written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, ParallelConfig, Recompute, StageConfig
from hunyuan_pretrain.plan.counts import flops_per_token


class Pipeline(NamedTuple):
    """Ranks, model chunks of each, and layers of each stage; None: as many in each."""

    ranks: int = 1
    chunks: int = 1
    layers: tuple[int, ...] | None = None


class Layout(NamedTuple):
    """All that the search chooses, but for parallel.recompute."""

    tp: int = 1
    cp: int = 1
    method: str = "all_gather"
    ep: int = 1
    expert_tp: int = 1
    pipeline: Pipeline = Pipeline()
    micro: int = 1
    """Sequences of a micro-batch."""

    def __str__(self) -> str:
        ranks, chunks, layers = self.pipeline
        parts = [f"{name} {size}" for name, size in (("TP", self.tp), ("PP", ranks), ("VPP", chunks)) if size > 1]
        parts += [f"layers {'-'.join(map(str, layers))}"] if layers else []
        parts += [f"CP {self.cp} {self.method}"] if self.cp > 1 else []
        parts += [f"{name} {size}" for name, size in (("EP", self.ep), ("ETP", self.expert_tp)) if size > 1]
        return ", ".join([*(parts or ["DP only"]), f"micro-batch {self.micro}"])

    def settings(self, recompute: str) -> dict[str, Any]:
        """Of the section `parallel`."""
        return {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.tp > 1,
            "pipeline_model_parallel_size": self.pipeline.ranks,
            "virtual_pipeline_model_parallel_size": self.pipeline.chunks,
            "pipeline_layout": self.pipeline.layers,
            "context_parallel_size": self.cp,
            "context_parallel_method": self.method,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.expert_tp,
            "recompute": recompute,
        }


def applied(experiment: Experiment, stage: StageConfig, layout: Layout, recompute: str = "none") -> Experiment:
    """The experiment under a layout, with one training stage, and with validation if that is the first, whose length of
    sequences it takes. Values are not validated.

    Keeps parallel.overlap_shared_expert where it is legal. The noise scale is measured as in the whole experiment,
    which excludes layouts, but not used: before the only stage nothing is measured.
    """
    parallel = experiment.parallel.model_copy(update=layout.settings(recompute) | {"world_size": None})
    if parallel.overlap_shared_expert and (
        layout.tp > 1 or layout.ep == 1 or "norms" in recompute or parallel.cpu_offloading_num_layers
    ):
        parallel = parallel.model_copy(update={"overlap_shared_expert": False})
    only = stage.model_copy(update={"micro_batch_sequences": layout.micro})
    found: dict[str, Any] = {"parallel": parallel, "stages": (only,)}
    if (every := experiment.optimizer.measure_noise_scale_every_steps) is not None:
        noise: dict[str, int | None] = {"measure_noise_scale_every_steps": min(every, stage.num_steps)}
        if experiment.optimizer.expert_lr_noise_scale_tokens == "measured":
            noise["expert_lr_noise_scale_tokens"] = None
        found["optimizer"] = experiment.optimizer.model_copy(update=noise)
    if stage is not experiment.stages[0]:
        found["evaluation"] = experiment.evaluation.of_nothing()
    return experiment.model_copy(update=found)


@dataclass
class Refusals:
    """What rules exclude: single values of a setting, and combinations."""

    values: dict[str, tuple[list[Any], Problem]] = field(default_factory=dict)
    """Setting -> values that are illegal whatever the others are, and the problem of the first."""
    combinations: dict[str, tuple[int, Problem]] = field(default_factory=dict)
    """Setting that a rule names -> layouts, each choice of recompute counted, and the problem of the first."""

    def value(self, setting: str, value: Any, problem: Problem) -> None:
        self.values.setdefault(setting, ([], problem))[0].append(value)

    def layouts(self, number: int, problem: Problem) -> None:
        before, first = self.combinations.get(problem.path, (0, problem))
        self.combinations[problem.path] = before + number, first


class Legal:
    """Legal layouts of one training stage. Rules look at three parts of a layout, so each part is checked once."""

    def __init__(self, experiment: Experiment, stage: StageConfig, gpus: int) -> None:
        self.experiment, self.stage, self.gpus = experiment, stage, gpus
        self.refused = Refusals()
        self._without_layout = list(self._problems(Layout()))
        model, sizes = experiment.model, divisors(gpus)
        self.tp = [size for size in sizes if self._stands("tensor_model_parallel_size", size, Layout(tp=size))]
        self.ep = [size for size in sizes if self._stands("expert_model_parallel_size", size, Layout(ep=size))]
        self.expert_tp = [
            size for size in sizes if self._stands("expert_tensor_parallel_size", size, Layout(expert_tp=size))
        ]
        self.recompute = [
            choice for choice in get_args(Recompute) if self._stands("recompute", choice, Layout(), choice)
        ]
        self.groups = model.num_layers // model.cla_share_factor
        self.pipelines = [one for size in sizes for one in self._pipelines(size)]
        self._local: dict[Layout, Problem | None] = {}

    def _stands(self, setting: str, value: Any, layout: Layout, recompute: str = "none") -> bool:
        """Whether no rule excludes a value whatever the others are: none that names a setting of the layout. Of a
        pipeline, no rule that holds without one: what other parts do does not depend on it."""
        for problem in self._problems(layout, recompute):
            is_new = isinstance(value, Pipeline) and problem not in self._without_layout
            if is_new or problem.path.startswith("parallel."):
                self.refused.value(setting, value, problem)
                return False
        return True

    def _problems(self, layout: Layout, recompute: str = "none") -> Iterator[Problem]:
        experiment = applied(self.experiment, self.stage, layout, recompute)
        for rule in rules.EXPERIMENT_RULES:
            yield from rule(experiment)

    def _pipelines(self, ranks: int) -> Iterator[Pipeline]:
        """With as many layers in each stage, and balanced with the loss on the last rank."""
        name = "pipeline_model_parallel_size"
        if ranks > self.groups:
            self._stands(name, ranks, Layout(pipeline=Pipeline(ranks)))
        for chunks in range(1, self.groups // ranks + 1 if ranks > 1 else 2):
            is_even = self.groups % (ranks * chunks) == 0
            balanced = balanced_layers(self.experiment.model, self.stage.sequence_length, ranks, chunks)
            choices = [Pipeline(ranks, chunks)] * is_even
            choices += [Pipeline(ranks, chunks, balanced)] * (len(set(balanced)) > 1)
            yield from (one for one in choices if self._stands(name, one, Layout(pipeline=one)))

    def __iter__(self) -> Iterator[Layout]:
        choices, stage = len(self.recompute), self.stage
        context = [(cp, method) for cp in divisors(self.gpus) for method in CONTEXT_METHODS[: 2 if cp > 1 else 1]]
        for tp, (cp, method) in ((tp, one) for tp in self.tp for one in context):
            for pipeline in self.pipelines:
                dp, rest = divmod(self.gpus, tp * cp * pipeline.ranks)
                if rest:
                    continue
                of_rank, rest = divmod(stage.global_batch_sequences, dp)
                for micro in [1] if rest else divisors(of_rank):
                    one = Layout(tp, cp, method, pipeline=pipeline, micro=micro)
                    pairs = [
                        (ep, expert_tp)
                        for ep in self.ep
                        for expert_tp in self.expert_tp
                        if self.gpus % (ep * expert_tp * pipeline.ranks) == 0
                    ]
                    problem = self._batch_problem(one, dp)
                    if problem is not None:
                        self.refused.layouts(len(pairs) * choices, problem)
                        continue
                    for ep, expert_tp in pairs:
                        found = one._replace(ep=ep, expert_tp=expert_tp)
                        problem = self._local_problem(found._replace(pipeline=Pipeline()))
                        if problem is None:
                            yield found
                        else:
                            self.refused.layouts(choices, problem)

    def _batch_problem(self, layout: Layout, dp: int) -> Problem | None:
        """Of the rules that depend on the micro-batches of each of `dp` ranks."""
        parallel = ParallelConfig.model_construct(**layout.settings("none"))
        stage = self.stage.model_copy(update={"micro_batch_sequences": layout.micro})
        problem = next(rules.batch_splits(parallel, 0, stage, dp), None)
        if problem is None and self.experiment.optimizer.measure_noise_scale_every_steps is not None:
            problem = next(rules.noise_micro_batches(applied(self.experiment, self.stage, layout), dp), None)
        return problem

    def _local_problem(self, layout: Layout) -> Problem | None:
        """Of the rules that depend neither on the pipeline nor on the number of ranks."""
        if layout not in self._local:
            self._local[layout] = next(self._problems(layout), None)
        return self._local[layout]


CONTEXT_METHODS = get_args(ParallelConfig.model_fields["context_parallel_method"].annotation)


def divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def balanced_layers(model: ModelConfig, sequence_length: int, ranks: int, chunks: int) -> tuple[int, ...]:
    """Layers of each stage such that the rank that computes longest computes as briefly as it can: whole CLA groups of
    equal work, and the output layer on the last rank. Of equals, earlier ranks get fewer: they keep more micro-batches
    waiting."""
    flops, groups = flops_per_token(model, sequence_length), model.num_layers // model.cla_share_factor
    loss = flops.output_head * groups / (flops.total - flops.output_head)
    stages = [1] * (ranks * chunks)
    load = [float(chunks)] * ranks
    load[-1] += loss
    for _ in range(groups - len(stages)):
        rank = min(range(ranks), key=lambda rank: (load[rank], -rank))
        stage = min(range(rank, len(stages), ranks), key=lambda stage: stages[stage])
        stages[stage] += 1
        load[rank] += 1
    return tuple(size * model.cla_share_factor for size in stages)


def yaml_lines(experiment: Experiment, stage: StageConfig, layout: Layout, recompute: str) -> list[str]:
    """The settings to paste: those that are not at their default, or that the experiment has otherwise."""
    found = applied(experiment, stage, layout, recompute).parallel
    lines = ["parallel:"]
    for name, known in ParallelConfig.model_fields.items():
        value = getattr(found, name)
        if value != known.default or value != getattr(experiment.parallel, name):
            text = json.dumps(value) if not isinstance(value, str) else value
            lines.append(f"  {name}: {text}")
    lines = lines if len(lines) > 1 else ["parallel: {}"]
    return [*lines, f"# of stage {stage.name}:", f"micro_batch_sequences: {layout.micro}"]
