"""Parallel layouts of a tiny experiment, and the comparison of each with one rank."""

from __future__ import annotations

import gc
import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

STEPS = 2
"""One per training stage of the experiment."""

CONTEXT_PARALLEL_SIZES = (1, 2, 4, 8)
"""(1,) leaves context parallelism out of all sets."""

SIZES = {
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "vpp": (1, 2),
    "cp": CONTEXT_PARALLEL_SIZES,
    "ep": (1, 2, 4),
    "etp": (1, 2),
    "dp": (1, 2, 4, 8),
}
LARGEST_WORLD = 8

MODELS: dict[str, dict[str, Any]] = {
    "recycling": {},
    "dropless": {"moe_expert_capacity_factor": None, "recycle_routing": False},
    "top 2": {
        "moe_router_topk": 2,
        "recycle_routing": False,
        "share_embeddings_and_output_weights": False,
        "moe_z_loss_coeff": 0.01,
    },
    "4 key/value heads": {"num_query_groups": 4},
    "bf16": {},
}
"""Changes to the model with every feature on: 8 layers, CLA of 2, 2 key/value heads, 4 experts, recycling, tied
embeddings, QK norm."""


@dataclass(frozen=True)
class Layout:
    """How the work is split over the ranks, and what else must not change the result."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    model: str = "recycling"
    """A key of MODELS, or "random N"."""
    optimizer: str = "distributed"
    """Or "plain"; "half offloaded": distributed, with half of its state on the host; "precision-aware": distributed,
    with split main weights, for the model "bf16"."""
    overlap: str = "nothing"
    """Or "gradients", or "everything": parameter gathering too."""
    recompute: str = "none"
    offload: int = 0
    """Layers of a stage whose activations wait in host memory."""
    attention: str = "all_gather"
    micro_batch: int = 2
    """Sequences."""
    later_micro_batch: int = 0
    """Sequences of the second step, if different."""
    pipeline: tuple[int, ...] = ()
    """Layers per pipeline stage; empty: split evenly."""

    def __str__(self) -> str:
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
        return ", ".join(f"{name} {value}" for name, value in changed.items()) or "one rank"

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def reference(self) -> Layout:
        """The same model on one rank, with the whole batch at once."""
        return Layout(model=self.model, optimizer="plain", micro_batch=8)

    def experiment(self, corpus: Path, run_dir: Path, steps: int = STEPS) -> Experiment:
        """The experiment, with types but not rules checked."""
        changes = {"num_layers": 8, "moe_routing_group_tokens": 8} | _model_changes(self.model)
        parallel = {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.tp > 1,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "pipeline_layout": self.pipeline or None,
            "context_parallel_size": self.cp,
            "context_parallel_method": self.attention,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "use_distributed_optimizer": self.optimizer != "plain",
            "overlap_grad_reduce": self.overlap != "nothing",
            "overlap_param_gather": self.overlap == "everything",
            "recompute": self.recompute,
            "cpu_offloading_num_layers": self.offload,
        }
        found = experiment_fields(
            corpus, run_dir, steps, parallel=parallel, **{f"model__{key}": value for key, value in changes.items()}
        )
        # Adam's first step divides a gradient by its own size: without a large epsilon the sign of noise would be an
        # update
        found["optimizer"] |= {"adam_eps": 1e-3, "clip_grad": 0.5, "ema_decay": 0.5}
        found["optimizer"]["cpu_offload_fraction"] = 0.5 if self.optimizer == "half offloaded" else 0.0
        found["optimizer"]["use_precision_aware_optimizer"] = self.optimizer == "precision-aware"
        found["runtime"]["distributed_timeout_s"] = 300  # eight ranks may share two busy cores
        found["precision"]["dtype"] = "bf16" if self.model == "bf16" else "fp32"
        warmup, decay = found["stages"]
        warmup["micro_batch_sequences"], decay["micro_batch_sequences"] = (
            self.micro_batch,
            self.later_micro_batch or self.micro_batch,
        )
        return Experiment.model_validate(found)

    def problems(self) -> list[Problem]:
        """Why the rules refuse the layout; empty if they accept it."""
        return rules.find_problems(self.experiment(Path("corpus"), Path("run")), self.world_size)


# --- which layouts there are ------------------------------------------------------------------------------------------


def every_product(sizes: dict[str, tuple[int, ...]] = SIZES) -> Iterator[Layout]:
    """All combinations of sizes with up to LARGEST_WORLD ranks, legal or not, each with a micro-batch that fits if any
    does."""
    for values in product(*sizes.values()):
        layout = Layout(**dict(zip(sizes, values, strict=True)))
        if layout.world_size <= LARGEST_WORLD:
            # micro-batches of 2 sequences allow 4; more data-parallel ranks or pipeline rounds need smaller ones
            if layout.tp == 4:
                layout = replace(layout, model="4 key/value heads")
            yield next((small for small in (layout, replace(layout, micro_batch=1)) if not small.problems()), layout)


VARIANTS: dict[str, tuple[Any, ...]] = {
    "model": ("recycling", "dropless", "top 2", "4 key/value heads"),
    "optimizer": ("distributed", "plain", "half offloaded"),
    "overlap": ("nothing", "gradients", "everything"),
    "recompute": ("none", "swiglu+norms", "selective", "selective+norms", "cla_group"),
    "micro_batch": (1, 2, 4),
    "attention": ("all_gather", "all_to_all"),
}


def sparsely_crossed(products: Iterable[Layout]) -> list[Layout]:
    """Each of these legal layouts once, with variants chosen so that nearly every legal pair of a size and a variant
    occurs."""
    draw = random.Random(1)
    met: set[tuple[Any, ...]] = set()
    chosen = []
    for layout in products:
        candidates = [replace(layout, **_draw_variant(draw, layout)) for _ in range(32)]
        candidates.sort(key=lambda candidate: len(pairs(candidate) - met), reverse=True)
        best = next(candidate for candidate in [*candidates, layout] if not candidate.problems())
        met |= pairs(best)
        chosen.append(best)
    return chosen


def _draw_variant(draw: random.Random, layout: Layout) -> dict[str, Any]:
    variant = {name: draw.choice(values) for name, values in VARIANTS.items()}
    if layout.cp == 1:
        variant["attention"] = "all_gather"
    if layout.model != Layout.model:
        variant["model"] = layout.model
    return variant


def pairs(layout: Layout) -> set[tuple[Any, ...]]:
    """(size, its value, variant, its value) for every size above 1."""
    return {
        (size, getattr(layout, size), variant, getattr(layout, variant))
        for size in SIZES
        for variant in VARIANTS
        if getattr(layout, size) > 1
    }


def random_layout(seed: int, largest_world: int) -> Layout:
    """A random small model under a random legal layout of 2 to `largest_world` ranks; a pure function of its
    arguments."""
    draw = random.Random(f"{seed}/{largest_world}")
    while True:
        layout = Layout(
            **{name: draw.choice(values) for name, values in SIZES.items()}, model=f"random {draw.randrange(1 << 20)}"
        )
        layout = replace(layout, **_draw_variant(draw, layout))
        if 1 < layout.world_size <= largest_world and not layout.problems():
            return layout


def _model_changes(model: str) -> dict[str, Any]:
    if not model.startswith("random "):
        return MODELS[model]
    draw = random.Random(model)
    share, groups, topk = draw.choice((1, 2, 3)), draw.choice((2, 4)), draw.choice((1, 1, 2))
    capacity = draw.choice((None, 0.75, 1.0, 1.25))
    return {
        "cla_share_factor": share,
        "num_layers": share * draw.choice((2, 4)),
        "hidden_size": 8 * draw.choice((3, 4, 5)),
        "kv_channels": draw.choice((4, 6, 8)),
        "num_query_groups": groups,
        "num_attention_heads": groups * draw.choice((1, 2, 3)),
        "ffn_hidden_size": 8 * draw.choice((3, 5, 7)),
        "moe_ffn_hidden_size": 4 * draw.choice((5, 6)),
        "num_moe_experts": draw.choice((4, 8)),
        "moe_router_topk": topk,
        "moe_expert_capacity_factor": capacity,
        "recycle_routing": capacity is not None and draw.random() < 0.7,
        "moe_routing_group_tokens": draw.choice((8, 16, 32)),
        "moe_aux_loss_coeff": draw.choice((0.0, 0.01)),
        "moe_z_loss_coeff": draw.choice((0.0, 0.01)),
        "qk_layernorm": draw.random() < 0.5,
        "share_embeddings_and_output_weights": draw.random() < 0.5,
    }


# --- how they compare -------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A layout compared with one rank, without the tensors themselves."""

    differences: list[Any]
    """diagnostics.parity.Difference of every quantity of every step."""
    scalars: list[dict[str, float]]
    shares: list[dict[str, Any]]
    """Both, by step."""
    norms: list[float]
    """Norm of all gradients of a step, recomputed from them."""

    def complaint(self) -> str:
        """Empty if everything is within the tolerance; otherwise the first differences, in execution order."""
        found = [difference for difference in self.differences if not difference.is_within]
        lines = [f"{d.kind} {d.name} in step {d.step}: {d.relative:.2e} of its largest entry" for d in found[:8]]
        return "\n".join([f"{len(found)} of {len(self.differences)} differ, first:", *lines]) if found else ""


