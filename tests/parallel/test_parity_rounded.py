"""Layouts compared in bf16 and FP8: the same model passes, and bugs exceed rounding."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.layouts import layout_experiment
from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields
from tests.parallel.test_parity import copies_drift_apart, expert_gradients_times_ep, loss_over_one_ranks_tokens

pytestmark = pytest.mark.slow
STEPS = 1
FORMATS = {"bf16": ("bf16", None), "tensorwise": ("fp8", "tensorwise")}
LAYOUTS = [("bf16", "tp=2,etp=2"), ("bf16", "cp=2"), ("tensorwise", "tp=2")]
BUGS = {
    expert_gradients_times_ep: ("dp=2,ep=2", "gradient"),
    loss_over_one_ranks_tokens: ("dp=2", "scalar"),
    copies_drift_apart: ("tp=2", "copies"),
}


def experiment(corpus: Path, **precision: Any) -> Experiment:
    fields = experiment_fields(
        corpus, Path("unused"), STEPS + 1, stages__global_batch_sequences=16, precision={"dtype": "bf16"} | precision
    )
    fields["model"] |= {"hidden_size": 64, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64, "num_layers": 2}
    fields["stages"][0]["tokens"] *= 2
    fields["stages"][1]["tokens"] = STEPS * 16 * 64
    return Experiment.model_validate(fields)


def under(corpus: Path, layout: str, number_format: str, folder: Path) -> tuple[Experiment, int]:
    precision, recipe = FORMATS[number_format]
    return layout_experiment(
        experiment(corpus, **({"fp8_recipe": recipe} if recipe else {})), layout, None, folder, precision
    )


def traces(jobs: list[tuple[Experiment, int | None, Any, Any]]) -> list[Any]:
    from hunyuan_pretrain.diagnostics.parity import trace_layout

    found: list[Any] = []
    for layout, noise, bug, choices in jobs:
        if isinstance(choices, int):  # the choices of an earlier job
            choices = [step.choices for step in found[choices]]
        with bug() if bug else nullcontext():
            found.append(trace_layout(layout, STEPS, noise, choices))
    return found


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory) -> dict[Any, list[Any]]:
    """(format, layout) and bug -> differences."""
    from hunyuan_pretrain.diagnostics.parity_noise import NOISE_SEEDS, compare_rounded

    folder = tmp_path_factory.mktemp("rounded")
    wanted = [(number_format, layout, None) for number_format, layout in LAYOUTS]
    wanted += [("bf16", layout, bug) for bug, (layout, _) in BUGS.items()]
    layouts = [under(corpus, layout, number_format, folder / "two")[0] for number_format, layout, _ in wanted]
    jobs: list[Any] = []
    for number_format in FORMATS:
        alone, first = under(corpus, "dp=1", number_format, folder / "one")[0], len(jobs)
        jobs += [(alone, None, None, None), *((alone, seed, None, first) for seed in NOISE_SEEDS)]
    traced = fork_ranks(1, traces, jobs)[0]
    width = 1 + len(NOISE_SEEDS)
    references = {
        number_format: traced[number * width : (number + 1) * width] for number, number_format in enumerate(FORMATS)
    }
    choices = {number_format: [step.choices for step in runs[0]] for number_format, runs in references.items()}
    jobs = [(layout, None, bug, choices[name]) for layout, (name, _, bug) in zip(layouts, wanted, strict=True)]
    found = {}
    for (name, layout, bug), trace in zip(wanted, fork_ranks(2, traces, jobs)[0], strict=True):
        found[bug or (name, layout)] = compare_rounded(trace, references[name][0], references[name][1:])
    return found


@pytest.mark.parametrize(("number_format", "layout"), LAYOUTS)
def test_layouts_that_train_the_same_model_differ_only_by_rounding(compared, number_format, layout):
    found = compared[number_format, layout]
    assert not [difference for difference in found if not difference.is_within]
    tolerances = sorted(difference.tolerance for difference in found if difference.kind == "gradient")
    assert tolerances[-1] < 0.3 or number_format != "bf16"
    assert tolerances[len(tolerances) // 2] < 0.8


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_exceeds_rounding(compared, bug):
    outside = [difference for difference in compared[bug] if not difference.is_within]
    assert outside, "not caught"
    assert outside[0].kind == BUGS[bug][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Transformer Engine may be usable")
def test_layers_that_this_machine_lacks_are_refused_before_a_rank_starts(corpus):
    from hunyuan_pretrain.diagnostics.parity_run import run_parity

    with pytest.raises(ConfigError, match=r"runtime\.transformer_engine=required"):
        run_parity(experiment(corpus), "dp=1", "dp=1", 1, "bf16", "te", "own")
