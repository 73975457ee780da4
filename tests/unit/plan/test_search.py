"""The search finds what looking at every layout finds, and says why it rejects the others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

import pytest
import yaml

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, ParallelConfig, Recompute
from hunyuan_pretrain.plan import ranking
from hunyuan_pretrain.plan.bounds import Bounds
from hunyuan_pretrain.plan.hardware import load
from hunyuan_pretrain.plan.layouts import Layout, Legal, Pipeline, applied, balanced_layers, divisors
from hunyuan_pretrain.plan.memory import TO_SPARE, host_missing, peaks
from hunyuan_pretrain.plan.passes import Assumptions
from hunyuan_pretrain.plan.search import Found, search
from hunyuan_pretrain.plan.timing import job_of, least_seconds, step_time
from tests.helpers.planned import experiment as experiment_of

GPUS = 4
MODEL = ModelConfig(
    num_layers=4,
    cla_share_factor=1,
    hidden_size=2048,
    num_attention_heads=16,
    num_query_groups=4,
    num_moe_experts=4,
    ffn_hidden_size=5632,
    padded_vocab_size=32768,
    moe_routing_group_tokens=2048,
)


@cache
def small(fp8: str | None = None, shared: bool = False) -> Experiment:
    precision = {"fp8_recipe": fp8, "num_layers_at_start_in_bf16": 1} if fp8 else {}
    parallel = {"overlap_shared_expert": True, "expert_model_parallel_size": 2} if shared else {}
    return experiment_of(MODEL, 4096, 4, 1, precision=precision, parallel=parallel)


def every_layout(
    experiment: Experiment, choices: tuple[str, ...] = get_args(Recompute)
) -> Iterator[tuple[Layout, str, Experiment]]:
    """By brute force: every size and method, checked by the rules of a whole experiment."""
    sizes, groups, stage = divisors(GPUS), MODEL.num_layers // MODEL.cla_share_factor, experiment.stages[0]
    pipelines = []
    for ranks, chunks in itertools.product(sizes, range(1, groups + 1)):
        if ranks * chunks <= groups:
            layers = balanced_layers(MODEL, stage.sequence_length, ranks, chunks)
            pipelines += [Pipeline(ranks, chunks)] + [Pipeline(ranks, chunks, layers)] * (len(set(layers)) > 1)
    methods = get_args(ParallelConfig.model_fields["context_parallel_method"].annotation)
    for tp, cp, ep, expert_tp, micro in itertools.product(sizes, sizes, sizes, sizes, divisors(4)):
        for method, pipeline, recompute in itertools.product(methods, pipelines, choices):
            if cp > 1 or method == methods[0]:
                layout = Layout(tp, cp, method, ep, expert_tp, pipeline, micro)
                made = applied(experiment, stage, layout, recompute)
                if not rules.find_problems(made, GPUS):
                    yield layout, recompute, made


@pytest.mark.parametrize(("fp8", "shared"), [(None, False), ("blockwise", True)])
def test_pruning_loses_nothing(fp8: str | None, shared: bool) -> None:
    """In a memory into which half of the legal layouts fit."""
    experiment, hardware = small(fp8, shared), load("H100-80GB")
    legal = [(layout, made, peaks(made, made.stages[0], GPUS)) for layout, _, made in every_layout(experiment)]
    fullest = [max(peak.total for peak in found) for *_, found in legal]
    hardware = hardware.model_copy(update={"memory_bytes": sorted(fullest)[len(legal) // 2] / (1 - TO_SPARE)})
    seconds: dict[Layout, float] = {}
    for (layout, made, found), size in zip(legal, fullest, strict=True):
        if size <= hardware.memory_bytes * (1 - TO_SPARE) and host_missing(found, hardware) <= 0:
            step = step_time(made, made.stages[0], GPUS, hardware).seconds
            seconds[layout] = min(step, seconds.get(layout, step))
    result = search(experiment, experiment.stages[0], GPUS, hardware, shown=7)
    assert [one.step.seconds for one in result.best] == sorted(seconds.values())[:7]
    for one in result.best:
        assert seconds[one.layout] == one.step.seconds
    rejected = [result.state, result.peak, result.host, result.slower]
    assert sum(count.layouts for count in rejected) + len(result.best) == len(legal), "each is counted once"
    assert result.peak.layouts > 0


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("runtime", {"cuda_graphs": True}),
        ("optimizer", {"measure_noise_scale_every_steps": 10**9, "expert_lr_noise_scale_tokens": "measured"}),
    ],
)
def test_settings_beside_the_layout_exclude_layouts(section: str, settings: dict[str, Any]) -> None:
    """A recorded step has no pipeline; a measured noise scale needs more micro-batches than pipeline ranks, and a stage
    before the one that uses it."""
    changed = getattr(small(), section).model_copy(update=settings)
    experiment = small().model_copy(update={section: changed, "stages": small().stages * 2})
    legal = list(Legal(experiment, experiment.stages[0], GPUS))
    assert sorted(legal, key=str) == sorted((one for one, *_ in every_layout(experiment, ("none",))), key=str)
    assert 0 < len(legal) < len(list(Legal(small(), small().stages[0], GPUS)))


def test_the_bounds_hold() -> None:
    experiment, hardware = small("blockwise", True), load("H100-80GB")
    bounds = Bounds(experiment, experiment.stages[0], GPUS, hardware, Assumptions())
    tightest = 0.0
    for layout, recompute, made in itertools.islice(every_layout(experiment), 0, None, 23):
        step = step_time(made, made.stages[0], GPUS, hardware).seconds
        least = least_seconds(job_of(made, made.stages[0], GPUS, hardware))
        assert bounds.seconds(layout, recompute) <= least <= step, (layout, recompute)
        found = peaks(made, made.stages[0], GPUS)
        assert bounds.state_bytes(layout) <= max(peak.kept + peak.outside for peak in found)
        assert bounds.activation_bytes(layout, recompute) <= found[0].activations
        tightest = max(tightest, bounds.seconds(layout, recompute) / step)
    assert tightest > 0.6, "a bound of zero would hold too"


@cache
def found_on_h100() -> Found:
    return search(small(), small().stages[0], GPUS, load("H100-80GB"), shown=3)


def test_a_better_layout_than_the_given_one_is_found() -> None:
    """Tensor parallelism sends much for a model that fits without it."""
    known = applied(small(), small().stages[0], Layout(tp=2))
    (first, *_), hardware = found_on_h100().best, load("H100-80GB")
    assert first.step.seconds < 0.9 * step_time(known, known.stages[0], GPUS, hardware).seconds
    assert first.layout.tp == 1


def test_the_settings_make_the_experiment_that_was_timed() -> None:
    found = found_on_h100()
    text = "\n".join(ranking.settings(small(), found, GPUS))
    data: dict[str, Any] = yaml.safe_load(text)
    parallel = ParallelConfig.model_validate(small().parallel.model_dump() | data["parallel"])
    stage = small().stages[0].model_copy(update={"micro_batch_sequences": data["micro_batch_sequences"]})
    pasted = small().model_copy(update={"parallel": parallel, "stages": (stage,)})
    assert rules.find_problems(pasted, GPUS) == []
    assert step_time(pasted, stage, GPUS, load("H100-80GB")).seconds == found.best[0].step.seconds


def test_stages_are_searched_for_themselves() -> None:
    """The pasted layout is for one stage; another that refuses it is named. It can have its own layout."""
    tail = small().stages[0].model_copy(update={"name": "tail", "global_batch_sequences": 1})
    both = small().model_copy(update={"stages": (*small().stages, tail)})
    lines = ranking.settings(both, found_on_h100(), GPUS)
    assert lines[-1].startswith("# not for the whole experiment: stages.1.global_batch_sequences=1: not a multiple of")
    found = search(both, tail, GPUS, load("H100-80GB"), shown=1)
    sizes = found.best[0].layout
    assert sizes.tp * sizes.cp * sizes.pipeline.ranks == GPUS, "one sequence leaves no data parallelism"


def test_the_rows_rank_explain_and_count() -> None:
    found, hardware = found_on_h100(), load("H100-80GB")
    shown = {row.name: row for row in ranking.rows(found, hardware)}
    assert shown["1"].value == f"{found.best[0].step.seconds:.4g} s"
    assert float(shown["1 against 2"].value.split()[0]) >= 0
    number, problem = found.refused.combinations["stages.0.sequence_length"]
    assert shown["sequence_length"].value == f"{number:,}"
    assert problem.rule in shown["sequence_length"].note
    assert shown["slower"].value == f"{found.slower.layouts:,}"
    data = json.loads(json.dumps(ranking.as_data(small(), found, GPUS)))
    assert data["layouts"][0]["seconds"] == found.best[0].step.seconds
    assert data["rejected"]["slower"] == found.slower.layouts


def test_when_nothing_fits_the_nearest_is_named() -> None:
    tiny = load("H100-80GB").model_copy(update={"memory_bytes": 4e9})
    with pytest.raises(ConfigError, match=r"--gpus=4: no layout fits into H100-80GB for stage main: the near.*use m"):
        ranking.searches(small(), GPUS, tiny, Assumptions())
    with pytest.raises(ConfigError, match=r"--gpus=7: no layout is legal .*use 6 GPUs"):
        ranking.searches(small(), 7, load("H100-80GB"), Assumptions())


def test_balanced_layers_leave_room_for_the_loss() -> None:
    model = MODEL.model_copy(update={"num_layers": 20, "padded_vocab_size": 262_144})
    assert balanced_layers(model, 4096, 2, 1) == (13, 7), "the loss is worth 6 layers"
    assert sum(balanced_layers(model, 4096, 4, 2)) == 20