Outcome = list[Any] | str
"""Traces of a layout's steps, or the traceback of the failure."""


class Comparisons:
    """Comparisons of layouts, computed on request. Up to JOB_SIZE layouts of a world size share one job, because a job
    takes seconds to start."""

    JOB_SIZE = 24

    def __init__(self, corpus: Path, folder: Path, layouts: Iterable[Layout]) -> None:
        """`layouts`: the layouts that will be requested."""
        self._corpus, self._folder = corpus, folder
        self._wanted = list(dict.fromkeys([layout for wanted in layouts for layout in (wanted.reference, wanted)]))
        self._traces: dict[Layout, list[Any]] = {}
        self._done: dict[Layout, Comparison | str] = {}

    def reference(self, layout: Layout) -> list[Any]:
        """Traces of one rank with the model of `layout`, as a list of diagnostics.parity.StepTrace."""
        if layout.reference not in self._done:
            self._run(layout.reference)
        found = self._done[layout.reference]
        assert not isinstance(found, str), found
        return self._traces[layout.reference]

    def __getitem__(self, layout: Layout) -> Comparison:
        self.reference(layout)
        if layout not in self._done:
            self._run(layout)
        found = self._done[layout]
        assert not isinstance(found, str), f"{layout}:\n{found}"
        return found

    def _run(self, layout: Layout) -> None:
        same_size = [
            other for other in self._wanted if other.world_size == layout.world_size and other not in self._done
        ]
        layouts = list(dict.fromkeys([layout, *sorted(same_size, key=lambda other: other != other.reference)]))[
            : self.JOB_SIZE
        ]
        first = len(self._done)
        experiments = [
            other.experiment(self._corpus, self._folder / f"{first}_{number}") for number, other in enumerate(layouts)
        ]
        for other, outcome in zip(layouts, trace_in_jobs(layout.world_size, trace_all, experiments), strict=True):
            self._done[other] = outcome if isinstance(outcome, str) else self._compared(other, outcome)

    def _compared(self, layout: Layout, traces: list[Any]) -> Comparison | str:
        from hunyuan_pretrain.diagnostics.parity import compare

        if layout == layout.reference:
            self._traces[layout] = traces
        elif layout.reference not in self._traces:
            return f"its reference failed: {self._done.get(layout.reference)}"
        return Comparison(
            compare(traces, self._traces[layout.reference]),
            [trace.scalars for trace in traces],
            [trace.shares for trace in traces],
            [
                sqrt(sum(np.square(value, dtype=np.float64).sum() for value in trace.gradients.values()))
                for trace in traces
            ],
        )


