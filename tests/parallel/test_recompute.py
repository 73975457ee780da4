"""Recompute by part and offloading under parallel layouts: the same bits as without, on the same ranks.

Two steps of core's schedules with the optimizer, and gradients accumulated in DistributedDataParallel's buffers: the
norm, moments and weights after them are compared too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.activations import passes_in_flight
from tests.helpers.layouts import STEPS, Layout, Outcome, trace_in_jobs, until_failure
from tests.helpers.ranks import fork_ranks

pytestmark = pytest.mark.slow

LAYOUTS = {
    "tensor, expert": Layout(tp=2, ep=2, model="bf16"),
    "context, all-to-all": Layout(cp=2, attention="all_to_all", model="4 key/value heads"),
    "expert-tensor, dropless": Layout(dp=2, etp=2, model="dropless", optimizer="plain"),
    "pipeline": Layout(pp=2, micro_batch=1),
    "interleaved, overlapping": Layout(pp=2, vpp=2, micro_batch=1, overlap="everything"),
}
CHOICES = (("swiglu+norms", 0), ("none", 2), ("swiglu+norms", 2), ("selective+norms", 2), ("cla_group", 2))


def traces_of(experiments: list[Experiment]) -> list[Outcome]:
    """On every rank: the traces of each experiment. Blocks of any size are offloaded; a run that should offload and
    does not fails."""
    from hunyuan_pretrain.diagnostics.parity import trace_layout
    from hunyuan_pretrain.model import hunyuan_model
    from hunyuan_pretrain.model.offload import Lanes, Offload

    def trace(experiment: Experiment) -> list[Any]:
        copies: list[int] = []
        make = Lanes.host_memory

        def host_memory(lanes: Lanes, num_bytes: int) -> Any:
            copies.append(num_bytes)
            return make(lanes, num_bytes)

        with (
            patch.object(hunyuan_model, "Offload", partial(Offload, smallest_bytes=1)),
            patch.object(Lanes, "host_memory", host_memory),
        ):
            found = trace_layout(experiment, STEPS)
        parallel = experiment.parallel
        # with full recompute, the first group of a later stage keeps only what the schedule holds anyway
        if parallel.recompute != "cla_group" or parallel.pipeline_model_parallel_size == 1:
            assert bool(copies) == (parallel.cpu_offloading_num_layers > 0)
        return found

    return until_failure(experiments, trace)


def passes_of(experiments: list[Experiment]) -> list[list[tuple[int, ...]]]:
    """On this rank, for each experiment: after each forward pass of a step, how many passes of each chunk wait for
    their backward pass."""
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.step import compute_gradients

    found = []
    for experiment in experiments:
        run = setup.prepare(experiment)
        waiting, states = [0] * len(run.chunks), []

        def begun(gradient: Any, chunk: int, waiting: list[int] = waiting) -> None:
            waiting[chunk] -= 1

        def after_forward(
            model: Any, inputs: Any, output: Any, chunk: int, waiting: list[int] = waiting, states: Any = states
        ) -> None:
            waiting[chunk] += 1
            states.append(tuple(waiting))
            output[0].register_hook(partial(begun, chunk=chunk))

        for chunk, model in enumerate(run.chunks):
            model.register_forward_hook(partial(after_forward, chunk=chunk))
        compute_gradients(run, run.schedule.stage(0), 0)
        setup.leave(run)
        found.append(states)
    return found


def test_the_plan_knows_how_many_passes_wait(corpus: Path, tmp_path: Path) -> None:
    layouts = [Layout(pp=2, micro_batch=micro_batch) for micro_batch in (1, 8)]
    layouts += [Layout(pp=2, vpp=vpp, micro_batch=micro_batch) for vpp, micro_batch in ((2, 1), (2, 4), (4, 1))]
    layouts = [replace(layout, model="bf16") for layout in layouts]
    experiments = [layout.experiment(corpus, tmp_path / str(number)) for number, layout in enumerate(layouts)]
    # four chunks of two ranks: 16 layers
    experiments[-1] = experiments[-1].model_copy(
        update={"model": experiments[-1].model.model_copy(update={"num_layers": 16})}
    )
    for pipeline_rank, found in enumerate(fork_ranks(2, passes_of, experiments)):
        for experiment, states in zip(experiments, found, strict=True):
            micro_batches = 8 // experiment.stages[0].micro_batch_sequences
            assert states == passes_in_flight(experiment.parallel, micro_batches, pipeline_rank)


@pytest.fixture(scope="module")
def traces(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Any]:
    folder = tmp_path_factory.mktemp("recompute")
    keys = [(name, *choice) for name in LAYOUTS for choice in (("none", 0), *CHOICES)]
    experiments = [
        replace(LAYOUTS[name], recompute=recompute, offload=offload).experiment(corpus, folder / str(number))
        for number, (name, recompute, offload) in enumerate(keys)
    ]
    return dict(zip(keys, trace_in_jobs(2, traces_of, experiments), strict=True))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_choice_changes_a_bit(traces: dict[tuple[str, str, int], Any], name: str, choice: tuple[str, int]) -> None:
    from hunyuan_pretrain.diagnostics.parity import compare

    without, found = traces[name, "none", 0], traces[(name, *choice)]
    assert not isinstance(without, str), without
    assert not isinstance(found, str), found
    compared = compare(found, without)
    assert len(compared) > 500
    assert [difference for difference in compared if difference.relative] == []
