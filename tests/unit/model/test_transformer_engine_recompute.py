"""Recompute by part and offloading under Transformer Engine's spec, on CPU stand-ins for its kernels.

Its linear layers are told to keep their input instead of an FP8 copy (save_original_input), and its RMSNorm before the
attention is no longer fused into a projection. The stand-ins show that the operands stay the same and what is kept, not
the arithmetic of a kernel.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.activations import kept_by_group, kept_by_layer
from tests.helpers.layouts import STEPS, Layout
from tests.helpers.ranks import run_ranks
from tests.helpers.transformer_engine_cases import Case, kept, traces

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("transformer_engine")]

CHOICES = (("none", 0), ("swiglu", 0), ("norms", 0), ("swiglu+norms", 2), ("selective+norms", 0))
RECIPES = (None, "tensorwise", "blockwise")
SIZES = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 128, "moe_ffn_hidden_size": 128, "kv_channels": 16}
SIZES |= {"num_attention_heads": 8, "num_query_groups": 4, "moe_routing_group_tokens": 64}


def experiment(layout: Layout, recipe: str | None, corpus: Path, run_dir: Path) -> Experiment:
    fields = layout.experiment(corpus, run_dir).model_dump(mode="json")
    fields["precision"] |= {"dtype": "bf16", "fp8_recipe": recipe}
    fields["model"] |= SIZES
    return Experiment.model_validate(fields)


def cases(layout: Layout, recipe: str | None, corpus: Path, folder: Path) -> list[Case]:
    return [
        Case(
            experiment(
                replace(layout, recompute=recompute, offload=layers), recipe, corpus, folder / f"{recipe}{number}"
            ),
            engine=True,
        )
        for number, (recompute, layers) in enumerate(CHOICES)
    ]


@pytest.mark.parametrize("layout", [Layout(model="dropless", micro_batch=4), Layout(tp=2, micro_batch=4)], ids=str)
def test_no_choice_changes_a_bit(layout: Layout, corpus: Path, tmp_path: Path) -> None:
    """Losses, gradients, moments and weights of two steps, in bf16 and in FP8; in FP8 the rows of experts are padded.

    A separate norm gives its reader bf16 values, as the fused one does with these recipes.
    """
    from hunyuan_pretrain.diagnostics.parity import compare

    work = [case for recipe in RECIPES for case in cases(layout, recipe, corpus, tmp_path)]
    found: list[Any] = run_ranks(layout.world_size, traces, work, STEPS, timeout_s=900)[0]
    for number, recipe in enumerate(RECIPES):
        without, *others = found[number * len(CHOICES) : (number + 1) * len(CHOICES)]
        for choice, mine in zip(CHOICES[1:], others, strict=True):
            compared = compare(mine, without)
            assert len(compared) > 300
            assert [one for one in compared if one.relative] == [], (recipe, choice)


def test_a_choice_frees_exactly_what_the_plan_says(corpus: Path, tmp_path: Path) -> None:
    """In FP8 as well: neither the bf16 input of a linear layer nor an FP8 copy of it is kept.

    The plan leaves out the one scale of 4 bytes that tensorwise has for each input, and counts scales of whole blocks
    of 128 rows, while an expert here has 32 rows.
    """
    work = [case for recipe in RECIPES for case in cases(Layout(micro_batch=2), recipe, corpus, tmp_path)]
    (found,) = run_ranks(1, kept, work)
    planned = [planned_bytes(case.experiment) for case in work]
    for number, recipe in enumerate(RECIPES):
        first = number * len(CHOICES)
        for index in range(first + 1, first + len(CHOICES)):
            choice = CHOICES[index - first]
            freed = sum(found[first]) - sum(found[index])
            expected = planned[first] - planned[index]
            inputs = SIZES["num_layers"] * 2 * (4 + 2)  # of four routed experts, the shared one and the projections
            scales = {None: 0, "tensorwise": 4 * inputs, "blockwise": 4 * SIZES["hidden_size"] * inputs}[recipe]
            assert 0 < expected <= freed <= expected + scales, (recipe, choice)
            assert (found[index][1] > 0) == (choice[1] > 0)


def planned_bytes(experiment: Experiment) -> int:
    parts, share = experiment.parallel.recomputed_parts, experiment.model.cla_share_factor
    layers = [kept_by_layer(experiment, experiment.stages[0], 1, layer) for layer in range(experiment.model.num_layers)]
    return sum(
        size for start in range(0, len(layers), share) for size in kept_by_group(layers[start : start + share], parts)
    )