def trace_all(experiments: list[Experiment]) -> list[Outcome]:
    """On every rank: the outcome of each experiment up to the first failure, after which the ranks are out of step."""
    from hunyuan_pretrain.diagnostics.parity import trace_layout

    return until_failure(experiments, lambda experiment: trace_layout(experiment, STEPS))


def until_failure(jobs: list[Any], trace: Callable[[Any], list[Any]]) -> list[Outcome]:
    """Outcomes of `trace` for each job, up to and including the first traceback."""
    found: list[Outcome] = []
    for job in jobs:
        # the previous run, kept alive by reference cycles, holds process groups with their own threads
        gc.collect()
        try:
            found.append(trace(job))
        except Exception:
            return [*found, traceback.format_exc()]
    return found


def trace_in_jobs(world_size: int, function: Callable[[list[Any]], list[Outcome]], work: list[Any]) -> list[Outcome]:
    """Run `function` over `work` on `world_size` ranks in one job, with a new job after each failure; returns the
    outcomes of rank 0.

    What all ranks report (losses, norms, shares) must be bitwise identical on all of them.
    """
    found: list[Outcome] = []
    while len(found) < len(work):
        ranks = fork_ranks(world_size, function, work[len(found) :], timeout_s=300 + 60 * len(work))
        for outcomes in zip(*ranks, strict=False):  # a rank that failed has fewer outcomes
            failure = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
            found.append(failure or _agreed(outcomes))
    return found


def _agreed(outcomes: tuple[Any, ...]) -> Outcome:
    reports = [[(trace.scalars, trace.shares) for trace in traces] for traces in outcomes]
    return (
        outcomes[0] if all(report == reports[0] for report in reports) else f"ranks report different numbers: {reports}"
    )
